"""Drafts with a tokenizer of their own: what is shared, what is read and proposed, and texts that do not change."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from test_verifiers import TREES, check_law
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast

import specdec
from specdec.drafters.vocabulary import ForeignDraft, Overlap
from specdec.engine.loop import Decoder
from specdec.engine.slots import Rows
from specdec.engine.text import Text
from specdec.graphs.compiled import _own_code
from specdec.hf.laws import law_of

N = 97
SHAPES: dict[str, dict[str, Any]] = {"chain": {"depth": 3}, "tree": {"tree": TREES["ragged"]}}
Words = PreTrainedTokenizerFast


def words(numbers: Iterable[int], **special: Any) -> Words:
    """Token i is the word `w` followed by the i-th of the numbers."""
    vocabulary = {f"w{number}": i for i, number in enumerate(numbers)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_level(*tokens: str, **special: Any) -> PreTrainedTokenizerFast:
    """All bytes, ids 0 to 255, and these tokens."""
    vocabulary = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *tokens])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def pieces(*tokens: str, **special: Any) -> PreTrainedTokenizerFast:
    """As sentencepiece has them: an unknown token, all bytes, ids 1 to 256, and these tokens."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *tokens])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def rearranged(model: PreTrainedModel, rows: Tensor) -> PreTrainedModel:
    """The model with other ids: its token i is `model`'s token rows[i], or where that has none, one never likely."""
    n = model.config.vocab_size
    out, is_old = copy.deepcopy(model), rows < n
    old = {name: getattr(model, name)().weight.detach() for name in ("get_input_embeddings", "get_output_embeddings")}
    out.resize_token_embeddings(len(rows))
    with torch.no_grad():
        for name, weight in old.items():
            new = getattr(out, name)().weight
            new[is_old] = weight[rows[is_old]]
            new[~is_old] = 0
    return out


@pytest.fixture(scope="module")
def permuted(tiny: Tiny) -> tuple[PreTrainedModel, Words]:
    """The Llama of `model`, its tokens shuffled."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    return rearranged(tiny("llama"), order), words(order.tolist())


@pytest.fixture(scope="module")
def partial(tiny: Tiny) -> tuple[PreTrainedModel, Words]:
    """The same with 70 of the tokens, and 10 that it has not. The second is its unknown token."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))[:70].tolist() + list(range(N, N + 10))
    return rearranged(tiny("llama"), torch.tensor(order)), words(order, unk_token=f"w{order[1]}")


def overlap_of(wrapped: PreTrainedModel) -> Overlap | None:
    return wrapped.specdec._decoders.get(wrapped.specdec.draft).drafter.overlap


# What is shared.


def _overlap(target: Any, draft: Any, tiny: Tiny, n_target: int = 0, n_draft: int = 0) -> Overlap | None:
    sized = (
        tiny("llama", vocab_size=n or len(t), num_hidden_layers=1) for n, t in ((n_target, target), (n_draft, draft))
    )
    of_target, of_draft = sized
    return ForeignDraft(of_draft, target, draft).overlap(of_target)


def _table(overlap: Overlap | None, ids: Iterable[int]) -> list[tuple[int, bool]]:
    assert overlap is not None
    return [(int(overlap.draft_ids[i]), bool(overlap.is_shared[i])) for i in ids]


def test_tokens_are_matched_by_the_text_they_stand_for(tiny: Tiny) -> None:
    own = ["Ġcat", "cat", "Ċ", "caf", "Ã©", "<eot>"]
    foreign = ["▁cat", "é", "\n", "<eot>", "cat", "Ġ", "öö"]
    target = byte_level(*own[:2], *own[3:5])
    target.add_tokens([AddedToken("<eot>", special=True), AddedToken("▁cat"), AddedToken("öö")])  # in plain letters
    draft = pieces(*foreign)
    ids, draft_ids = target.get_vocab(), draft.get_vocab()
    overlap = _overlap(target, draft, tiny)
    shared = {
        "Ġcat": "▁cat",
        "cat": "cat",
        "Ã©": "é",
        "Ċ": "\n",
        "<eot>": "<eot>",
        "a": "<0x61>",
        "Ġ": "<0x20>",
        "öö": "öö",
    }
    assert _table(overlap, (ids[t] for t in shared)) == [(draft_ids[t], True) for t in shared.values()]
    # Not shared: read by their longest endings.
    endings = {"caf": "<0x66>", "▁cat": "cat"}
    assert _table(overlap, (ids[t] for t in endings)) == [(draft_ids[t], False) for t in endings.values()]
    assert overlap is not None
    assert overlap.is_shared.sum() == 256 + 5

    back = _overlap(draft, target, tiny)
    assert _table(back, (draft_ids[t] for t in shared.values())) == [(ids[t], True) for t in shared]
    # A byte that stands for what another token is too is not proposed; a real "Ġ" is two bytes.
    assert _table(back, [draft_ids["<0x0A>"], draft_ids["Ġ"]]) == [(ids["Ċ"], False), (ids["ł"], False)]


