"""One op at one shape, and the ways to compute it: what the micro-benchmarks run.

A case states the fewest bytes and operations its op can do with: each input read once, each output written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from specdec.zoo import SIZES

Ways = dict[str, "partial[Any]"]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: the op's name. shape: the shape in words.
        ways: from a device, the calls to compare: "op", "reference", "pytorch", ... with arguments of their own.
        bytes, flops: what the op can't do without.
    """

    op: str
    shape: str
    ways: Callable[[torch.device], Ways]
    bytes: int
    flops: int = 0

    def __str__(self) -> str:
        return f"{self.op} {self.shape}"


def head_shape(size: str) -> tuple[int, int, int]:
    """Query heads, key/value heads and head dim of a model size."""
    shape = SIZES[size]
    return shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
