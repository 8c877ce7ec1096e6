"""Draw one id a row from a row's law, in which some ids may have other weights: the token a step ends with.

    weight_i = exit_weights[c] where exit_ids[c] = i, else p_i        (p: see `specdec.kernels.row_law`)

The weights need not sum to one. Should rounding have left none at all, the law itself is drawn from: it is the limit of
what was left (p equal to q up to rounding, an event of probability about 1e-7).

Nothing as long as the vocabulary is written: the kernel reads the row, and what it draws is one number.

Letters: R rows drawn from, T rows, V vocabulary, C how many ids may have weights of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.draw import draw, draw_reference
from specdec.kernels.library import register
from specdec.kernels.row_law import row_probs


def draw_row_reference(
    logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor, row: Tensor, ids: Tensor,
    weights: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int, flat: bool,
) -> Tensor:  # fmt: skip
    """One id for each of R rows.

    Args:
        logits: [T, V]. knobs: [3]. log_total, threshold, first: [T]; with the logits the rows' laws, see `row_law`.
        row: [R] int64, which of the T. ids, weights: [R, C] int64 and float32, ids with weights of their own, -1 for
            none; distinct among the others.
        seed, position, node: [R] int64, the noise key of each draw. stream: see `specdec.kernels.noise`.
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


def _fake(
    logits: Tensor, knobs: Tensor, log_total: Tensor, threshold: Tensor, first: Tensor, row: Tensor, *args: object
) -> Tensor:
    return row.new_empty(len(row))


draw_row = register(
    "draw_row(Tensor logits, Tensor knobs, Tensor log_total, Tensor threshold, Tensor first, Tensor row, Tensor ids, "
    "Tensor weights, Tensor seed, Tensor position, Tensor node, int stream, bool flat) -> Tensor",
    cpu=draw_row_cpu,
    launcher=None,
    fake=_fake,
)
