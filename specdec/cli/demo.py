"""The demo: one prompt, decoded by transformers and by specdec, timed side by side."""

from __future__ import annotations

import shlex
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from specdec.cli import measure, report

PROMPT = '''class LRUCache:
    """A cache that forgets the least recently used entry."""

    def __init__(self, maxsize=128):
        self.maxsize = maxsize
        self.entries = OrderedDict()

    def get(self, key, default=None):'''
COMPARED = ("transformers", "transformers_assisted", "specdec")


@dataclass(frozen=True)
class Settings:
    """What to decode and how.

    Attributes:
        prompt: text to continue. size: "bundled" or one of `zoo.SIZES`. draft: "both", "model" or "ngram".
        new_tokens: tokens to add. compiled: False runs specdec eagerly. repeats: timed runs of each path.
    """

    prompt: str = PROMPT
    size: str = "bundled"
    draft: str = "both"
    new_tokens: int = 128
    compiled: bool = True
    repeats: int = 5

    @property
    def command(self) -> str:
        """What to type to run this again."""
        words = ["python", "-m", "specdec", "demo", "--size", self.size, "--draft", self.draft]
        words += ["--max-new-tokens", str(self.new_tokens), "--repeats", str(self.repeats)]
        words += ["--prompt", self.prompt] * (self.prompt != PROMPT) + ["--no-compile"] * (not self.compiled)
        return shlex.join(words)


class ConsoleStreamer(TextStreamer):
    """Writes a text to a rich console as its tokens come, the prompt dimmed.

    Args:
        tokenizer: decodes the tokens.
        console: where they go.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.console, self.style = console, "dim"

    def put(self, value: Tensor) -> None:
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        if is_prompt:
            super().end()
            self.style = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.console.print(text, style=self.style, end="", markup=False, highlight=False, soft_wrap=True)


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Warm up, stream the continuation, measure; returns what `--json` writes.

    Raises:
        ValueError: the prompt and its continuation do not fit into the model's context.
    """
    measure.quiet()
    note = "" if settings.size == "bundled" else f", the target enlarged to {settings.size} with its function unchanged"
    with console.status(f"loading the bundled models{note}"):
        target, draft, tokenizer = measure.load_pair(settings.size)
    ids = [tokenizer.eos_token_id, *tokenizer(settings.prompt)["input_ids"]]
    tokens = torch.tensor([ids], dtype=torch.int64, device="cpu")
    room = target.config.max_position_embeddings - tokens.shape[1]
    if settings.new_tokens > room:
        raise ValueError(f"the prompt has {tokens.shape[1]} tokens: there is room for {max(room, 0)} more")
    paths = measure.all_paths(target, draft, compiled=settings.compiled)
    ours = {
        "ngram": {"transformers_assisted": "transformers_lookup", "specdec": "specdec_ngram"},
        "both": {"specdec": "specdec_both"},
    }
    paths |= {name: paths[other] for name, other in ours.get(settings.draft, {}).items()}
    paths = {name: paths[name] for name in COMPARED}

    warmup_seconds = _warm_up(paths["specdec"], tokens, console)
    console.rule("specdec decodes", align="left", style="dim")
    paths["specdec"](tokens, settings.new_tokens, streamer=ConsoleStreamer(tokenizer, console))
    console.print()
    console.rule(style="dim")

    seconds, texts = _measure(paths, tokens, settings, console)
    stats = paths["specdec"].model.specdec.stats
    identical = torch.equal(texts["transformers"], texts["specdec"])
    faults = measure.Faults()
    with faults.of(settings.size):
        measure.check(paths["specdec"].label, stats)
    faults.same(f"{settings.size}: {paths['specdec'].label}", identical)
    return {
        "identical": identical,
        "assisted_identical": torch.equal(texts["transformers"], texts["transformers_assisted"]),
        "tokens_per_second": {name: settings.new_tokens / statistics.median(seconds[name]) for name in COMPARED},
        "tokens_per_step": stats.tokens_per_step,
        "acceptance_by_position": stats.acceptance_by_position,
        "warmup_seconds": warmup_seconds,
        "fallbacks": dict(stats.fallbacks),
        "faults": faults,
        "seconds": seconds,
        "labels": {name: paths[name].label for name in COMPARED},
        "parameters": sum(p.numel() for p in target.parameters()),
        "prompt_tokens": tokens.shape[1],
        "new_tokens": settings.new_tokens,
        "text": tokenizer.decode(texts["specdec"][0], skip_special_tokens=True),
        "command": settings.command,
        "versions": measure.versions(),
        "machine": measure.machine(),
        "date": measure.today(),
    }


