"""`make gpu` without a GPU: every section runs, small and on a CPU, stops when it must, and writes what it has."""

from __future__ import annotations

import json
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import typer
from rich.console import Console
from test_bench import small_cases
from torch import Tensor

from bench import correct, gpu, gpu_decode, gpu_report, profile, ways
from bench.case import Case, Ways
from bench.clock import Clock, Compilations, OutOfTime
from bench.device_time import Timing
from bench.gpu_run import Run, Setup
from bench.gpu_sections import SECTIONS
from bench.ways import Way
from specdec import SpecdecWarning
from specdec.cli import measure

TOY = Setup(
    device="cpu", dtype=torch.float32, size="bundled", draft_size="25m", prompt_tokens=8, new_tokens=8, rounds=1,
    batches=(2,), roof_elements=2**12, roof_side=32, compiled=False, inductor={"backend": "eager", "mode": None},
    cases=small_cases,
)  # fmt: skip


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text())


def sections(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return read(folder)["sections"]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    facts = measure.run_facts("bench.gpu")
    run = Run(TOY, tmp_path, Clock(600), facts, Console(quiet=True))
    with run.compilations:
        yield run


@pytest.mark.slow
def test_every_section_runs_and_is_reported(tmp_path: Path) -> None:
    gpu.measure_gpu(TOY, tmp_path, list(SECTIONS), 9)
    result, found = read(tmp_path), sections(tmp_path)
    assert list(found) == list(result["seconds"]) == list(SECTIONS)
    assert not [row for rows in found.values() for row in rows if {"missing", "error"} & row.keys()]
    assert len(found["correctness"]) == 8
    rows = found["decode"] + found["batches"] + found["draft_1b"]
    assert [row["name"] for row in rows] == [
        "transformers, batch 1", "specdec, no draft, batch 1", "specdec, a draft model, 5 tokens, batch 1",
        "a loop over a static cache, compiled, batch 1", "specdec, n-grams, batch 1",
        "specdec, a draft model and n-grams, batch 1", "transformers, static cache, compiled, batch 1",
        "specdec, a draft model, 5 tokens, batch 2", "specdec, a draft model, 5 tokens, adaptive, batch 2",
        "specdec, no draft, batch 2", "specdec, a 25m draft, 5 tokens, batch 1",
    ]  # fmt: skip
    for row in rows:
        assert row["identical"] and row["common"] == 1 and row["margin"] is None
        assert len(row["seconds_one"]) == len(row["seconds_all"]) == 1 + TOY.rounds
        assert row["milliseconds"] > 0 and row["of_copy_roof"] > 0
    chain = found["decode"][2]
    assert chain["tokens_per_step"] > 1.2 and chain["steps"] < TOY.new_tokens
    assert found["decode"][1]["steps"] == TOY.new_tokens
    assert [row["name"] for row in found["profile"]] == [row["name"].rsplit(",", 1)[0] for row in rows[1:3]]
    assert all(row["milliseconds"] > 0 and row["waits"] == 0 for row in found["profile"])
    assert [row["name"] for row in found["products"]] == [str(case) for case in small_cases()]
    assert [list(row["seconds"]) for row in found["products"][-2:]] == [["op", "pytorch"], ["pytorch"]]
    names = {"gpu.json", "gpu.md", "products.png", "decode.png", "trace.json.gz"}
    assert {path.name for path in tmp_path.iterdir()} == names
    text = (tmp_path / "gpu.md").read_text()
    for words in ("## Roofs", "## Batches", "| specdec, n-grams, batch 1 |", "graph launches", "identical", "holds"):
        assert words in text


def test_nothing_runs_where_texts_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise correct.Wrong("not transformers' text: token 3")

    def checks(device: torch.device, compiled: bool) -> Iterator[tuple[str, Callable[[], None]]]:
        yield "one that holds", lambda: None
        yield "one that does not", fail
        raise AssertionError("it goes on")

    with pytest.raises(typer.Exit) as exit:
        gpu.measure_gpu(replace(TOY, checks=checks), tmp_path, list(SECTIONS), 9)
    assert exit.value.exit_code == 1
    rows = sections(tmp_path)
    assert list(rows) == ["correctness"]
    assert [row.get("error") for row in rows["correctness"]] == [None, "Wrong: not transformers' text: token 3"]
    assert "failed: correctness: one that does not: Wrong: not transformers' text: token 3" in capsys.readouterr().err
    assert "**failed**: Wrong: not transformers' text: token 3" in (tmp_path / "gpu.md").read_text()


def test_what_is_wrong_is_found() -> None:
    """Texts that differ in one token, steps that fall back, and steps that would wait."""
    checks = correct.Checks(torch.device("cpu"), compiled=False)
    calls = dict(checks)
    calls["greedy, no draft"]()
    checks._greedy[1, 4] += 1
    for name in ("greedy, no draft", "greedy, a tree", "no step waits, greedy, kernel by kernel"):
        with pytest.raises(correct.Wrong, match="not transformers' text: token 5 of sample 2 is"):
            calls[name]()
    texts = iter(torch.arange(4).view(4, 1))
    checks._sampled = lambda model: next(texts)[None]  # type: ignore[method-assign]
    for name in ("equal seeds, equal texts", "coupled texts, drafted or not"):
        with pytest.raises(correct.Wrong, match="token 1 of sample 1"):
            calls[name]()


def test_synchronisation_is_forbidden_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with correct.no_synchronisation(torch.device("cpu")):
        pass
    assert not modes
    with pytest.raises(ValueError), correct.no_synchronisation(torch.device("cuda")):
        raise ValueError
    assert modes == ["error", "default"]


@pytest.mark.parametrize(
    ("device", "compiled", "measured"),
    [("cpu", False, []), ("cpu", True, ["compiled"]), ("cuda", False, []), ("cuda", True, ["recorded"])],
)
def test_steps_are_checked_as_they_are_measured(device: str, compiled: bool, measured: list[str]) -> None:
    checks: Any = object.__new__(correct.Checks)
    checks._device, checks._compiled, checks._draft = torch.device(device), compiled, None
    names = [name.rsplit(", ", 1)[1] for name, _ in checks if name.startswith("no step waits")]
    assert names[::2] == names[1::2] == ["kernel by kernel", *measured]


def compile_something() -> None:
    """With code of its own, which nothing has been compiled for."""
    own = types.FunctionType((lambda x: x + 1).__code__.replace(co_name="new"), globals())
    torch.compile(own, backend="eager")(torch.ones(2))


class Late:
    """A way that writes transformers' text, and compiles at its n-th call."""

    def __init__(self, run: Run, n: int) -> None:
        self.run, self.n, self.calls = run, n, 0

    def __call__(self, prompts: Tensor, new_tokens: int) -> Tensor:
        self.calls += 1  # in pairs: of all tokens and of one
        if self.calls == self.n:
            compile_something()
        return self.run.text(len(prompts))[:, : prompts.shape[1] + new_tokens]


@pytest.mark.parametrize(
    ("n", "error"),
    [
        (3, None),  # in the second call of its warm-up, which goes on
        (5, "NotMeasured: it compiled in timed round 1"),  # the call of one token
        (8, "NotMeasured: it compiled in timed round 2"),
    ],
)
def test_a_way_that_compiles_late_gives_no_figure(n: int, error: str | None, run: Run) -> None:
    late, quiet = Late(run, n), Late(run, 0)
    found = [Way("late", late, 1), Way("quiet", quiet, 1)]
    gpu_decode.measure_ways(run, "decode", found, 1, run.clock)
    row, other = run.result["sections"]["decode"]
    assert row.get("error") == error
    assert ("milliseconds" in row) == (error is None) == (not run.faults)
    assert len(other["seconds_all"]) == 1 + TOY.rounds
    if error:
        with pytest.raises(typer.Exit):
            run.faults.exit()


def test_a_way_that_compiles_always_is_never_warm(run: Run) -> None:
    def call(prompts: Tensor, new_tokens: int) -> Tensor:
        triton.knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=True)
        return prompts

    gpu_decode.measure_ways(run, "decode", [Way("restless", call, 1)], 1, run.clock)
    (row,) = run.result["sections"]["decode"]
    assert row["error"] == f"NotMeasured: still compiling at call {gpu_decode.WARM_UPS}"


