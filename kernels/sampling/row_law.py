"""The law of a row of logits, in three numbers: temperature, then top-k, top-p and min-p, as transformers applies them.

Each of these keeps the end of one and the same order, ascending by logit and among equal logits by id. So whatever
they keep together is told by where the kept part begins:

    p_i = exp(logits_i * inverse_temperature - log_total)   where logits_i > threshold, or equal and i >= first; else 0

- top-k keeps what is no less than the k-th largest logit, all of its equals included;
- top-p, on the law that top-k leaves, keeps what has less than `top_p` of the mass after it in that order;
- min-p keeps what has at least `min_p` times the best one's probability;
- the last of the order, the best token, always stays.

Several (threshold, first) can tell the same law, and implementations may give different ones. A row without cuts has
threshold -inf and first 0. A row that holds a NaN or +inf has log_total NaN, a row of -inf alone log_total -inf.

The kernels, each with several programs a row, as decoding has few rows:

1. One pass for the row's maximum and sum. Without cuts that is all; what follows returns at once.
2. Passes that search for both cuts at the same time (see `pivots`): two for bfloat16, as a rule. Three are launched,
   or four for float32, and those come back empty-handed that have nothing left to find.
3. One program a row ends the search, where a row needs more passes than were launched, and looks for `first` in the
   one slice of the row where it must be.

A pass starts with what the one before found, joined by every program for itself: a launch each, and no more.

Letters: T rows, V vocabulary.
Source: transformers/generation/logits_process.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.library import jit, register, tl, triton
from specdec.kernels.sampling.pivots import PIVOTS, first_pivots, key, load_sums, narrowed, reaching, value

_ROWS, _COLUMNS = 4, 1024  # a tile of the first pass; slices are made of whole tiles


def law_of(logits: Tensor, ids: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor) -> Tensor:
    """The probabilities of ids with these logits, float32 (float64 stays float64); all arguments but `knobs` broadcast.

    Args:
        logits: any float. ids: int64. knobs: [3] (inverse temperature, top_p, min_p).
        log_total, threshold, first: what `row_law` gives for their rows.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = (logits > threshold) | ((logits == threshold) & (ids >= first))
    return torch.where(kept, (logits * knobs[0] - log_total).exp(), 0.0)


def row_probs(logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor) -> Tensor:
    """The dense law of each row, float32 (float64 stays float64).

    Args:
        logits: [..., V]. knobs: [3]. log_total, threshold, first: [...], what `row_law` gives.
    """
    ids = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.int64)
    return law_of(logits, ids, knobs, log_total[..., None], threshold[..., None], first[..., None])


