"""The adaptive policy in a simulated world: beside not drafting and beside the best depth; noticing; calm."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence

import pytest
from control_world import Machine, Source, World
from hypothesis import given, settings
from hypothesis import strategies as st
from side_by_side import Tiny
from torch import device
from transformers import LogitsProcessorList

from specdec.drafters.ngram import NgramDrafter
from specdec.engine.control import Adaptive, Decisions, Fixed, Plan, Track, policy_of
from specdec.engine.control.estimate import StepCosts
from specdec.engine.control.plan import Shape
from specdec.engine.loop import Decoder
from specdec.engine.stats import Stats
from specdec.engine.tree import TokenTree
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.laws import law_of
from specdec.hf.view import ModelView
from specdec.verifiers import VERIFIERS

FORWARDS = {
    "bandwidth bound": lambda t: 1 + 0.01 * t,
    "compute bound": lambda t: 0.05 + 0.25 * t,
    "stairs": lambda t: math.ceil(t / 16) + 0.005 * t,
}
CHAIN, TREE, NGRAMS = TokenTree.chain(5), TokenTree.from_widths(3, 2, 1), TokenTree.chain(8)
DEPTHS = {CHAIN: (1, 2, 3, 5), TREE: (1, 2, 3), NGRAMS: (8,)}
KINDS = {"cheap": CHAIN, "dear": CHAIN, "tree": TREE, "n-grams": NGRAMS}
QUALITIES = (0.0, 0.2, 0.5, 0.8, 1.0)
START = 100
"""Steps that it may spend on finding out."""


def machine(kind: str, forward: str) -> Machine:
    """Drafts cost a share of a forward of one token."""
    unit = FORWARDS[forward](1)
    if kind == "n-grams":
        return Machine(FORWARDS[forward], search=0.02 * unit)
    level = {"cheap": 0.03, "dear": 0.3, "tree": 0.05}[kind] * unit
    return Machine(FORWARDS[forward], level=level, read=level / 50)


def world(kind: str, forward: str, qualities: Sequence[float], **options: float) -> World:
    """A text of each quality: the probability that a path goes on one more level."""
    texts = [Source([q] * KINDS[kind].depth, 0.5 if kind == "n-grams" else 1.0) for q in qualities]
    return World(KINDS[kind], machine(kind, forward), texts, **options)  # type: ignore[arg-type]


def adaptive(kind: str) -> Adaptive:
    return Adaptive(Shape(KINDS[kind], DEPTHS[KINDS[kind]]))


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("kind", KINDS)
def test_speed_beside_not_drafting_and_the_best_depth(kind: str, forward: str) -> None:
    """On average: with few texts, a run of bad luck looks like a bad draft for a while."""
    slow = []
    for n in (1, 2, 8, 24):
        for quality in QUALITIES[::2] if n > 2 else QUALITIES:
            beside = [_speed(kind, forward, n, quality, seed) for seed in range(5 if n < 8 else 1)]
            undrafted, best = map(statistics.mean, zip(*beside, strict=True))
            if undrafted < 0.97 or best < 0.95:
                slow.append(f"{n} texts of {quality}: {undrafted:.3f} of undrafted, {best:.3f} of the best depth")
    assert not slow, "\n".join(slow)


def _speed(kind: str, forward: str, n: int, quality: float, seed: int) -> tuple[float, float]:
    here, control = world(kind, forward, [quality] * n, seed=seed), adaptive(kind)
    here.run(control, START)
    rate = here.run(control, 1000 if n < 8 else 500)
    return rate / here.rate(0), rate / here.best_rate(control.shape.depths)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("forward", FORWARDS)
def test_texts_of_different_quality_in_one_batch(forward: str, lag: int) -> None:
    """Better texts get more levels; together they are no slower than with the best depth for all, even if reports come
    a step late."""
    here, control = world("cheap", forward, [0.1, 0.95] * 4, lag=lag), adaptive("cheap")
    here.run(control, START)
    rate = here.run(control, 1000)
    assert rate >= 0.97 * here.rate(0)
    assert rate >= 0.95 * here.best_rate(control.shape.depths)
    chosen = [plan for plan in here.plans[START:] if not plan.trial]
    poor, good = (sum(sum(plan.allowed[first::2]) for plan in chosen) for first in (0, 1))
    assert good > 3 * poor
    assert (good > 4 * len(chosen)) == (forward != "compute bound")  # where a token costs what it brings


def test_texts_that_come_and_go() -> None:
    """As in a stream of prompts: texts of any quality take others' places, and at last fewer and fewer are left."""
    here, control, choose = world("cheap", "bandwidth bound", [0.6] * 8), adaptive("cheap"), random.Random(0)
    here.run(control, START)
    tokens = seconds = undrafted = 0.0
    for n_left in [8] * 40 + list(range(7, 0, -1)):
        here.texts = [t if choose.random() < 0.7 else Source([choose.random()] * 5) for t in here.texts[:n_left]]
        here.run(control, 20)
        tokens, seconds = tokens + here.tokens, seconds + here.seconds
        undrafted += here.tokens / here.rate(0)
    assert undrafted > 1.3 * seconds  # drafting brings much here, in spite of the poor texts among them


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 8])
def test_acceptance_that_changes_is_noticed(kind: str, n: int) -> None:
    here, control = world(kind, "bandwidth bound", [0.0] * n), adaptive(kind)
    depth = KINDS[kind].depth

    def become(quality: float) -> None:
        for text in here.texts:
            text.accept = [quality] * depth

    useless = 300
    here.run(control, useless)
    for _ in range(2):
        become(1.0)
        here.run(control, 4 * useless)  # it explores again after twice as long each time
        rate = here.run(control, 100)
        assert rate > 0.95 * here.best_rate(control.shape.depths) > 1.2 * here.rate(0)
        become(0.0)
        here.run(control, 50)
        assert here.run(control, useless - 50) > 0.95 * here.rate(0)


