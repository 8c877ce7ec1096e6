"""Whatever is planned, texts keep their law: random plans on the real decoder, and what a forward has room for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from side_by_side import Prompts, Tiny, wrap
from test_joining import EOS, decode, decoder_of, law_of, random_texts
from test_verifiers import TREES, check_law
from transformers import PreTrainedModel

from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.engine.control import Adaptive, Plan, Track
from specdec.engine.loop import Decoder
from specdec.engine.state import BatchState
from specdec.engine.stats import Stats
from specdec.engine.tree import TokenTree
from specdec.graphs.captured import Mark
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.view import ModelView

CHAIN, TREE = TokenTree.chain(3), TokenTree.from_widths(3, 2, 1)


@pytest.fixture
def random_plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The policy plans anything that is legal; these are its plans."""
    choose, plans = random.Random(0), []

    def plan(self: Adaptive, samples: Sequence[Track]) -> Plan:
        depth = choose.choice([0, *self.shape.depths])
        allowed = tuple(self.shape.nodes_to[choose.randint(0, depth)] for _ in samples)
        plans.append(Plan(depth, allowed, len(samples) + choose.randint(0, sum(allowed))))
        return plans[-1]

    monkeypatch.setattr(Adaptive, "plan", plan)
    return plans


@pytest.mark.parametrize("tree", [CHAIN, TREE, None], ids=["chain", "tree", "n-grams"])
def test_greedy_texts_are_transformers_with_any_plans(
    tree: TokenTree | None, tiny: Tiny, random_plans: list[Plan]
) -> None:
    """Texts join and leave; the draft model reads what was decoded without it."""
    target, texts, law = tiny("llama"), random_texts(40), law_of(False)
    drafter = NgramDrafter(4) if tree is None else ModelDrafter(ModelView(_close_to(target)), tree)
    decoder = Decoder(ModelView(target), drafter, CompiledSteps(False), Stats())
    decode(decoder, texts, 5, law)
    assert {plan.depth for plan in random_plans} == {0, *drafter.depths}
    assert any(len(plan.allowed) < plan.n_tokens < len(plan.allowed) + sum(plan.allowed) for plan in random_plans)
    assert all(0 < a < p for a, p in zip(decoder.stats.accepted[:3], decoder.stats.proposed, strict=False))
    for text in texts:
        out = target.generate(
            text.prompt[None], max_new_tokens=text.max_new_tokens, eos_token_id=EOS.tolist(), pad_token_id=0
        )
        assert text.tokens == out[0, len(text.prompt) :].tolist()


def _close_to(target: PreTrainedModel) -> PreTrainedModel:
    """A draft that is often right: the target with some noise in its weights."""
    draft = type(target)(target.config).eval()
    generator = torch.Generator().manual_seed(0)
    noise = {k: 0.05 * x.std() * torch.randn(x.shape, generator=generator) for k, x in target.state_dict().items()}
    draft.load_state_dict({k: x + noise[k] for k, x in target.state_dict().items()})
    return draft


@pytest.mark.parametrize("tree", [CHAIN, TREE], ids=["chain", "tree"])
def test_a_draft_that_is_the_target_is_always_accepted(tree: TokenTree, tiny: Tiny, random_plans: list[Plan]) -> None:
    """So its cache holds all that was decoded without it, by whatever texts took the row."""
    target = tiny("llama")
    decoder = Decoder(ModelView(target), ModelDrafter(ModelView(target), tree), CompiledSteps(False), Stats())
    decode(decoder, random_texts(40), 5, law_of(False))
    assert 0 < decoder.stats.undrafted < decoder.stats.steps
    assert decoder.stats.accepted == decoder.stats.proposed


