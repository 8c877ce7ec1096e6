"""Adaptive tokens draft, in two forwards a step and in one: the law stays, and what is drafted is what slots say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from side_by_side import RAGGED, Prompts, Tiny, same, tokens_of, wrap
from test_control_decoding import random_plans  # noqa: F401
from test_joining import EOS, decode, law_of, random_texts
from test_verifiers import SEEDS, VOCAB, check_law
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec import TokenTree
from specdec.config import Config
from specdec.drafters.adaptive import Adaptive
from specdec.engine.control import Plan
from specdec.engine.draft import Draft
from specdec.engine.loop import Decoder
from specdec.engine.state import BatchState
from specdec.engine.stats import Stats
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.view import ModelView
from specdec.kernels.sampling import draw_children as kernel
from specdec.training.slots import SlotModel
from specdec.verifiers import VERIFIERS

TREE = TokenTree.from_widths(3, 2, 1)
KINDS = "one forward", "two forwards", "tree"


def wrapped_as(kind: str, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    more = {"tree": TREE} if kind == "tree" else {"depth": 4}
    return wrap(model, Adaptive(tokens_of(model), in_one=kind == "one forward"), **(more | options))


@pytest.mark.parametrize("adapt", [False, None])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "falcon"])
def test_greedy_tokens(family: str, kind: str, adapt: bool | None, tiny: Tiny, prompts: Prompts) -> None:
    """By the fused kernel, under a mask, and by the model's own attention."""
    model = tiny(family)
    wrapped = wrapped_as(kind, model, adapt=adapt)
    for lengths in (RAGGED, [9]):
        same(wrapped, model, **prompts(lengths), max_new_tokens=40)
    assert not wrapped.specdec.stats.dropped_drafts
    assert sum(wrapped.specdec.stats.proposed) > 0