def test_steps_that_specdec_records_count_as_compiled(run: Run) -> None:
    way = run.plain

    def call(prompts: Tensor, new_tokens: int) -> Tensor:
        text = way.call(prompts, new_tokens)
        if way.stats is not None:
            way.stats.seconds["compile"] += seconds
        return text

    for seconds in (0.0, 0.1):
        timed = ways.timed(replace(way, call=call), run.prompts[:1], 2, run.compilations)
        assert timed.compiled == (seconds > 0)


def test_compilations_are_counted_while_it_is_asked() -> None:
    with Compilations() as compilations:
        compile_something()
        assert compilations.n == 1
    compile_something()
    assert compilations.n == 1 and triton.knobs.compilation.listener is None


def test_what_is_profiled_must_not_compile(run: Run) -> None:
    way = Way("late", Late(run, 1), 1)
    with pytest.raises(measure.NotMeasured, match="late compiled while it was profiled"):
        profile.steps(way, run.prompts[:1], run.compilations)


def test_what_does_not_fit_is_said_and_no_failure(tmp_path: Path) -> None:
    gpu.measure_gpu(TOY, tmp_path, list(SECTIONS), 0)
    rows = sections(tmp_path)
    assert list(rows) == list(SECTIONS)
    assert all(row["missing"] == gpu_report.OUT_OF_TIME for section in rows.values() for row in section)
    assert (tmp_path / "gpu.md").read_text().count("not run, out of time") == len(SECTIONS)


