"""Time that is left, and what compiles in it."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import triton
from torch._dynamo.callback import callback_handler


class OutOfTime(BaseException):
    """The time is up. No `Exception`: who recovers from failures must not recover from this."""


class Clock:
    """A number of seconds from now on."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def part(self, seconds: float) -> Clock:
        """So many seconds of what is left, or all of it."""
        return Clock(min(seconds, self.left))

    @contextmanager
    def limit(self) -> Generator[None]:
        """What runs here when the time is up is stopped, in the middle of whatever it does; in the main thread alone.

        Raises:
            OutOfTime: it was.
        """

        def stop(*_: object) -> None:
            raise OutOfTime

        if self.left <= 0:
            raise OutOfTime
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.left)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Compilations:
    """Counts what this process compiles, or records as a CUDA graph, while this is entered: functions by Dynamo,
    kernels by Triton, which counts those that it finds on disk, too, and Inductor's recordings."""

    def __init__(self) -> None:
        self.n = 0

    def _count(self, *_: object, **__: Any) -> None:
        self.n += 1

    def __enter__(self) -> Compilations:
        callback_handler.register_start_callback(self._count)
        self._before, triton.knobs.compilation.listener = triton.knobs.compilation.listener, self._count
        return self

    def __exit__(self, *_: object) -> None:
        callback_handler.remove_start_callback(self._count)
        triton.knobs.compilation.listener = self._before