@pytest.mark.parametrize(
    ("shape", "verifier"), [("chain", "auto"), ("ragged", "auto"), ("ragged", "rrs"), ("chain", "coupled")]
)
def test_sampled_texts_follow_the_exact_law_with_any_plans(
    shape: str, verifier: str, tiny: Tiny, random_plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.drafters.model.SUPPORT_SIZE", 4)
    small = {"vocab_size": 6, "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    target = tiny("llama", **small, head_dim=4, num_attention_heads=2, num_key_value_heads=1)
    draft = tiny("gpt2", vocab_size=6, n_embd=8, n_layer=1, n_head=2, initializer_range=0.3)
    wrapped = wrap(target, draft, verifier=verifier, tree=TREES[shape], adapt=True)
    check_law(wrapped, target, "cut", n_calls=40)
    assert any(plan.depth and plan.n_tokens < len(plan.allowed) + sum(plan.allowed) for plan in random_plans)
    stats = wrapped.specdec.stats
    assert all(0 < a < p for a, p in zip(stats.accepted, stats.proposed, strict=True))


@pytest.mark.parametrize("verifier", ["auto", "coupled"])
@pytest.mark.parametrize("adapt", [None, True])
def test_a_seeds_text_beside_what_steps_take(
    adapt: bool | None, verifier: str, tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default the same whatever the clock says. Asked to adapt, sampling without coupling gives up that, and
    statistics say who chooses."""
    clock = random.Random()
    monkeypatch.setattr(Mark, "until", lambda *_: clock.random())
    texts, allowed = [], []
    for seed in range(4):
        clock.seed(seed)
        wrapped = wrap(tiny("llama"), tiny("llama", seed=7), verifier=verifier, depth=3, adapt=adapt)
        wrapped.specdec.seeds = [5, 6]
        out = wrapped.generate(**prompts([9, 4]), do_sample=True, temperature=2.0, max_new_tokens=60)
        texts.append(out.tolist())
        allowed.append(wrapped.specdec.stats.to_dict()["allowed"])
        pinned = wrapped.specdec.stats.control == "always 3 tokens deep, the whole draft"
        assert pinned == (adapt is None and verifier == "auto")
    assert (len(set(allowed)) == 1) == pinned
    assert all(text == texts[0] for text in texts) == (pinned or verifier == "coupled")


@pytest.mark.parametrize("adapt", [None, False])
def test_with_ngrams_a_seeds_text_is_that_without_a_draft(adapt: bool | None, tiny: Tiny, prompts: Prompts) -> None:
    """So a draft that does not pay is not drafted when sampling, either; but not if another verifier is asked for."""
    texts, sampled = {}, {"do_sample": True, "temperature": 0.7, "max_new_tokens": 60}
    for verifier, draft in (("auto", None), ("auto", "ngram"), ("block", "ngram")):
        wrapped = wrap(tiny("llama"), draft, verifier=verifier, adapt=adapt)
        wrapped.specdec.seeds = [5, 6]
        texts[verifier, draft] = wrapped.generate(**prompts([9, 4]), **sampled).tolist()
        stats = wrapped.specdec.stats
        assert bool(sum(stats.proposed)) == (draft is not None)
        assert stats.control.startswith("always 8") == (draft is not None and (adapt is False or verifier == "block"))
    assert texts["auto", "ngram"] == texts["auto", None] != texts["block", "ngram"]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_a_forward_has_room_for(data: st.DataObject) -> None:
    """All roots; then first come, first served, as many nodes as were found and are allowed."""
    n = data.draw(st.integers(1, 6))
    state = BatchState(n, 8, 1, NgramDrafter(5).tree, 0, torch.device("cpu"))
    counts, allowed = (data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)) for _ in range(2))
    finished = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    n_tokens = data.draw(st.integers(finished.count(False), 6 * n))
    state.draft.counts.copy_(torch.tensor(counts))
    state.allowed.copy_(torch.tensor(allowed))
    state.finished.copy_(torch.tensor(finished))
    room, expected = n_tokens - finished.count(False), []
    for found, most, has_ended in zip(counts, allowed, finished, strict=True):
        judged = 0 if has_ended else min(found, most, room)
        room -= judged
        expected.append(0 if has_ended else 1 + judged)
    assert state.n_nodes(n_tokens).tolist() == expected
    assert sum(expected) <= n_tokens


@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_drafts_that_were_not_allowed_are_never_judged(kind: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text allowed nothing gets a token a step, however good its draft; the others theirs."""
    decoder = decoder_of(tiny, kind, CompiledSteps(False))
    prompt = torch.tensor([9, 8] * 4)
    texts = [type(t)(prompt, 30) for t in random_texts(2)]
    monkeypatch.setattr(decoder.drafter, "draft", _always_right(decoder, tiny("llama"), prompt))
    whole = len(decoder.tree) - 1

    def plan(self: Adaptive, samples: Sequence[Track]) -> Plan:
        allowed = (0, whole)[: len(samples)]
        return Plan(self.shape.depths[-1], allowed, len(samples) + sum(allowed) + 2)

    monkeypatch.setattr(Adaptive, "plan", plan)
    gained: dict[int, list[int]] = {0: [], 1: []}
    with torch.no_grad():
        for emitted in decoder.run(texts, 2, 130, 130, law_of(False), EOS[:0]):
            for piece in emitted:
                gained[texts.index(piece.text)].append(len(piece.tokens))
    assert set(gained[0]) == {1}
    assert set(gained[1][:-1]) == {decoder.tree.depth + 1}
    assert texts[0].tokens == texts[1].tokens


def _always_right(decoder: Decoder, target: PreTrainedModel, prompt: torch.Tensor) -> Any:
    """A draft whose first children are the target's own greedy tokens."""
    whole = target.generate(prompt[None], max_new_tokens=40)[0]
    tree = decoder.tree
    draft = type(decoder.drafter).draft

    def right(state: BatchState, law: Any, live: torch.Tensor, depth: int) -> Any:
        made = draft(decoder.drafter, state, law, live, depth)
        for node in range(1, len(tree)):
            made.tokens[:, node - 1] = whole[(state.lengths + tree.depths[node]).clamp(max=len(whole) - 1)]
        made.counts.fill_(len(tree) - 1)
        return made

    return right
