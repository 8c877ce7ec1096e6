"""A text to decode, and what has become of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.engine.control import Track
from specdec.engine.roles import Prefix

Process = Callable[[Tensor, Tensor], Tensor]
"""From a text [1, length] int64, without padding, and its next token's logits [1, V] float32 to scores [1, V]."""


@dataclass
class Record:
    """What `output_logits` and `output_scores` ask for, by new token: [1, V] float32 each, before and after the
    processors."""

    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def cut(self, n_tokens: int) -> None:
        """Forget what came after so many tokens."""
        del self.logits[n_tokens:], self.scores[n_tokens:]


@dataclass(eq=False)
class Text:
    """A text to decode, and what has become of it.

    Attributes:
        prompt: [length] int64, at least one token. max_new_tokens: at most so many are added. seed: int64.
        ends: whether the user's criteria end the text, given all new tokens up to one; asked for every one, in order.
        process: what the logits processors that look at the text make of scores. record: where scores are to be kept.
        prefix: keys and values of its first tokens. is_over: whether the user's criteria end it, as last asked.
        tokens: what has been added. finished: whether the text has ended; whoever sets it ends the text.
        error: what kept it from being decoded. track: what it made of its drafts.
    """

    prompt: Tensor
    max_new_tokens: int
    seed: int = 0
    ends: Callable[[list[int]], bool] | None = None
    process: Process | None = None
    record: Record | None = None
    prefix: Prefix | None = None
    is_over: bool = False
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    error: Exception | None = None
    track: Track = field(default_factory=Track)

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
