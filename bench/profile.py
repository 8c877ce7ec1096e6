"""What one decoding step asks of the GPU: kernels, launches, waits, device time; read from a profiler trace."""

from __future__ import annotations

import gzip
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.clock import Compilations
from bench.ways import Way, timed
from specdec.cli import measure

_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_GRAPHS = ("cudaGraphLaunch",)
_COPIES = ("cudaMemcpyAsync",)
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_NO_KERNELS = ("Memcpy", "Memset")
NEW_TOKENS, TOP = 24, 20


@torch.no_grad()
def steps(way: Way, prompts: Tensor, compilations: Compilations, trace: Path | None = None) -> dict[str, Any]:
    """Averages over the steps of a short call, of a way that has been warmed up; its prefill counts as one more step.

    Args:
        trace: where to write the profiler's trace, as .json.gz, or None.

    Returns:
        Kernels, and of the host's calls launches, graph launches, copies and waits, a step; milliseconds a step on the
        clock, without a profiler, and on the device; and the kernels that take most of the device's time.

    Raises:
        NotMeasured: the way did not run as it claims, or compiled.
    """
    call = timed(way, prompts, NEW_TOKENS, compilations)
    before = compilations.n
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        way.call(prompts, NEW_TOKENS)
        measure.synchronize()
    if call.compiled or compilations.n > before:
        raise measure.NotMeasured(f"{way.label} compiled while it was profiled")
    calls: Counter[str] = Counter()
    device: Counter[str] = Counter()
    n_kernels = 0
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            device[event.name] += event.device_time_total
            n_kernels += not event.name.startswith(_NO_KERNELS)
        else:
            calls[event.name] += 1
    if trace is not None:
        plain = trace.with_suffix("")
        profiler.export_chrome_trace(str(plain))
        with open(plain, "rb") as source, gzip.open(trace, "wb") as target:
            shutil.copyfileobj(source, target)
        plain.unlink()

    def a_step(names: tuple[str, ...]) -> float:
        return sum(calls[name] for name in names) / call.steps

    return {
        "batch": len(prompts), "steps": call.steps, "kernels": n_kernels / call.steps,
        "launches": a_step(_LAUNCHES), "graphs": a_step(_GRAPHS), "copies": a_step(_COPIES), "waits": a_step(_WAITS),
        "milliseconds": 1e3 * call.seconds / call.steps, "device_milliseconds": sum(device.values()) / 1e3 / call.steps,
        "top": [[name[:100], microseconds / 1e3 / call.steps] for name, microseconds in device.most_common(TOP)],
    }  # fmt: skip
