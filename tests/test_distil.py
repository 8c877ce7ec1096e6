"""Distillation: the objectives, the target's texts, the training of a draft, and `specdec train draft`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from specdec import zoo
from specdec.cli import inputs, train
from specdec.cli.app import app
from specdec.training import distil, texts
from specdec.training.distil import Recipe
from specdec.training.evaluate import agreement
from specdec.training.objectives import Objective

PLAIN: dict[Objective, Callable[[float, float], float]] = {
    Objective.forward: lambda p, q: p * (torch.tensor(p).log() - torch.tensor(q).log()).item(),
    Objective.reverse: lambda p, q: q * (torch.tensor(q).log() - torch.tensor(p).log()).item(),
    Objective.tv: lambda p, q: 0.5 * abs(p - q),
}
FUNCTIONS = {objective: objective.function for objective in Objective}


def laws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def tiny(seed: int, vocabulary: int = 300) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return distil.llama(vocabulary, 32, 1, 2, 1, 64).eval()


def text(count: int) -> torch.Tensor:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("objective", Objective)
def test_an_objective_is_its_formula(objective: Objective) -> None:
    log_p, log_q = laws(3, 5), laws(3, 5, seed=1)
    rows = zip(log_p.exp().tolist(), log_q.exp().tolist(), strict=True)
    plain = [sum(map(PLAIN[objective], p, q)) for p, q in rows]
    assert objective.function(log_p, log_q).item() == pytest.approx(sum(plain) / 3, abs=1e-6)


@pytest.mark.parametrize("objective", Objective)
def test_an_objective_rests_where_the_laws_agree(objective: Objective) -> None:
    logits = torch.randn(4, 9, requires_grad=True)
    log_q = logits.log_softmax(-1)
    assert objective.function(log_q.detach(), log_q).item() == 0
    objective.function(log_q.detach(), log_q).backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-6
    logits.grad = None
    objective.function(laws(4, 9), logits.log_softmax(-1)).backward()
    assert logits.grad.abs().max() > 1e-3


def test_other_tokens_are_one_outcome() -> None:
    logits = torch.randn(2, 3, 20)
    tokens = logits.topk(4).indices
    p = logits.softmax(-1)
    found = texts.coarse(logits, tokens).exp()
    assert torch.allclose(found[..., :4], p.gather(-1, tokens), atol=1e-6)
    assert torch.allclose(found[..., 4], p.scatter(-1, tokens, 0.0).sum(-1), atol=1e-6)
    for objective in Objective:
        other = torch.randn(2, 3, 20)
        whole = objective.function(p.log(), other.log_softmax(-1))
        assert 0 < objective.function(found.log(), texts.coarse(other, tokens)) < whole


def test_the_targets_law_is_kept() -> None:
    target, ids = tiny(0), text(60).view(3, 20)
    found = texts.law(target, ids)
    p = texts.forward(target, ids).softmax(-1)
    assert found.ids is ids and found.tokens.shape == (3, 20, texts.KEPT)
    assert torch.equal(found.tokens[..., 0], p.argmax(-1))
    assert torch.allclose(found.log_p[..., :-1].float().exp(), p.gather(-1, found.tokens.long()), rtol=5e-3)


def test_texts_are_collected_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "ROWS", 2)
    rows, written = text(100).view(5, 20), []

    def write(part: torch.Tensor, index: int) -> torch.Tensor:
        written.append(index)
        return part + index

    first = texts.collect(tiny(0), tmp_path, "own", rows, write)
    (tmp_path / "own-00001.pt").unlink()
    again = texts.collect(tiny(0), tmp_path, "own", rows, write)
    assert written == [0, 1, 2, 1]
    assert torch.equal(first.ids, rows + torch.tensor([0, 0, 1, 1, 2])[:, None])
    assert all(torch.equal(values, vars(again)[name]) for name, values in vars(first).items())


def test_a_step_in_parts_has_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"text": texts.law(tiny(1), text(320).view(16, 20))}
    monkeypatch.setattr(distil, "MIX", ("text",))
    gradients = []
    for accumulate in (1, 4):
        draft, recipe = tiny(0), Recipe(batch=160, accumulate=accumulate)
        parts = list(distil.parts_of_step(found, recipe, 3))
        assert [len(part) for part in parts] == [8 // accumulate] * accumulate
        for part in parts:
            log_q = texts.coarse(texts.forward(draft, part.ids), part.tokens.long())
            (Objective.forward.function(part.log_p.float(), log_q) / accumulate).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in draft.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=0.02, atol=0.02 * gradients[0].abs().max().item())


def test_a_run_begins_with_the_forward_kl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "SAMPLE", 40)
    used = []
    monkeypatch.setattr(Objective, "function", property(lambda self: used.append(self) or FUNCTIONS[self]))
    for share, expected in ((0.5, ["forward", "forward", "tv", "tv"]), (0, ["tv"] * 4), (1, ["forward"] * 4)):
        used.clear()
        recipe = Recipe(Objective.tv, steps=4, batch=512, samples=2, forward_share=share)
        distil.distil(tiny(0), tiny(1), text(600), text(600), recipe, tmp_path / str(share))
        assert [objective.value for objective in used] == expected


@pytest.mark.parametrize("first", [None, 7])
def test_rows_of_a_text_may_begin_with_a_token(first: int | None) -> None:
    rows = distil.rows_of_text(torch.arange(100, 110), 4, first)
    begun = [[100, 101, 102, 103], [104, 105, 106, 107]]
    assert rows.tolist() == (begun if first is None else [[7, 100 + i, 101 + i, 102 + i] for i in (0, 3, 6)])


def test_a_new_draft_begins_with_the_targets_embeddings() -> None:
    target, _, _ = zoo.load_pair()
    draft = distil.new_draft(target)
    products = [(m.lm_head.weight @ m.lm_head.weight.T).flatten() for m in (target, draft)]
    assert torch.corrcoef(torch.stack(products))[0, 1] > 0.9
    assert draft.lm_head.weight is not draft.model.embed_tokens.weight


def test_a_run_of_something_else_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "SAMPLE", 40)
    recipe = Recipe(steps=1, batch=512, samples=2)
    distil.distil(tiny(0), tiny(1), text(600), text(600), recipe, tmp_path)
    monkeypatch.setattr(distil, "collect", lambda *_: pytest.fail("work was done"))
    for target, tokens in ((tiny(2), text(600)), (tiny(0), text(700))):
        with pytest.raises(ValueError, match="take another folder, or empty it"):
            distil.distil(target, tiny(1), tokens, text(600), recipe, tmp_path)
    with pytest.raises(ValueError, match="the draft has 301 tokens and the target 300"):
        distil.distil(tiny(0), tiny(1, 301), text(600), text(600), recipe, tmp_path / "new")


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["train", "draft", *arguments], env={"COLUMNS": "200"})


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Text files: good ones, and ones that cannot be learned from."""
    source = "".join(zoo.held_out_texts()[:2])
    (tmp_path / "good.txt").write_text(source[:9000], encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    (tmp_path / "short.txt").write_text("x = 1\n" * 20, encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 5000)
    return tmp_path


def test_a_draft_is_trained_from_files(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "SAMPLE", 34)
    out = files / "out"
    options = ["--steps", "10", "--batch", "512", "--samples", "2", "--threads", str(torch.get_num_threads())]
    done = call("--data", f"{files}/good.txt", "--out", str(out), "--learning-rate", "0.04", *options)
    assert done.exit_code == 0, done.output
    assert "held-out greedy" in done.output
    figures = json.loads((out / "metrics.json").read_text())
    assert figures["curve"][-1]["step"] == 10 and figures["objective"] == "tv"

    target, _, _ = zoo.load_pair()
    draft, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert draft.dtype == target.dtype and draft.num_parameters() == figures["parameters"]
    ids = torch.tensor(tokenizer((files / "good.txt").read_text())["input_ids"] + [tokenizer.eos_token_id])
    measured = agreement(target, draft, [ids[-512:]])
    assert measured == pytest.approx(figures["held_out"], abs=1e-3) and measured["greedy"] > 0.02
    card = (out / "README.md").read_text()
    assert f"{figures['held_out']['greedy']:.1%}" in card and figures["command"] in card
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")

    more = files / "more"
    options[1] = "1"
    done = call("--data", f"{files}/good.txt", "--out", str(more), "--draft", str(out), *options)
    assert done.exit_code == 0, done.output
    trained = AutoModelForCausalLM.from_pretrained(more).lm_head.weight
    assert 0 < (trained - draft.lm_head.weight).abs().max() < 1e-3  # a first step of the warm-up


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{files}/good.txt", "--data", "{files}/empty.txt"], "--data {files}/empty.txt: there is no text"),
        (["--data", "{files}/latin.txt"], "--data {files}/latin.txt: not UTF-8 text, byte 0 is 0xe9"),
        (["--data", "{files}/short.txt"], "--data {files}/short.txt: it takes 1024 tokens at least, there are 81"),
        (
            ["--data", "{files}/good.txt", "--held-out", "{files}/short.txt"],
            "--held-out {files}/short.txt: it takes 512",
        ),
        (["--data", "{files}/none.txt"], "does not exist"),
        (["--data", "{files}/good.txt", "--model", "{files}/none"], "--model {files}/none: there is no such folder"),
        (["--data", "{files}/good.txt", "--draft", "{files}/none"], "--draft {files}/none: there is no such folder"),
        (["--data", "{files}/good.txt", "--objective", "l2"], "--objective"),
        (["--data", "{files}/good.txt", "--device", "abacus"], "--device abacus"),
    ],
)
def test_what_cannot_be_trained_on_is_named_before_anything_is_loaded(
    arguments: list[str], message: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs.Sources, "load", lambda _: pytest.fail("models were loaded"))
    done = call("--out", f"{files}/out", *(argument.format(files=files) for argument in arguments))
    assert done.exit_code == 2, done.output
    assert message.format(files=files) in done.output.replace("\n", "")
    assert "Traceback" not in done.output and not (files / "out").exists()


def test_ctrl_c_ends_as_it_does_elsewhere(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "distil", interrupt)
    assert call("--data", f"{files}/good.txt", "--out", f"{files}/out", "--threads", "1").exit_code == 130


def test_a_text_is_begun_as_the_tokenizer_begins_it() -> None:
    tokenizer = zoo.load_pair()[2]
    assert train.first_token(tokenizer) is None
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    assert train.first_token(tokenizer) == tokenizer.bos_token_id