def test_a_row_is_stopped_when_the_time_is_up(run: Run) -> None:
    """In the middle, also where failures are recovered from; and what follows is not begun."""

    def stubborn() -> dict[str, Any]:
        while True:
            with suppress(Exception):
                time.sleep(30)

    clock = Clock(0.2)
    assert not run.row("products", "long", stubborn, clock)
    assert not run.row("products", "next", lambda: pytest.fail("begun"), clock)
    assert run.row("correctness", "of another section", dict, run.clock)
    rows = run.result["sections"]["products"] + run.result["sections"]["correctness"]
    assert [row.get("missing") for row in rows] == [gpu_report.OUT_OF_TIME] * 2 + [None]
    assert not run.faults


def test_figures_stay_where_there_is_no_time_for_more(run: Run) -> None:
    name = "one"
    for row in {"seconds": 1}, {"missing": gpu_report.OUT_OF_TIME}:
        run.put("correctness", {"name": name, **row})
    assert run.result["sections"]["correctness"] == [{"name": name, "seconds": 1}]
    run.put("correctness", {"name": name, "error": "it compiled"})  # what is wrong with them counts
    assert run.result["sections"]["correctness"] == [{"name": name, "error": "it compiled"}]


def test_a_clock_has_parts() -> None:
    clock = Clock(50)
    assert clock.part(10).left == pytest.approx(10, abs=1)
    assert clock.part(100).left == pytest.approx(50, abs=1)
    with pytest.raises(OutOfTime), clock.part(-1).limit():
        pytest.fail("begun")


def test_a_warm_up_leaves_time_for_the_rounds_of_the_others(run: Run) -> None:
    def slow(seconds: float, prompts: Tensor, new_tokens: int) -> Tensor:
        time.sleep(seconds)
        return run.text(1)[:, : prompts.shape[1] + new_tokens]

    found = [Way("first", partial(slow, 0.1), 1), Way("endless", partial(slow, 60), 1)]
    run.text(1)
    assert run.roofs
    gpu_decode.measure_ways(run, "decode", found, 1, Clock(4))
    first, endless = run.result["sections"]["decode"]
    assert len(first["seconds_all"]) == 1 + TOY.rounds
    assert endless["missing"] == gpu_report.OUT_OF_TIME


