"""Draw one id a row from a row's law, in which some ids may have other weights: the token a step ends with.

    weight_i = exit_weights[c] where exit_ids[c] = i, else p_i        (p: see `specdec.kernels.sampling.row_law`)

The weights need not sum to one. Should rounding have left none at all, the law itself is drawn from: it is the limit of
what was left (p equal to q up to rounding, an event of probability about 1e-7).

Nothing as long as the vocabulary is written: the kernel reads the row, and what it draws is one number. It goes through
the blocks upwards, and through the changed ids as it comes to them: every block sums weights of its own, where a
difference of sums would lose the small ones.

Letters: R rows drawn from, T rows, V vocabulary, C how many ids may have weights of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.library import jit, register, tl, triton
from specdec.kernels.sampling.draw import DRAW_BLOCK, block_score, draw, draw_reference, entry_scores
from specdec.kernels.sampling.row_law import law_at, row_probs

_NONE = 2**63 - 1 if tl is None else tl.constexpr(2**63 - 1)  # a change after all others


def draw_row_reference(
    logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor, row: Tensor, ids: Tensor,
    weights: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int, flat: bool,
) -> Tensor:  # fmt: skip
    """One id for each of R rows.

    Args:
        logits: [T, V]. knobs: [3]. log_total, threshold, first: [T]; with the logits the rows' laws, see `row_law`.
        row: [R] int64, which of the T. ids, weights: [R, C] int64 and float32, ids with weights of their own, -1 for
            none; distinct among the others.
        seed, position, node: [R] int64, the noise key of each draw. stream: see `specdec.kernels.sampling.noise`.
        flat: one race over the whole row, see `draw`.

    Returns:
        [R] int64. Where a law holds a NaN, some id of the vocabulary.
    """
    weights = _weights(logits, knobs, log_total, threshold, first, row, ids, weights)
    return draw_reference(weights, seed, position, node, stream, flat)


def _weights(
    logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor, row: Tensor, ids: Tensor,
    weights: Tensor,
) -> Tensor:  # fmt: skip
    """[R, V], what is drawn from."""
    law = row_probs(logits[row], knobs, log_total[row], threshold[row], first[row])
    if ids.shape[1] == 0:
        return law
    # An entry that is none writes what its row's first true entry does, or where there is none, what stands there.
    anchor = (ids >= 0).int().argmax(-1, keepdim=True)
    place = ids.gather(1, anchor)
    value = torch.where(place >= 0, weights.gather(1, anchor).to(law.dtype), law[:, :1])
    place = torch.where(ids >= 0, ids, place.clamp(min=0))
    changed = law.scatter(1, place, torch.where(ids >= 0, weights.to(law.dtype), value))
    return torch.where(changed.sum(-1, keepdim=True) > 0, changed, law)


def draw_row_cpu(
    logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor, row: Tensor, ids: Tensor,
    weights: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int, flat: bool,
) -> Tensor:  # fmt: skip
    """One id for each of R rows (see `draw_row_reference`)."""
    weights = _weights(logits, knobs, log_total, threshold, first, row, ids, weights)
    return draw(weights, seed, position, node, stream, flat)


@jit
def _next(changes, least):
    """The first of the changes that is `least` or comes after it."""
    return tl.min(tl.where(changes >= least, changes, _NONE), 0)


@jit
def _changed(law, i, end, change, changes):
    """`law` [BLOCK] of ids `i` with the changes from `change` to id `end` made to it, and the change after them."""
    while change < tl.cast(end, tl.int64) << 32:
        weight = change.to(tl.int32).to(tl.float32, bitcast=True)
        law = tl.where(i == (change >> 32).to(tl.int32), weight, law)
        change = _next(changes, change + 1)
    return law, change


@jit
def _draw_row_kernel(
    logits_ptr, knobs_ptr, log_total_ptr, threshold_ptr, first_ptr, row_ptr, ids_ptr, weights_ptr, seed_ptr,
    position_ptr, node_ptr, out_ptr, V, C, stream, stride_lt, stride_lv, stride_ir, stride_ic, stride_wr, stride_wc,
    FLAT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: a race of its blocks, then one inside the block that won. With FLAT all in one race."""
    i_r = tl.program_id(0).to(tl.int64)
    seed, position, node = tl.load(seed_ptr + i_r), tl.load(position_ptr + i_r), tl.load(node_ptr + i_r)
    i_t = tl.load(row_ptr + i_r)
    p_row = logits_ptr + i_t * stride_lt
    inverse_temperature, log_total = tl.load(knobs_ptr), tl.load(log_total_ptr + i_t)
    threshold, first = tl.load(threshold_ptr + i_t), tl.load(first_ptr + i_t).to(tl.int32)

    # A change is an id and the bits of its weight, in the order of ids.
    i_c = tl.arange(0, BLOCK_C).to(tl.int64)
    ids = tl.load(ids_ptr + i_r * stride_ir + i_c * stride_ic, mask=i_c < C, other=-1)
    weights = tl.load(weights_ptr + i_r * stride_wr + i_c * stride_wc, mask=i_c < C, other=0).to(tl.float32)
    changes = (ids << 32) | (weights.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    has_nan = tl.sum(((ids >= 0) & (weights != weights)).to(tl.int32), 0) > 0
    changes = tl.where((ids >= 0) & (has_nan == 0), changes, _NONE)

    best, winner, n_races = -1.0, 0, 0
    while (best < 0) & (n_races < 2):
        changes = tl.where(n_races == 0, changes, _NONE)  # nothing was left: the law itself
        change = _next(changes, 0)
        i = tl.arange(0, BLOCK)
        logit = tl.load(p_row + i.to(tl.int64) * stride_lv, mask=i < V, other=-float("inf"))
        for start in range(0, V, BLOCK):
            following = i + BLOCK
            fetched = tl.load(p_row + following.to(tl.int64) * stride_lv, mask=following < V, other=-float("inf"))
            law = law_at(logit.to(tl.float32), i, inverse_temperature, log_total, threshold, first)
            law, change = _changed(law, i, start + BLOCK, change, changes)
            if FLAT:
                scores = entry_scores(law, seed, position, node, stream, start, BLOCK)
                score, at = tl.max(scores, 0, return_indices=True)
            else:
                score, at = block_score(tl.sum(law, 0), seed, position, node, stream, start // BLOCK), 0
            winner = tl.where(score > best, start + at, winner)
            best = tl.maximum(score, best)
            i, logit = following, fetched
        n_races += 1

    if not FLAT:
        i = winner + tl.arange(0, BLOCK)
        logit = tl.load(p_row + i.to(tl.int64) * stride_lv, mask=i < V, other=-float("inf")).to(tl.float32)
        law = law_at(logit, i, inverse_temperature, log_total, threshold, first)
        change = _next(changes, tl.cast(winner, tl.int64) << 32)
        law, _ = _changed(law, i, winner + BLOCK, change, changes)
        winner += tl.argmax(entry_scores(law, seed, position, node, stream, winner, BLOCK), 0)
    tl.store(out_ptr + i_r, winner)


def draw_row_triton(
    logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor, row: Tensor, ids: Tensor,
    weights: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int, flat: bool,
) -> Tensor:  # fmt: skip
    """One id for each of R rows (see `draw_row_reference`)."""
    n_draws, size = ids.shape
    vocab = logits.shape[-1]
    out = torch.empty(n_draws, dtype=torch.int64, device=row.device)
    block = min(max(triton.next_power_of_2(vocab), 4), DRAW_BLOCK)
    if n_draws > 0:
        _draw_row_kernel[(n_draws,)](
            logits, *(x.contiguous() for x in (knobs, log_total, threshold, first, row)), ids, weights,
            *(x.contiguous() for x in (seed, position, node)), out, vocab, size, stream, *logits.stride(),
            *ids.stride(), *weights.stride(), FLAT=flat, BLOCK_C=triton.next_power_of_2(max(size, 1)), BLOCK=block,
            num_warps=16 if block > 1024 else 4, maxnreg=128,  # left to itself ptxas may spill at 64
        )  # fmt: skip
    return out


def _fake(
    logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor, row: Tensor, *args: object
) -> Tensor:
    return row.new_empty(row.shape[0])


draw_row = register(
    "draw_row(Tensor logits, Tensor knobs, Tensor log_total, Tensor threshold, Tensor first, Tensor row, Tensor ids, "
    "Tensor weights, Tensor seed, Tensor position, Tensor node, int stream, bool flat) -> Tensor",
    cpu=draw_row_cpu,
    launcher=draw_row_triton,
    fake=_fake,
)
