"""Progress of long work, on stderr: drawn by rich where it is installed, or else nothing."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
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


@contextmanager
def spinner(what: str) -> Generator[_Silent]:
    """While something takes its time."""
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
