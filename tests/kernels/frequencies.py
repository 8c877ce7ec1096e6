"""Whether what was drawn many times follows a law. The noise is a function of its key: these tests cannot flake."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from specdec.kernels.library import INTERPRETED

N_DRAWS = 200_000
P_VALUE = 1e-3

in_bulk = pytest.mark.skipif(INTERPRETED, reason="as many programs as draws; their decisions are the CPU's")


def p_value(counts: Tensor, law: Tensor) -> float:
    """Of the counts under the law; 0 when something impossible was counted."""
    possible = law > 0
    if counts[~possible].any():
        return 0.0
    expected = law[possible].double()
    return float(chisquare(counts[possible], expected / expected.sum() * counts.sum()).pvalue)


def distinct_keys(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct noise keys: what varies between them changes from one element to the next."""
    row = torch.arange(n, device=device)
    return row // 7, row % 7, torch.ones_like(row)
