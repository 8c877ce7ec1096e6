"""What is under way, on stderr: the one place of the library that asks for rich, and is silent without it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def spinner(text: str) -> Generator[Callable[[str], None]]:
    """Turns, counts seconds, and is gone in the end; what it yields says how far things are, after `text`."""
    try:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError:
        yield _silent
        return
    columns = SpinnerColumn(), TextColumn(f"{text} {{task.description}}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda doing: progress.update(task, description=doing)


@contextmanager
def bar(text: str, total: int | None, is_wanted: bool = True) -> Generator[Callable[[int], None]]:
    """Fills up to `total`, where stderr is a terminal; what it yields says how much more is done.

    Drawn when something has been done: a bar that refreshes itself takes time from decoding.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield _silent
        return
    console = Console(stderr=True)
    columns = TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    hidden = not (is_wanted and console.is_terminal)
    with Progress(*columns, console=console, disable=hidden, auto_refresh=False) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.update(task, advance=n, refresh=n > 0)


def _silent(_: Any) -> None:
    """Says nothing."""
