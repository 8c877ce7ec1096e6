"""Seeds of the texts of calls: one a text, set by the user or drawn from torch's generator."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, repeat
from typing import Any

import torch
from torch import Tensor


class Seeds:
    """What each call's texts draw with.

    Attributes:
        last: [n] int64, the last call's, or those set for the next; None before the first, for greedy calls, which
            draw nothing, and where a call did not know how many it would take.
    """

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self._are_fixed = False

    def fix(self, value: Any) -> None:
        """Use these for the next call: whole numbers, one a text; None takes back what was set.

        Raises:
            TypeError: they are not whole numbers.
        """
        given = None if value is None else torch.as_tensor(value, device="cpu")
        if given is not None and (given.is_floating_point() or given.is_complex()):
            raise TypeError(f"seeds are whole numbers, got {given.dtype}")
        self.last = None if given is None else given.to(torch.int64).flatten()
        self._are_fixed = given is not None

    def take(self, n_texts: int | None, greedy: bool = False) -> Iterator[int]:
        """A seed for each of so many texts, or of any number: those that were set, or drawn with torch's generator,
        which greedy calls leave alone.

        Raises:
            ValueError: another number was set.
        """
        if self._are_fixed and self.last is not None:
            self._are_fixed = False
            if n_texts is not None and len(self.last) != n_texts:
                raise ValueError(f"{len(self.last)} seeds were set for a batch of {n_texts} samples")
            return iter(self.last.tolist())
        if greedy:
            self.last = None
            return repeat(0)
        if n_texts is not None:
            self.last = torch.randint(2**62, (n_texts,), dtype=torch.int64, device="cpu")
            return iter(self.last.tolist())
        self.last = None
        generator = torch.Generator("cpu").manual_seed(int(torch.randint(2**62, (), dtype=torch.int64, device="cpu")))
        return (int(torch.randint(2**62, (), generator=generator, dtype=torch.int64, device="cpu")) for _ in count())
