"""The training of the bundled pair, on tiny models and texts (of drafts: test_distil.py)."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from specdec import zoo
from specdec.hf.adaptive import AdaptiveTokens
from specdec.training import adaptive, data, distil, loop, pair


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "TARGET_BATCH", 1024)
    monkeypatch.setattr(distil, "SAMPLE", 48)


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return distil.llama(4096, 32, 1, 2, 1, 64)


def train(kind: str, model: LlamaForCausalLM, work: Path, seed: int = 0) -> None:
    tokens = torch.randint(0, 4096, (4000,), generator=torch.Generator().manual_seed(1))
    if kind == "target":
        pair.train_target(model, tokens, tokens[:600], steps=6, seed=seed, work=work)
    else:
        recipe = distil.Recipe(steps=6, batch=1024, accumulate=2, samples=4, seed=seed)
        distil.distil(tiny(7), model, tokens, tokens[:600], recipe, work)


@pytest.mark.parametrize("kind", ["target", "draft"])
def test_a_resumed_run_equals_an_uninterrupted_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped, resumed = tiny(0), tiny(0), tiny(3)
    train(kind, whole, tmp_path / "whole")
    rate = loop.learning_rate

    def press_ctrl_c(step: int, *others: Any) -> float:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return rate(step, *others)

    monkeypatch.setattr(loop, "learning_rate", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        train(kind, stopped, tmp_path / "parts")
    monkeypatch.setattr(loop, "learning_rate", rate)
    assert torch.load(tmp_path / "parts" / f"{kind}.pt")["step"] == 3
    train(kind, resumed, tmp_path / "parts")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert not torch.equal(whole.model.embed_tokens.weight, stopped.model.embed_tokens.weight)
    assert (tmp_path / "parts" / f"{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    train("target", tiny(0), tmp_path)
    with pytest.raises(ValueError, match=r"'seed': 0.*'seed': 1"):
        train("target", tiny(0), tmp_path, seed=1)


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [loop.learning_rate(step, 1000, 2.0, 100) for step in range(1001)]
    assert rates[0] == 0.02 and rates[99] == rates[100] == 2.0 and rates[1000] == 0.0
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_windows_need_enough_tokens() -> None:
    with pytest.raises(ValueError, match="5 tokens are less than one window of 6"):
        data.random_windows(torch.arange(5), 1, 6, seed=0)


def test_the_split_of_modules_is_fixed() -> None:
    assert data.is_held_out("argparse") and data.is_held_out("queue")
    assert not data.is_held_out("inspect") and not data.is_held_out("typing")


def test_reading_skips_tests_and_names_packages(tmp_path: Path) -> None:
    for name in ("a.py", "p/__init__.py", "p/b.py", "p/test/c.py", "site-packages/d.py", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = data.read_corpus(tmp_path)
    assert corpus.train | corpus.held_out == {"a": "a.py", "p": "p/__init__.py", "p.b": "p/b.py"}
    with pytest.raises(FileNotFoundError, match="no Python module"):
        data.read_corpus(tmp_path / "nowhere")


def test_a_whole_run_writes_a_pair_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    names = [f"m{i}" for i in range(60)]
    for i, name in enumerate(names):
        (source / f"{name}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 8)
    held_out = [name for name in names if data.is_held_out(name)]
    monkeypatch.setattr(pair, "new_target", lambda scale: tiny(0))
    monkeypatch.setattr(pair, "new_draft", lambda target, layers: tiny(1))
    monkeypatch.setattr(adaptive, "LENGTH", 48)
    monkeypatch.setattr(pair, "ADAPTIVE", adaptive.Recipe(slots=2, rank=2, steps=2, anchors=4, samples=4))
    out = tmp_path / "out"
    options = {"out": out, "work": tmp_path / "work", "target_steps": 2, "draft_steps": 2, "samples": 4}
    threads = torch.get_num_threads()
    figures = pair.train_pair(**options, source=source, threads=threads)

    monkeypatch.setattr(zoo, "FOLDER", out)
    target, draft, tokenizer = zoo.load_pair()
    assert target.dtype == draft.dtype == torch.float32
    assert zoo.metrics() == json.loads(json.dumps(figures))
    assert len(zoo.held_out_texts()) == figures["held_out_modules"] == len(held_out)
    assert zoo.held_out_prompts(tokenizer, 2, 8).shape == (2, 8)
    card = (out / "README.md").read_text()
    assert f"{figures['target']['loss']:.3f}" in card and figures["command"] in card

    before = (out / "target" / "model.safetensors").read_bytes()
    options |= {"keep_target": True, "work": tmp_path / "anew", "draft_steps": 3}
    again = pair.train_pair(**options, source=source, threads=threads)
    assert again["target"] == figures["target"] and again["draft"]["steps"] == 3
    assert (out / "target" / "model.safetensors").read_bytes() == before
    assert AdaptiveTokens.load(out / "target", target).n_slots == 2
