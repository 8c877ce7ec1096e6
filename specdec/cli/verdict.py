"""What measurements of ways to decode come to: which one to take, in a sentence and a line of Python."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from specdec.cli.texts import Difference
from specdec.engine.stats import Stats

BASE = "transformers"
"""The way that the others are compared with."""


@dataclass(frozen=True)
class Way:
    """A way to decode, as measured.

    Attributes:
        name: of `measure.all_paths`. label: for tables.
        tokens: new ones in a round. seconds: of each round.
        warmup_seconds: until it decoded at full speed, first decoding of all prompts included.
        stats: what specdec counted in the rounds; None for transformers' ways.
        difference: None where all texts are transformers', or were sampled.
    """

    name: str
    label: str
    tokens: int
    seconds: Sequence[float]
    warmup_seconds: float = 0.0
    stats: Stats | None = None
    difference: Difference | None = None

    @cached_property
    def speed(self) -> float:
        """Tokens a second, the median round's."""
        return self.tokens / statistics.median(self.seconds)

    @cached_property
    def middle(self) -> tuple[float, float]:
        """Tokens a second that the middle half of the rounds lies between: what is measured, up to noise."""
        if len(self.seconds) == 1:
            return self.speed, self.speed
        slow, _, fast = reversed(statistics.quantiles(self.seconds, n=4, method="inclusive"))
        return self.tokens / slow, self.tokens / fast

    def is_faster(self, other: Way) -> bool:
        """Whether it is, by more than the noise."""
        return self.middle[0] > other.middle[1]

    @property
    def depth(self) -> int:
        """Tokens that it drafts a step, at most."""
        return self.stats.decisions.n_levels if self.stats is not None and self.stats.decisions is not None else 0

    @property
    def drafted(self) -> float:
        """Tokens that it drafted a step, on average: how deep the controller chose to draft."""
        return self.stats.allowed / max(self.stats.sample_steps, 1) if self.stats is not None else 0.0

    @cached_property
    def draft_cost(self) -> float | None:
        """What drafting a token takes, of what the target takes for a step without a draft; None if not known."""
        decisions = self.stats.decisions if self.stats is not None else None
        if decisions is None or not decisions.draft_seconds or not decisions.forward_seconds:
            return None
        depth, by_samples = max(decisions.draft_seconds.items())
        samples, seconds = max(by_samples.items())
        forwards = decisions.forward_seconds[max(n for n in decisions.forward_seconds if n <= samples)]
        return seconds / depth / forwards[min(forwards)]

    def to_dict(self, base: Way) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "name": self.name, "label": self.label, "seconds": list(self.seconds), "tokens": self.tokens,
            "tokens_per_second": self.speed, "middle_half": list(self.middle), "ratio": self.speed / base.speed,
            "warmup_seconds": self.warmup_seconds,
            "difference": None if self.difference is None else asdict(self.difference),
            "stats": None if self.stats is None else self.stats.to_dict(),
            "depth": self.depth, "drafted_per_step": self.drafted, "draft_cost": self.draft_cost,
        }  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Which way to take.

    Attributes:
        sentence: for people. code: Python to paste, or "" where nothing is faster than `generate()`.
    """

    sentence: str
    code: str = ""


CODE = {
    "transformers_lookup": "out = model.generate(**inputs, prompt_lookup_num_tokens={lookup})",
    "transformers_assisted": "out = model.generate(**inputs, assistant_model=draft{tokenizers})",
    "specdec_plain": "model = specdec.compile(model{options})",
    "specdec_ngram": 'model = specdec.compile(model, draft="ngram", depth={depth}{options})',
    "specdec": "model = specdec.compile(model, draft=draft, depth={depth}{tokenizers}{options})",
    "specdec_both": 'model = specdec.compile(model, draft=[draft, "ngram"]{tokenizers}{options})',
}


def verdict(ways: Sequence[Way], *, two_tokenizers: bool = False, compiled: bool = True, lookup: int = 8) -> Verdict:
    """The fastest way, what the draft model brings, and what is not told apart from it.

    Args:
        ways: transformers' own and at least one more, with the same rounds.
        two_tokenizers: whether the draft model has a tokenizer of its own. compiled: whether specdec's steps are.
        lookup: tokens of transformers' prompt lookup.
    """
    by_name = {way.name: way for way in ways}
    base = by_name[BASE]
    others = sorted((way for way in ways if way is not base), key=lambda way: -way.speed)
    best = others[0]
    if best.is_faster(base):
        sentences = [f"{_name(best)}: {best.speed / base.speed:.1f}x generate()"]
    elif best.speed > base.speed:
        sentences = [
            f"Nothing is faster than generate() beyond the noise of the rounds; {_name(best)} comes closest, "
            f"with {best.speed / base.speed:.2f}x"
        ]
    else:
        sentences = [
            f"Nothing is faster than generate(); {_name(best)} comes closest, with {best.speed / base.speed:.2f}x"
        ]
    if "specdec" in by_name:
        sentences.append(_of_draft(by_name["specdec"], by_name.get("specdec_plain"), best))
    if not best.is_faster(base):
        sentences.append("Leave the model as it is")
        return Verdict(_joined(sentences))
    if near := [_name(way) for way in others[1:] if not best.is_faster(way)]:
        sentences.append(f"The difference to {' and '.join(near)} is smaller than the noise of the rounds")
    code = CODE[best.name].format(
        depth=best.depth,
        lookup=lookup,
        tokenizers=_TOKENIZERS.get(best.name, "") if two_tokenizers else "",
        options="" if compiled else ", compile=False",
    )
    return Verdict(_joined(sentences), code)


_TOKENIZERS = {
    "specdec": ", tokenizer=tokenizer, draft_tokenizer=draft_tokenizer",
    "specdec_both": ", tokenizer=tokenizer, draft_tokenizer=draft_tokenizer",
    "transformers_assisted": ", tokenizer=tokenizer, assistant_tokenizer=draft_tokenizer",
}


def _of_draft(way: Way, plain: Way | None, best: Way) -> str:
    """What the draft model costs and brings."""
    cost = "" if way.draft_cost is None else f"costs {way.draft_cost:.2g} of a target step a token"
    if way is best or plain is None:
        return f"This draft {cost}" if cost else ""
    if way.is_faster(plain):
        gain = f"makes specdec {way.speed / plain.speed:.1f}x as fast as without a draft"
    else:
        gain = "does not pay"
    return f"This draft {cost} and {gain}" if cost else f"This draft {gain}"


def _name(way: Way) -> str:
    return f"{way.label}, depth {way.depth}" if way.depth else way.label


def _joined(sentences: Sequence[str]) -> str:
    return ". ".join(sentence for sentence in sentences if sentence) + "."
