"""The examples do what they say."""

from __future__ import annotations

import json
import runpy
import signal
from collections.abc import Callable
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer

import specdec
from specdec import zoo
from specdec.engine.text import Text

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TEMPLATE = "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}# assistant\n"
FORGETFUL = "{% for m in messages if m.role == 'user' %}# user\n{{ m.content }}\n{% endfor %}# assistant\n"


def main(name: str) -> Callable[..., None]:
    """The main function of an example."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> list[PreTrainedModel]:
    """What the examples wrap; none of it may run transformers' own loop."""
    models, make = [], specdec.compile

    def compile(*given: Any, **more: Any) -> PreTrainedModel:
        models.append(make(*given, **more))
        return models[-1]

    monkeypatch.setattr(specdec, "compile", compile)
    return models


def test_a_drafter_of_ones_own_keeps_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    main("own_drafter")(compile=False)
    text, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n\n")
    target, _, tokenizer = zoo.load_pair()
    prompt = tokenizer("class Reader:\n    def __init__(", return_tensors="pt")
    plain = target.generate(**prompt, max_new_tokens=96, do_sample=False)
    assert text == tokenizer.decode(plain[0])
    steps, _, unit = last.partition(" ")
    assert unit == "tokens per step"
    assert float(steps) > 1.2


WORDS = ["def first(items):", "def second(items):", "class Last:"]