def test_after_long_disappointment_better_drafts_are_still_noticed() -> None:
    here, control = world("cheap", "bandwidth bound", [0.0]), adaptive("cheap")
    rate = here.run(control, 20000)
    assert rate > 0.99 * here.rate(0)
    here.texts[0].accept = [1.0] * 5
    here.run(control, 10000)
    rate = here.run(control, 100)
    assert rate > 0.95 * here.best_rate(control.shape.depths)


@pytest.mark.parametrize("noise", [0.05, 0.15])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_does_not_turn_plans_over(kind: str, noise: float) -> None:
    """At the quality at which drafting one level brings as much as it costs, and above."""
    even = min((q / 100 for q in range(101)), key=lambda q: abs(math.log(_gain(kind, q))))
    for quality in (even, 0.5 * (1 + even)):
        here, control = world(kind, "bandwidth bound", [quality] * 4, noise=noise), adaptive(kind)
        here.run(control, START)
        before, first = control.changes, len(here.plans)
        here.run(control, 2000)
        depths = [plan.depth for plan in here.plans[first:]]
        assert control.changes - before < 0.01 * len(depths)
        assert sum(map(int.__ne__, depths, depths[1:])) < 0.03 * len(depths)  # what was only tried among them


def _gain(kind: str, quality: float) -> float:
    here = world(kind, "bandwidth bound", [quality] * 4)
    return here.rate(DEPTHS[KINDS[kind]][0]) / here.rate(0)


@pytest.mark.parametrize("tree", [CHAIN, TREE])
def test_pinned_always_drafts_the_whole_tree(tree: TokenTree) -> None:
    control = policy_of(tree, DEPTHS[tree], False)
    here = World(tree, Machine(lambda t: t, level=10.0), [Source([0.0] * tree.depth) for _ in range(3)])
    here.run(control, 300)
    nodes = len(tree) - 1
    assert set(here.plans) == {Plan(tree.depth, (nodes,) * 3, 3 * len(tree))}
    assert control.levels == (tree.depth,)
    assert str(control.decisions) == f"always {tree.depth} tokens deep, the whole draft"


def test_without_a_draft_there_is_nothing_to_choose() -> None:
    control = policy_of(TokenTree.chain(0), (0,), True)
    assert isinstance(control, Fixed)
    assert control.plan([Track(), Track()]) == Plan(0, (0, 0), 2)
    assert str(control.decisions) == "there is no draft"


@pytest.mark.parametrize("adapt", [None, True, False])
@pytest.mark.parametrize(("do_sample", "verifier"), [(False, "auto"), (True, "auto"), (True, "coupled")])
def test_adapts_by_default_only_where_texts_do_not_depend_on_it(
    tiny: Tiny, do_sample: bool, verifier: str, adapt: bool | None
) -> None:
    steps, law = CompiledSteps(False), law_of(LogitsProcessorList(), do_sample, device("cpu"))
    decoder = Decoder(ModelView(tiny("llama")), NgramDrafter(3), steps, Stats(), VERIFIERS[verifier], adapt)
    control = decoder._policy(law)
    assert isinstance(control, Adaptive) == (adapt if adapt is not None else (not do_sample or verifier == "coupled"))
    assert decoder._policy(law) is control  # what it has learned serves the next call


