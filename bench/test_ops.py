"""Micro-benchmarks of the ops on the machine at hand: each against its reference and against plain PyTorch.

On a CPU an op that is PyTorch code runs compiled, as it does inside a step; compiling is not timed. Arguments rotate,
so that weights and caches come from memory and not from the core's own cache. Bytes and operations a second are in
the benchmarks' extra info (`--benchmark-json`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from bench.case import Case
from bench.cases import cpu_cases, gpu_cases
from specdec.kernels.library import OPS

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
CASES = list(gpu_cases() if GPU else cpu_cases())
WAYS = ("op", "reference", "pytorch")
COPIES = 4


def ready(calls: list[partial[Any]], op: str, way: str) -> Callable[[], object]:
    """One call after the other, in a circle; compiled where a step would compile."""
    functions: list[Callable[[], object]] = list(calls)
    if way == "op" and not GPU and OPS[op].kernel is None:
        torch._dynamo.reset()
        compiled = torch.compile(calls[0].func, fullgraph=True)
        functions = [partial(compiled, *call.args) for call in calls]
    turn = itertools.cycle(functions)

    def run() -> None:
        next(turn)()
        if GPU:
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(benchmark: Any, case: Case, way: str) -> None:
    torch.manual_seed(0)
    calls = [ways[way] for ways in (case.ways(DEVICE) for _ in range(COPIES)) if way in ways]
    if not calls:
        pytest.skip(f"{case.op} has no {way} here")
    benchmark.group = str(case)
    with torch.no_grad():
        benchmark.pedantic(ready(calls, case.op, way), rounds=50, iterations=4, warmup_rounds=5)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(gigabytes_per_second=case.bytes / seconds / 1e9, gigaflops=case.flops / seconds / 1e9)