def _prompt(answers: list[str], tokenizer: Any) -> Tensor:
    """[1, length], what the model reads after these answers."""
    turns: list[dict[str, str]] = []
    for words, answer in zip_longest(WORDS[: len(answers) + 1], answers):
        turns += [{"role": "user", "content": words}, {"role": "assistant", "content": answer}]
    text = "\n".join(turn["content"] for turn in turns[:-1])
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("template", [None, TEMPLATE, FORGETFUL], ids=["plain", "template", "forgetful template"])
@pytest.mark.parametrize("is_stopped", [False, True], ids=["", "Ctrl-C"])
def test_a_chat_computes_only_what_is_new(
    template: str | None, is_stopped: bool, wrapped: list[PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And Ctrl-C stops the first answer, of which what was written stays."""
    target, draft, tokenizer = zoo.load_pair()
    tokenizer.chat_template = template
    monkeypatch.setattr(zoo, "load_pair", lambda **_: (target, draft, tokenizer))
    words, written, answers = iter([*WORDS, "/quit"]), [], []

    def ask(_: str) -> str:
        if not answers:  # the model is there, and warm
            view = wrapped[0].specdec._decoders.get(draft).target
            write = view._write
            monkeypatch.setattr(
                view, "_write", lambda p: (written.append(sum(len(ids) for _, ids in p.values())), write(p))
            )
        answers.append("")
        return next(words)

    def show(_: Any, text: str, stream_end: bool = False) -> None:
        answers[-1] += text
        if is_stopped and len(answers) == 1 and len(answers[0]) > 20 and not stream_end:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(TextStreamer, "on_finalized_text", show)
    before = signal.getsignal(signal.SIGINT)
    main("chat")(["--max-new-tokens", "24"], compile=False)
    assert signal.getsignal(signal.SIGINT) is before
    assert not wrapped[0].specdec.stats.fallbacks

    known, n_cached = torch.empty(1, 0, dtype=torch.int64), 0
    for turn, n_written in enumerate(written):
        prompt = _prompt(answers[:turn], tokenizer)
        length = min(prompt.shape[1], known.shape[1])
        n_shared = int((prompt[0, :length] == known[0, :length]).long().cumprod(0).sum())
        assert n_written == prompt.shape[1] - 1 - min(n_shared, n_cached)
        known = target.generate(prompt, max_new_tokens=24, do_sample=False)
        new = known[0, prompt.shape[1] :]
        if is_stopped and not turn:
            n = next(n for n in range(len(new)) if tokenizer.decode(new[:n]) == answers[0])
            known = known[:, : prompt.shape[1] + n]
        else:
            assert answers[turn] == tokenizer.decode(new, skip_special_tokens=True)
        n_cached = known.shape[1] - 1
    assert len(written) == len(WORDS)


def test_a_gpu_is_not_needed(wrapped: list[PreTrainedModel], capsys: pytest.CaptureFixture[str]) -> None:
    main("gpu")(["--device", "cpu", "--max-new-tokens", "16"], compile=False)
    out = capsys.readouterr().out
    assert out.count("the same text") == 4
    assert str(wrapped[0].specdec.stats) in out
    assert wrapped[0].specdec.stats.tokens == 4 * 16
    assert not wrapped[0].specdec.stats.fallbacks


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    """Ten prompts, one of them without a token."""
    _, _, tokenizer = zoo.load_pair()
    prompts = tokenizer.batch_decode(zoo.held_out_prompts(tokenizer, 10, 12))
    prompts[4] = ""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": prompt}) + "\n" for i, prompt in enumerate(prompts)))
    return path


def _results(path: Path) -> list[dict[str, Any]]:
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda result: result["index"])


@pytest.mark.parametrize("law", [[], ["--temperature", "0.8"]], ids=["greedy", "sampled"])
def test_many_prompts_go_on_where_they_were_stopped(
    law: list[str], prompts_file: Path, tmp_path: Path, wrapped: list[PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path) -> None:
        options = ["--max-new-tokens", "12", "--max-batch-size", "3", *law]
        main("many_prompts")([str(prompts_file), str(out), *options], compile=False)

    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    run(whole)
    expected = _results(whole)
    assert [(result["index"], result["id"]) for result in expected] == [(i, f"p{i}") for i in range(10)]
    assert [i for i, result in enumerate(expected) if "error" in result] == [4]
    target, _, tokenizer = zoo.load_pair()
    if not law:
        for result in expected[:4]:
            prompt = tokenizer(result["prompt"], return_tensors="pt")
            text = target.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
            assert result["text"] == tokenizer.decode(text, skip_special_tokens=True)

    take, calls = Text.take, count()

    def interrupted(text: Text, new: list[int], finished: bool) -> list[int]:
        if next(calls) == 30:
            raise KeyboardInterrupt
        return take(text, new, finished)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Text, "take", interrupted)
        run(parts)
    first = _results(parts)
    assert 2 < len(first) < 10
    assert all(result in expected for result in first)
    parts.write_bytes(parts.read_bytes()[:-20])  # as kill -9 would leave it
    given, generate_many = [], specdec.generate_many
    monkeypatch.setattr(
        specdec,
        "generate_many",
        lambda model, ids, **rest: (given.append(len(ids)), generate_many(model, ids, **rest))[1],
    )
    run(parts)
    assert _results(parts) == expected
    assert given == [10 - (len(first) - 1)]
    run(parts)  # nothing is left to do
    assert _results(parts) == expected
    assert len(given) == 1
    assert not any(model.specdec.stats.fallbacks for model in wrapped)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a', "is not JSON"),
        ('{"prompt": 5}', 'is not an object with a string "prompt"'),
        ('{"prompt": "a", "text": "b"}', "has a field 'text'"),
        ("\xff", "is not JSON"),
    ],
)
def test_a_bad_prompt_is_named_before_any_work(
    line: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zoo, "load_pair", lambda **_: pytest.fail("a model was loaded"))
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_bytes(f'{{"prompt": "a"}}\n{line}\n'.encode("latin-1"))
    with pytest.raises(SystemExit):
        main("many_prompts")([str(prompts), str(out)])
    assert f"{prompts}, line 2 {reason}" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("there", ["something else", "something\n", '{"index": 0, "prompt": "another"}\n'])
def test_a_file_that_holds_something_else_is_left_alone(
    there: str, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(there)
    with pytest.raises(SystemExit):
        main("many_prompts")([str(prompts_file), str(out)])
    assert f"error: {out}" in capsys.readouterr().err
    assert out.read_text() == there


@pytest.mark.slow
def test_the_evaluation_harness_gets_the_same_answers(
    wrapped: list[PreTrainedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    main("evaluate_harness")(["--limit", "3"], compile=False)
    assert "3 of 3 answers are the same" in capsys.readouterr().out
    assert wrapped[0].specdec.stats.decoded == 3
    assert not wrapped[0].specdec.stats.fallbacks


def test_a_loop_over_the_backend(capsys: pytest.CaptureFixture[str]) -> None:
    main("backend")()
    target, _, tokenizer = zoo.load_pair()
    prompt = tokenizer("class Reader:\n    def __init__(", return_tensors="pt")
    plain = target.generate(**prompt, max_new_tokens=64, do_sample=False)
    assert capsys.readouterr().out == tokenizer.decode(plain[0]) + "\n"