@st.composite
def _trees(draw: st.DrawFn) -> TokenTree:
    parents = [-1]
    for node in range(draw(st.integers(1, 9))):
        parents.append(draw(st.integers(max(parents[-1], 0), node)))
    return TokenTree(tuple(parents))


@settings(max_examples=150, deadline=None)
@given(_trees(), st.integers(0, 2**32), st.integers(1, 9))
def test_plans_are_legal(tree: TokenTree, seed: int, most: int) -> None:
    """Whole levels, no deeper than is drafted; tokens for all roots, and for no more than is allowed. With texts that
    come and go, any times, and any acceptance."""
    choose = random.Random(seed)
    depths = (*sorted(choose.sample(range(1, tree.depth), choose.randrange(tree.depth))), tree.depth)
    control = policy_of(tree, depths, True)
    slope, level = choose.choice([0.01, 0.3]), choose.choice([0.01, 0.5])
    here = World(tree, Machine(lambda t: 1 + slope * t, level=level), [], noise=0.5, seed=seed)
    for _ in range(8):
        accept = sorted((choose.random() for _ in range(tree.depth)), reverse=True)
        here.texts = [Source(accept, choose.choice([1.0, 0.3])) for _ in range(choose.randint(1, most))]
        here.run(control, 12)
    whole_levels = [sum(0 < d <= level for d in tree.depths) for level in range(tree.depth + 1)]
    for plan in here.plans:
        n = len(plan.allowed)
        assert plan.depth in (0, *depths)
        assert set(plan.allowed) <= set(whole_levels[: plan.depth + 1])
        assert n <= plan.n_tokens <= n + sum(plan.allowed)


def test_better_habits_get_more() -> None:
    control = adaptive("cheap")
    texts = [Source([q] * 5) for q in (0.2, 0.5, 0.9)]
    here = World(CHAIN, machine("cheap", "bandwidth bound"), texts)
    for text in texts:  # what is judged is the whole chain
        for _ in range(200):
            hits = [here._random.random() < 0.6 for _ in range(5)]
            control.count(Track(), 5, 5, 5, [*hits, False].index(False))
        text.track.expected, text.track.accepted = 10.0, 10.0 * sum(text.accept) / 3
    costs = control.estimate.costs
    costs.learn(Plan(0, (0,) * 3, 3), 0.0, 0.0, 1.0)
    for levels in (1, 5):
        costs.learn(control.uniform(3, levels), 0.0, 0.01 * levels, 1 + 0.3 * levels)
    control._explorer.calibration(3).clear()
    plan = control.plan([t.track for t in texts])
    assert list(plan.allowed) == sorted(plan.allowed)
    assert plan.allowed[0] < plan.allowed[2]


def test_forwards_of_few_texts_do_not_speak_for_those_of_many() -> None:
    """The same number of tokens of one text and of four: these have four caches to read."""
    costs = StepCosts(Shape(TokenTree.chain(1), (1,)))
    for n, n_tokens, seconds in [(1, 1, 5.0), (1, 6, 6.0), (4, 4, 7.0), (4, 8, 10.0)]:
        costs.learn(Plan(0, (0,) * n, n_tokens), 0.0, 0.0, seconds)
    assert costs.forward(1, 6, 1) == 6.0
    assert costs.forward(4, 6, 1) == costs.forward(7, 6, 1) == 8.5


@pytest.mark.parametrize("tree", [CHAIN, TREE])
def test_decisions_are_data(tree: TokenTree) -> None:
    """Ready for JSON, and as a sentence."""
    control = Adaptive(Shape(tree, DEPTHS[tree]))
    here = World(tree, Machine(lambda t: 1 + 0.01 * t), [Source([1.0] * tree.depth) for _ in range(2)], noise=0.0)
    here.run(control, START)
    found = control.decisions
    assert (found.n_levels, found.adapts, found.depth) == (tree.depth, True, here.plans[-1].depth)
    assert found.changes == control.changes > 0
    assert len(found.acceptance) == tree.depth and min(found.acceptance) > 0.9
    assert found.forward_seconds[2][2] == 1.02
    assert found.draft_seconds[tree.depth] == {2: 0.0}
    told = found.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["forward_seconds"]["2"]["2"] == 1.02


def test_decisions_as_a_sentence() -> None:
    found = Decisions(2, True, 1, 3, [0.5, 0.25], {2: {1: 0.001}}, {4: {4: 7.0, 8: 10.0}})
    assert str(found) == (
        "now 1 of up to 2 tokens deep, after 3 changes; chances to be accepted: 0.50, 0.25; ms of a draft 2 deep, by "
        "batch size: 1 takes 1.0; ms of the target from batch size 4 on, by tokens: 4 takes 7000.0, 8 takes 10000.0"
    )
