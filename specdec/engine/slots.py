"""The rows of a running batch: which text is in which, and how much of it the models have read.

Texts take rows as these come free. A newcomer's prompt is written to the target's cache between steps, a piece at a
time, while the others go on; the draft model reads a text when next something is drafted for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from specdec.engine.decide import agreed_memory
from specdec.engine.roles import Drafter, Target
from specdec.engine.state import READ, BatchState
from specdec.engine.text import Text

CHUNK = 256
"""Tokens of newcomers' prompts that are written between two steps of the others, which are kept waiting."""
FIRST_CHUNK = 2048
"""The same where no text is waiting."""


class Rows:
    """Texts in the rows of a batch.

    Args:
        texts: those to decode, taken one by one as rows come free. grow: makes room for a text of some length.
    """

    def __init__(
        self, texts: Iterator[Text], state: BatchState, target: Target, drafter: Drafter,
        grow: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._waiting, self._state, self._target, self._drafter, self._grow = texts, state, target, drafter, grow
        self._texts: list[Text | None] = [None] * len(state.lengths)
        self._unwritten: dict[int, tuple[int, Tensor]] = {}
        self._unread: dict[int, int] = {}  # how many tokens of it the drafter knows
        self._has_all = getattr(drafter, "shares_cache", False)  # what the target has written

    def fill(self, n_rows: int) -> list[Text]:
        """Give the first `n_rows` rows, where free, to waiting texts; those that cannot be decoded come back."""
        failed: list[Text] = []
        for row in range(n_rows):
            text = self._texts[row]
            if text is not None and text.finished:
                self._clear(row)
            while self._texts[row] is None and (new := next(self._waiting, None)) is not None:
                try:
                    with agreed_memory():
                        self._grow(len(new.prompt) + 1)
                        self._state.admit(row, new.prompt, new.max_new_tokens, new.seed)
                        written = new.prefix.write_to(self._target.cache, row) if new.prefix else 0
                    self._texts[row], self._unwritten[row] = new, (written, new.prompt[:-1])
                    if not self._has_all:
                        self._unread[row] = 0
                except Exception as error:
                    new.fail(error)
                    failed.append(new)
        return failed

    def _clear(self, row: int) -> None:
        self._state.stop(row)
        self._texts[row] = None
        self._unwritten.pop(row, None)
        self._unread.pop(row, None)

    @property
    def is_writing(self) -> bool:
        return bool(self._unwritten)

    def write(self) -> list[Text]:
        """Write the next tokens of prompts; texts with which that fails come back."""
        n_tokens = CHUNK if self.is_under_way else FIRST_CHUNK
        try:
            with agreed_memory():
                left = self._target.write(self._unwritten, n_tokens)
            self._wrote(left)
            return []
        except Exception:  # find out with whom
            failed = []
            for row, rest in list(self._unwritten.items()):
                try:
                    with agreed_memory():
                        left = self._target.write({row: rest}, n_tokens)
                except Exception as error:
                    text = self._texts[row]
                    assert text is not None
                    text.fail(error)
                    failed.append(text)
                    self._clear(row)
                else:
                    others = {r: known for r, known in self._unwritten.items() if r != row}
                    self._wrote(others | left)
            return failed

    def _wrote(self, unwritten: dict[int, tuple[int, Tensor]]) -> None:
        for row in self._unwritten.keys() - unwritten.keys():
            self._state.start(row)
        self._unwritten = unwritten

    @property
    def live(self) -> dict[int, Text]:
        """The texts that are decoded, by row."""
        return {
            row: text
            for row, text in enumerate(self._texts)
            if text is not None and not text.finished and row not in self._unwritten
        }

    @property
    def is_under_way(self) -> bool:
        """Whether a text would be kept waiting; before the first step none is."""
        return any(text.tokens for text in self.live.values())

    @property
    def length(self) -> int:
        """Of the longest text, as far as is known."""
        return max((len(t.prompt) + len(t.tokens) for t in self._texts if t is not None), default=1)

    def skip(self, live: dict[int, Text]) -> None:
        """A step adds to these texts without the drafter's seeing it."""
        for row, text in () if self._has_all else live.items():
            self._unread.setdefault(row, len(text.prompt) + len(text.tokens))

    def unread(self, live: dict[int, Text]) -> dict[int, int]:
        """How many tokens the drafter knows of those texts of which it does not know all."""
        return {row: self._unread[row] for row in live if row in self._unread}

    def read(self, live: dict[int, Text], wanted: dict[int, Text]) -> list[int]:
        """Let the drafter take in those wanted of the live texts.

        Returns:
            By row, how many last tokens it has yet to read in the step: none of texts that it does not know.
        """
        counts, behind = [0] * len(self._texts), {}
        at_once = getattr(self._drafter, "reads_at_once", 0)  # users' drafters need not say
        last = min(READ, at_once)
        for row in live.keys() - self._unread.keys():
            counts[row] = last
        for row, known in self.unread(wanted).items():
            text = wanted[row]
            counts[row] = len(text.prompt) + len(text.tokens) - max(known - READ, 0)
            if not known or counts[row] > at_once:
                behind[row], counts[row] = (known, text.ids), last
            del self._unread[row]
        if behind:
            self._drafter.read(behind)
        return counts
