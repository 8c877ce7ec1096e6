"""Decoding with trees: transformers' own tokens whatever the tree, and exactly the drafts that should be there."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StoppingCriteriaList

import specdec
from specdec import TokenTree
from specdec.engine.loop import Decoder
from specdec.hf.cache import Way

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2"]
TREES = {
    "widths": TokenTree.from_widths(2, 2, 1),
    "ragged": TokenTree((-1, 0, 0, 0, 1, 1, 2, 4, 4, 6, 7, 9)),  # with leaves on every level
    "fork": TokenTree.fork(3, 3),
    "chain": TokenTree.chain(4),
}


def near(model: PreTrainedModel) -> PreTrainedModel:
    """A draft that is often right, and often with its second guess: the model with noise on its weights."""
    draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in draft.parameters():
            p += 0.1 * p.std() * torch.randn(p.shape, generator=generator)
    return draft


def opposite(model: PreTrainedModel) -> PreTrainedModel:
    """A draft that is never right: what it thinks best is what the model thinks worst."""
    draft = copy.deepcopy(model)
    with torch.no_grad():
        draft.get_output_embeddings().weight.neg_()
    return draft


def decoder_of(wrapped: PreTrainedModel) -> Decoder:
    return wrapped.specdec._decoders.get(wrapped.specdec.draft)


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family: str, shape: str, tiny: Tiny, prompts: Prompts) -> None:
    model, tree = tiny(family), TREES[shape]
    for make in (lambda m: m, near, opposite):
        wrapped = wrap(model, make(model), tree=tree)
        same(wrapped, model, **prompts(RAGGED), max_new_tokens=2 * (tree.depth + 1))
        accepted = wrapped.specdec.stats.accepted
        if make is near:
            assert accepted[0] > 0
        elif make is opposite:
            assert accepted == [0] * tree.depth
        else:  # every step, all the way down, which wants the accepted entries of both caches in their places
            assert accepted == [2 * len(RAGGED)] * tree.depth


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_dense_attention(family: str, tiny: Tiny, prompts: Prompts) -> None:
    """Where the fused kernel is not: under a mask, made of the same ancestors."""
    model = tiny(family)
    for draft in (model, near(model)):
        wrapped = wrap(model, draft, tree=TREES["ragged"])
        decoder = decoder_of(wrapped)
        decoder.target.cache.way = decoder.drafter.view.cache.way = Way.MASKED
        same(wrapped, model, **prompts(RAGGED), max_new_tokens=15)
        assert decoder_of(wrapped) is decoder


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_half_precision(family: str, fresh: Tiny, prompts: Prompts) -> None:
    """The tokens are transformers' up to rounding: no other is better by more than the logits are rounded."""
    model = fresh(family).to(torch.bfloat16)
    wrapped = wrap(model, model, tree=TREES["widths"])
    out = wrapped.generate(**prompts([12]), max_new_tokens=32)
    logits = model(out).logits[0, 11:-1].float()
    chosen = logits.gather(1, out[0, 12:, None])[:, 0]
    assert (logits.amax(1) - chosen <= 0.02 * logits.abs().amax(1)).all()
    assert wrapped.specdec.stats.acceptance_by_position[0] > 0.9


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7])
def test_a_path_that_passes_the_limit_is_cut(
    max_new_tokens: int, shape: str, model: PreTrainedModel, prompts: Prompts
) -> None:
    for draft in (model, near(model)):
        wrapped = wrap(model, draft, tree=TREES[shape])
        same(wrapped, model, **prompts(RAGGED), max_new_tokens=max_new_tokens)
        assert wrapped.specdec.stats.tokens == len(RAGGED) * max_new_tokens


