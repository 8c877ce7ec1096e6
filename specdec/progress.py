"""Progress of long work, on stderr: drawn by rich where it is installed, or else nothing."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class _Silent:
    """A bar that nobody sees."""

    def advance(self, n: int = 1) -> None:
        pass

    def say(self, text: str) -> None:
        pass


class _Drawn(_Silent):
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def advance(self, n: int = 1) -> None:
        """So much more is done."""
        self._bar.update(self._task, advance=n, refresh=bool(n))

    def say(self, text: str) -> None:
        """What is being done."""
        self._bar.update(self._task, description=text)


_shown: ContextVar[bool] = ContextVar("specdec_notes_shown", default=False)
log = logging.getLogger("specdec")


def show_notes(shown: bool) -> None:
    """Whether `compiling` draws on a terminal, from now on, in this thread: not where a text is being written to it."""
    _shown.set(shown)


@contextmanager
def compiling(what: str) -> Generator[None]:
    """While something is compiled: a line on a terminal, where notes are shown; and in the log, at level INFO."""
    note = f"compiles {what}: seconds to a minute, once for calls like this; model.specdec.warmup() does it beforehand"
    log.info(note)
    start = time.perf_counter()
    with spinner(note, shown=_shown.get() and sys.stderr.isatty()):
        yield
    log.info("compiled %s in %.1f s", what, time.perf_counter() - start)


@contextmanager
def spinner(what: str, shown: bool) -> Generator[_Silent]:
    """While something takes its time."""
    if not shown:
        yield _Silent()
        return
    try:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError:
        yield _Silent()
        return
    columns = (SpinnerColumn(), TextColumn("specdec {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Drawn(bar, bar.add_task(what, total=None))


@contextmanager
def counter(total: int | None, shown: bool) -> Generator[_Silent]:
    """Of so many things to do, or of nobody knows how many; drawn on a terminal, if it is to be `shown`.

    It is drawn only when it advances: a bar that refreshes itself takes time from decoding.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield _Silent()
        return
    console = Console(stderr=True)
    columns = (TextColumn("specdec"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), auto_refresh=False) as bar:
        yield _Drawn(bar, bar.add_task("", total=total))
