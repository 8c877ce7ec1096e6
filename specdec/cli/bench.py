"""`specdec bench`: every way to decode a user's own model, side by side, and which one to take."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from rich.console import Console
from torch import Tensor

from specdec.cli import inputs, measure
from specdec.cli.measure import Path
from specdec.cli.texts import Batch, difference
from specdec.cli.verdict import BASE, Verdict, Way, verdict
from specdec.engine.stats import Stats


@dataclass(frozen=True)
class Settings:
    """What to decode and how.

    Attributes:
        sources: the models. prompts: file of prompts, or None for those built in.
        batch: prompts decoded at once. temperature: 0 decodes greedily. new_tokens: to write after each prompt.
        repeats: rounds. compiled: False runs specdec eagerly.
    """

    sources: inputs.Sources = field(default_factory=inputs.Sources)
    prompts: pathlib.Path | None = None
    batch: int = 1
    temperature: float = 0.0
    new_tokens: int = 128
    repeats: int = 5
    compiled: bool = True

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of `generate()`."""
        return {"do_sample": True, "temperature": self.temperature} if self.temperature else {}


@dataclass
class Result:
    """What was measured, so far.

    Attributes:
        settings: what was asked for. facts: of this run, `measure.run_facts`. parameters, dtype: of the target.
        ways: transformers' own first; those that failed are left out.
        rounds: that ended. interrupted: whether there were to be more.
        faults: why ways were left out, or wrote another text. notes: what else there is to know.
    """

    settings: Settings
    facts: dict[str, Any]
    parameters: int = 0
    dtype: str = ""
    two_tokenizers: bool = False
    ways: list[Way] = field(default_factory=list)
    rounds: int = 0
    interrupted: bool = False
    faults: measure.Faults = field(default_factory=measure.Faults)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """Which way to take."""
        prefix = ""
        if self.interrupted:
            prefix = f"Interrupted after {self.rounds} of {self.settings.repeats} rounds. "
        if len(self.ways) < 2 or self.ways[0].name != BASE:
            return Verdict(f"{prefix}There is nothing to compare.")
        found = verdict(
            self.ways, two_tokenizers=self.two_tokenizers, compiled=self.settings.compiled, lookup=measure.LOOKUP_TOKENS
        )
        return Verdict(prefix + found.sentence, found.code)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        settings = asdict(self.settings) | {"prompts": self.settings.prompts and str(self.settings.prompts)}
        return {
            **self.facts, "settings": settings, "parameters": self.parameters, "dtype": self.dtype,
            "rounds": self.rounds, "interrupted": self.interrupted,
            "ways": [way.to_dict(self.ways[0]) for way in self.ways],
            "verdict": asdict(self.verdict), "faults": list(self.faults), "notes": self.notes,
        }  # fmt: skip


def run(settings: Settings, console: Console) -> Result:
    """Load, warm up, measure. Ctrl-C while measuring ends it, with what there is.

    Raises:
        ValueError: what was given is not what can be measured. The message is a line.
    """
    measure.quiet()
    sources, result = settings.sources, Result(settings, measure.run_facts("specdec"))
    with console.status("looking at models and prompts"):
        texts = None if settings.prompts is None else inputs.read_prompts(settings.prompts)
        sources.check()
        prompts = inputs.prompts(sources, texts, settings.new_tokens)
    with console.status("loading the models"):
        pair = sources.load()
        try:
            paths = _paths(pair, settings, result.notes)
        except (TypeError, ValueError) as error:  # a draft that does not fit to its target
            raise ValueError(inputs.in_a_line(error)) from None
    result.parameters = sum(parameter.numel() for parameter in pair.target.parameters())
    result.dtype, result.two_tokenizers = str(pair.target.dtype).removeprefix("torch."), bool(pair.tokenizers)
    _Run(result, paths, inputs.batches(prompts, settings.batch, sources.device), console).measure()
    return result


def _paths(pair: inputs.Pair, settings: Settings, notes: list[str]) -> dict[str, Path]:
    """The ways that are compared; why others are not is noted."""
    every = measure.all_paths(pair.target, pair.draft, compiled=settings.compiled, tokenizers=pair.tokenizers)
    names = [BASE, "specdec_plain", "specdec_ngram"] + ["specdec", "specdec_both"] * (pair.draft is not None)
    theirs = "transformers_lookup" if settings.sources.draft == "ngram" else "transformers_assisted"
    if (path := every.get(theirs)) is None:
        pass
    elif path.max_batch is not None and settings.batch > path.max_batch:
        notes.append(f"{path.label} takes one prompt at a time, and is left out at batch {settings.batch}.")
    elif pair.tokenizers and settings.temperature:  # it replaces the draft's embeddings
        notes.append(f"{path.label} changes the draft when it samples with two tokenizers, and is left out.")
    elif pair.tokenizers and len(pair.vocabularies) == 1:
        notes.append(f"{path.label} refuses two tokenizers where vocabularies are of one size, and is left out.")
    else:
        names.insert(1, theirs)
    if pair.draft is not None and pair.draft_tokenizer is None:
        notes.append("No tokenizer is saved with the draft: its tokens are taken for the target's.")
    if not settings.compiled:
        notes.append("specdec ran eagerly (--no-compile), which is slow.")
    if settings.temperature:
        notes.append("Sampled texts differ from run to run, and cannot be compared.")
        notes.append("When sampling specdec drafts its whole depth at each step; with adapt=True it drafts what pays.")
    return {name: every[name] for name in names}


