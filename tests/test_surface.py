"""What a user meets first: names, options, drafts by name, what the handle says, and a line where it compiles."""

from __future__ import annotations

import logging
import pydoc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from side_by_side import Prompts, Tiny, same, wrap
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import specdec
from specdec import TokenTree, progress
from specdec.cli.app import app


def test_the_package_lists_what_it_offers() -> None:
    assert set(dir(specdec)) == set(specdec.__all__)
    assert all(getattr(specdec, name) is not None for name in specdec.__all__)
    assert "model.generate" in pydoc.render_doc(specdec)
    assert "draft" in pydoc.render_doc(specdec.compile)
    assert (Path(specdec.__file__).parent / "py.typed").exists()  # type checkers read the hints


def test_the_command_line_says_its_version() -> None:
    said = CliRunner().invoke(app, ["--version"])
    assert said.exit_code == 0
    assert said.output.strip() == f"specdec {specdec.__version__}"


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            {"dept": 3},
            TypeError,
            r"no option 'dept' \(did you mean 'depth'\?\); it has draft, tokenizer, .*, progress$",
        ),
        ({"xyz": 3}, TypeError, r"no option 'xyz'; it has draft, "),
        ({"depth": "3"}, TypeError, r"depth must be a whole number, got '3' \(str\)"),
        ({"progress": 1}, TypeError, "progress must be True or False, got 1"),
        (
            {"draft": "n-gram"},
            ValueError,
            'draft must be "auto", "ngram", "adaptive", .*, a folder or hub id, a model, .*got \'n-gram\'',
        ),
        ({"draft": "./nowhere"}, ValueError, "'./nowhere' is no folder"),
        ({"draft": "no/such-model"}, ValueError, "'no/such-model' cannot be loaded: "),
    ],
)
def test_options_that_cannot_be(wrong: dict[str, Any], error: type[Exception], message: str, tiny: Tiny) -> None:
    model = tiny("llama")
    with pytest.raises(error, match=message):
        specdec.compile(model, **wrong)
    assert not hasattr(model, "specdec")


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def test_a_draft_by_name_is_loaded_as_the_target_is(tmp_path: Path, fresh: Tiny, tiny: Tiny, prompts: Prompts) -> None:
    folder, target = saved(fresh("llama", seed=7).to(torch.bfloat16), tmp_path), tiny("llama")
    wrapped = wrap(target, folder)
    draft = wrapped.specdec.draft
    assert (draft.dtype, draft.device, draft.training) == (target.dtype, target.device, False)
    same(wrapped, target, **prompts([6, 3]), max_new_tokens=9)
    assert sum(wrapped.specdec.stats.proposed) > 0


def test_a_draft_by_name_brings_its_tokenizer(tmp_path: Path, fresh: Tiny, prompts: Prompts) -> None:
    def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
        vocabulary = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), unk_token=words[0])

    words = [f"w{i}" for i in range(97)]
    folder, target = saved(fresh("llama", seed=7), tmp_path), fresh("llama")
    tokenizer(words[::-1]).save_pretrained(folder)
    wrapped = wrap(target, folder, tokenizer=tokenizer(words))
    assert wrapped.specdec.draft.draft_tokenizer.get_vocab()["w0"] == 96
    same(wrapped, target, **prompts([6, 3]), max_new_tokens=9)
    assert sum(wrapped.specdec.stats.proposed) > 0


def test_the_handle_says_what_decodes(tiny: Tiny, prompts: Prompts) -> None:
    target = tiny("llama")
    wrapped = wrap(target, tiny("llama", seed=7), depth=3)
    before = repr(wrapped.specdec)
    assert TokenTree.chain(3).summary in before
    for said in "LlamaForCausalLM", "auto when sampling", "on first use", "eager", "0 decoded":
        assert said in before
    wrapped.generate(**prompts([6]), max_new_tokens=5)
    wrapped.generate(**prompts([6]), max_new_tokens=5, do_sample=True, use_cache=False)
    after = repr(wrapped.specdec)
    assert "logits are the model's own" in after
    assert "1 of 2 calls were decoded by specdec: use_cache=False" in after
    assert "n-grams" in repr(wrap(target, "ngram").specdec)
    assert "draft     none" in repr(wrap(target, None).specdec)


def test_a_step_says_that_it_compiles(tiny: Tiny, prompts: Prompts, caplog: pytest.LogCaptureFixture) -> None:
    """Once; the line says for how long, and how to do it beforehand."""
    caplog.set_level(logging.INFO, "specdec")
    wrapped = specdec.compile(tiny("llama"), draft=None)
    wrapped.generate(**prompts([6]), max_new_tokens=6)
    begun = [line for line in caplog.messages if line.startswith("compiles a step (judge)")]
    assert len(begun) == 1
    assert "seconds to a minute" in begun[0] and "warmup()" in begun[0]
    assert any(line.startswith("compiled a step (judge) in") for line in caplog.messages)
    caplog.clear()
    wrapped.generate(**prompts([6]), max_new_tokens=6)
    assert not [line for line in caplog.messages if line.startswith("compile")]


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, True), (True, False), (False, True)])
def test_a_terminal_shows_it_unless_asked_not_to(
    is_terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    progress.show_notes(shown)
    try:
        with progress.compiling("a step (draft)"):
            pass
    finally:
        progress.show_notes(False)
    assert ("specdec compiles a step (draft)" in capsys.readouterr().err) == (is_terminal and shown)
