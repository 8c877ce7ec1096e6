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

The kernel reads the row once for its maximum and sum. Cuts are found by bisection between values that occur in the
row, with the row in the L2 cache: half-way between them at first, half-way between their bit patterns in the end,
where a bound on the steps is known.

Letters: T rows, V vocabulary.
Source: transformers/generation/logits_process.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.library import jit, register, tl, triton


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
def _load(p_row, stride_lv, V, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of logits, float32, -inf past the row's end. Sums and maxima over its rows stay within a thread."""
    i = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    p_tile = p_row + tl.cast(start, tl.int64) * stride_lv
    return tl.load(p_tile + i.to(tl.int64) * stride_lv, mask=i < V - start, other=-float("inf")).to(tl.float32)


@jit
def _key(x):
    """An integer for a float32 scalar, in the same order; `_float` undoes it."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@jit
def _float(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _bisect(p_row, stride_lv, V, best, slope, need, low, high, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The largest value of the row from `low` to `high` at or above which the weights exp2((x - best) * slope) sum to
    `need` at least; `low` if there is none. With slope 0 the weights count."""
    step = 0
    # Both ends are values of the row (or low is -inf), and every step moves one: by 32 steps of the second kind at
    # most. The bound is for rows with zeros of both signs, which are equal and yet different patterns.
    while (low < high) & (step < 48):
        middle = 0.5 * low + 0.5 * high
        if step >= 12:
            middle = _float(_key(low) + (_key(high) - _key(low)) // 2)
        middle = _float(tl.maximum(_key(middle), _key(low) + 1))
        inside = tl.zeros([COLUMNS], tl.float32)
        above = tl.full([COLUMNS], float("inf"), tl.float32)
        below = tl.full([COLUMNS], -float("inf"), tl.float32)
        for start in range(0, V, ROWS * COLUMNS):
            x = _load(p_row, stride_lv, V, start, ROWS, COLUMNS)
            is_in = x >= middle
            inside += tl.sum(tl.where(is_in, tl.exp2((x - best) * slope), 0.0), 0)
            above = tl.minimum(above, tl.min(tl.where(is_in, x, float("inf")), 0))
            below = tl.maximum(below, tl.max(tl.where(is_in, -float("inf"), x), 0))
        found = tl.sum(inside, 0)
        low = tl.where(found >= need, tl.min(above, 0), low)
        high = tl.where(found > need, high, tl.where(found == need, low, tl.max(below, 0)))
        step += 1
    return low


@jit
def _around(p_row, stride_lv, V, best, slope, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of weights exp2((x - best) * slope) above `value`, and the number of its equals, float32."""
    above = tl.zeros([COLUMNS], tl.float32)
    equal = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, V, ROWS * COLUMNS):
        x = _load(p_row, stride_lv, V, start, ROWS, COLUMNS)
        above += tl.sum(tl.where(x > value, tl.exp2((x - best) * slope), 0.0), 0)
        equal += tl.sum((x == value).to(tl.float32), 0)
    return tl.sum(above, 0), tl.sum(equal, 0)


@jit
def _row_law_kernel(
    logits_ptr, knobs_ptr, log_total_ptr, threshold_ptr, first_ptr, V, top_k, stride_lt, stride_lv,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    i_t = tl.program_id(0).to(tl.int64)
    p_row = logits_ptr + i_t * stride_lt
    inverse_temperature = tl.load(knobs_ptr)
    slope = inverse_temperature * 1.4426950408889634
    top_k = tl.cast(top_k, tl.int32)  # Triton makes a 1 a constant

    bests = tl.full([COLUMNS], -float("inf"), tl.float32)
    totals = tl.zeros([COLUMNS], tl.float32)
    for start in tl.range(0, V, ROWS * COLUMNS, num_stages=STAGES):
        x = _load(p_row, stride_lv, V, start, ROWS, COLUMNS)
        raised = tl.maximum(bests, tl.max(x, 0))
        base = tl.where(raised == -float("inf"), 0.0, raised)  # -inf minus itself is NaN
        fresh = tl.sum(tl.exp2((x - base[None, :]) * slope), 0)
        totals = totals * tl.exp2((bests - base) * slope) + fresh
        bests = raised
    best = tl.max(bests, 0)
    best = tl.where(best == -float("inf"), 0.0, best)
    total = tl.sum(totals * tl.exp2((bests - best) * slope), 0)

    low = tl.full([], -float("inf"), tl.float32)
    first = tl.full([], 0, tl.int64)
    if total > 0:  # neither empty nor NaN
        top_p, min_p = tl.load(knobs_ptr + 1), tl.load(knobs_ptr + 2)
        if (top_k > 0) & (top_k < V):
            low = _bisect(p_row, stride_lv, V, best, 0.0, top_k.to(tl.float32), low, best, ROWS, COLUMNS)
            above, equal = _around(p_row, stride_lv, V, best, slope, low, ROWS, COLUMNS)
            total = above + equal * tl.exp2((low - best) * slope)
        if top_p < 1:
            need = top_p * total
            low = _bisect(p_row, stride_lv, V, best, slope, need, low, best, ROWS, COLUMNS)
            above, equal = _around(p_row, stride_lv, V, best, slope, low, ROWS, COLUMNS)
            weight = tl.exp2((low - best) * slope)
            # Of equals the last ids stay, as many as still have less than `need` after them.
            n_kept = tl.minimum(tl.maximum(tl.ceil((need - above) / weight), 1.0), equal)
            total = above + n_kept * weight
            if n_kept < equal:
                n_cut = (equal - n_kept).to(tl.int32)
                for start in range(0, V, ROWS * COLUMNS):
                    x = _load(p_row, stride_lv, V, start, 1, ROWS * COLUMNS)
                    is_equal = (tl.reshape(x, [ROWS * COLUMNS]) == low).to(tl.int32)
                    n_equal = tl.sum(is_equal, 0)
                    if (n_cut >= 0) & (n_cut < n_equal):
                        order = tl.cumsum(is_equal, 0)
                        first = (start + tl.sum((order <= n_cut).to(tl.int32), 0)).to(tl.int64)
                    n_cut -= n_equal
        if tl.exp2((low - best) * slope) < min_p:
            sums = tl.zeros([COLUMNS], tl.float32)
            least = tl.full([COLUMNS], float("inf"), tl.float32)
            for start in range(0, V, ROWS * COLUMNS):
                x = _load(p_row, stride_lv, V, start, ROWS, COLUMNS)
                weights = tl.exp2((x - best) * slope)
                sums += tl.sum(tl.where(weights >= min_p, weights, 0.0), 0)
                least = tl.minimum(least, tl.min(tl.where(weights >= min_p, x, float("inf")), 0))
            total, low, first = tl.sum(sums, 0), tl.min(least, 0), tl.full([], 0, tl.int64)
    tl.store(log_total_ptr + i_t, best * inverse_temperature + tl.log(total))
    tl.store(threshold_ptr + i_t, low)
    tl.store(first_ptr + i_t, first)


def row_law_triton(logits: Tensor, knobs: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """log_total, threshold and first of each row (see `row_law_reference`)."""
    n_rows, vocab = logits.shape
    log_total, threshold, first = _row_law_fake(logits, knobs, top_k)
    columns = min(triton.next_power_of_2(vocab), 2048)
    rows = min(triton.next_power_of_2(triton.cdiv(vocab, columns)), 4)
    if n_rows > 0:
        _row_law_kernel[(n_rows,)](
            logits, knobs.contiguous(), log_total, threshold, first, vocab, top_k, *logits.stride(),
            ROWS=rows, COLUMNS=columns, STAGES=3, num_warps=min(max(columns // 256, 1), 8),
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