def test_products_that_do_not_fit_are_counted(run: Run) -> None:
    def long(device: torch.device) -> Ways:
        time.sleep(30)
        return {}

    run.setup = replace(TOY, cases=lambda: [Case("long", "a", long, 1), *small_cases()])
    assert run.roofs
    SECTIONS["products"][0](run, Clock(0.2))
    rows = run.result["sections"]["products"]
    assert [row["name"] for row in rows] == ["long a", f"{len(small_cases())} more"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_run_that_is_stopped_leaves_what_it_has(stop: type[BaseException], tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def stopped(device: torch.device) -> Ways:
        seen.append([row["name"] for row in sections(tmp_path)["products"]])
        if len(seen) == 2:
            raise stop
        return {"pytorch": partial(torch.ones, 1)}

    many = [Case("op", str(i), stopped, 1) for i in range(1, 4)]
    kernel = Case("op", "0", lambda device: {"pytorch": partial(torch.ones, 1)}, 1)
    with pytest.raises(stop):
        gpu.measure_gpu(replace(TOY, cases=lambda: [kernel, *many]), tmp_path, ["roofs", "products"], 9)
    assert seen == [["op 0"], ["op 0", "op 1"]]
    assert [row["name"] for row in sections(tmp_path)["products"]] == ["op 0", "op 1"]
    assert "| op 1 |" in (tmp_path / "gpu.md").read_text()


def test_what_fails_is_said_and_the_rest_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(device: torch.device) -> Ways:
        raise ValueError("no such | kernel\nand more")

    def slower(device: torch.device) -> Ways:
        warnings.warn("specdec could not do so", SpecdecWarning, stacklevel=1)
        return {}

    found = [Case("broken", "a", broken, 1), Case("slower", "b", slower, 1), small_cases()[-1]]
    with pytest.raises(typer.Exit):
        gpu.measure_gpu(replace(TOY, cases=lambda: found, size="none"), tmp_path, ["decode", "products"], 9)
    rows = sections(tmp_path)
    assert [row.get("error") for row in rows["products"]] == [
        "ValueError: no such | kernel", "SpecdecWarning: specdec could not do so", None,
    ]  # fmt: skip
    assert rows["decode"] == [{"name": "decode", "error": "KeyError: 'none'"}]
    assert "| broken a | **failed**: ValueError: no such / kernel |" in (tmp_path / "gpu.md").read_text()
    assert capsys.readouterr().err.count("failed: ") == 3


def test_where_texts_part_the_margin_is_said(run: Run) -> None:
    """The logits' difference at the first token that differs, of the sample where it is largest."""
    expected, target = run.text(2), run.pair[0]
    assert gpu_decode.compare(target, expected, expected, 8) == {"identical": True, "common": 1, "margin": None}
    found = expected.clone()
    found[0, 10], found[1, 12:] = 7, 9
    margins = []
    for sample, place in (0, 10), (1, 12):
        logits = target(expected[sample : sample + 1]).logits[0, place - 1]
        margins.append((logits[expected[sample, place]] - logits[found[sample, place]]).item())
    compared = gpu_decode.compare(target, found, expected, 8)
    assert compared == {"identical": False, "common": (2 + 4) / 16, "margin": pytest.approx(max(margins), rel=1e-4)}
    assert min(margins) > 0


def test_prefill_is_no_decoding(run: Run) -> None:
    """A call of one token is subtracted; of specdec's the first token is a step's."""
    expected = run.text(1)

    def call(text: Tensor, seconds: float, steps: int) -> ways.Call:
        return ways.Call(text, seconds, steps, 2.0, False)

    alls = [call(expected, seconds, 5) for seconds in (9.0, 1.3, 1.2)]
    ones = [call(expected[:, :9], seconds, 1) for seconds in (0.5, 0.4, 0.5)]
    run.roofs["bytes_per_second"] = 100.0
    for model, prefill in (None, 0.5), (SimpleNamespace(specdec=SimpleNamespace(stats=1)), 0.3):
        way: Any = Way("a", lambda prompts, n: prompts, 10, model)  # type: ignore[arg-type]
        row = gpu_decode.row(run, gpu_decode.Timed(way, 7.0, ones, alls), run.prompts[:1])
        assert row["milliseconds"] == pytest.approx(200)
        assert row["tokens_per_second"] == pytest.approx(7 / 0.8)
        assert row["of_copy_roof"] == pytest.approx(10 / 100 / 0.2)
        assert row["prefill_seconds"] == pytest.approx(prefill)


def test_weights_that_a_step_reads(run: Run) -> None:
    """A head that is the embeddings is read; embeddings of their own are not."""
    target, draft = run.pair
    total = sum(parameter.nbytes for parameter in target.parameters())
    assert ways.weight_bytes(target) == total
    assert ways.chain(target, draft, compile=False).read_bytes == total + 5 * ways.weight_bytes(draft)
    big, _, _ = measure.load_pair("25m")
    unread = big.get_input_embeddings().weight.nbytes
    assert ways.weight_bytes(big) == sum(parameter.nbytes for parameter in big.parameters()) - unread


def test_what_was_compiled_serves_a_way_that_adapts(run: Run) -> None:
    assert run.chain.model is not None
    before = ways.timed(run.chain, run.prompts, 8, run.compilations)
    handle = run.chain.model.specdec
    (decoder,) = handle._decoders.kept.values()
    assert not any(policy.decisions.adapts for policy in decoder.policies.values())
    after = ways.timed(ways.adapting(run.chain), run.prompts, 8, run.compilations)
    assert list(handle._decoders.kept.values()) == [decoder]
    assert all(policy.decisions.adapts for policy in decoder.policies.values())
    assert torch.equal(before.text, after.text)


def test_what_was_not_replayed_is_starred(run: Run) -> None:
    run.time = lambda call: Timing(0.001, "started by the host each time: it reads")
    for section in ("roofs", "products"):
        SECTIONS[section][0](run, run.clock)
    text = gpu_report.markdown(run.result)
    assert text.count("1000.0*") == 2 * len(small_cases()) - 1
    assert "- \\* this device, copy: started by the host each time: it reads" in text
    assert "- \\* ancestor_words B 2 N 5, pytorch: started by the host each time: it reads" in text


def test_without_a_gpu_there_is_nothing_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.Exit) as exit:
        gpu.main(tmp_path)
    assert exit.value.exit_code == 2
    with pytest.raises(typer.BadParameter, match="nonsense is none of correctness"):
        gpu.main(tmp_path, "nonsense")
    assert not list(tmp_path.iterdir())