@pytest.mark.parametrize(
    ("special", "read"), [({"unk_token": "w5", "eos_token": "w6"}, 5), ({"eos_token": "w6"}, 6), ({}, 2)]
)
def test_a_token_without_an_ending_is_read_as_unknown(special: dict[str, str], read: int, tiny: Tiny) -> None:
    overlap = _overlap(words([8, 2, 9]), words(range(8), **special), tiny)
    assert _table(overlap, range(3)) == [(read, False), (2, True), (read, False)]


def test_tokens_without_a_row_are_none(tiny: Tiny) -> None:
    both = words(range(9))
    assert _table(_overlap(both, both, tiny, n_target=12, n_draft=6), range(12)) == [
        *((i, True) for i in range(6)), *((0, False) for _ in range(6))
    ]  # fmt: skip
    assert _overlap(both, words(range(9)), tiny, 12, 12) is None
    assert _overlap(both, both, tiny, 12, 13) is not None


# What is decoded.


@pytest.mark.parametrize("lengths", [[7], RAGGED], ids=["alone", "ragged"])
@pytest.mark.parametrize("shape", SHAPES)
def test_of_the_same_model_in_another_order_everything_is_accepted(
    shape: str, lengths: list[int], model: PreTrainedModel, permuted: Any, prompts: Prompts
) -> None:
    draft, tokenizer = permuted
    wrapped = wrap(model, draft, tokenizer=words(range(N)), draft_tokenizer=tokenizer, **SHAPES[shape])
    depth = wrapped.specdec._decoders.get(wrapped.specdec.draft).tree.depth
    same(wrapped, model, **prompts(lengths), max_new_tokens=3 * (depth + 1))
    assert wrapped.specdec.stats.accepted == [3 * len(lengths)] * depth
    assert not wrapped.specdec.stats.fallbacks


@pytest.mark.parametrize("n_draft", [103, 90])
def test_one_tokenizer_under_tables_of_two_sizes(n_draft: int, model: PreTrainedModel, prompts: Prompts) -> None:
    """90 tokens in all; the target has 97 rows."""
    draft, tokenizer = rearranged(model, torch.arange(n_draft)), words(range(90))
    inputs = prompts(RAGGED, vocab=90)
    biased = copy.deepcopy(model)  # a text of the tokens that there are
    with torch.no_grad():
        biased.get_output_embeddings().weight[90:] = 0
    wrapped = wrap(biased, draft, depth=3, tokenizer=tokenizer, draft_tokenizer=tokenizer)
    same(wrapped, biased, **inputs, max_new_tokens=12)
    assert wrapped.specdec.stats.acceptance_by_position == [1.0] * 3


@pytest.mark.parametrize("shape", SHAPES)
def test_some_tokens_are_shared(shape: str, model: PreTrainedModel, partial: Any, prompts: Prompts) -> None:
    draft, tokenizer = partial
    wrapped = wrap(model, draft, tokenizer=words(range(N)), draft_tokenizer=tokenizer, **SHAPES[shape])
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=24)
    stats = wrapped.specdec.stats
    assert 0 < stats.accepted[0] < stats.proposed[0]
    assert stats.accepted[1] > 0


def test_what_is_drafted_is_the_best_shared_token_of_a_plain_forward(
    model: PreTrainedModel, partial: Any, prompts: Prompts
) -> None:
    draft, tokenizer = partial
    wrapped = wrap(model, draft, depth=1, tokenizer=words(range(N)), draft_tokenizer=tokenizer)
    text = same(wrapped, model, **prompts([9]), max_new_tokens=80)[0]
    known = {int(token[1:]): i for token, i in tokenizer.get_vocab().items()}
    read = torch.tensor([known.get(i, 1) for i in range(N)])  # what it has not ends like no other
    logits = draft(read[text][None]).logits[0]
    ours = [i for i in range(N) if i in known]
    guesses = torch.tensor(ours)[logits[:, [known[i] for i in ours]].argmax(-1)]
    at, accepted, steps = 9, 0, 0
    while at < len(text):
        right = int(guesses[at - 1] == text[at])
        at, accepted, steps = at + 1 + right, accepted + right, steps + 1
    assert {int(t) for t in text} - known.keys(), "a text with tokens that the draft has not"
    assert (wrapped.specdec.stats.accepted, wrapped.specdec.stats.steps) == ([accepted], steps)
    assert accepted > 0


