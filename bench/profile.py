"""What one decoding step asks of the GPU: launches, synchronisations, device time; read from a profiler trace."""

from __future__ import annotations

import gzip
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from specdec.cli import measure

_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_GRAPHS = ("cudaGraphLaunch",)
_COPIES = ("cudaMemcpyAsync",)
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
NEW_TOKENS = 24


def steps(path: measure.Path, prompts: Tensor, trace: Path | None = None) -> dict[str, Any]:
    """Averages over the steps of a short `generate()`; its prefill counts as one more step.

    Args:
        trace: where to write the profiler's trace, as .json.gz, or None.

    Returns:
        Launches, graph launches, copies and waits a step, milliseconds a step on the clock and on the device, and the
        kernels that take most of the device's time.

    Raises:
        NotMeasured: the path did not run as it claims.
    """
    for _ in range(2):
        path(prompts, NEW_TOKENS)
    stats = path.model.specdec.stats if hasattr(path.model, "specdec") else None
    if stats is not None:
        stats.reset()
    measure.synchronize()
    start = time.perf_counter()
    path(prompts, NEW_TOKENS)
    measure.synchronize()
    seconds = time.perf_counter() - start
    if stats is not None:
        measure.check(path.label, stats)
    n_steps = NEW_TOKENS if stats is None else stats.steps
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        path(prompts, NEW_TOKENS)
        measure.synchronize()
    calls: Counter[str] = Counter()
    device: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            device[event.name] += event.device_time_total
        else:
            calls[event.name] += 1
    if trace is not None:
        plain = trace.with_suffix("")
        profiler.export_chrome_trace(str(plain))
        with open(plain, "rb") as source, gzip.open(trace, "wb") as target:
            shutil.copyfileobj(source, target)
        plain.unlink()

    def a_step(names: tuple[str, ...]) -> float:
        return sum(calls[name] for name in names) / n_steps

    return {
        "path": path.label, "batch": len(prompts), "steps": n_steps,
        "launches": a_step(_LAUNCHES), "graphs": a_step(_GRAPHS), "copies": a_step(_COPIES), "waits": a_step(_WAITS),
        "milliseconds": 1e3 * seconds / n_steps, "device_milliseconds": sum(device.values()) / 1e3 / n_steps,
        "kernels": [[name[:80], time / 1e3 / n_steps] for name, time in device.most_common(12)],
    }  # fmt: skip
