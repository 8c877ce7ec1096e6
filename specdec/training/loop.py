"""One resumable optimisation loop for targets and drafts."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

console = Console()


def keep_freed_memory() -> None:
    """Ask glibc to reuse large freed blocks: fresh pages for every activation make CPU steps several times slower."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            trim_threshold, top_pad, mmap_max = -1, -2, -4
            libc.mallopt(mmap_max, 0)
            libc.mallopt(trim_threshold, 2**31 - 1)
            libc.mallopt(top_pad, 2**28)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 matrix products on the device, float32 weights."""
    return torch.autocast(device.type, torch.bfloat16)


def save(state: object, path: Path) -> None:
    """Write a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def progress_bar(label: str) -> Progress:
    """Bar with the count, the loss (field ``loss``), the time spent and the time left."""
    return Progress(
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to ``peak``, then a cosine down to 0 at ``steps``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def settle(file: Path, settings: Mapping[str, object]) -> None:
    """Write down what a run depends on, or see that it is what a run that was stopped here depended on.

    Raises:
        ValueError: it is not; both are named.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    elif (before := json.loads(file.read_text(encoding="utf-8"))) != settings:
        raise ValueError(
            f"{file.parent} has a run with {before}, not with {settings}: take another folder, or empty it"
        )


@contextmanager
def interrupts_wait() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is only noted: what is given says whether there was one."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # the only one that signals reach
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class Fit:
    """What a run took and how it went.

    Attributes:
        seconds: those before a resume included.
        curve: at intervals the step count, the loss and what was measured on held-out text.
    """

    seconds: float
    curve: list[dict[str, float]]


def fit(
    model: nn.Module,
    losses_of_step: Callable[[int], Iterable[torch.Tensor]],
    *,
    label: str,
    steps: int,
    peak: float,
    checkpoint: Path,
    validate: Callable[[], dict[str, float]],
    warmup: int = 100,
    save_every: int = 400,
) -> Fit:
    """Run AdamW from the checkpoint (or from step 0) to ``steps``; beside the checkpoint the curve is drawn.

    ``losses_of_step(step)`` must depend on the weights and on ``step`` alone; a run that was stopped and resumed then
    ends with the same weights as one that was not. A step's loss is their sum: one is differentiated before the next
    is asked for, so that parts of a batch are never in memory together.

    Args:
        model: float32 weights, updated in place.
        validate: figures on held-out text.

    Raises:
        KeyboardInterrupt: Ctrl-C, after the step is done and saved.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    start, spent, began = 0, 0.0, time.monotonic()
    curve: list[dict[str, float]] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=next(model.parameters()).device)
        start, spent, curve = state["step"], state["seconds"], state["curve"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    mean = curve[-1]["loss"] if curve else math.nan
    with progress_bar(label) as bar, interrupts_wait() as interrupted:
        task = bar.add_task(label, total=steps, completed=start, loss="")
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, warmup)
            total = 0.0
            for loss in losses_of_step(step):
                loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            mean = total if math.isnan(mean) else 0.95 * mean + 0.05 * total
            bar.update(task, completed=step + 1, loss=f"loss {mean:.3f}")
            due = (step + 1) % save_every == 0 or step + 1 == steps
            if due:
                measured = validate()
                curve = [*curve, {"step": step + 1, "loss": mean} | {f"held_out_{k}": v for k, v in measured.items()}]
                plot(curve, checkpoint.with_suffix(".png"))
                note = ", ".join(f"{name} {value:.3f}" for name, value in measured.items())
                console.print(f"{label}: step {step + 1} of {steps}, loss {mean:.3f}; held-out {note}")
            if due or interrupted():
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}
                save(state | {"step": step + 1, "seconds": spent + time.monotonic() - began}, checkpoint)
            if interrupted():
                console.print(f"{label}: stopped after step {step + 1} of {steps}, where it goes on when started again")
                raise KeyboardInterrupt
    return Fit(spent + time.monotonic() - began, curve)


def plot(curve: Sequence[Mapping[str, float]], file: Path) -> None:
    """The loss, and what was measured on held-out text, by step: a PNG."""
    from matplotlib.figure import Figure

    names = [name for name in curve[0] if name != "step"]
    figure = Figure(figsize=(3.4 * len(names), 2.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        axes.plot([point["step"] for point in curve], [point[name] for point in curve], marker=".")
        axes.set_title(name.replace("held_out_", "held-out "), loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120, format="png")
