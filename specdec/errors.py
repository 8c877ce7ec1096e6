"""What specdec raises and warns of."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from itertools import count


class SpecdecWarning(UserWarning):
    """Something runs slower than asked for, with the same output law: a call runs transformers' own loop, or a step
    could not be compiled. `warnings.simplefilter("error", specdec.SpecdecWarning)` makes it an error."""


class Unsupported(Exception):
    """This call runs transformers' own loop.

    Attributes:
        reason: why, in words that are the same for every such call: what is warned of once, and counted by.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        """`detail` says what may differ from call to call: sizes, lengths, another library's message."""
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


_OURS = ("specdec", "torch", "transformers", "peft", "contextlib")


def warn(message: str) -> None:
    """Warn at the line of the user's own code that led here."""
    for level in count(2):
        try:
            module = sys._getframe(level - 1).f_globals.get("__name__", "")
        except ValueError:  # nobody but us
            level = 2
            break
        if module.partition(".")[0] not in _OURS:
            break
    warnings.warn(message, SpecdecWarning, stacklevel=level)


@contextmanager
def needs_cli(what: str) -> Generator[None]:
    """An import that only the command line and plots need: where it is missing, the error says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or what).partition(".")[0]
        raise ImportError(f"{what} needs {missing}: pip install 'specdec[cli]'") from error
