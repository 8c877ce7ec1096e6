"""Measuring decoding side by side: the ways to decode, the clock, and the machine it ran on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import specdec
from specdec import zoo
from specdec.engine.stats import Stats
from specdec.hf.adaptive import AdaptiveTokens, Base

LOOKUP_TOKENS = 8
"""Tokens that transformers' prompt lookup proposes a step: as many as specdec's n-gram drafter."""


@dataclass(frozen=True)
class Path:
    """One way to decode.

    Attributes:
        label: for tables and plots.
        model: whose `generate()` is called. options: what it is called with.
        compiles: whether the first calls compile.
        max_batch: the most samples it takes at once, or None.
    """

    label: str
    model: PreTrainedModel
    options: Mapping[str, Any] = field(default_factory=dict)
    compiles: bool = False
    max_batch: int | None = None

    def __call__(self, prompts: Tensor, new_tokens: int, **more: Any) -> Tensor:
        """[B, length + new_tokens] ids: the prompts [B, length] and exactly `new_tokens` tokens each, which are greedy
        unless `more` says otherwise."""
        call = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "max_new_tokens": new_tokens}
        return self.model.generate(prompts, **call | {**self.options, **more})


def load_pair(
    size: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Target, draft and tokenizer: the bundled ones, or with a target of the same function that costs what `size` does.

    Args:
        size: "bundled" or one of `zoo.SIZES`.
        dtype, device: of both models. Large weights are made in place, never on the host first.
    """
    target, draft, tokenizer = zoo.load_pair()
    if size != "bundled":
        shape: dict[str, Any] = zoo.SIZES[size]
        target = zoo.enlarge(target, **shape, dtype=dtype, device=device)
        if "vocab_size" in shape:
            draft = zoo.pad_vocabulary(draft, shape["vocab_size"], dtype=dtype, device=device)
    for model in (target, draft):
        model.to(device)
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay in float32
            parameter.data = parameter.data.to(dtype)
    return target, draft, tokenizer


def load_adaptive(target: PreTrainedModel) -> AdaptiveTokens:
    """The bundled target's adaptive tokens, for it or for a target of `load_pair`.

    Raises:
        ValueError: that has another vocabulary.
    """
    bundled, *_ = zoo.load_pair()
    tokens = AdaptiveTokens.load(zoo.FOLDER / "target", bundled)
    if Base.of(target).shape == Base.of(bundled).shape:
        return tokens.to(target.device, target.dtype)
    return zoo.enlarge_adaptive(tokens, bundled, target)


def all_paths(
    target: PreTrainedModel, draft: PreTrainedModel | None, *, compiled: bool = True,
    tokenizers: Mapping[str, PreTrainedTokenizerBase] = MappingProxyType({}),
) -> dict[str, Path]:  # fmt: skip
    """Every way to decode `target`, by name; `"transformers"` comes first and is what the others are compared with.

    The models' end-of-text tokens are switched off, so that all paths write the same number of tokens.

    Args:
        draft: None leaves out what needs one.
        compiled: False runs specdec eagerly and leaves out what exists only compiled.
        tokenizers: `tokenizer` and `draft_tokenizer`, where the draft's tokens are not the target's.
    """
    for model in (target, draft):
        if model is not None:
            model.generation_config.eos_token_id = None
    static = CompileConfig()
    static._compile_all_devices = True  # transformers compiles by itself on GPUs only
    assisted: dict[str, Any] = {"assistant_model": draft}
    if tokenizers:
        assisted |= {"tokenizer": tokenizers["tokenizer"], "assistant_tokenizer": tokenizers["draft_tokenizer"]}

    def ours(label: str, draft: Any, **more: Any) -> Path:
        return Path(label, specdec.compile(target, draft, compile=compiled, **more), compiles=compiled)

    paths = {
        "transformers": Path("transformers", target),
        "transformers_compiled": Path(
            "transformers, compiled", target, {"cache_implementation": "static", "compile_config": static}, True
        ),
        "transformers_lookup": Path(
            "transformers, prompt lookup", target, {"prompt_lookup_num_tokens": LOOKUP_TOKENS}, max_batch=1
        ),
        "transformers_assisted": Path("transformers, assisted", target, assisted, max_batch=1),
        "specdec_plain": ours("specdec, no draft", None),
        "specdec_ngram": ours("specdec, n-grams", "ngram"),
    }
    if draft is None:
        del paths["transformers_assisted"]
    else:
        paths["specdec"] = ours("specdec, draft model", draft, **tokenizers)
        paths["specdec_both"] = ours("specdec, model and n-grams", [draft, "ngram"], **tokenizers)
    if not compiled:
        del paths["transformers_compiled"]
    return paths


