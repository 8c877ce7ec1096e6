"""What a call takes on a GPU, without what it costs the host to start it.

A decoding step is replayed from a CUDA graph, and so are the calls timed here: a graph of [clear the L2 cache, event,
call, event], ten in a row, replayed for a while. Clearing is what `triton.testing.do_bench` does: a buffer larger than
the cache is overwritten, before the first event, so that a call finds none of its inputs in the cache, and writes back
what it evicts. The events are nodes of the graph: a call is charged the gaps before and after it, as in a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import triton

CALLS, SECONDS = 10, 0.08


class Timing(NamedTuple):
    """Median time of a call; note: why it was not replayed from a graph, or nothing if it was."""

    seconds: float
    note: str = ""


def timer(device: torch.device) -> Callable[[Callable[[], object]], Timing]:
    """What times a call on such a device."""
    return time_call if device.type == "cuda" else time_on_host


def time_on_host(call: Callable[[], object]) -> Timing:
    """Time a call that is done when it returns."""
    call()
    seconds: list[float] = []
    begun = time.monotonic()
    while not seconds or time.monotonic() < begun + SECONDS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Timing(median(seconds))


def time_call(call: Callable[[], object]) -> Timing:
    """Time a call that starts work on the current CUDA device."""
    try:
        return Timing(_replayed(call))
    except RuntimeError as error:  # something in the call can't be recorded: it reads on the host, say
        seconds = triton.testing.do_bench(call, warmup=20, rep=60, return_mode="median") / 1e3
        return Timing(seconds, f"started by the host each time: {str(error).partition(chr(10))[0]}")


def _replayed(call: Callable[[], object]) -> float:
    call()  # compiles its kernels and sets its libraries up
    driver = triton.runtime.driver.active
    buffer = driver.get_empty_cache_for_benchmark()
    # External events are recorded by every replay; others would only order the recorded work.
    events = [[torch.cuda.Event(enable_timing=True, external=True) for _ in range(2)] for _ in range(CALLS)]
    graph = torch.cuda.CUDAGraph()
    # The outer context brings the stream back where recording fails.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        for start, end in events:
            driver.clear_cache(buffer)
            start.record()
            call()
            end.record()
    graph.replay()  # warms up
    milliseconds: list[float] = []
    begun = time.monotonic()
    while not milliseconds or time.monotonic() < begun + SECONDS:
        graph.replay()
        torch.cuda.synchronize()
        milliseconds += [start.elapsed_time(end) for start, end in events]
    return median(milliseconds) / 1e3
