"""One resumable optimisation loop for targets and drafts."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
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
    settings: dict[str, object],
    validate: Callable[[], dict[str, float]],
    warmup: int = 100,
    save_every: int = 400,
    stop_at: int | None = None,
) -> Fit:
    """Run AdamW from the checkpoint (or from step 0) to ``steps``.

    ``losses_of_step(step)`` must depend on the weights and on ``step`` alone; a run that was stopped and resumed then
    ends with the same weights as one that was not. A step's loss is their sum: one is differentiated before the next
    is asked for, so that parts of a batch are never in memory together.

    Args:
        model: float32 weights, updated in place.
        settings: what the run depends on, kept in the checkpoint.
        validate: figures on held-out text.
        stop_at: stop early, with a checkpoint, after this step count.

    Raises:
        ValueError: the checkpoint was written with other settings.
    """
    settings = settings | {"steps": steps, "peak": peak, "warmup": warmup}
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    start, spent, began = 0, 0.0, time.monotonic()
    curve: list[dict[str, float]] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=next(model.parameters()).device)
        if state["settings"] != settings:
            raise ValueError(f"{checkpoint} was trained with {state['settings']}, not with {settings}")
        start, spent, curve = state["step"], state["seconds"], state["curve"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    end = min(steps, stop_at or steps)
    mean = curve[-1]["loss"] if curve else math.nan
    with progress_bar(label) as bar:
        task = bar.add_task(label, total=steps, completed=start, loss="")
        for step in range(start, end):
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
            if (step + 1) % save_every == 0 or step + 1 == end:
                measured = validate()
                curve = [*curve, {"step": step + 1, "loss": mean} | {f"held_out_{k}": v for k, v in measured.items()}]
                seconds = spent + time.monotonic() - began
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}
                save(state | {"step": step + 1, "seconds": seconds, "settings": settings}, checkpoint)
                note = ", ".join(f"{name} {value:.3f}" for name, value in measured.items())
                console.print(
                    f"{label}: step {step + 1} of {steps}, {seconds / 60:.1f} min, loss {mean:.3f}; held-out {note}"
                )
    return Fit(spent + time.monotonic() - began, curve)
