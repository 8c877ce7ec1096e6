"""Seeds of the texts of calls: one a text, set by the user or drawn from torch's generator."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import count, repeat
from typing import Any

import torch
from torch import Tensor

from specdec.engine.decide import decide


class Seeds:
    """What each call's texts draw with.

    Attributes:
        last: [n] int64, the last call's, or those set for the next; None before the first, for greedy calls, which
            draw nothing, for calls that transformers' own loop ran, and where a call did not know how many it would
            take.
    """

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self._waiting: Tensor | None = None  # set for the next call

    def fix(self, value: Any) -> None:
        """Use these for the next call: whole numbers, one a text; None takes back what was set.

        Raises:
            TypeError: they are not whole numbers that int64 holds.
        """
        self.last = self._waiting = None if value is None else _whole(value)

    @contextmanager
    def one_call(self) -> Generator[None]:
        """The call that runs in here is the next, whatever becomes of it: what was set before serves none after it."""
        last, waiting = self.last, self._waiting
        try:
            yield
        finally:
            if self.last is last and self._waiting is waiting:  # nobody has taken any, nor set others meanwhile
                self.fix(None)

    def take(self, n_texts: int | None, greedy: bool = False) -> Iterator[int]:
        """A seed for each of so many texts, or of any number: those that were set, or drawn with torch's generator,
        which greedy calls leave alone.

        Raises:
            ValueError: another number was set.
        """
        given, self._waiting = self._waiting, None
        self.last = given
        if given is not None:
            if n_texts is not None and len(given) != n_texts:
                raise ValueError(f"{len(given)} seeds were set for a batch of {n_texts} samples")
            return iter(given.tolist())
        if greedy:
            return repeat(0)
        if n_texts is not None:
            self.last = decide("seeds", torch.randint(2**62, (n_texts,), dtype=torch.int64, device="cpu"))
            return iter(self.last.tolist())
        generator = torch.Generator(device="cpu").manual_seed(decide("seed of seeds", _draw()))
        return (_draw(generator) for _ in count())


def _draw(generator: torch.Generator | None = None) -> int:
    return int(torch.randint(2**62, (), generator=generator, dtype=torch.int64, device="cpu"))


def _whole(value: Any) -> Tensor:
    """[n] int64; see `Seeds.fix`."""
    wrong = TypeError(f"seeds must be whole numbers from -2**63 to 2**63 - 1, got {value!r}")
    try:
        given = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise wrong from None
    if given.dtype == torch.bool or given.is_floating_point() or given.is_complex():
        raise wrong
    seeds = given.to(torch.int64, copy=True).flatten()
    if given.dtype == torch.uint64 and bool((seeds < 0).any()):  # wrapped around
        raise wrong
    return seeds