def test_a_tree_wider_than_what_is_shared(model: PreTrainedModel, tiny: Tiny, prompts: Prompts) -> None:
    """Two tokens, both drafted everywhere, and none of the places that are left makes trouble."""
    draft, tree = tiny("llama", vocab_size=5, num_hidden_layers=1), specdec.TokenTree.from_widths(4, 3)
    first, second = model.generate(**prompts(RAGGED), max_new_tokens=24)[0, -2:].tolist()
    tokenizers = {"tokenizer": words(range(N)), "draft_tokenizer": words([first, 200, 201, second, 202])}
    wrapped = wrap(model, draft, tree=tree, **tokenizers)
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=24)
    stats = wrapped.specdec.stats
    assert sum(stats.slots[4][1:]) > 0
    for verifier in ("auto", "rrs", "target"):
        wrapped = wrap(model, draft, tree=tree, verifier=verifier, **tokenizers)
        assert wrapped.generate(**prompts(RAGGED), max_new_tokens=12, do_sample=True).shape[1] == max(RAGGED) + 12
        assert not wrapped.specdec.stats.fallbacks


@pytest.mark.parametrize(("verifier", "shape"), [("auto", "ragged"), ("rrs", "ragged"), ("coupled", "chain")])
def test_texts_follow_the_exact_law(verifier: str, shape: str, tiny: Tiny) -> None:
    """Six tokens, of which the draft has four, in another order and among others."""
    size = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "head_dim": 4,
            "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    target = tiny("llama", vocab_size=6, **size)
    draft = tiny("gpt2", vocab_size=8, n_embd=8, n_layer=1, n_head=2, initializer_range=0.3)
    tokenizers = {"tokenizer": words(range(6)), "draft_tokenizer": words([11, 4, 0, 12, 5, 13, 2, 14])}
    wrapped = wrap(target, draft, verifier=verifier, tree=TREES[shape], **tokenizers)
    check_law(wrapped, target, "cut")
    for reached, *taken in wrapped.specdec.stats.slots.values():
        assert 0 < min(taken) <= sum(taken) < reached


def test_coupled_texts_are_those_without_a_draft(
    model: PreTrainedModel, permuted: Any, partial: Any, prompts: Prompts
) -> None:
    settings = {**prompts(RAGGED), "do_sample": True, "max_new_tokens": 16}
    alone = wrap(model, None, verifier="coupled")
    alone.specdec.seeds = range(4)
    expected = alone.generate(**settings)
    for draft, tokenizer in (permuted, partial):
        given = {"tokenizer": words(range(N)), "draft_tokenizer": tokenizer}
        wrapped = wrap(model, draft, verifier="coupled", depth=3, **given)
        wrapped.specdec.seeds = range(4)
        assert torch.equal(wrapped.generate(**settings), expected)
        if draft is permuted[0]:  # noise belongs to the target's ids: both draw the same
            assert wrapped.specdec.stats.accepted == [16] * 3
        assert wrapped.specdec.stats.accepted[0] > 0


def test_a_step_is_one_graph(model: PreTrainedModel, partial: Any, prompts: Prompts) -> None:
    draft, tokenizer = partial
    wrapped = wrap(model, draft, depth=2, tokenizer=words(range(N)), draft_tokenizer=tokenizer)
    decoder: Decoder = wrapped.specdec._decoders.get(wrapped.specdec.draft)
    law = law_of(LogitsProcessorList(), True, model.device)
    prompt = prompts([9])["input_ids"][0]
    drafted = []
    with torch.no_grad():
        for draft_ in (
            decoder.step.draft,
            torch.compile(_own_code(decoder.step.draft), backend="eager", fullgraph=True),
        ):
            state = decoder.buffers.open(1, 20, 9, torch.tensor([3]))
            rows = Rows(iter([Text(prompt, 8)]), state, decoder.target, decoder.drafter, decoder.buffers.grow)
            rows.fill(1)
            rows.write()
            rows.read(rows.live, rows.live)
            with torch.fx.experimental._config.patch(use_duck_shape=False):  # as steps are compiled
                draft_(state, law, decoder.launcher.count(1), 2)
            drafted.append(state.draft.tokens.clone())
    overlap, drawn = overlap_of(wrapped), state.draft.law
    assert overlap is not None
    assert drawn is not None
    assert torch.equal(*drafted)
    assert torch.equal(overlap.is_shared[drawn.support_ids], drawn.support_probs > 0)