@pytest.mark.parametrize("shape", TREES)
def test_texts_end_inside_a_path(shape: str, model: PreTrainedModel, prompts: Prompts) -> None:
    inputs = prompts(RAGGED)
    free = model.generate(**inputs, max_new_tokens=12)[:, max(RAGGED) :].tolist()
    for eos in ([free[0][0], free[1][1]], [free[0][1], free[2][2], free[3][6]]):  # of paths of at least three tokens
        for draft in (model, near(model)):
            wrapped = wrap(model, draft, tree=TREES[shape])
            same(wrapped, model, **inputs, max_new_tokens=12, eos_token_id=eos, pad_token_id=0)


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("dense", [False, True])
def test_no_slot_to_spare(
    dense: bool, shape: str, model: PreTrainedModel, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches have room for the next step alone, and grow with every one."""
    monkeypatch.setattr(specdec.engine.memory, "SLOT_BUCKET", 1)
    wrapped = wrap(model, model, tree=TREES[shape])
    decoder = decoder_of(wrapped)
    if dense:
        decoder.target.cache.way = decoder.drafter.view.cache.way = Way.MASKED
    same(wrapped, model, **prompts([3, 20]), max_new_tokens=20)
    assert decoder.target.cache.n_slots < 20 + 20 + len(TREES[shape]) + TREES[shape].depth + 3
    assert decoder.target.cache.generation > 3


def test_more_children_than_the_vocabulary_has_tokens() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.tensor([[0, 2, 1, 1]])
    for tree in (TokenTree.from_widths(5, 2), TokenTree.from_widths(4)):
        wrapped = wrap(model, model, tree=tree)
        same(wrapped, model, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
        wrapped.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=12)
        assert not wrapped.specdec.stats.fallbacks


class _Walks:
    """The statistics of greedy decoding, from the texts and the draft's plain forward over them."""

    def __init__(self, tree: TokenTree) -> None:
        self.tree, self.steps, self.sample_steps, self.tokens = tree, 0, 0, 0
        self.proposed, self.accepted = [0] * tree.depth, [0] * tree.depth
        self.slots = {k: [0] * (k + 1) for k in sorted(set(tree.n_children)) if k}

    def add(self, text: Tensor, prompt_length: int, guesses: Tensor) -> None:
        """One text [length], decoded to its end; guesses [length, K], the draft's best tokens after each of its own."""
        at, steps = prompt_length, 0
        while at < len(text):
            room, node, depth = len(text) - at, 0, 0
            for level in range(min(room, self.tree.depth)):
                self.proposed[level] += 1
            while True:
                k = self.tree.n_children[node]
                if k and depth < room:
                    self.slots[k][0] += 1
                if k == 0 or depth >= room:
                    break
                own = guesses[at + depth - 1, :k].tolist()
                if int(text[at + depth]) not in own:
                    break
                child = own.index(int(text[at + depth]))
                self.slots[k][1 + child] += 1
                self.accepted[depth] += 1
                node, depth = self.tree.first_child[node] + child, depth + 1
            at, steps = at + min(depth + 1, room), steps + 1
        self.tokens += len(text) - prompt_length
        self.sample_steps += steps
        self.steps = max(self.steps, steps)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("shape", TREES)
def test_every_count_is_what_plain_forwards_say(shape: str, family: str, tiny: Tiny, prompts: Prompts) -> None:
    """What the draft proposes after any accepted path is what its plain forward proposes there: nothing in its cache is
    stale or out of place, and each child that is accepted is counted where it belongs."""
    model, tree, n_new = tiny(family), TREES[shape], 43
    draft, inputs = near(model), prompts(RAGGED)
    wrapped = wrap(model, draft, tree=tree)
    out = same(wrapped, model, **inputs, max_new_tokens=n_new)
    expected = _Walks(tree)
    for row, length in enumerate(RAGGED):
        text = out[row, max(RAGGED) - length :]
        expected.add(text, length, draft(text[None]).logits[0].topk(max(tree.n_children)).indices)
    stats = wrapped.specdec.stats
    found = {name: getattr(stats, name) for name in vars(expected) if name != "tree"}
    assert found == {name: value for name, value in vars(expected).items() if name != "tree"}
    assert all(min(counts) > 0 for counts in stats.slots.values()), "every child is taken some time"


@pytest.mark.parametrize("budget", [12, 20])
@pytest.mark.parametrize("shape", TREES)
def test_counts_end_with_the_text_whoever_ends_it(
    shape: str, budget: int, model: PreTrainedModel, prompts: Prompts
) -> None:
    """The device at an end of text, or the host where the user's criteria end it; also before a later one that the
    device has seen in the same step."""
    draft, inputs = near(model), prompts([9])
    text = model.generate(**inputs, max_new_tokens=budget)[0, 9:].tolist()
    firsts = [n for n in range(1, 12) if text[n - 1] not in text[: n - 1]]
    assert len(firsts) > 3
    for n in firsts:
        ends = StoppingCriteriaList([lambda ids, scores, n=n, **_: torch.tensor([ids.shape[1] >= 9 + n])])
        ways: list[dict[str, Any]] = [{"eos_token_id": text[n - 1]}, {"stopping_criteria": ends}]
        if text[n] not in text[:n]:
            ways.append({"stopping_criteria": ends, "eos_token_id": text[n]})
        counts = []
        for way in ways:
            wrapped = wrap(model, draft, tree=TREES[shape])
            assert wrapped.generate(**inputs, max_new_tokens=budget, **way)[0, 9:].tolist() == text[:n]
            counts.append((wrapped.specdec.stats.proposed, wrapped.specdec.stats.accepted))
        assert counts == counts[:1] * len(counts), n


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("shape", TREES)
def test_counts_of_slots_and_positions_agree(
    shape: str, do_sample: bool, model: PreTrainedModel, prompts: Prompts
) -> None:
    tree = TREES[shape]
    wrapped = wrap(model, near(model), tree=tree)
    wrapped.generate(**prompts(RAGGED), max_new_tokens=17, do_sample=do_sample)
    stats = wrapped.specdec.stats
    assert stats.proposed[0] == stats.sample_steps  # a live text has room for a token at least
    assert sum(sum(taken) for _, *taken in stats.slots.values()) == sum(stats.accepted)
    # Each step adds what it accepts and one more, but for a text's last, which may have no room for that one.
    cut = stats.sample_steps + sum(stats.accepted) - stats.tokens
    assert 0 <= cut <= len(RAGGED)
    for reached, *taken in stats.slots.values():
        assert sum(taken) <= reached
    for k, shares in stats.acceptance_by_slot.items():
        assert [s * stats.slots[k][0] for s in shares] == pytest.approx(stats.slots[k][1:])
    told = json.loads(json.dumps(stats.to_dict()))
    assert told == stats.to_dict()
    assert told["acceptance_by_slot"] == {str(k): list(v) for k, v in stats.acceptance_by_slot.items()}


@pytest.mark.slow
def test_the_compiled_step_writes_the_same(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama", num_hidden_layers=1)
    draft, tree = near(model), TokenTree((-1, 0, 0, 2))
    eager, compiled = (specdec.compile(model, draft, tree=tree, compile=c) for c in (False, True))
    texts = []
    for wrapped in (eager, compiled):
        wrapped.specdec.seeds = [1, 2, 3, 4]
        texts.append(wrapped.generate(**prompts(RAGGED), max_new_tokens=15, do_sample=True))
    assert torch.equal(*texts)
    assert compiled.specdec.stats.slots == eager.specdec.stats.slots
    assert min(eager.specdec.stats.slots[2]) > 0
    assert compiled.specdec.stats.seconds["compile"] > 0


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_draft_the_same_tree(make: Callable[[Any], Any], fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama")
    wrapped = wrap(model, model, tree=TREES["widths"], verifier="traversal")
    other = make(wrapped)
    assert other.specdec.config == wrapped.specdec.config
    same(other, model, **prompts(RAGGED), max_new_tokens=8)
    assert other.specdec.stats.accepted == [8, 8, 8]
