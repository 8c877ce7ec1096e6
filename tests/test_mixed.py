"""Two sources in one draft, the text and a model: the law stays, the model's cache catches up, each is counted."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from test_control_decoding import _close_to, random_plans  # noqa: F401
from test_joining import decode, law_of, random_texts
from test_ngram import _search
from test_verifiers import SEEDS, VOCAB, check_law, draft, target  # noqa: F401
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec import TokenTree
from specdec.drafters import mixed
from specdec.drafters.lookup import LookUp, SuffixIndex
from specdec.drafters.mixed import MixedDrafter
from specdec.engine.control import Adaptive, Plan, Track
from specdec.engine.control.best import best_plan
from specdec.engine.control.estimate import Estimate
from specdec.engine.control.plan import Shape
from specdec.engine.loop import Decoder
from specdec.engine.stats import Stats
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.view import ModelView
from specdec.kernels.sampling import draw_children as kernel
from specdec.verifiers import VERIFIERS

BOTH = "draft model", "n-grams"


@pytest.mark.parametrize("max_ngram", [1, 2, 3, 5])
@pytest.mark.parametrize("vocab", [2, 3, 8])
def test_the_index_finds_what_a_plain_search_finds(vocab: int, max_ngram: int) -> None:
    """Where two tokens match at least; a text that grows by pieces, at every length."""
    chance, shortest, n_found = random.Random(vocab * max_ngram), min(2, max_ngram), 0
    for _ in range(20):
        text, index = [chance.randrange(vocab) for _ in range(40)], SuffixIndex(max_ngram)
        for n in range(1, 41):
            index.extend(text[len(index.tokens) : n])
            expected = _search(text[:n], 6, max_ngram)
            if all(text[n - shortest : n] != text[end - shortest : end] for end in range(shortest, n)):
                expected = []  # no so many tokens match
            assert index.continuation(6) == expected
            n_found += bool(expected)
    assert n_found > 30


@pytest.mark.parametrize("adapt", [False, None])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen2_moe", "falcon"])
def test_greedy_tokens(family: str, adapt: bool | None, tiny: Tiny, prompts: Prompts) -> None:
    """By the fused kernel, under a mask, and by the model's own attention."""
    model = tiny(family)
    wrapped = wrap(model, [tiny("llama", seed=7), "ngram"], adapt=adapt)
    for lengths in (RAGGED, [9]):
        same(wrapped, model, **prompts(lengths), max_new_tokens=60)
    assert set(wrapped.specdec.stats.sources) == set(BOTH)
    assert not wrapped.specdec.stats.dropped_drafts


