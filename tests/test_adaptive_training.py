"""Adaptive tokens: what their rows see, what they leave alone, and the commands that train them; on tiny models."""

from __future__ import annotations

import json
import os
import signal
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from typer.testing import CliRunner

from specdec import zoo
from specdec.cli.app import app
from specdec.engine.packing import Nodes
from specdec.engine.tree import TokenTree
from specdec.graphs.compiled import as_region
from specdec.hf.adaptive import AdaptiveTokens
from specdec.hf.twin import Look
from specdec.hf.view import ModelView
from specdec.training import adaptive, foresight
from specdec.training.adaptive import Recipe, train_adaptive_tokens
from specdec.training.slots import SlotModel
from specdec.training.texts import sample

SIZES = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=48)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, intermediate_size=48)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=32, n_layer=2, n_head=4)),
}


def tiny(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def trained(model: PreTrainedModel, n_slots: int = 3) -> AdaptiveTokens:
    """Adaptive tokens that do something."""
    tokens = AdaptiveTokens.new(model, n_slots, rank=4)
    for weight in tokens.parameters():
        nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(weight.numel()))
    return tokens


def ids_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 4096, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_standard_rows_stay_as_they_are_to_the_bit(family: str) -> None:
    model = tiny(family)
    tokens, ids = trained(model), ids_of(2, 9)
    slot = torch.tensor([[0, 0, 0, 0, 0, 1, 0, 2, 3], [0] * 9])
    # Every token sees the standard tokens before it, as slots that see their text and nobody would.
    visible = (torch.ones(9, 9).tril().bool() & (slot == 0)[:, None]) | torch.eye(9).bool()
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]
    own = model(input_ids=ids, attention_mask=mask).logits
    module = Look(model).twin(model)
    tokens.insert(module)
    with tokens.rows.at(slot):
        logits = module(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(logits[slot == 0], own[slot == 0])
    assert not torch.isclose(logits[slot > 0], own[slot > 0]).all(-1).any()
    assert torch.equal(module(input_ids=ids).logits, model(input_ids=ids).logits)  # and so do forwards without slots


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_slot_sees_its_text_and_its_block_alone(family: str) -> None:
    model = tiny(family)
    slots = SlotModel.of(model, trained(model))
    slots.check()
    ids, anchors = ids_of(2, 20), torch.tensor([11, 5, 8])
    text, ahead = slots.forward(ids, anchors)
    places = anchors[:, None] + torch.arange(1, 4)
    torch.testing.assert_close(text, model(input_ids=ids).logits[:, places])

    later = ids.clone()
    later[:, 12:] = ids_of(2, 8, seed=1)
    assert torch.equal(slots.forward(later, anchors)[1], ahead)
    others = slots.forward(ids, torch.tensor([2, 5, 16]))[1]
    assert torch.equal(others[:, 1], ahead[:, 1])
    earlier = ids.clone()
    earlier[:, 8] += 1
    seen = (slots.forward(earlier % 4096, anchors)[1] != ahead).any(-1).all(-1).all(0)
    assert seen.tolist() == [True, False, True]
    # A slot is what stands before it in its block, too: the first slot's vector is not for the others alone.
    slots.tokens.vectors[0] += 1
    assert (slots.forward(ids, anchors)[1] != ahead).any(-1).all()


@torch.no_grad()
def test_slots_in_a_tree_say_what_they_say_in_training() -> None:
    model = tiny()
    slots, view, ids = SlotModel.of(model, trained(model, 2)), ModelView(model), ids_of(1, 12)
    ahead = slots.forward(ids, torch.tensor([7, 8]))[1][0]

    slots.tokens.insert(view.module)
    view.allocate(1, 32)
    view.prefill({0: (0, ids[0, :7])})
    # Below the pending token at 7 are its slots, and the next token with slots of its own.
    tree = TokenTree((-1, 0, 0, 1, 2, 4))
    tokens = torch.tensor([ids[0, 7], 0, ids[0, 8], 0, 0, 0])
    nodes = Nodes.packed(torch.tensor([7]), torch.tensor([6]), torch.arange(6), 6, 32, *tree.tensors(view.device))
    with slots.tokens.rows.at(torch.tensor([[0, 1, 0, 2, 1, 2]])):
        logits = view.forward(tokens, nodes).logits
    torch.testing.assert_close(logits[[1, 3]], ahead[0])
    torch.testing.assert_close(logits[[4, 5]], ahead[1])
    torch.testing.assert_close(logits[[0, 2]], model(input_ids=ids).logits[0, 7:9])


@torch.no_grad()
def test_slots_compile_into_one_graph_for_all_layers() -> None:
    model = tiny()
    tokens, ids = trained(model), ids_of(1, 7)
    module = Look(model).twin(model)
    tokens.insert(module)
    for layer in module.get_decoder().layers:
        vars(layer)["forward"] = types.MethodType(as_region(type(layer).forward), layer)

    def step(slot: torch.Tensor) -> torch.Tensor:
        with tokens.rows.at(slot):
            return module(input_ids=ids, use_cache=False).logits

    graphs: list[list[str]] = []

    def backend(graph: fx.GraphModule, _: object) -> Any:
        graphs.append([name for name, _ in graph.named_children()])
        return graph.forward

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for slot in torch.tensor([[[0, 0, 1, 2, 0, 3, 1]], [[0, 0, 0, 0, 0, 0, 2]]]):
        assert torch.equal(compiled(slot), step(slot))
    assert [len(regions) for regions in graphs] == [1]


def test_only_slots_learn_and_the_model_stays_alone() -> None:
    model = tiny()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    slots = SlotModel.of(model, trained(model))
    slots.forward(ids_of(1, 12), torch.tensor([3, 6]))[1].square().mean().backward()
    assert all(weight.grad is not None for weight in slots.tokens.parameters())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_model_that_ignores_positions_is_refused() -> None:
    model = tiny()
    own = type(model).forward

    class Counts(LlamaForCausalLM):  # positions by what the cache holds
        def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
            return own(self, *args, **kwargs)

    model.__class__ = Counts
    with pytest.raises(ValueError, match="Counts takes no adaptive tokens"):
        SlotModel.of(model, trained(model)).check()


def test_files_load_again_in_any_dtype(tmp_path: Path) -> None:
    model = tiny()
    tokens = trained(model)
    tokens.save(tmp_path, model)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        again = AdaptiveTokens.load(tmp_path, tiny().to(dtype))
        assert again.paths == tokens.paths and again.n_slots == 3
        for one, other in zip(again.parameters(), tokens.parameters(), strict=True):
            assert one.dtype == dtype and not one.requires_grad
            torch.testing.assert_close(one.float(), other, atol=1e-2, rtol=1e-2)


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"has no adaptive tokens: adaptive_tokens.safetensors"):
        AdaptiveTokens.load(tmp_path, model)
    model.config._name_or_path = "somewhere/mine"
    trained(model).save(tmp_path, model)
    other = tiny(seed=1)
    other.config._name_or_path = "yours"
    with pytest.raises(ValueError, match=r"of mine \(Llama.*the model is yours \(Llama.* with other weights"):
        AdaptiveTokens.load(tmp_path, other)
    with pytest.raises(ValueError, match=r"of mine \(LlamaForCausalLM.*the model is .*\(Qwen2ForCausalLM"):
        AdaptiveTokens.load(tmp_path, tiny("qwen2"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROMPT": 8, "LENGTH": 40, "N_TEXTS": 8, "N_GLANCE": 4}.items():
        monkeypatch.setattr(adaptive, name, value)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to learn from, and held out."""
    texts = zoo.held_out_texts()[:2]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(zoo.FOLDER / "tokenizer")
    return tuple(torch.tensor(tokenizer(text)["input_ids"]) for text in texts)


def recipe(method: str = "adapters", **changed: Any) -> Recipe:
    return Recipe(
        **{"method": method, "slots": 2, "rank": 4, "steps": 6, "batch": 2, "anchors": 4, "samples": 4} | changed
    )


@pytest.mark.parametrize("method", ["adapters", "joint"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    method: str, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wanted = tiny(), recipe(method, accumulate=2)
    figures = train_adaptive_tokens(model, *data(), tmp_path / "whole", wanted, tmp_path / "whole" / "work")

    calls, own = [], adaptive.loss_of

    def interrupted(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 5:  # in the third step, the first of two forwards
            os.kill(os.getpid(), signal.SIGINT)
        return own(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(adaptive, "loss_of", interrupted)
        train_adaptive_tokens(model, *data(), tmp_path / "parts", wanted, tmp_path / "parts" / "work")
    assert len(calls) == 6 and not (tmp_path / "parts" / "adaptive_tokens.safetensors").exists()
    resumed = train_adaptive_tokens(model, *data(), tmp_path / "parts", wanted, tmp_path / "parts" / "work")
    names = {"adaptive_tokens.safetensors"} | ({"model.safetensors"} if method == "joint" else set())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert resumed["foresight"] == figures["foresight"]
    assert [point["step"] for point in resumed["curve"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("method", ["adapters", "joint"])
def test_a_run_writes_what_loads_again_and_its_card(method: str, tmp_path: Path, small: None) -> None:
    model = tiny()
    figures = train_adaptive_tokens(model, *data(), tmp_path, recipe(method), tmp_path / "work")
    base = AutoModelForCausalLM.from_pretrained(tmp_path) if method == "joint" else model
    tokens = AdaptiveTokens.load(tmp_path, base)
    assert tokens.n_slots == 2 and bool(tokens.paths) == (method == "adapters")
    about = json.loads((tmp_path / "adaptive_tokens.json").read_text())
    assert about == figures | {"slots": 2, "base": about["base"]}
    assert (figures["loss_before"] == figures["loss_after"]) == (method == "adapters")
    assert f"{figures['foresight']['two_step'][1]:.2f}" in (tmp_path / "adaptive_tokens.md").read_text()
    assert (tmp_path / "adaptive_tokens.png").read_bytes().startswith(b"\x89PNG")


def test_training_brings_slots_nearer() -> None:
    model = tiny()
    model.get_output_embeddings().weight.data *= 20  # laws that say something
    slots, ids, anchors = SlotModel.of(model, AdaptiveTokens.new(model, 2, rank=4)), ids_of(2, 12), torch.tensor([2, 6])
    optimizer = torch.optim.AdamW(slots.tokens.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = adaptive.loss_of(slots, slots, ids, anchors)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1


def test_bad_data_is_refused_before_the_first_step(tmp_path: Path, small: None) -> None:
    model, (train, held_out) = tiny(), data()
    with pytest.raises(ValueError, match="there are 39 tokens to learn from, and must be 40 at least"):
        train_adaptive_tokens(model, train[:39], held_out, tmp_path, recipe(), tmp_path / "work")
    with pytest.raises(ValueError, match="there are 7 tokens held out, and must be 8 at least"):
        train_adaptive_tokens(model, train, held_out[:7], tmp_path, recipe(), tmp_path / "work")
    with pytest.raises(ValueError, match="texts of 40 tokens have 37 places for 38 anchors"):
        train_adaptive_tokens(model, train, held_out, tmp_path, recipe(anchors=38), tmp_path / "work")
    model.config.max_position_embeddings = 39
    with pytest.raises(ValueError, match="the model has 39 positions, and it is trained on texts of 40 tokens"):
        train_adaptive_tokens(model, train, held_out, tmp_path, recipe(), tmp_path / "work")
    with pytest.raises(ValueError, match="rank is 0"):
        recipe(rank=0)
    assert not list(tmp_path.iterdir())


def test_another_run_in_the_folder_is_refused(tmp_path: Path, small: None) -> None:
    train_adaptive_tokens(tiny(), *data(), tmp_path, recipe(steps=1), tmp_path / "work")
    with pytest.raises(ValueError, match=r"'steps': 1.*not with.*'steps': 2"):
        train_adaptive_tokens(tiny(), *data(), tmp_path, recipe(steps=2), tmp_path / "work")
    with pytest.raises(ValueError, match="take another folder"):
        train_adaptive_tokens(tiny(seed=1), *data(), tmp_path, recipe(steps=1), tmp_path / "work")


def test_texts_begin_as_the_model_expects() -> None:
    texts = adaptive.Texts(torch.arange(10, 500), torch.zeros(1, 256, dtype=torch.int64), first=3)
    ids, _ = texts.batch(0, recipe())
    assert ids.shape == (2, 256) and (ids[:, 0] == 3).all() and (ids[:, 2:] - ids[:, 1:-1] == 1).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "there is no text in it"),
        (b"caf\xe9", "not UTF-8 text, byte 3 is 0xe9"),
        (b"x = 1\n", "tokens at least"),
    ],
)
def test_files_that_cannot_be_learned_from_are_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_bytes(content)
    arguments = ["train", "adaptive-tokens", "--data", str(tmp_path / "my.txt"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and not (tmp_path / "out").exists()
    said = " ".join(done.output.split())
    assert message in said and "Traceback" not in said and "my.txt" in said.replace(" ", "")


def test_the_command_trains_a_model_in_a_folder(tmp_path: Path, small: None) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(zoo.FOLDER / "tokenizer")
    for saved in (tiny(), tokenizer):
        saved.save_pretrained(tmp_path / "model")
    (tmp_path / "my.txt").write_text("".join(zoo.held_out_texts()[:3]), encoding="utf-8")
    options = {"data": tmp_path / "my.txt", "model": tmp_path / "model", "out": tmp_path / "model", "steps": 2}
    options |= {"batch": 2, "anchors": 4, "samples": 4, "rank": 2, "device": "cpu", "threads": torch.get_num_threads()}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = CliRunner().invoke(app, ["train", "adaptive-tokens", *words])
    assert done.exit_code == 0, done.output
    assert (
        AdaptiveTokens.load(tmp_path / "model", AutoModelForCausalLM.from_pretrained(tmp_path / "model")).n_slots == 6
    )


def test_tokens_a_forward_are_counted_as_decoding_would() -> None:
    found = torch.zeros(1, 6, 3, dtype=torch.bool)
    found[0, 0, :2] = True  # slots 1 and 2 are right at the first anchor, slot 2 alone at the fourth
    found[0, 3, 1] = True
    # Two forwards a step: 4 tokens, then 2 at place 4, the end. One: 3 tokens, then 1 each at places 3, 4 and 5.
    assert foresight.tokens_a_forward(found, 3, in_one=False) == 6 / 4
    assert foresight.tokens_a_forward(found, 3, in_one=True) == 6 / 4
    assert foresight.tokens_a_forward(found, 1, in_one=True) == 6 / 5


def test_skip_bigrams_guess_what_stood_there_most_often() -> None:
    table = foresight.skip_bigrams(torch.tensor([1, 9, 2, 9, 1, 9, 3, 9, 1, 9, 3, 9]), 10)
    assert table[[1, 2, 9]].tolist() == [3, 1, 9]


def test_the_bundled_target_foresees_its_own_text() -> None:
    target, _, tokenizer = zoo.load_pair()
    slots = SlotModel.of(target, AdaptiveTokens.load(zoo.FOLDER / "target", target))
    texts = sample(target, zoo.held_out_prompts(tokenizer, 16, 32), 128, seed=0, greedy=True)
    found = foresight.hits(slots, texts, first=31)
    assert foresight.tokens_a_forward(found, 5, in_one=False) >= 1.3
    assert foresight.tokens_a_forward(found, 5, in_one=True) >= 1.55
