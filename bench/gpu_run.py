"""What the sections of `bench.gpu` share: what is measured, the models, the time that is left, and the results."""

from __future__ import annotations

import gc
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from bench import gpu_report, ways
from bench.case import Case
from bench.cases import gpu_cases
from bench.clock import Clock, Compilations, OutOfTime
from bench.correct import Checks
from bench.device_time import Timing, timer
from specdec import zoo
from specdec.cli import measure

PLOT_SECONDS = 15
"""Plots take longer than most rows: they follow after so long, and at the end of each section."""


@dataclass(frozen=True)
class Setup:
    """What is measured, and where.

    Attributes:
        device, dtype, size: of the target, made on the device. draft_size: of the larger draft.
        prompt_tokens, new_tokens: of every call. rounds: timed ones, after each way's first.
        batches: samples decoded at once, beside one.
        roof_elements: of the tensor that is copied. roof_side: of the matrices that are multiplied.
        compiled: whether specdec's steps are. inductor: what the other compiled ways tell `torch.compile`.
        cases: of the kernels, the most telling first. checks: what has to hold before.
    """

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    size: str = "8b"
    draft_size: str = "1b"
    prompt_tokens: int = 64
    new_tokens: int = 96
    rounds: int = 2
    batches: Sequence[int] = (8, 32)
    roof_elements: int = 2**30
    roof_side: int = 8192
    compiled: bool = True
    inductor: Mapping[str, Any] = field(default_factory=lambda: {"mode": "reduce-overhead"})
    cases: Callable[[], Iterable[Case]] = gpu_cases
    checks: Callable[[torch.device, bool], Iterable[tuple[str, Callable[[], None]]]] = Checks


class Run:
    """One run of `bench.gpu`.

    Args:
        setup: what is measured. out: folder of the results. clock: the time that is left for it. facts: of the
            machine.
    """

    def __init__(self, setup: Setup, out: Path, clock: Clock, facts: Mapping[str, Any], console: Console) -> None:
        self.setup, self.out, self.console = setup, out, console
        self.clock, self.compilations = clock, Compilations()
        self.result: dict[str, Any] = {**facts, "settings": _settings(setup), "seconds": {}, "sections": {}}
        self._texts: dict[int, Tensor] = {}
        self._plotted = time.monotonic()
        self.write()

    def row(self, section: str, name: str, work: Callable[[], Mapping[str, Any]], clock: Clock) -> bool:
        """What is done is a row of a section; where it fails, or there is no time, the row says so.

        Results are written after each: a run that is stopped leaves what it has. Warnings of specdec's are errors: what
        runs slower than it should is not to be measured.

        Returns:
            Whether it was done.
        """
        start = time.monotonic()
        try:
            with clock.limit(), warnings.catch_warnings():
                warnings.simplefilter("error", specdec.SpecdecWarning)
                found = dict(work())
        except OutOfTime:
            found = {"missing": gpu_report.OUT_OF_TIME}
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}".partition("\n")[0][:500]}
        row = {"name": name, **found}
        self.put(section, row)
        self.console.print(
            f"[dim]{section}: {name}: {time.monotonic() - start:.1f} s, {self.clock.left:.0f} s left[/]",
            highlight=False,
        )
        return gpu_report.is_done(row)

    def put(self, section: str, row: dict[str, Any]) -> None:
        """A row of a section, in place of an older one of its name; figures stay where there was no time for more."""
        rows: list[dict[str, Any]] = self.result["sections"].setdefault(section, [])
        place = next((i for i, old in enumerate(rows) if old["name"] == row["name"]), len(rows))
        if "missing" in row and any(map(gpu_report.is_done, rows[place : place + 1])):
            return
        rows[place : place + 1] = [row]
        self.write()
        if time.monotonic() > self._plotted + PLOT_SECONDS:
            self.plot()

    def took(self, section: str, seconds: float) -> None:
        """A section has ended."""
        self.result["seconds"][section] = seconds
        self.write()
        self.plot()

    @property
    def faults(self) -> measure.Faults:
        """What failed; what there was no time for did not."""
        return measure.Faults(
            f"{section}: {row['name']}: {row['error']}"
            for section, rows in self.result["sections"].items()
            for row in rows
            if "error" in row
        )

    def write(self) -> None:
        """The results so far."""
        gpu_report.write(self.result, self.out)

    def plot(self) -> None:
        """The results so far, as pictures."""
        gpu_report.plot(self.result, self.out)
        self._plotted = time.monotonic()

    def free(self) -> None:
        """Give memory back: models and their views know each other."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def device(self) -> torch.device:
        return torch.device(self.setup.device)

    @cached_property
    def time(self) -> Callable[[Callable[[], object]], Timing]:
        """Times a call on the device."""
        return timer(self.device)

    @cached_property
    def pair(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Target and draft, loaded once; no text ends before its time."""
        target, draft, _ = measure.load_pair(self.setup.size, self.setup.dtype, self.setup.device)
        for model in (target, draft):
            model.generation_config.eos_token_id = None
        return target, draft

    @cached_property
    def prompts(self) -> Tensor:
        """[most samples, prompt_tokens] int64."""
        _, _, tokenizer = zoo.load_pair()
        ids = zoo.held_out_prompts(tokenizer, max(1, *self.setup.batches), self.setup.prompt_tokens)
        return ids.to(self.device)

    def text(self, n_samples: int) -> Tensor:
        """[n_samples, prompt_tokens + new_tokens] ids: what transformers makes of the prompts."""
        if n_samples not in self._texts:
            with torch.no_grad():
                self._texts[n_samples] = ways.eager(self.pair[0]).call(self.prompts[:n_samples], self.setup.new_tokens)
        return self._texts[n_samples]

    @cached_property
    def plain(self) -> ways.Way:
        """specdec without a draft: compiled once, for all sections."""
        return ways.plain(self.pair[0], compile=self.setup.compiled)

    @cached_property
    def chain(self) -> ways.Way:
        """specdec with the draft of the pair."""
        return ways.chain(*self.pair, compile=self.setup.compiled)

    @cached_property
    def roofs(self) -> dict[str, Any]:
        """What this device does now: bytes a second copied, operations a second of its dtype, seconds of an empty
        kernel."""
        setup = self.setup
        source = torch.randn(setup.roof_elements, dtype=setup.dtype, device=self.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(setup.roof_side, setup.roof_side, dtype=setup.dtype, device=self.device) for _ in "ab")
        one = torch.zeros(1, device=self.device)
        calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b, "empty": one.zero_}
        timings = {name: self.time(call) for name, call in calls.items()}
        return {
            "bytes_per_second": 2 * source.nbytes / timings["copy"].seconds,
            "flops_per_second": 2 * setup.roof_side**3 / timings["product"].seconds,
            "launch_seconds": timings["empty"].seconds,
            "notes": {name: timing.note for name, timing in timings.items() if timing.note},
        }


def _settings(setup: Setup) -> dict[str, Any]:
    """What a reader has to know of it."""
    shown = ("size", "draft_size", "prompt_tokens", "new_tokens", "rounds")
    return {name: getattr(setup, name) for name in shown} | {"dtype": str(setup.dtype).removeprefix("torch.")}
