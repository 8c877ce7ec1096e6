"""Rows of logits or probabilities, and the settings of their laws, for the tests of several kernels."""

from __future__ import annotations

import torch
from torch import Tensor

Knobs = tuple[float, float, float, int]
"""Inverse temperature, top_p, min_p and top_k."""

OFF: Knobs = (1.0, 1.0, 0.0, 0)


def random_laws(n_rows: int, size: int, zeros: float = 0.3, seed: int = 0) -> Tensor:
    """Random laws, not normalised, far from flat, with some probabilities zero and one certainly positive a row."""
    generator = torch.Generator().manual_seed(seed + size)
    probs = torch.randn(n_rows, size, generator=generator).mul(3).exp()
    probs *= torch.rand(n_rows, size, generator=generator) >= zeros
    probs[:, torch.randint(size, (1,), generator=generator)] += 0.01
    return probs


def far_apart(rows: Tensor) -> Tensor:
    """The same rows, 2^30 elements from each other: the third needs an offset of more than 31 bits."""
    n_rows, size = rows.shape
    memory = torch.empty((n_rows - 1) * 2**30 + size, dtype=rows.dtype, device=rows.device)
    return memory.as_strided((n_rows, size), (2**30, 1)).copy_(rows)
