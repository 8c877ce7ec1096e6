"""The products of a decoding step: those that are joined into one launch, and those that are left to the library."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Ways, head_shape
from specdec.kernels.linear.joined_linear import (
    gated_linear,
    gated_linear_reference,
    joined_linear,
    joined_linear_reference,
)
from specdec.zoo import SIZES


def joined(size: str, rows: int) -> Case:
    """The projections to queries, keys and values."""
    heads, groups, dim = head_shape(size)
    n_in, outs = SIZES[size]["hidden_size"], [heads * dim, groups * dim, groups * dim]

    def ways(device: torch.device) -> Ways:
        args = _half_layers(rows, n_in, outs, device)
        return {
            "op": partial(joined_linear, *args, []),
            "reference": partial(joined_linear_reference, *args, []),
            "pytorch": partial(joined_linear_reference, *args, []),
        }

    moved = 2 * (n_in * sum(outs) + rows * (n_in + sum(outs)))
    return Case("joined_linear", f"{size} qkv T {rows}", ways, moved, 2 * rows * n_in * sum(outs))


def gated(size: str, rows: int) -> Case:
    n_in, inner = SIZES[size]["hidden_size"], SIZES[size]["intermediate_size"]

    def ways(device: torch.device) -> Ways:
        x, weights = _half_layers(rows, n_in, [inner, inner], device)
        return {
            "op": partial(gated_linear, x, *weights),
            "reference": partial(gated_linear_reference, x, *weights),
            "pytorch": partial(gated_linear_reference, x, *weights),
        }

    moved = 2 * (n_in * 2 * inner + rows * (n_in + inner))
    return Case("gated_linear", f"{size} T {rows}", ways, moved, 4 * rows * n_in * inner)


def library(size: str, layer: str, rows: int) -> Case:
    """A product that a step leaves to the library: of a gated unit's output, of attention's, or the head's."""
    heads, _, dim = head_shape(size)
    hidden, inner = SIZES[size]["hidden_size"], SIZES[size]["intermediate_size"]
    shapes = {"down": (inner, hidden), "out": (heads * dim, hidden), "head": (hidden, SIZES[size].get("vocab_size", 0))}
    n_in, n_out = shapes[layer]

    def ways(device: torch.device) -> Ways:
        x, (weight,) = _half_layers(rows, n_in, [n_out], device)
        return {"pytorch": partial(F.linear, x, weight)}

    moved = 2 * (n_in * n_out + rows * (n_in + n_out))
    return Case("linear", f"{size} {layer} T {rows}", ways, moved, 2 * rows * n_in * n_out)


def _half_layers(rows: int, n_in: int, outs: list[int], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    x, *weights = (torch.randn(n, n_in, dtype=torch.bfloat16, device=device) for n in (rows, *outs))
    return x, weights