def row_law_reference(logits: Tensor, knobs: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the kept part of each row begins, and the logarithm of its mass.

    Args:
        logits: [T, V] bfloat16, float16 or float32.
        knobs: [3] float32 (inverse temperature, top_p, min_p); (1, 1, 0) changes nothing.
        top_k: 0 for no limit.

    Returns:
        log_total [T] float32, threshold [T] float32 and first [T] int64.
    """
    inverse_temperature, top_p, min_p = knobs.double()
    ascending, ids = logits.float().sort(dim=-1, stable=True)
    best = ascending[:, -1:].double()
    best = torch.where(best == -torch.inf, 0, best)
    weights = ((ascending - best) * inverse_temperature).exp()

    vocab = logits.shape[-1]
    limit = top_k if 0 < top_k < vocab else vocab
    kept = ascending >= ascending[:, vocab - limit, None]
    mass = weights * kept
    up_to = mass.flip(-1).cumsum(-1).flip(-1)
    is_last = torch.arange(vocab, device=logits.device, dtype=torch.int64) == vocab - 1
    kept &= (up_to.roll(-1, -1) < top_p * up_to[:, :1]) | is_last | (top_p >= 1)
    kept &= weights >= min_p * weights[:, -1:]

    log_total = best[:, 0] * inverse_temperature + (weights * kept).sum(-1).log()
    begin = kept.int().argmax(-1, keepdim=True)
    threshold, first = ascending.gather(1, begin)[:, 0], ids.gather(1, begin)[:, 0]
    whole = begin[:, 0] == 0
    return log_total.float(), torch.where(whole, -torch.inf, threshold), torch.where(whole, 0, first)


@jit
def law_at(logits, i, inverse_temperature, log_total, threshold, first):
    """`law_of` in a kernel: float32 logits of ids `i`, all arguments scalars or blocks that broadcast."""
    kept = (logits > threshold) | ((logits == threshold) & (i >= first))
    return tl.where(kept, tl.exp(logits * inverse_temperature - log_total), 0.0)


@jit
def _sums_kernel(
    logits_ptr, knobs_ptr, parts_ptr, V, share, stride_lt, stride_lv,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (T, splits): a slice's maximum, and the sum of weights relative to it."""
    i_t, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_row = logits_ptr + i_t * stride_lt
    slope = tl.load(knobs_ptr) * 1.4426950408889634
    begin = i_s * share
    # Sums and maxima over a tile's rows stay within a thread.
    i = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    bests = tl.full([COLUMNS], -float("inf"), tl.float32)
    totals = tl.zeros([COLUMNS], tl.float32)
    for start in tl.range(begin, tl.minimum(begin + share, V), ROWS * COLUMNS, num_stages=STAGES):
        p_tile = p_row + tl.cast(start, tl.int64) * stride_lv + i.to(tl.int64) * stride_lv
        x = tl.load(p_tile, mask=i < V - start, other=-float("inf")).to(tl.float32)
        raised = tl.maximum(bests, tl.max(x, 0))
        base = tl.where(raised == -float("inf"), 0.0, raised)  # -inf minus itself is NaN
        fresh = tl.sum(tl.exp2((x - base[None, :]) * slope), 0)
        totals = totals * tl.exp2((bests - base) * slope) + fresh
        bests = raised
    best, total = _joined(bests, totals, slope)
    p_part = parts_ptr + (i_t * tl.num_programs(1) + i_s) * 2
    tl.store(p_part, best)
    tl.store(p_part + 1, total)


@jit
def _joined(bests, totals, slope):
    """The maximum of all, 0 if it is -inf, and the sum of weights relative to it."""
    best = tl.max(bests, 0)
    best = tl.where(best == -float("inf"), 0.0, best)
    return best, tl.sum(totals * tl.exp2((bests - best) * slope), 0)


@jit
def _row(parts_ptr, knobs_ptr, i_t, V, k, n_splits, SPLITS: tl.constexpr):
    """best, total and slope of a row, and whether anything is to be cut."""
    o_s = tl.arange(0, SPLITS)
    p_parts = parts_ptr + (i_t * n_splits + o_s) * 2
    bests = tl.load(p_parts, mask=o_s < n_splits, other=-float("inf"))
    totals = tl.load(p_parts + 1, mask=o_s < n_splits, other=0.0)
    slope = tl.load(knobs_ptr) * 1.4426950408889634
    best, total = _joined(bests, totals, slope)
    is_cut = (k < V) | (tl.load(knobs_ptr + 1) < 1) | (tl.load(knobs_ptr + 2) > 0)
    return best, total, slope, (total > 0) & is_cut  # the total of an empty row is 0, and of one without a law NaN


@jit
def _search_kernel(
    logits_ptr, knobs_ptr, parts_ptr, old_pivots_ptr, old_sums_ptr, pivots_ptr, sums_ptr, V, k, share,
    stride_lt, stride_lv, IS_FIRST: tl.constexpr, SHIFT: tl.constexpr, SPLITS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Grid (T, splits): how much of a slice reaches each of P pivots, chosen after what the last search found."""
    i_t, i_s, n_splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    best, _, slope, is_cut = _row(parts_ptr, knobs_ptr, i_t, V, k, n_splits, SPLITS)
    if is_cut:
        p_row, begin = logits_ptr + i_t * stride_lt, i_s * share
        end = tl.minimum(begin + share, V)
        if IS_FIRST:
            pivots = first_pivots(best, slope, tl.load(knobs_ptr + 2), V, SHIFT, P)
            counts, masses = reaching(p_row, stride_lv, begin, end, best, slope, pivots, P)
        else:
            pivots, all_counts, all_masses = load_sums(old_pivots_ptr, old_sums_ptr, i_t, n_splits, SPLITS, P)
            following, _, _, _, is_done = narrowed(pivots, all_counts, all_masses, k, tl.load(knobs_ptr + 1), SHIFT, P)
            if is_done:  # hand on what is known
                own = (tl.arange(0, SPLITS) == i_s)[:, None]
                counts, masses = tl.sum(tl.where(own, all_counts, 0), 0), tl.sum(tl.where(own, all_masses, 0), 0)
            else:
                pivots = following
                counts, masses = reaching(p_row, stride_lv, begin, end, best, slope, pivots, P)
        j = tl.arange(0, P)
        if i_s == 0:
            tl.store(pivots_ptr + i_t * P + j, pivots)
        p_sums = sums_ptr + (i_t * n_splits + i_s) * 2 * P + j
        tl.store(p_sums, counts)
        tl.store(p_sums + P, masses)


@jit
def _finish_kernel(
    logits_ptr, knobs_ptr, parts_ptr, pivots_ptr, sums_ptr, log_total_ptr, threshold_ptr, first_ptr, V, k, share,
    n_splits, stride_lt, stride_lv, SHIFT: tl.constexpr, SPLITS: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    i_t = tl.program_id(0).to(tl.int64)
    best, total, slope, is_cut = _row(parts_ptr, knobs_ptr, i_t, V, k, n_splits, SPLITS)
    threshold = tl.full([], -float("inf"), tl.float32)
    first = tl.full([], 0, tl.int64)
    if is_cut:
        p_row, top_p, o_s = logits_ptr + i_t * stride_lt, tl.load(knobs_ptr + 1), tl.arange(0, SPLITS)
        pivots, counts, masses = load_sums(pivots_ptr, sums_ptr, i_t, n_splits, SPLITS, P)
        following, low, high, need, is_done = narrowed(pivots, counts, masses, k, top_p, SHIFT, P)
        while is_done == 0:
            pivots = following
            for i_s in range(0, n_splits):
                end = tl.minimum((i_s + 1) * share, V)
                count, mass = reaching(p_row, stride_lv, i_s * share, end, best, slope, pivots, P)
                counts = tl.where((o_s == i_s)[:, None], count[None, :], counts)
                masses = tl.where((o_s == i_s)[:, None], mass[None, :], masses)
            following, low, high, need, is_done = narrowed(pivots, counts, masses, k, top_p, SHIFT, P)
        at_low, at_high = key(pivots, SHIFT) == low, key(pivots, SHIFT) == high
        mass = tl.sum(masses, 0)
        threshold, total = value(low, SHIFT), tl.max(tl.where(at_low, mass, 0.0), 0)
        if top_p < 1:
            weight, above = tl.exp2((threshold - best) * slope), tl.max(tl.where(at_high, mass, 0.0), 0)
            equal = tl.max(tl.where(at_low[None, :], counts, 0.0), 1) - tl.max(tl.where(at_high, counts, 0.0), 1)
            # Of equals the last ids stay, as many as still have less than `need` after them.
            n_equal = tl.sum(equal, 0)
            n_kept = tl.minimum(tl.maximum(tl.ceil((need - above) / weight), 1.0), n_equal)
            n_cut = n_equal - n_kept
            if n_cut > 0:
                total = above + n_kept * weight
                i_s = tl.sum((tl.cumsum(equal, 0) <= n_cut).to(tl.int32), 0)
                left = (n_cut - tl.sum(tl.where(o_s < i_s, equal, 0.0), 0)).to(tl.int32)
                for start in range(i_s * share, tl.minimum((i_s + 1) * share, V), BLOCK):
                    i = start + tl.arange(0, BLOCK)
                    x = tl.load(p_row + i.to(tl.int64) * stride_lv, mask=i < V, other=float("nan")).to(tl.float32)
                    is_equal = (x == threshold).to(tl.int32)
                    n_here = tl.sum(is_equal, 0)
                    if (left >= 0) & (left < n_here):
                        first = (start + tl.sum((tl.cumsum(is_equal, 0) <= left).to(tl.int32), 0)).to(tl.int64)
                    left -= n_here
        is_least = tl.arange(0, P) == 0  # min-p's own pivot
        least = tl.max(tl.where(is_least, pivots, -float("inf")), 0)
        if least > threshold:
            threshold, total, first = least, tl.sum(tl.where(is_least, mass, 0.0), 0), tl.full([], 0, tl.int64)
    tl.store(log_total_ptr + i_t, best * tl.load(knobs_ptr) + tl.log(total))
    tl.store(threshold_ptr + i_t, threshold)
    tl.store(first_ptr + i_t, first)


def row_law_triton(logits: Tensor, knobs: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """log_total, threshold and first of each row (see `row_law_reference`)."""
    (n_rows, vocab), knobs = logits.shape, knobs.contiguous()
    log_total, threshold, first = _row_law_fake(logits, knobs, top_k)
    if n_rows == 0:
        return log_total, threshold, first
    k = top_k if 0 < top_k < vocab else vocab
    tiles = triton.cdiv(vocab, _ROWS * _COLUMNS)
    # Eight programs of four warps for each of about 132 multiprocessors; more slices would take too long to join.
    share = triton.cdiv(tiles, min(max(8 * 132 // n_rows, 1), 32)) * _ROWS * _COLUMNS
    n_splits = triton.cdiv(vocab, share)
    n_searches = 4 if logits.dtype == torch.float32 else 3
    size = {"P": PIVOTS, "SPLITS": triton.next_power_of_2(n_splits), "num_warps": 4, "maxnreg": 255}
    size["SHIFT"] = {torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0)  # bits that a float32 has more
    device = logits.device
    parts = torch.empty((n_rows, n_splits, 2), dtype=torch.float32, device=device)
    pivots = torch.empty((n_searches, n_rows, PIVOTS), dtype=torch.float32, device=device)
    sums = torch.empty((n_searches, n_rows, n_splits, 2, PIVOTS), dtype=torch.float32, device=device)
    _sums_kernel[(n_rows, n_splits)](
        logits, knobs, parts, vocab, share, *logits.stride(),
        ROWS=_ROWS, COLUMNS=_COLUMNS, STAGES=3, num_warps=4,
    )  # fmt: skip
    for i in range(n_searches):
        _search_kernel[(n_rows, n_splits)](
            logits, knobs, parts, pivots[i - 1], sums[i - 1], pivots[i], sums[i], vocab, k, share, *logits.stride(),
            IS_FIRST=i == 0, **size,
        )  # fmt: skip
    _finish_kernel[(n_rows,)](
        logits, knobs, parts, pivots[-1], sums[-1], log_total, threshold, first, vocab, k, share, n_splits,
        *logits.stride(), BLOCK=_COLUMNS, **size,
    )  # fmt: skip
    return log_total, threshold, first


def _row_law_fake(logits: Tensor, knobs: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    shape, device = (logits.shape[0],), logits.device
    log_total, threshold = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    return log_total, threshold, torch.empty(shape, dtype=torch.int64, device=device)


row_law = register(
    "row_law(Tensor logits, Tensor knobs, int top_k) -> (Tensor, Tensor, Tensor)",
    cpu=row_law_reference,
    launcher=row_law_triton,
    fake=_row_law_fake,
)
