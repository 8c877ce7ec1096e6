"""In Triton's interpreter no kernel may touch memory that it was not given: a sanitizer, where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from specdec.kernels.library import INTERPRETED, triton


class OutOfBounds(Exception):
    """A kernel reads or writes where no tensor is. The message names the address and the nearest tensor."""


class Memory:
    """The tensors whose addresses somebody asked for: kernels get no others, behind tables neither."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}
        self._sorted: np.ndarray | None = None

    def add(self, tensor: torch.Tensor, address: int) -> None:
        """From the first element that the tensor shows to the last: what else its storage holds is not its own."""
        if tensor.numel():
            elements = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end = address + elements * tensor.element_size()
            if end > self._ends.get(address, 0):
                self._ends[address], self._sorted = end, None

    def check(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        """Whether elements of `size` bytes are all within tensors, where the mask says that they count.

        Raises:
            OutOfBounds: one is not.
        """
        first = addresses[np.broadcast_to(mask, addresses.shape)].astype(np.int64)
        if self._sorted is None:
            starts = np.array(sorted(self._ends), dtype=np.int64)
            # A tensor that begins within another may end before it.
            self._sorted = np.stack([starts, np.maximum.accumulate([self._ends[start] for start in starts.tolist()])])
        starts, ends = self._sorted
        place = np.searchsorted(starts, first, side="right") - 1
        wrong = (place < 0) | (first + size > ends[place])
        if wrong.any():
            address, i = int(first[wrong][0]), max(int(place[wrong][0]), 0)
            raise OutOfBounds(f"{size} bytes at {address:#x}; near it a tensor from {starts[i]:#x} to {ends[i]:#x}")


@pytest.fixture(autouse=INTERPRETED)
def in_bounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a kernel reads out of bounds would be masked, or chance: on a GPU it may be an illegal access."""
    memory, data_ptr = Memory(), torch.Tensor.data_ptr
    builder = triton.runtime.interpreter.InterpreterBuilder

    def remembered(tensor: torch.Tensor) -> int:
        address = data_ptr(tensor)
        memory.add(tensor, address)
        return address

    def checked(access: Callable[..., Any], mask_place: int) -> Callable[..., Any]:
        def call(self: Any, pointers: Any, *args: Any, **kwargs: Any) -> Any:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            memory.check(pointers.data, args[mask_place].data, max(size, 1))
            return access(self, pointers, *args, **kwargs)

        return call

    monkeypatch.setattr(torch.Tensor, "data_ptr", remembered)
    monkeypatch.setattr(builder, "create_masked_load", checked(builder.create_masked_load, 0))
    monkeypatch.setattr(builder, "create_masked_store", checked(builder.create_masked_store, 1))
    yield