# Where it is given.


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_draft_the_same(make: Callable[[Any], Any], fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama")  # some versions' do not pickle once `output_hidden_states` has left its hooks
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    draft, tokenizer = rearranged(model, order), words(order.tolist())
    other = make(wrap(model, draft, depth=3, tokenizer=words(range(N)), draft_tokenizer=tokenizer))
    same(other, model, **prompts(RAGGED), max_new_tokens=8)
    assert other.specdec.stats.accepted == [8] * 3


def test_an_assistant_of_one_call(model: PreTrainedModel, prompts: Prompts) -> None:
    order = torch.randperm(N + 6, generator=torch.Generator().manual_seed(1))
    draft, tokenizer = rearranged(model, order), words(order.tolist())
    given = {"assistant_model": draft, "tokenizer": words(range(N)), "assistant_tokenizer": tokenizer}
    wrapped = wrap(model, None, depth=3)
    inputs = prompts(RAGGED)
    expected = model.generate(**inputs, max_new_tokens=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="specdec")
        for _ in range(2):
            assert torch.equal(wrapped.generate(**inputs, max_new_tokens=8, **given), expected)
        assert wrapped.specdec.stats.accepted == [16] * 3
        assert len(wrapped.specdec._decoders.kept) == 1
        texts = [row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        results = specdec.generate_many(wrapped, texts, max_batch_size=2, max_new_tokens=8, **given)
        for row, result in enumerate(results):
            assert result.tokens is not None
            assert torch.equal(result.tokens[-8:], expected[row, -8:])
    assert wrapped.specdec.stats.accepted == [24] * 3
    assert not wrapped.specdec.stats.fallbacks


def test_an_assistant_that_transformers_has_changed_is_left_to_it(model: PreTrainedModel, prompts: Prompts) -> None:
    """Its own loop, sampling, takes from an assistant what is not shared, for good."""
    order = torch.randperm(N + 6, generator=torch.Generator().manual_seed(1)).tolist()
    draft, unknown = rearranged(model, torch.tensor(order)), {"unk_token": "w5"}
    settings = {**prompts([6]), "max_new_tokens": 6, "assistant_model": draft}
    settings |= {"tokenizer": words(range(N), **unknown), "assistant_tokenizer": words(order, **unknown)}
    wrapped = wrap(model, None)
    wrapped.generate(**settings)
    assert not wrapped.specdec.stats.fallbacks
    model.generate(**settings, do_sample=True)
    with pytest.warns(UserWarning, match="a draft that does not fit: the draft's embeddings were replaced"):
        assert wrapped.generate(**settings, do_sample=True).shape[1] == 12
    assert wrapped.specdec.stats.fallbacks.total() == 1


def test_memory_and_trees_know_the_draft(model: PreTrainedModel, permuted: Any) -> None:
    draft, tokenizer = permuted
    given = {"tokenizer": words(range(N)), "draft_tokenizer": tokenizer}
    assert wrap(model, draft, **given).specdec.memory(2, 50) == wrap(model, draft).specdec.memory(2, 50)
    with pytest.raises(ValueError, match="a node with 65 children; a draft model drafts 64"):
        wrap(model, draft, tree=specdec.TokenTree.from_widths(65), **given)
    with pytest.raises(ValueError, match="max_nodes must be at least 2, got 1"):
        wrap(model, draft, **given).specdec.tune(torch.tensor([[1]]), max_nodes=1)


def test_what_does_not_go_together(model: PreTrainedModel, tiny: Tiny) -> None:
    ours, other = words(range(N)), tiny("llama", vocab_size=90)
    with pytest.raises(ValueError, match=r"draft vocabulary 90 .* target vocabulary 97; .*draft_tokenizer="):
        wrap(model, other)
    for given in ("tokenizer", "draft_tokenizer"):
        missing = ({"tokenizer", "draft_tokenizer"} - {given}).pop()
        with pytest.raises(ValueError, match=f"go together, and there is no {missing}"):
            wrap(model, other, **{given: ours})
        with pytest.raises(TypeError, match=f"^{given} must be a transformers tokenizer, got Tokenizer"):
            wrap(model, other, **{given: ours.backend_tokenizer, missing: ours})
    for draft in ("ngram", None):
        with pytest.raises(ValueError, match=f"for a draft model, and the draft is {draft!r}"):
            wrap(model, draft, tokenizer=ours, draft_tokenizer=ours)
    with pytest.raises(ValueError, match=r"90 tokens .* have none in common with the target's 97"):
        wrap(model, other, tokenizer=ours, draft_tokenizer=words(range(N, 2 * N)))
