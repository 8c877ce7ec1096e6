"""Chains that end after a token that the draft model itself holds for unlikely: the law stays, and rows are saved."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from oracle import DISTINCT, Number, Process, Text, normalised, random_process
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from test_control_decoding import _close_to, random_plans  # noqa: F401
from test_verifiers import SEEDS, VOCAB, check_law, draft, target  # noqa: F401
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec import TokenTree
from specdec.drafters.ngram import NgramDrafter
from specdec.engine.control import Plan, Track
from specdec.engine.control.best import best_plan
from specdec.engine.control.estimate import Acceptance, Estimate
from specdec.engine.control.plan import Shape
from specdec.engine.draft import Draft
from specdec.engine.state import BatchState

CHOSEN = ("auto", "block", "rrs", "traversal", "coupled", "target")


# What is exact: chains of two levels, one step after the other, in fractions

DEPTH, N_STEPS = 2, 2


def _texts(
    process: Process, is_weak: Callable[[Text, int], bool], drops: bool, weights_down: bool
) -> dict[Text, Number]:
    """The law of what some steps emit, where chains end after a weak token, or, wrongly, before it."""

    def leaf(text: Text, weight: Number) -> dict[Text, Number]:
        return {(*text, x): weight * p for x, p in enumerate(process.target[text])}

    @cache
    def emitted(text: Text, level: int, weight: Number) -> dict[Text, Number]:
        """What the chain after a text emits (see `oracle.step_law`)."""
        if level == DEPTH:
            return leaf(text, weight)
        law: defaultdict[Text, Number] = defaultdict(Fraction)
        for children, prob in DISTINCT.draft(process.draft[text], 1).items():
            (token,), left = children, prob
            if is_weak(text, token) and drops:
                tests, exit_weight, bonus = (), weight, process.target[text]
            else:
                tests, exit_weight, bonus = DISTINCT.judge(weight, process.target[text], process.draft[text], children)
            for x, child_weight in tests:
                handed = child_weight if weights_down else Fraction(1)
                longer = (*text, x)
                subtree = leaf(longer, handed) if is_weak(text, x) else emitted(longer, level + 1, handed)
                share = left if weights_down else left * child_weight
                for each, mass in subtree.items():
                    law[each] += share * mass
                left -= share * sum(subtree.values())
            for x, p in enumerate(bonus):
                law[(*text, x)] += left * exit_weight * p
        return dict(law)

    texts: dict[Text, Number] = {(): Fraction(1)}
    for _ in range(N_STEPS):
        longer: defaultdict[Text, Number] = defaultdict(Fraction)
        for text, mass in texts.items():
            for each, share in emitted(text, 0, Fraction(1)).items():
                longer[each] += mass * share
        texts = longer
    return texts


@pytest.mark.parametrize("weights_down", [False, True], ids=["by node", "weights down"])
def test_stopping_after_a_weak_token_is_exact_and_dropping_it_is_not(weights_down: bool) -> None:
    length = N_STEPS * (DEPTH + 1)
    for seed in range(2):
        process = random_process(seed, length, 3, "any")

        def is_weak(text: Text, token: int, of: Process = process) -> bool:
            return of.draft[text][token] < Fraction(1, 2)

        expected = process.target_law(length)
        stopped, dropped = (_texts(process, is_weak, drops, weights_down) for drops in (False, True))
        assert len({len(text) for text in stopped}) > 2  # chains of all lengths
        assert process.completed(stopped, length) == expected
        off = process.completed(dropped, length)
        assert sum(off.values()) == 1
        assert off != expected


def test_how_far_off_a_length_chosen_by_the_token_is() -> None:
    """A draft of two equal tokens, of which only the first is verified: (.7, .3) turns into (.85, .15)."""
    law, flat = normalised([Fraction(7), Fraction(3)]), normalised([Fraction(1), Fraction(1)])
    texts = [text for n in range(7) for text in np.ndindex(*[2] * n)]
    process = Process(dict.fromkeys(texts, law), dict.fromkeys(texts, flat))
    for drops, expected in ((False, law), (True, (Fraction(17, 20), Fraction(3, 20)))):
        emitted = _texts(process, lambda _, token: token == 1, drops, weights_down=False)
        first = [sum(mass for text, mass in emitted.items() if text[0] == x) for x in range(2)]
        assert tuple(first) == expected


# What is decoded


def _stopping(target: PreTrainedModel, draft: Any, stop_below: float, verifier: str, **more: Any) -> PreTrainedModel:  # noqa: F811
    return wrap(target, draft, stop_below=stop_below, verifier=verifier, depth=2, **more)


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
@pytest.mark.parametrize("stop_below", [0.3, 0.7])
@pytest.mark.parametrize("verifier", CHOSEN)
def test_texts_follow_the_exact_law(
    verifier: str, stop_below: float, mixed: bool, target: PreTrainedModel, draft: PreTrainedModel,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("specdec.drafters.model.SUPPORT_SIZE", 4)
    wrapped = _stopping(target, [draft, "ngram"] if mixed else draft, stop_below, verifier)
    check_law(wrapped, target, "cut")
    stats = wrapped.specdec.stats
    assert stats.proposed[1] < stats.proposed[0]
    if stop_below == 0.3:  # at 0.7 this draft model never drafts another
        assert 0 < stats.accepted[1] < stats.proposed[1]


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
@pytest.mark.parametrize("verifier", ["auto", "rrs"])
def test_texts_follow_the_exact_law_with_any_plans(
    verifier: str, mixed: bool, target: PreTrainedModel, draft: PreTrainedModel, random_plans: list[Plan],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("specdec.drafters.model.SUPPORT_SIZE", 4)
    wrapped = _stopping(target, [draft, "ngram"] if mixed else draft, 0.3, verifier, adapt=True)
    check_law(wrapped, target, "cut", n_calls=40)
    assert len({plan.depth for plan in random_plans}) > 1


@pytest.mark.parametrize("adapt", [False, None])
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_greedy_tokens(family: str, mixed: bool, adapt: bool | None, tiny: Tiny, prompts: Prompts) -> None:
    model = tiny(family)
    near = _close_to(model)
    stop_below = 0.11 if family == "gemma2" else 0.2  # about the median of what these drafts say
    wrapped = wrap(model, [near, "ngram"] if mixed else near, stop_below=stop_below, adapt=adapt)
    for lengths in (RAGGED, [9]):
        same(wrapped, model, **prompts(lengths), max_new_tokens=40)
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=20, repetition_penalty=1.3)  # asked for on the host
    if adapt is False:
        proposed = wrapped.specdec.stats.proposed
        assert 0 < proposed[4] < proposed[0]


def test_one_compiled_draft_stops_anywhere(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama", num_hidden_layers=1)
    wrapped = specdec.compile(model, _close_to(model), depth=3, adapt=False, stop_below=0.15)
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=40)
    stats = wrapped.specdec.stats
    assert not stats.eager
    assert 0 < stats.accepted[-1] < stats.proposed[-1] < stats.proposed[0]
    stats.reset()
    same(wrapped, model, **prompts([3, 8, 1, 2], seed=1), max_new_tokens=40)
    assert stats.seconds["compile"] == 0


@pytest.mark.parametrize("greedy", [True, False])
def test_chains_end_after_the_first_token_below(greedy: bool, tiny: Tiny, prompts: Prompts, monkeypatch: Any) -> None:
    """As the plain draft model says it, with the temperature of the law."""
    model, near = tiny("llama"), _close_to(tiny("llama"))
    stop_below = 0.2 if greedy else 0.05
    wrapped = wrap(model, near, stop_below=stop_below, depth=4)
    seen: list[tuple[Tensor, int, int]] = []
    propose = BatchState.propose

    def noted(state: BatchState, made: Draft) -> None:
        for row in (~state.finished).nonzero()[:, 0].tolist():
            text = state.tokens[row, : state.lengths[row] + 1]
            seen.append((torch.cat([text, made.tokens[row]]), len(text), int(made.counts[row])))
        propose(state, made)

    monkeypatch.setattr(BatchState, "propose", noted)
    law = {} if greedy else {"do_sample": True, "temperature": 0.8, "top_k": 40}
    wrapped.generate(**prompts(RAGGED), max_new_tokens=20, **law)
    lengths = []
    for text, n_known, count in seen:
        with torch.no_grad():
            logits = near(text[None]).logits[0, n_known - 1 : -1].double()
        if not greedy:
            logits = logits / 0.8
            logits = logits.where(logits >= logits.topk(40).values[:, -1:], -torch.inf)
        probs = logits.softmax(-1).gather(1, text[n_known:, None])[:, 0].tolist()
        if min(abs(p - stop_below) for p in probs) < 1e-4:
            continue  # rounding decides
        weak = [i for i, p in enumerate(probs) if p < stop_below]
        lengths.append(weak[0] + 1 if weak else 4)
        assert count == lengths[-1]
    assert set(lengths) == {1, 2, 3, 4}


@pytest.mark.parametrize("verifier", ["auto", "rrs", "coupled"])
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
def test_a_text_does_not_depend_on_its_neighbours(
    mixed: bool, verifier: str, target: PreTrainedModel, draft: PreTrainedModel, prompts: Prompts  # noqa: F811
) -> None:  # fmt: skip
    inputs = prompts([12, 2, 1, 6], vocab=VOCAB)

    def sample(wrapped: PreTrainedModel, rows: list[int]) -> list[list[int]]:
        wrapped.specdec.seeds = [SEEDS[r] for r in rows]
        own = {name: x[rows] for name, x in inputs.items()}
        return wrapped.generate(**own, do_sample=True, temperature=1.5, max_new_tokens=14)[:, 12:].tolist()

    source = [draft, "ngram"] if mixed else draft
    stopping, whole = (wrap(target, source, verifier=verifier, depth=3, stop_below=at) for at in (0.4, None))
    together = sample(stopping, [0, 1, 2, 3])
    assert sample(stopping, [3, 1]) == [together[3], together[1]]
    assert (sample(whole, [0, 1, 2, 3]) == together) == (verifier == "coupled")


# What is planned


def _count(acceptance: Acceptance, track: Track, lengths: list[int], chance: random.Random) -> None:
    """A step of a sample that drafts so many levels, or fewer: each of them is accepted in four of five cases."""
    found = chance.choice(lengths)
    hits = [chance.random() < 0.8 for _ in range(found)]
    acceptance.count(track, 5, found, found, [*hits, False].index(False))


def test_what_drafts_lack_is_counted() -> None:
    acceptance, track, chance = Acceptance(5), Track(), random.Random(0)
    acceptance.remember(100)
    for _ in range(20_000):
        _count(acceptance, track, [1, 5], chance)
    assert acceptance.lengths == pytest.approx([1.0, 0.5, 0.5, 0.5, 0.5], abs=0.03)
    assert acceptance.rates == pytest.approx([0.8, *(0.5 * 0.8**level for level in range(2, 6))], abs=0.05)
    assert acceptance.chance(track) > 0.99


def test_room_is_for_as_much_as_is_found() -> None:
    """Whole drafts are all judged; where half of them end after a token, a forward has less room than they may take."""
    rooms = []
    for lengths in ([5], [1, 5]):
        shape, chance = Shape(TokenTree.chain(5), (1, 2, 3, 5)), random.Random(0)
        estimate, tracks = Estimate(shape), [Track() for _ in range(8)]
        estimate.acceptance.remember(8)
        for track in tracks * 100:
            _count(estimate.acceptance, track, lengths, chance)
        for levels in (0, 1, 5):
            estimate.learn(shape.uniform(8, levels), 0.0, 0.02 * levels, 1 + 0.01 * 8 * (levels + 1))
        plan = best_plan(tracks, shape, estimate, shape.depths, 5)
        assert plan.depth == 5
        rooms.append((plan.n_tokens, 8 + sum(plan.allowed)))
    (whole, wanted), (less, as_wanted) = rooms
    assert whole == wanted == as_wanted
    assert 8 + 8 * 3 <= less < wanted - 5


# What is given


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-0.5, ValueError), (1.5, ValueError), (float("nan"), ValueError), ("0.5", TypeError),
     (True, TypeError), (np.bool_(True), TypeError), ([0.5], TypeError), (torch.ones(2), TypeError)],
)  # fmt: skip
def test_values_that_cannot_be(value: Any, error: type[Exception], model: PreTrainedModel) -> None:
    with pytest.raises(error, match=r"stop_below must be (above 0 and at most 1|a number), got "):
        wrap(model, model, stop_below=value)


@pytest.mark.parametrize("value", [-0.5, 1.5, True])
def test_thresholds_that_cannot_be_are_transformers_matter(value: Any, model: PreTrainedModel) -> None:
    """As other settings of a draft that a call names: its own loop decodes, and the reason is said."""
    wrapped, said = wrap(model, None), r"assistant_confidence_threshold must be (above 0 and at most 1|a number), got "
    with pytest.warns(specdec.SpecdecWarning, match=said):
        wrapped.generate(
            torch.tensor([[3]]), assistant_model=model, max_new_tokens=4, assistant_confidence_threshold=value
        )
    assert wrapped.specdec.stats.fallbacks == {"a draft that does not fit": 1}


def test_chains_of_draft_models_end_early_and_nothing_else(model: PreTrainedModel) -> None:
    tree = TokenTree.from_widths(2, 1)
    with pytest.raises(ValueError, match=r"stop_below=0.5 ends chains early, and tree=\(-1, 0, 0, 1, 2\) has nodes"):
        wrap(model, model, stop_below=0.5, tree=tree)
    for draft in (None, "ngram", NgramDrafter(3)):  # noqa: F402
        with pytest.raises(ValueError, match=r"stop_below=0\.5 ends a draft model's chain, and the draft is"):
            wrap(model, draft, stop_below=0.5)
    wrapped = wrap(model, model, stop_below=np.float32(0.5), tree=TokenTree.chain(2))
    assert type(wrapped.specdec.config.stop_below) is float
    assert "chain of 2 a step, up to a token below 0.5" in repr(wrapped.specdec)
    with pytest.raises(ValueError, match=r"tune\(\) chooses whole trees, and stop_below=0.5"):
        wrapped.specdec.tune(torch.tensor([[3]]))