@pytest.mark.parametrize("reads_at_once", [2, 16])
def test_the_model_knows_what_was_decoded_without_it(
    reads_at_once: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft model that is the target is always right, after any number of tokens that the text proposed; it reads
    them in the step, or, where they are many, before."""
    monkeypatch.setattr(mixed, "READS_AT_ONCE", reads_at_once)
    model = tiny("llama")
    drafter = MixedDrafter(ModelView(model), 3, LookUp(6, 3))
    decoder = Decoder(ModelView(model), drafter, CompiledSteps(False), Stats(), adapt=False)
    read: list[int] = []
    monkeypatch.setattr(drafter, "read", lambda texts, to=drafter.read: (read.extend(texts), to(texts)))
    texts = random_texts(40)
    for text in texts[::2]:
        text.prompt = text.prompt.repeat(3)[: len(text.prompt)]
    decode(decoder, texts, 5, law_of(False))
    model_, text_ = (decoder.stats.sources[name] for name in BOTH)
    assert model_.accepted == model_.verified > 100
    assert 0 < text_.accepted < text_.verified
    assert (len(read) > len(texts)) == (reads_at_once == 2)  # each once, for its prompt


@pytest.mark.usefixtures("random_plans")
def test_any_plans_keep_greedy_texts(tiny: Tiny) -> None:
    model = tiny("llama")
    drafter = MixedDrafter(ModelView(_close_to(model)), 3, LookUp(6, 3))
    decoder = Decoder(ModelView(model), drafter, CompiledSteps(False), Stats())
    decode(decoder, random_texts(40), 5, law_of(False))
    assert all(0 < decoder.stats.sources[name].accepted < decoder.stats.sources[name].verified for name in BOTH)


def _mixed(target: PreTrainedModel, draft: PreTrainedModel, verifier: str, **more: Any) -> PreTrainedModel:  # noqa: F811
    return wrap(target, [draft, "ngram"], verifier=verifier, depth=2, **more)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_texts_follow_the_exact_law(
    verifier: str, target: PreTrainedModel, draft: PreTrainedModel, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr("specdec.drafters.model.SUPPORT_SIZE", 4)
    wrapped = _mixed(target, draft, verifier)
    check_law(wrapped, target, "cut")
    for name in BOTH:
        source = wrapped.specdec.stats.sources[name]
        assert 0 < source.accepted < source.verified


def test_texts_follow_the_exact_law_with_any_plans(
    target: PreTrainedModel, draft: PreTrainedModel, random_plans: list[Plan], monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr("specdec.drafters.model.SUPPORT_SIZE", 4)
    check_law(_mixed(target, draft, "auto", adapt=True), target, "cut", n_calls=40)
    assert len({plan.depth for plan in random_plans}) > 1


@pytest.mark.parametrize("verifier", ["auto", "rrs", "coupled"])
def test_a_text_does_not_depend_on_its_neighbours(
    verifier: str, target: PreTrainedModel, draft: PreTrainedModel, prompts: Prompts  # noqa: F811
) -> None:  # fmt: skip
    wrapped = _mixed(target, draft, verifier)
    inputs = prompts([12, 2, 1, 6], vocab=VOCAB)

    def sample(rows: Sequence[int]) -> list[list[int]]:
        wrapped.specdec.seeds = [SEEDS[r] for r in rows]
        own = {name: x[list(rows)] for name, x in inputs.items()}
        return wrapped.generate(**own, do_sample=True, temperature=1.5, max_new_tokens=14)[:, 12:].tolist()

    together = sample(range(4))
    assert sample([3, 1]) == [together[3], together[1]]
    for row in range(4):
        assert sample([row]) == [together[row]]
    assert all(wrapped.specdec.stats.sources[name].accepted for name in BOTH)


def test_no_noise_is_read_twice(
    target: PreTrainedModel, draft: PreTrainedModel, prompts: Prompts, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """Of a text, each draw of the draft model's is by a position and a node that no other draw has."""
    keys: list[tuple[int, ...]] = []

    def noted(ids: Tensor, probs: Tensor, n_hubs: Tensor, counts: Tensor, *key: Any) -> Tensor:
        seeds, position, node = key[:3]
        drawn = zip(*(x[n_hubs < counts].tolist() for x in (seeds, position, node)), strict=True)
        keys.extend(set(drawn))  # rows of nobody repeat those of somebody
        return kernel.draw_children(ids, probs, n_hubs, counts, *key)

    monkeypatch.setattr("specdec.drafters.model.draw_children", noted)
    wrapped = wrap(target, [draft, "ngram"], verifier="rrs", depth=3)
    wrapped.specdec.seeds = SEEDS
    wrapped.generate(**prompts([12, 2, 1, 6], vocab=VOCAB), do_sample=True, max_new_tokens=40)
    live = [key for key in keys if key[0] in SEEDS]
    assert len(live) > 60
    assert len(set(live)) == len(live)


def test_many_prompts_and_streams(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    wrapped = wrap(model, [tiny("llama", seed=7), "ngram"])
    texts = [prompts([n])["input_ids"][0] for n in (9, 3, 12, 5, 1, 7)]
    for text in texts[:3]:
        text[len(text) // 2 :] = text[: len(text) - len(text) // 2].clone()
    for result in specdec.generate_many(wrapped, texts, max_batch_size=2, max_new_tokens=20, progress=False):
        expected = model.generate(texts[result.index][None], max_new_tokens=20)[0]
        assert result.tokens.tolist() == expected.tolist()
    assert set(wrapped.specdec.stats.sources) == set(BOTH)


def test_nothing_is_kept_of_a_call(tiny: Tiny, prompts: Prompts) -> None:
    """Texts hold prompts, and what the user's criteria hold; where they end, so does what was known of them."""
    wrapped = wrap(tiny("llama"), [tiny("llama", seed=7), "ngram"])
    wrapped.generate(**prompts(RAGGED), max_new_tokens=60)
    assert wrapped.specdec.stats.sources["n-grams"].drafts
    gc.collect()
    (decoder,) = wrapped.specdec._decoders.kept.values()
    assert not decoder.drafter.look_up._indexes


def test_one_compiled_draft_reads_any_number_of_tokens(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    wrapped = specdec.compile(model, [tiny("llama", seed=7), "ngram"], adapt=False)
    stats = wrapped.specdec.stats
    for first, *others in ([RAGGED, [11, 3, 7]], [[9], [14], [5]]):
        wrapped.generate(**prompts(first), max_new_tokens=40)
        stats.reset()
        for lengths in others:  # other texts, which are served at other steps
            out = wrapped.generate(**prompts(lengths), max_new_tokens=40)
            assert torch.equal(out, model.generate(**prompts(lengths), max_new_tokens=40))
        assert stats.seconds["compile"] == 0 and not stats.eager and not stats.fallbacks
        assert all(stats.sources[name].drafts > 2 for name in BOTH)


# What is planned


def _estimate(draft_seconds: float, row_seconds: float) -> tuple[Shape, Estimate]:
    shape = Shape(TokenTree.chain(8), (1, 2, 3, 8), (5, 8))
    estimate = Estimate(shape)
    for n_tokens in (1, 2, 9, 18):
        estimate.costs.forwards.setdefault(1, _curve()).learn(n_tokens, 1.0 + row_seconds * n_tokens)
        estimate.costs.forwards.setdefault(2, _curve()).learn(n_tokens, 1.0 + row_seconds * n_tokens)
    for depth in (1, 8):
        estimate.costs.drafts.setdefault(depth, _curve()).learn(1, draft_seconds * min(depth, 5))
    return shape, estimate


def _curve() -> Any:
    from specdec.engine.control.estimate import Curve

    return Curve()


def test_what_the_text_says_costs_no_draft() -> None:
    """With a draft model that is too dear, what was looked up is verified all the same."""
    shape, estimate = _estimate(draft_seconds=10.0, row_seconds=0.01)
    looked_up, not_found = Track(source=1), Track(source=0)
    assert best_plan([looked_up], shape, estimate, shape.depths, 0).allowed == (8,)
    plan = best_plan([looked_up, not_found], shape, estimate, shape.depths, 0)
    assert (plan.depth, plan.allowed) == (0, (8, 0))
    assert best_plan([not_found], shape, estimate, shape.depths, 0).depth == 0


def test_the_models_depth_stays_where_it_is_not_asked() -> None:
    shape, estimate = _estimate(draft_seconds=0.01, row_seconds=0.01)
    assert best_plan([Track(source=0)], shape, estimate, shape.depths, 0).depth == 8
    assert best_plan([Track(source=1)], shape, estimate, shape.depths, 3).depth == 3
    shape, estimate = _estimate(draft_seconds=0.01, row_seconds=100.0)  # not even these pay
    plan = best_plan([Track(source=1)], shape, estimate, shape.depths, 3)
    assert (plan.depth, plan.allowed, plan.n_tokens) == (3, (0,), 1)


def test_slots_ride_where_the_text_says_nothing() -> None:
    """Rows for them cost time; what the text says needs none, and the depth stays for the steps after."""
    policy = Adaptive(Shape(TokenTree.chain(8), (1, 2, 8), (2, 8), rides=True))
    for n_rows, seconds in ((1, 1.0), (4, 1.1), (9, 1.2), (27, 3.0)):
        policy.estimate.costs.forwards.setdefault(1, _curve()).learn(n_rows, seconds)
    policy._explorer._calibrations[1] = []
    found, not_found = Track(source=1), Track(source=0)
    assert policy.plan([not_found]).depth == 2
    changes = policy.changes
    for _ in range(3):
        plan = policy.plan([found])
        assert (plan.depth, plan.allowed) == (0, (8,))
        assert policy.plan([not_found]).depth == 2
    assert policy.changes == changes


def test_a_plan_asks_for_no_more_than_there_is() -> None:
    plan = Plan(8, (8, 8, 0), 19)
    assert plan.within([5, 8, 8]) == Plan(8, (5, 8, 0), 16)
    assert Plan(8, (8, 8), 12).within([8, 8]).n_tokens == 12  # as planned: not all are found


# What is given


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        (["ngram", "ngram"], r"\['ngram', 'ngram'\]"),
        (["model", "model"], r"\[LlamaForCausalLM, LlamaForCausalLM\]"),
        (["model"], r"\[LlamaForCausalLM\]"),
        ([], r"\[\]"),
        (["model", "ngram", "ngram"], r"\[LlamaForCausalLM, 'ngram', 'ngram'\]"),
        (["model", None], r"\[LlamaForCausalLM, NoneType\]"),
    ],
)
def test_other_sources_are_named(sources: list[Any], said: str, tiny: Tiny) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=rf'several drafts are a model and "ngram", got {said}'):
        specdec.compile(model, [model if source == "model" else source for source in sources])


def test_a_tree_is_for_a_model_alone(tiny: Tiny) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="what a draft model drafts alone; with n-grams it drafts a chain"):
        specdec.compile(model, [model, "ngram"], tree=TokenTree.from_widths(2, 2))


def test_any_order_and_what_is_said(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    for sources in ([tiny("llama", seed=7), "ngram"], ("ngram", tiny("llama", seed=7))):
        wrapped = wrap(model, sources)
        wrapped.generate(**prompts([9]), max_new_tokens=40)
        stats, said = wrapped.specdec.stats, repr(wrapped.specdec)
        assert "n-grams of the text, up to 8 tokens" in said and "LlamaForCausalLM" in said
        assert stats.to_dict()["sources"]["n-grams"]["drafts"] == stats.sources["n-grams"].drafts
        assert {f"drafts by {name}" for name in BOTH} <= {name for name, _ in stats.lines()}
        assert sum(source.accepted for source in stats.sources.values()) == sum(stats.accepted)
        assert sum(source.verified for source in stats.sources.values()) == sum(stats.proposed)
