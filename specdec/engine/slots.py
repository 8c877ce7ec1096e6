"""The rows of a running batch: which text is in which, and how much of it the models have read.

Texts take rows as these come free. A newcomer's prompt is written to the target's cache between steps, a piece at a
time, while the others go on; the draft model reads a text when next something is drafted for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.engine.control import Habit
from specdec.engine.decide import agreed_memory
from specdec.engine.draft import Drafter
from specdec.engine.state import BatchState
from specdec.hf.prefix import Past
from specdec.hf.processors import Process, Record
from specdec.hf.view import ModelView

CHUNK = 256
"""Tokens of newcomers' prompts that are written between two steps of the others, which are kept waiting."""
FIRST_CHUNK = 2048
"""The same where no text is waiting."""


@dataclass(eq=False)
class Text:
    """A text to decode, and what has become of it.

    Attributes:
        prompt: [length] int64, at least one token. max_new_tokens: at most so many are added. seed: int64.
        ends: whether the user's criteria end the text, given all new tokens up to one; asked for every one, in order.
        process: what the logits processors that look at the text make of scores. record: where scores are to be kept.
        past: keys and values of its first tokens. is_over: whether the user's criteria end it, as last asked.
        tokens: what has been added. finished: whether the text has ended; whoever sets it ends the text.
        error: what kept it from being decoded. habit: what it made of its drafts.
    """

    prompt: Tensor
    max_new_tokens: int
    seed: int = 0
    ends: Callable[[list[int]], bool] | None = None
    process: Process | None = None
    record: Record | None = None
    past: Past | None = None
    is_over: bool = False
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    error: Exception | None = None
    habit: Habit = field(default_factory=Habit)

    def take(self, new: list[int], finished: bool) -> list[int]:
        """Add tokens, after which the text has ended or not, and return them; the user's criteria may end it sooner."""
        if self.ends is not None and self.process is None:
            n = next((n for n in range(1, len(new) + 1) if self.asks(self.tokens + new[:n])), None)
            new = new[:n] if self.error is None or n is None else new[: n - 1]
        finished |= self.is_over or self.error is not None
        self.tokens += new
        self.finished |= finished
        return new

    def asks(self, tokens: list[int]) -> bool:
        """Whether the user's criteria end the text, with these new tokens, or fail."""
        try:
            self.is_over = bool(self.ends and self.ends(tokens))
        except Exception as error:
            self.error = error
        return self.is_over or self.error is not None

    def cut(self, n_tokens: int | None) -> int:
        """Keep so many of its new tokens, or all; how many are gone."""
        before, self.tokens = len(self.tokens), self.tokens[:n_tokens]
        if self.record is not None:
            self.record.cut(len(self.tokens))
        return before - len(self.tokens)

    def fail(self, error: Exception) -> None:
        self.finished, self.error = True, error

    @property
    def ids(self) -> Tensor:
        """[length] int64: prompt and new tokens."""
        return torch.cat([self.prompt, torch.tensor(self.tokens, dtype=torch.int64, device=self.prompt.device)])


class Rows:
    """Texts in the rows of a batch.

    Args:
        texts: those to decode, taken one by one as rows come free. grow: makes room for a text of some length.
    """

    def __init__(
        self, texts: Iterator[Text], state: BatchState, target: ModelView, drafter: Drafter,
        grow: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._waiting, self._state, self._target, self._drafter, self._grow = texts, state, target, drafter, grow
        self._texts: list[Text | None] = [None] * len(state.lengths)
        self._unwritten: dict[int, tuple[int, Tensor]] = {}
        self._unread: dict[int, int] = {}  # how many tokens of it the drafter knows

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
                        written = new.past.write_to(self._target.cache, row) if new.past else 0
                    self._texts[row], self._unwritten[row], self._unread[row] = new, (written, new.prompt[:-1]), 0
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
        for row, text in live.items():
            self._unread.setdefault(row, len(text.prompt) + len(text.tokens))

    def unread(self, live: dict[int, Text]) -> dict[int, int]:
        """How many tokens the drafter knows of those texts of which it does not know all."""
        return {row: self._unread[row] for row in live if row in self._unread}

    def read(self, live: dict[int, Text]) -> None:
        """The drafter takes in what it does not know."""
        unread = self.unread(live)
        if unread:
            self._drafter.read({row: (known, live[row].ids) for row, known in unread.items()})
            for row in unread:
                del self._unread[row]
