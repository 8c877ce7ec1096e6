"""What a process cannot know of another: answers that depend on a clock, on free memory or on the host's randomness.

All of them pass through `decide`, so that several ranks can be made to agree, by making this one function agree.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


def decide(name: str, value: T) -> T:
    """The answer to follow, where this process would answer `value` to the question `name`."""
    return value


def is_past(deadline: float | None) -> bool:
    """Whether it is later than a `time.time()`."""
    return deadline is not None and decide("is past", time.time() > deadline)


@contextmanager
def agreed_memory() -> Generator[None]:
    """What runs in here has the memory that it takes, or else is out of memory for all.

    Raises:
        torch.OutOfMemoryError: it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        decide("lacks memory", True)
        raise
    if decide("lacks memory", False):
        raise torch.OutOfMemoryError("another process is out of memory")
