"""The sections of `bench.gpu`. Each writes rows as it goes, within its time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench import profile, ways
from bench.case import Case
from bench.clock import Clock
from bench.gpu_decode import measure_ways, warm_up
from bench.gpu_run import Run
from specdec import zoo


def correctness(run: Run, clock: Clock) -> None:
    """What has to hold before anything is measured; nothing is checked after what does not."""
    for name, check in run.setup.checks(run.device, run.setup.compiled):
        run.row("correctness", name, lambda check=check: check() or {}, clock)
        if run.faults:
            break


def roofs(run: Run, clock: Clock) -> None:
    """What the device copies and multiplies."""
    run.row("roofs", "this device", lambda: run.roofs, clock)


def decode(run: Run, clock: Clock) -> None:
    """One sample, every way, nothing adapted."""
    setup, (target, draft) = run.setup, run.pair
    slots = setup.prompt_tokens + setup.new_tokens
    found = [
        ways.eager(target), run.plain, run.chain, ways.loop(target, slots, setup.inductor),
        ways.ngram(target, compile=setup.compiled), ways.both(target, draft, compile=setup.compiled),
        ways.static(target, slots, setup.inductor),
    ]  # fmt: skip
    measure_ways(run, "decode", found, 1, clock)


def profiles(run: Run, clock: Clock) -> None:
    """Steps of the same objects, as a profiler sees them."""
    for way in (run.plain, run.chain):
        trace = run.out / "trace.json.gz" if way is run.chain else None

        def work(way: ways.Way = way, trace: Any = trace) -> dict[str, Any]:
            warm_up(run, way, run.prompts[:1])  # no more than a check where `decode` has run
            return profile.steps(way, run.prompts[:1], run.compilations, trace)

        run.row("profile", way.label, work, clock)


def products(run: Run, clock: Clock) -> None:
    """Every op at decoding shapes, beside PyTorch."""
    cases = list(run.setup.cases())
    for i, case in enumerate(cases):
        if clock.left <= 0:
            run.row("products", f"{len(cases) - i} more", dict, clock)
            break
        run.row("products", str(case), partial(_time_case, run, case), clock)
        run.free()


def _time_case(run: Run, case: Case) -> dict[str, Any]:
    """Seconds of the op, where there is one, and of PyTorch; and the fewest that the roofs allow."""
    torch.manual_seed(0)
    found = case.ways(run.device)
    timings = {name: run.time(found[name]) for name in ("op", "pytorch") if name in found}
    roofs = run.roofs
    return {
        "op": case.op, "shape": case.shape, "bytes": case.bytes, "flops": case.flops,
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "floor_seconds": max(case.bytes / roofs["bytes_per_second"], case.flops / roofs["flops_per_second"]),
        "notes": {name: timing.note for name, timing in timings.items() if timing.note},
    }  # fmt: skip


def batches(run: Run, clock: Clock) -> None:
    """Several samples, first as before, then drafting what pays."""
    for n in run.setup.batches:
        measure_ways(run, "batches", [run.chain], n, clock)
    adaptive = ways.adapting(run.chain)
    for n in run.setup.batches:
        measure_ways(run, "batches", [adaptive], n, clock)
    for n in run.setup.batches:
        measure_ways(run, "batches", [run.plain], n, clock)


def large_draft(run: Run, clock: Clock) -> None:
    """One sample, with a draft that costs what one of its size does and proposes what the small one does."""
    setup = run.setup
    _, small, _ = zoo.load_pair()
    shape: dict[str, Any] = zoo.SIZES[setup.draft_size]
    draft = zoo.enlarge(small, **shape, dtype=setup.dtype, device=setup.device)
    way = ways.chain(run.pair[0], draft, f"a {setup.draft_size} draft", compile=setup.compiled)
    measure_ways(run, "draft_1b", [way], 1, clock)


SECTIONS: dict[str, tuple[Callable[[Run, Clock], None], float]] = {
    "correctness": (correctness, 45),
    "roofs": (roofs, 15),
    "decode": (decode, 240),
    "profile": (profiles, 20),
    "products": (products, 60),
    "batches": (batches, 120),
    "draft_1b": (large_draft, 120),
}
"""By name, in order, what runs, and the most seconds it may take; what one leaves is the others'."""