def compare(
    runs: Mapping[str, Callable[[], Any]], repeats: int, after_each: Callable[[str], None] = lambda name: None
) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` of them, see `rounds`."""
    measured = list(rounds(runs, repeats, after_each))
    return {name: [seconds[name] for seconds in measured] for name in runs}


def rounds(
    runs: Mapping[str, Callable[[], Any]], repeats: int, after_each: Callable[[str], None] = lambda name: None
) -> Iterator[dict[str, float]]:
    """Seconds of each run, round by round. All take turns, and every round another one goes first.

    Take medians, and compare only what was measured in one call: the machine's mood then falls on all alike. Nothing
    is warmed up here.

    Args:
        after_each: called with the name of the run that ended, outside the clock.
    """
    names = list(runs)
    for turn in range(repeats):
        first, seconds = turn % len(names), {}
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            runs[name]()
            synchronize()
            seconds[name] = time.perf_counter() - start
            after_each(name)
        yield seconds


class NotMeasured(Exception):
    """What was to be measured did not run; the message is the reason, in a line."""


def check(label: str, stats: Stats) -> None:
    """Whether what was counted is specdec's own decoding, with its draft, compiled if that was asked for.

    Raises:
        NotMeasured: with the reason.
    """
    for how, reasons in (
        ("transformers' own loop", stats.fallbacks),
        ("without its draft", stats.dropped_drafts),
        ("eagerly", stats.eager),
    ):
        if reasons:
            raise NotMeasured(f"{label} ran {how}: {', '.join(reasons)}")


class Faults(list[str]):
    """Why a tool's figures are not what they claim to be, a line each. The tool goes on, and fails in the end."""

    @contextmanager
    def of(self, part: str) -> Generator[None]:
        """What is measured here is left out where it did not run."""
        try:
            yield
        except NotMeasured as error:
            self.append(f"{part}: {error}")

    def same(self, part: str, is_same: bool) -> None:
        """A text was compared with transformers'."""
        if not is_same:
            self.append(f"{part}: another text than transformers'")

    def say(self) -> None:
        """A line each, on stderr."""
        for line in self:
            print(f"failed: {line}", file=sys.stderr)

    def exit(self) -> None:
        """Say them and end with 1, if there are any."""
        self.say()
        if self:
            raise typer.Exit(1)


def ask_child(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """What a tool prints in a process of its own, whose last line is the result.

    Raises:
        NotMeasured: it failed; the reason is the last line of its stderr.
    """
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise NotMeasured(said[-1].removeprefix("failed: "))
    return done.stdout.strip().splitlines()[-1]


def progress(console: Console) -> Progress:
    """A bar that is drawn only when it advances: one that refreshes itself would take time from what is measured."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, auto_refresh=False)


def synchronize() -> None:
    """Wait until the GPU has done what it was asked, where there is one in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def quiet() -> None:
    """Keep transformers' progress bars and notes, and torch's warnings, out of a terminal that shows results."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"torch\.")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide how fast a model decodes."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}  # which says the build, too
    for name in ("triton", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"specdec": specdec.__version__}


def machine() -> dict[str, Any]:
    """The hardware: `cpu`, `cores`, `threads` (torch's), and `gpu` where there is one."""
    found = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def run_facts(module: str) -> dict[str, Any]:
    """What a result must say of the run it comes from: the command, the date, versions, the machine."""
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    return {"command": command, "date": today(), "versions": versions(), "machine": machine()}


def today() -> str:
    """The date, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
