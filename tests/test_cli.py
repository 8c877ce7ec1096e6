"""The command line: what it writes, what it exits with, and what it says about bad options."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import specdec.kernels.cache.kv_cache
import specdec.kernels.verify.verify_greedy  # noqa: F401
from specdec import zoo
from specdec.cli import info, measure
from specdec.cli.app import app
from specdec.errors import Unsupported
from specdec.hf import call as hf_call

QUICK = ["demo", "--no-compile", "--max-new-tokens", "12", "--repeats", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target` and `draft`: the bundled pair, as a user's own models are saved."""
    folder = tmp_path_factory.mktemp("models")
    *models, tokenizer = zoo.load_pair()
    for name, model in zip(("target", "draft"), models, strict=True):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def call(*arguments: str) -> Any:
    """Run the command in this process, in a terminal of 100 columns."""
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})


@pytest.mark.parametrize("draft", ["model", "ngram"])
def test_demo_writes_its_result(draft: str, tmp_path: Path) -> None:
    done = call(*QUICK, "--draft", draft, "--json", f"{tmp_path}/x.json", "--plot", f"{tmp_path}/x.png")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["identical"] is True and result["assisted_identical"] is True
    speeds = result["tokens_per_second"]
    assert set(speeds) == {"transformers", "transformers_assisted", "specdec"}
    assert all(isinstance(speed, float) and speed > 0 for speed in speeds.values())
    assert 1 <= result["tokens_per_step"] <= len(result["acceptance_by_position"]) + 1
    assert len(result["acceptance_by_position"]) == {"model": 5, "ngram": 8}[draft]
    assert all(0 <= share <= 1 for share in result["acceptance_by_position"])
    assert result["warmup_seconds"] > 0 and result["fallbacks"] == {}
    assert result["versions"]["torch"] == torch.__version__ and result["machine"]["threads"] == torch.get_num_threads()
    assert result["command"].startswith("python -m specdec demo --size bundled")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert all(word in done.output for word in ("tokens/s", "speed-up", "identical", "warm-up", "transformers"))


def test_demo_shows_the_text_it_decodes() -> None:
    done = call(*QUICK, "--prompt", "class Reader:\n    def")
    assert done.exit_code == 0, done.output
    assert "class Reader:\n    def" in done.output


def test_demo_says_when_the_text_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = measure.Path.__call__

    def falsify(path: measure.Path, *args: Any, **more: Any) -> torch.Tensor:
        return decode(path, *args, **more) + path.label.startswith("specdec")

    monkeypatch.setattr(measure.Path, "__call__", falsify)
    done = call(*QUICK, "--draft", "ngram")
    assert done.exit_code == 1 and "different" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--size", "9b"], "9b"),
        (["demo", "--draft", "oracle"], "oracle"),
        (["demo", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["demo", "--repeats", "many"], "--repeats"),
        (["demo", "--max-new-tokens", "100000"], "there is room for"),
        (["demo", "--plot", "x.pdf"], "must end in .png"),
        (["demo", "--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["demo", "--speed", "3"], "--speed"),
        (["train", "pair", "--target-steps", "few"], "--target-steps"),
        (["shrink"], "shrink"),
    ],
)
def test_bad_options_are_explained(arguments: list[str], message: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert message in done.output and "Traceback" not in done.output


def test_info_is_short() -> None:
    done = call("info")
    assert done.exit_code == 0, done.output
    for version in measure.versions().values():
        assert version in done.output
    assert "C++ compiler" in done.output and "decode here" in done.output
    assert len(done.output.splitlines()) <= 10


def test_info_names_every_op() -> None:
    done = call("info", "--verbose")
    assert done.exit_code == 0, done.output
    listed = {name for name, *_ in info.ops()}
    assert all(name in done.output for name in listed)
    assert {name for name in dir(torch.ops.specdec) if not name.startswith("_") and name != "name"} <= listed


@pytest.mark.parametrize("draft", [None, "ngram", "{folder}/draft"])
def test_info_tries_a_model(draft: str | None, folder: Path) -> None:
    drafts = [] if draft is None else ["--draft", draft.format(folder=folder)]
    done = call("info", "--model", str(folder / "target"), *drafts)
    assert done.exit_code == 0, done.output
    assert "LlamaForCausalLM, 4M parameters, float32" in done.output and "this model decodes here" in done.output
    assert ("draft " in done.output) == (draft == "{folder}/draft")


def test_info_says_why_a_model_does_not_decode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise Unsupported("a stand-in", "with details")

    monkeypatch.setattr(hf_call, "check_model", refuse)
    done = call("info", "--model", str(folder / "target"))
    assert done.exit_code == 1 and "decodes here" not in done.output
    assert "a stand-in: with details" in done.output and "docs/models.md" in done.output


def test_info_says_what_to_do_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "compiler_error", lambda: "g++: not found")
    done = call("info")
    assert done.exit_code == 0 and "g++: not found" in done.output and "install g++ or clang" in done.output


def test_info_says_what_a_release_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks() -> None:
        raise Unsupported("this transformers has no loop", "install transformers<9")

    monkeypatch.setattr(info.names, "check", lacks)
    done = call("info")
    assert done.exit_code == 1 and "install transformers<9" in done.output


def test_info_of_a_model_that_is_not_there() -> None:
    done = call("info", "--model", "no/such/folder")
    assert done.exit_code == 2 and "there is no such folder" in done.output and "Traceback" not in done.output


@pytest.mark.parametrize(("command", "option"), [("pair", "--target-steps"), ("draft", "--objective")])
def test_train_shows_the_trainers_own_options(command: str, option: str) -> None:
    done = call("train", command, "--help")
    assert done.exit_code == 0 and option in done.output


def test_importing_the_command_line_is_light() -> None:
    code = (
        "import sys, specdec.cli.app; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_runs_take_turns() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = measure.compare(runs, 3, lambda name: order.append(name.upper()))
    assert "".join(order) == "aAbBcCbBcCaAcCaAbB"
    assert all(len(values) == 3 and min(values) >= 0 for values in seconds.values())