@pytest.mark.parametrize("kind", ["one forward", "two forwards"])
def test_what_slots_say_is_drafted(kind: str, tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts that grow by any number of tokens a step, as forwards over the whole text say it."""
    model = tiny("llama")
    tokens, drafts = tokens_of(model), []
    own = BatchState.propose

    def noted(state: BatchState, draft: Draft) -> None:
        for row in (~state.finished).nonzero()[:, 0].tolist():
            text = state.tokens[row, : state.lengths[row] + 1]
            drafts.append((text.clone(), draft.tokens[row, : draft.counts[row]].clone()))
        own(state, draft)

    monkeypatch.setattr(BatchState, "propose", noted)
    wrapped = wrap(model, Adaptive(tokens, in_one=kind == "one forward"), depth=4, adapt=False)
    wrapped.generate(**prompts(RAGGED), max_new_tokens=30)
    slots = SlotModel.of(model, tokens)
    for text, drafted in drafts:
        in_two = int(kind == "two forwards")  # the first is the model's own
        ids = F.pad(text, (0, 6))[None]
        with torch.no_grad():
            says = slots.forward(ids, torch.tensor([len(text) - 2 + in_two]))[1][0, 0].argmax(-1).tolist()
            first = model(input_ids=text[None]).logits[0, -1].argmax()[None].tolist()
        assert drafted.tolist() == (first + says[:3] if in_two else says)
    assert len(drafts) > 50


@pytest.fixture(scope="module")
def target(tiny: Tiny) -> PreTrainedModel:
    return tiny("llama", vocab_size=VOCAB, num_hidden_layers=1, hidden_size=8, intermediate_size=8, head_dim=4,
                num_attention_heads=2, num_key_value_heads=1)  # fmt: skip


def _sampled(kind: str, target: PreTrainedModel, verifier: str, **more: Any) -> PreTrainedModel:
    shape = {"tree": TokenTree.from_widths(2, 1)} if kind == "tree" else {"depth": 2}
    draft = Adaptive(tokens_of(target, std=0.6), in_one=kind == "one forward")
    return wrap(target, draft, verifier=verifier, **(shape | more))


@pytest.mark.parametrize(
    ("kind", "verifiers"),
    [("one forward", "auto rrs traversal coupled"), ("two forwards", "auto"), ("tree", "auto rrsw coupled")],
)
def test_texts_follow_the_exact_law(
    kind: str, verifiers: str, target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.drafters.model.SUPPORT_SIZE", 4)
    for verifier in verifiers.split():
        wrapped = _sampled(kind, target, verifier)
        check_law(wrapped, target, "cut")
        stats = wrapped.specdec.stats
        assert 0 < sum(stats.accepted) < sum(stats.proposed)


def test_texts_follow_the_exact_law_with_any_plans(
    target: PreTrainedModel, random_plans: list[Plan], monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """Steps with and without slots, of which any number of drafted tokens is judged."""
    monkeypatch.setattr("specdec.drafters.model.SUPPORT_SIZE", 4)
    wrapped = _sampled("one forward", target, "auto", adapt=True)
    check_law(wrapped, target, "cut", n_calls=40)
    assert {plan.depth for plan in random_plans} == {0, 1, 2}
    assert 0 < sum(wrapped.specdec.stats.accepted) < sum(wrapped.specdec.stats.proposed)


@pytest.mark.parametrize("verifier", ["auto", "rrs", "coupled"])
def test_a_text_does_not_depend_on_its_neighbours(verifier: str, target: PreTrainedModel, prompts: Prompts) -> None:
    wrapped, inputs = _sampled("one forward", target, verifier), prompts([12, 2, 1, 6], vocab=VOCAB)

    def sample(rows: list[int]) -> list[list[int]]:
        wrapped.specdec.seeds = [SEEDS[r] for r in rows]
        own = {name: x[rows] for name, x in inputs.items()}
        return wrapped.generate(**own, do_sample=True, temperature=1.5, max_new_tokens=14)[:, 12:].tolist()

    together = sample([0, 1, 2, 3])
    assert sample([3, 1]) == [together[3], together[1]]
    for row in range(4):
        assert sample([row]) == [together[row]]


def test_no_noise_is_read_twice(target: PreTrainedModel, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[tuple[int, ...]] = []

    def noted(ids: Tensor, probs: Tensor, n_hubs: Tensor, counts: Tensor, *key: Any) -> Tensor:
        keys.extend(zip(*(x[n_hubs < counts].tolist() for x in key[:3]), strict=True))
        return kernel.draw_children(ids, probs, n_hubs, counts, *key)

    monkeypatch.setattr("specdec.drafters.model.draw_children", noted)
    wrapped = _sampled("one forward", target, "rrs", depth=4)
    wrapped.specdec.seeds = SEEDS
    wrapped.generate(**prompts([12, 2, 1, 6], vocab=VOCAB), do_sample=True, max_new_tokens=40, min_new_tokens=40)
    live = [key for key in keys if key[1] < 12]  # rows that have ended go on drawing the same for nobody
    assert len(live) > 30
    assert len(set(live)) == len(live)


@pytest.mark.usefixtures("random_plans")
@pytest.mark.parametrize("kind", KINDS)
def test_any_plans_keep_greedy_texts(kind: str, tiny: Tiny) -> None:
    """Texts join and leave; rows are taken by others, for which nothing has been drafted yet."""
    model = tiny("llama")
    view = ModelView(model)
    draft = Adaptive(tokens_of(model), in_one=kind == "one forward")
    config = Config(tree=TREE) if kind == "tree" else Config(depth=4)
    decoder = Decoder(view, draft.drafter(view, config, VERIFIERS["auto"]), CompiledSteps(False), Stats())
    texts = random_texts(40)
    decode(decoder, texts, 5, law_of(False))
    for text in texts[::4]:
        out = model.generate(
            text.prompt[None], max_new_tokens=text.max_new_tokens, eos_token_id=EOS.tolist(), pad_token_id=0
        )
        assert text.tokens == out[0, len(text.prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_up_to_the_last_learned_position(kind: str, tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("gpt2")
    wrapped = wrapped_as(kind, model, adapt=False)
    same(wrapped, model, **prompts([100, 90]), max_new_tokens=28)


def test_processors_that_look_at_the_text(tiny: Tiny, prompts: Prompts) -> None:
    """They are asked on the host, between two forwards."""
    model = tiny("llama")
    for kind in KINDS:
        wrapped = wrapped_as(kind, model, adapt=False)
        same(wrapped, model, **prompts(RAGGED), max_new_tokens=30, repetition_penalty=1.3, no_repeat_ngram_size=2)
        assert sum(wrapped.specdec.stats.proposed) > 0


@pytest.mark.parametrize("kind", ["one forward", "two forwards"])
def test_compiled_steps(kind: str, tiny: Tiny, prompts: Prompts) -> None:
    """One function a step where it is one forward; any number of texts compiles nothing again."""
    model = tiny("llama")
    wrapped = specdec.compile(model, Adaptive(tokens_of(model), in_one=kind == "one forward"), depth=3, adapt=False)
    stats = wrapped.specdec.stats
    for first, *others in ([RAGGED, [11, 3, 7]], [[9], [14], [5]]):
        wrapped.generate(**prompts(first), max_new_tokens=30)
        stats.reset()
        for lengths in others:
            out = wrapped.generate(**prompts(lengths), max_new_tokens=30)
            assert torch.equal(out, model.generate(**prompts(lengths), max_new_tokens=30))
        assert stats.seconds["compile"] == 0 and not stats.eager and not stats.fallbacks
    (decoder,) = wrapped.specdec._decoders.kept.values()
    names = {key[0] for key in decoder.steps._steps}
    assert names == ({"judge_and_draft"} if kind == "one forward" else {"draft", "judge"})


def test_it_takes_no_memory_but_for_slots(tiny: Tiny) -> None:
    model = tiny("llama")
    one, two, plain = (
        wrap(model, draft, depth=4).specdec.memory(4, 900)
        for draft in (Adaptive(tokens_of(model)), Adaptive(tokens_of(model), in_one=False), "ngram")
    )
    assert one == two == plain  # in whole blocks of slots


@pytest.mark.parametrize("adapt", [False, None])
def test_with_ngrams(adapt: bool | None, tiny: Tiny, prompts: Prompts) -> None:
    """Slots ride behind what the text says by itself, too."""
    model = tiny("llama")
    wrapped = wrap(model, [Adaptive(tokens_of(model)), "ngram"], adapt=adapt)
    texts = prompts([12, 20, 7])
    texts["input_ids"][:, -6:-3] = texts["input_ids"][:, -3:]
    for _ in range(2):
        same(wrapped, model, **texts, max_new_tokens=60)
    assert set(wrapped.specdec.stats.sources) == {"adaptive tokens", "n-grams"}
    same(wrapped, model, **texts, max_new_tokens=30, repetition_penalty=1.1)


@pytest.mark.parametrize("verifier", ["auto", "coupled"])
def test_with_ngrams_texts_follow_the_exact_law(
    verifier: str, target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.drafters.model.SUPPORT_SIZE", 4)
    wrapped = wrap(target, [Adaptive(tokens_of(target, std=0.6)), "ngram"], verifier=verifier, depth=2)
    check_law(wrapped, target, "cut")
    slots, text = (wrapped.specdec.stats.sources[name] for name in ("adaptive tokens", "n-grams"))
    assert 0 < slots.accepted < slots.verified
    assert text.verified > 0 and (
        text.accepted > 0 or verifier == "auto"
    )  # few are found, and the law has none of them


def test_names(tiny: Tiny, fresh: Tiny, prompts: Prompts, tmp_path: Path) -> None:
    model = fresh("llama")
    model.save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="has no adaptive tokens"):
        specdec.compile(model, "adaptive")
    tokens_of(model).save(tmp_path, model)
    for name in ("adaptive", str(tmp_path), ["ngram", "adaptive"]):
        wrapped = wrap(model, name)
        assert "its own adaptive tokens, 4 slots; one forward a step" in repr(wrapped.specdec)
        same(wrapped, model, **prompts([9]), max_new_tokens=20)
        assert sum(wrapped.specdec.stats.proposed) > 0
    with pytest.raises(ValueError, match=r"are of .*LlamaForCausalLM.*the model is .*with other weights"):
        specdec.compile(tiny("llama", seed=7), str(tmp_path))
    with pytest.raises(ValueError, match="a draft of 5 tokens, and 4 adaptive tokens draft 4"):
        specdec.compile(model, "adaptive", depth=5)
    with pytest.raises(ValueError, match=r"stop_below=0\.3 ends a draft model's chain"):
        specdec.compile(model, "adaptive", stop_below=0.3)


def test_the_models_own_are_found_unasked(fresh: Tiny, prompts: Prompts, tmp_path: Path) -> None:
    """Beside n-grams; where there are none, n-grams draft alone, and where they do not fit a warning says why."""
    model = fresh("llama")
    tokens = tokens_of(model)
    model.save_pretrained(tmp_path)

    def found(**options: Any) -> str:
        wrapped = specdec.compile(model, compile=False, **options)
        same(wrapped, model, **prompts([9]), max_new_tokens=20)
        return repr(wrapped.specdec)

    assert "n-grams of the text" in found() and "adaptive tokens" not in found()
    model.config._name_or_path = str(tmp_path)
    assert "adaptive tokens" not in found()
    tokens.save(tmp_path, model)
    for options in ({}, {"draft": "auto"}):
        assert "its own adaptive tokens, 4 slots" in found(**options) and "n-grams of the text" in found(**options)
    assert "adaptive tokens" not in found(draft=None)
    with pytest.warns(specdec.SpecdecWarning, match="alone: a draft of 5 tokens, and 4 adaptive tokens draft 4"):
        said = found(depth=5)
    assert "n-grams of the text" in said and "adaptive tokens" not in said
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    with pytest.warns(specdec.SpecdecWarning, match="leaves the model's adaptive tokens alone: .*with other weights"):
        assert "adaptive tokens" not in found()