def _warm_up(path: measure.Path, tokens: Tensor, console: Console) -> float:
    """Seconds until specdec decodes this prompt at full speed."""
    start = time.perf_counter()
    what = "specdec compiles its step, once" if path.compiles else "specdec warms up"
    with Progress(SpinnerColumn(), TextColumn(what), TimeElapsedColumn(), console=console) as progress:
        progress.add_task("", total=None)
        path.model.specdec.warmup()
        path(tokens, 8)
    return time.perf_counter() - start


def _measure(
    paths: dict[str, measure.Path], tokens: Tensor, settings: Settings, console: Console
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of the timed runs, after an untimed one each, and the texts [1, length] by path."""
    with measure.progress(console) as bar:
        task = bar.add_task("warming up", total=len(paths) * (settings.repeats + 1))

        def step(name: str) -> None:
            bar.update(task, advance=1, description="measuring", refresh=True)

        texts = {}
        for name, path in paths.items():
            texts[name] = path(tokens, settings.new_tokens)
            step(name)
        paths["specdec"].model.specdec.stats.reset()
        runs = {name: partial(path, tokens, settings.new_tokens) for name, path in paths.items()}
        return measure.compare(runs, settings.repeats, step), texts


def show(result: dict[str, Any], console: Console) -> None:
    """Print the result."""
    speeds = result["tokens_per_second"]
    per_step = {"transformers": "1.00", "transformers_assisted": "", "specdec": f"{result['tokens_per_step']:.2f}"}
    same = {"transformers": "", "transformers_assisted": result["assisted_identical"], "specdec": result["identical"]}
    words = {True: "[green]identical[/]", False: "[bold red]different[/]", "": ""}
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("")
    for title in ("tokens/s", "speed-up", "tokens/step"):
        table.add_column(title, justify="right")
    table.add_column("text")
    for name, speed in speeds.items():
        ratio = f"{speed / speeds['transformers']:.2f}×"
        style = "bold" if name == "specdec" else ""
        table.add_row(result["labels"][name], f"{speed:.1f}", ratio, per_step[name], words[same[name]], style=style)
    console.print()
    console.print(table)
    console.print()
    shares = "  ".join(f"{share:.2f}" for share in result["acceptance_by_position"])
    console.print(f"[dim]accepted by position[/]   {shares}", highlight=False)
    console.print(f"[dim]warm-up[/]                {result['warmup_seconds']:.1f} s", highlight=False)


def plot(result: dict[str, Any], path: str) -> None:
    """Tokens per second and acceptance by position, as a PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    speeds = result["tokens_per_second"]
    report.bars(
        left, {result["labels"][name]: speed for name, speed in speeds.items()}, [n == "specdec" for n in speeds]
    )
    left.set_title(f"{result['parameters'] / 1e6:.0f}M target, float32, greedy", loc="left", fontsize=10)
    shares = result["acceptance_by_position"]
    right.bar(range(1, len(shares) + 1), shares, color="tab:blue", width=0.6)
    right.set(xlabel="position in the draft", ylabel="share accepted", ylim=(0, 1), xticks=range(1, len(shares) + 1))
    right.set_title(f"{result['tokens_per_step']:.2f} tokens per step", loc="left", fontsize=10)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")