class _Run:
    """The measuring of one result.

    Args:
        result: gets the ways that were measured, and why others were not.
    """

    def __init__(self, result: Result, paths: dict[str, Path], batches: list[Batch], console: Console) -> None:
        self._result, self._settings, self._paths, self._batches = result, result.settings, paths, batches
        self._console = console
        self._texts: dict[str, list[Tensor]] = {}  # of the ways that work
        self._warmup_seconds: dict[str, float] = {}

    def measure(self) -> None:
        """Warm up and time all ways, until the end or Ctrl-C."""
        rounds: list[dict[str, float]] = []
        try:
            self._warm_up()
            if BASE in self._texts:
                self._time(rounds)
        except KeyboardInterrupt:
            self._result.interrupted = True
        self._result.rounds = len(rounds)
        for name in list(self._texts):
            with self._works(name):
                self._check(name)
        if rounds and BASE in self._texts:
            self._result.ways = [self._way(name, [seconds[name] for seconds in rounds]) for name in self._texts]

    def _warm_up(self) -> None:
        longest = max(ids.shape[1] for ids, _ in self._batches) + self._settings.new_tokens
        for i, (name, path) in enumerate(self._paths.items(), 1):
            start, what = time.perf_counter(), f"warming up ({i} of {len(self._paths)}): {path.label}"
            with self._works(name):
                self._console.print(f"{what}{', which compiles its steps' * path.compiles}", style="dim")
                if stats := _stats(path):  # its warm-up draws a spinner of its own
                    path.model.specdec.warmup((self._settings.batch,), longest, **self._settings.call)
                with self._console.status("decoding all prompts once"):
                    self._texts[name] = self._decode(path)
                self._check(name)
                if stats:
                    stats.reset()
                self._warmup_seconds[name] = time.perf_counter() - start
            if BASE not in self._texts:
                return  # there is nothing to compare with

    def _time(self, rounds: list[dict[str, float]]) -> None:
        """Fill in the rounds, as they end."""
        with measure.progress(self._console) as bar:
            task = bar.add_task("measuring", total=len(self._texts) * self._settings.repeats)

            def step(name: str) -> None:
                bar.update(task, advance=1, refresh=True)

            bar.refresh()
            runs = {name: partial(self._again, name) for name in self._texts}
            rounds.extend(measure.rounds(runs, self._settings.repeats, step))

    def _again(self, name: str) -> None:
        if name in self._texts:
            with self._works(name):
                self._decode(self._paths[name])

    def _decode(self, path: Path) -> list[Tensor]:
        new_tokens, call = self._settings.new_tokens, self._settings.call
        return [path(ids, new_tokens, attention_mask=mask, **call) for ids, mask in self._batches]

    @contextmanager
    def _works(self, name: str) -> Generator[None]:
        """A way that fails is left out, with the reason."""
        sources = self._settings.sources
        with self._result.faults.of(sources.model or sources.size):
            try:
                yield
            except Exception as error:  # of any library, or of code that came with the model
                self._texts.pop(name, None)
                if isinstance(error, measure.NotMeasured):
                    raise
                why = f"{type(error).__name__}: {inputs.in_a_line(error)}"
                raise measure.NotMeasured(f"{self._paths[name].label} failed: {why}") from None

    def _check(self, name: str) -> None:
        """Whether a way did what it claims to.

        Raises:
            NotMeasured: it did not.
        """
        path = self._paths[name]
        for (ids, _), text in zip(self._batches, self._texts[name], strict=True):
            if (n := text.shape[1] - ids.shape[1]) != self._settings.new_tokens:
                raise measure.NotMeasured(f"{path.label} wrote {n} tokens instead of {self._settings.new_tokens}")
        if stats := _stats(path):
            measure.check(path.label, stats)

    def _way(self, name: str, seconds: list[float]) -> Way:
        path, tokens = self._paths[name], sum(len(ids) for ids, _ in self._batches) * self._settings.new_tokens
        found = None
        if not self._settings.temperature:
            found = difference(self._paths[BASE].model, self._batches, self._texts[BASE], self._texts[name])
        if found is not None and not found.is_rounding and _stats(path):
            self._result.faults.append(f"{path.label}: {found}")
        return Way(name, path.label, tokens, seconds, self._warmup_seconds[name], _stats(path), found)


def _stats(path: Path) -> Stats | None:
    """What specdec counts, if it is this path that decodes."""
    return path.model.specdec.stats if hasattr(path.model, "specdec") else None
