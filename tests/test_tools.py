"""Tools that claim to measure specdec fail, and say why in a line, where something else ran or wrote another text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import (
    backend,
    control,
    end_to_end,
    many,
    many_memory,
    overhead,
    padding,
    trees,
    verifiers,
    warmup,
)  # fmt: skip
from specdec.cli import measure
from specdec.cli.app import app
from specdec.engine.text import Text
from specdec.engine.tree import TokenTree
from specdec.errors import Unsupported
from specdec.graphs import compiled
from specdec.hf import call

pytestmark = pytest.mark.filterwarnings("ignore")

Tool = Callable[[Path, bool], object]
"""Its main function, with the smallest settings: given a folder for the results, and whether to compile."""


def _demo(out: Path, compile: bool) -> None:
    options = ["--max-new-tokens", "4", "--repeats", "1", "--json", f"{out}/demo.json"]
    done = CliRunner().invoke(app, ["demo", *options, *["--no-compile"] * (not compile)])
    print(done.stderr)
    raise typer.Exit(done.exit_code)


TOOLS: dict[str, Tool] = {
    "demo": _demo,
    "end_to_end": lambda out, compile: end_to_end.main(
        "bundled", "1", "specdec_plain", 1, 8, 4, 1, compile=compile, out=out
    ),
    "control": lambda out, compile: control.main("bundled", "ngram", "1", 8, 4, 1, compile=compile, out=out),
    "many": lambda out, compile: many.main("bundled", 2, 2, 4, 1, "", compile=compile, out=out),
    "trees": lambda out, compile: trees.main("bundled", "0", 1, 4, 1, out=out),
    "overhead": lambda out, compile: overhead.main("bundled"),
    "verifiers": lambda out, compile: verifiers.main("1.0", "2", 2, 1, 4, out=out),
    "many_memory": lambda out, compile: many_memory.main("bundled", 1, 4, compile),
    "warmup": lambda out, compile: warmup.main(child=1),
    "padding": lambda out, compile: padding.main("bundled", "2", 2, 8, 4, 1, compile=compile, runs=2, out=out),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NEW_TOKENS": 4, "REPEATS": 1}.items():
        monkeypatch.setattr(overhead, name, value)
    for module, name, value in ((many, "LONGEST", 24), (many_memory, "SHORTEST", 8), (many_memory, "LONGEST", 12)):
        monkeypatch.setattr(module, name, value)


def _fails(tool: str, out: Path, compile: bool, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as exit:
        TOOLS[tool](out, compile)
    assert exit.value.exit_code == 1
    captured = capsys.readouterr()
    lines = [line for line in (captured.err + captured.out).splitlines() if line.startswith("failed: ")]
    assert any(reason in line for line in lines), lines  # what else fails may depend on the clock
    for file in out.glob("*.json"):  # what is written says it
        assert any(reason in fault for fault in json.loads(file.read_text())["faults"])


def _refuse(*_: Any) -> None:
    raise Unsupported("a stand-in", "with details")


@pytest.mark.parametrize("tool", [name for name in TOOLS if name != "padding"])
def test_what_ran_transformers_own_loop(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(call, "check_model", _refuse)
    _fails(tool, tmp_path, False, "transformers' own loop: a stand-in", capsys)


def test_a_model_without_a_ragged_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(padding, "ModelView", _refuse)
    _fails("padding", tmp_path, False, "no ragged forward: a stand-in", capsys)


def _some_trees(*_: Any) -> dict[str, Any]:
    return {"trees": {"best tree": TokenTree.from_widths(2)}, "expected": {"best tree": 1.0}, "why": ""}


@pytest.mark.parametrize("tool", ["demo", "overhead", "padding", "trees"])
def test_what_ran_eagerly_though_compiled_was_asked_for(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "compiler_error", lambda: "g++: it says no")
    monkeypatch.setattr(trees, "shapes", _some_trees)
    _fails(tool, tmp_path, True, "ran eagerly: g++: it says no", capsys)


@pytest.mark.parametrize("tool", ["demo", "end_to_end", "control", "many"])
def test_another_text(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take = Text.take
    monkeypatch.setattr(Text, "take", lambda text, new, finished: take(text, [t ^ 1 for t in new], finished))
    _fails(tool, tmp_path, False, "another text than transformers'", capsys)


def test_another_text_of_a_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take, make = Text.take, trees.specdec.compile
    monkeypatch.setattr(Text, "take", lambda text, new, finished: take(text, [t ^ 1 for t in new], finished))
    monkeypatch.setattr(trees, "shapes", _some_trees)
    monkeypatch.setattr(trees.specdec, "compile", lambda *given, **more: make(*given, **more, compile=False))
    _fails("trees", tmp_path, True, "another text than transformers'", capsys)


def test_what_is_left_out_loses_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last cell of a run."""
    run = end_to_end.measure_all

    def measure_all(able: Any, batches: Any, *rest: Any) -> Any:
        if len(batches[0]) == 2:
            monkeypatch.setattr(call, "check_model", _refuse)
        return run(able, batches, *rest)

    monkeypatch.setattr(end_to_end, "measure_all", measure_all)
    with pytest.raises(typer.Exit):
        end_to_end.main("bundled", "1,2", "specdec_plain", 2, 8, 4, 1, compile=False, out=tmp_path)
    result = json.loads((tmp_path / "end_to_end.json").read_text())
    assert [entry["batch"] for entry in result["results"]] == [1]
    assert result["faults"] == ["bundled, batch 2: specdec, no draft ran transformers' own loop: a stand-in"]
    assert f"**Failed:** {result['faults'][0]}." in (tmp_path / "end_to_end.md").read_text()


def test_a_backend_that_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plain(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        return gm.forward

    monkeypatch.setattr(backend, "specdec", plain)
    monkeypatch.setattr(backend, "FED", (1,))
    monkeypatch.setattr(
        backend, "all_ways", lambda _: {"inductor": {"backend": "eager"}, "specdec": {"backend": plain}}
    )
    with pytest.raises(typer.Exit):
        backend.main("bundled", "1", "80", new_tokens=2, repeats=1, out=tmp_path)
    assert "failed: bundled, batch 1, 1 a call: the backend replaced nothing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_children_say_why_they_failed() -> None:
    assert measure.ask_child(["-c", "print('progress'); print('[1]')"]) == "[1]"
    for code in ("import sys; print('failed: it', file=sys.stderr); sys.exit(1)", "raise ValueError('it')"):
        with pytest.raises(measure.NotMeasured, match=r"it$"):
            measure.ask_child(["-c", code])
