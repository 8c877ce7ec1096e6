"""The oracle is right: its rules keep the target's law and accept what they should; mistakes made elsewhere do not.

All in exact fractions, but for the linear programme.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from oracle import (
    DISTINCT,
    HUB,
    IID,
    KINDS,
    PHANTOM,
    RULES,
    TOP,
    Children,
    Law,
    Number,
    Process,
    Rule,
    Text,
    Verdict,
    best_of,
    drafted_trees,
    expected_tokens,
    normalised,
    optimal_acceptance,
    optimal_acceptance_by_prefixes,
    random_law,
    random_process,
    reject_recursively,
    rule_of_mixed,
    step_law,
    verdicts_of,
    without,
)

SHAPES = [((1, 1, 1), 3), ((4,), 5), ((3, 2), 4), ((2, 2, 2), 3), ((3, 2, 1), 3), ((3, 2, 1), 5)]
"""Widths by level and vocabulary."""


def distance(process: Process, rule: Rule, widths: tuple[int, ...], *, weights_down: bool = False) -> Number:
    """Total variation between the output law and the target's."""
    length = len(widths) + 1
    emitted = step_law(process, widths, verdicts_of(process, rule), weights_down=weights_down)
    whole, expected = process.completed(emitted, length), process.target_law(length)
    return sum(abs(whole.get(text, 0) - expected.get(text, 0)) for text in whole | expected) / 2


def tokens(process: Process, rule: Rule, widths: tuple[int, ...], *, weights_down: bool = False) -> Number:
    return expected_tokens(step_law(process, widths, verdicts_of(process, rule), weights_down=weights_down))


def one_node(target: Law, draft: Law) -> Process:
    return Process({(): target} | {(x,): target for x in range(len(target))}, {(): draft})


def acceptance(target: Law, draft: Law, rule: Rule, n_children: int) -> Fraction:
    """With which probability some child is accepted."""
    return Fraction(tokens(one_node(target, draft), rule, (n_children,))) - 1


def random_pairs(n: int, vocab: int, kind: str = "mixed") -> list[tuple[Law, Law]]:
    """Target and draft laws."""
    rng = random.Random(vocab)
    return [(random_law(rng, vocab), random_law(rng, vocab, kind)) for _ in range(n)]


def law(*weights: int) -> Law:
    return normalised(map(Fraction, weights))


def overlap(target: Law, draft: Law) -> Fraction:
    return sum(map(min, target, draft), Fraction(0))


# What is exact


@pytest.mark.parametrize("weights_down", [False, True], ids=["by node", "weights down"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("widths", "vocab"), SHAPES)
def test_output_law_is_exactly_the_targets(
    widths: tuple[int, ...], vocab: int, rule: Rule, weights_down: bool
) -> None:  # fmt: skip
    for seed, kind in enumerate(KINDS * 3):
        process = random_process(seed, len(widths), vocab, kind)
        assert distance(process, rule, widths, weights_down=weights_down) == 0


@pytest.mark.parametrize("weights_down", [False, True], ids=["by node", "weights down"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_step_law_is_that_of_whole_drafted_trees(rule: Rule, weights_down: bool) -> None:
    """Drafting a whole tree before looking at any node gives the law that drafting nodes when they are needed gives."""
    for seed in range(4):
        process = random_process(seed, 2, 3, "any")
        expected = step_law(process, (2, 2), verdicts_of(process, rule), weights_down=weights_down)
        whole: defaultdict[Text, Number] = defaultdict(Fraction)
        for tree, prob in drafted_trees(process, (2, 2), rule).items():
            _walk(process, rule, tree, 0, Fraction(1), prob, whole, weights_down)
        assert {text: mass for text, mass in whole.items() if mass} == {t: mass for t, mass in expected.items() if mass}


def test_a_mixed_tree_has_nodes_of_both_rules() -> None:
    assert {rule_of_mixed(draft) for draft in random_process(0, 2, 4, "any").draft.values()} == {HUB, DISTINCT}


def _walk(
    process: Process, rule: Rule, tree: tuple[Text | None, ...], node: int, weight: Number, reached: Number,
    emitted: defaultdict[Text, Number], weights_down: bool,
) -> Number:  # fmt: skip
    """Walk the subtree of a node of a full binary tree, reached with this probability: with which it then fails."""
    text = tree[node]
    assert text is not None
    target = process.target[text]
    if 2 * node + 1 >= len(tree):
        verdict = Verdict([], weight, target)
    else:
        places = {c: tree[c] for c in (2 * node + 1, 2 * node + 2)}
        children = tuple(PHANTOM if child is None else child[-1] for child in places.values())
        verdict = rule.judge(Fraction(weight), target, process.draft[text], children)
        for x, w in verdict.tests:
            # The first of two equal drafts is tested first; a tested child is forgotten.
            child = next(c for c, t in places.items() if t is not None and t[-1] == x)
            del places[child]
            if weights_down:
                reached = _walk(process, rule, tree, child, w, reached, emitted, weights_down)
            else:
                _walk(process, rule, tree, child, 1, reached * w, emitted, weights_down)
                reached *= 1 - w
    for x, prob in enumerate(verdict.bonus):
        emitted[(*text, x)] += reached * verdict.exit_weight * prob
    return reached * (1 - verdict.exit_weight)


# What is accepted


def test_two_drafts_with_replacement_are_accepted_as_the_closed_formula_says() -> None:
    for target, draft in random_pairs(60, 5):
        residual = [max(p - q, Fraction(0)) for p, q in zip(target, draft, strict=True)]
        again = sum(min(r, sum(residual) * q) for r, q in zip(residual, draft, strict=True))
        assert acceptance(target, draft, IID, 2) == overlap(target, draft) + again


@pytest.mark.parametrize("n_children", [1, 2, 3, 4])
def test_the_hub_is_accepted_as_the_closed_formula_says(n_children: int) -> None:
    for target, draft in random_pairs(60, 5):
        best = best_of(draft, n_children - 1)
        rest = without(draft, best)
        expected = sum(p if x in best else min(p, rest[x]) for x, p in enumerate(target))
        assert acceptance(target, draft, HUB, n_children) == expected


@pytest.mark.parametrize("kind", ["any", "truncated", "one-hot"])
@pytest.mark.parametrize("n_children", [2, 3, 4])
def test_the_hub_is_optimal_for_what_it_drafts(n_children: int, kind: str) -> None:
    for target, draft in random_pairs(40, 5, kind):
        best = optimal_acceptance(HUB.draft(draft, n_children), target)
        assert float(acceptance(target, draft, HUB, n_children)) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("rule", [IID, DISTINCT], ids=["iid", "distinct"])
@pytest.mark.parametrize("n_children", [1, 2, 3])
def test_the_prefix_formula_is_the_linear_programmes_optimum(n_children: int, rule: Rule) -> None:
    strictly = 0
    for target, draft in random_pairs(25, 5):
        drafts = rule.draft(draft, n_children)
        best = optimal_acceptance_by_prefixes(drafts, target, draft)
        assert float(best) == pytest.approx(optimal_acceptance(drafts, target), abs=1e-12)
        reached = acceptance(target, draft, rule, n_children)
        assert reached == best if n_children == 1 else reached <= best
        strictly += reached < best
    assert n_children == 1 or strictly > 5


@pytest.mark.parametrize("rule", [IID, DISTINCT, HUB], ids=["chain, iid", "distinct", "hub"])
def test_weights_handed_down_never_accept_less(rule: Rule) -> None:
    """Block verification and a plain chain, traversal verification and RRS without replacement, and the hub's."""
    more = 0
    for widths, vocab in [((1, 1, 1), 3), ((1, 1, 1), 4)] if rule is IID else [((2, 2, 2), 3), ((3, 2, 1), 5)]:
        for seed in range(12):
            process = random_process(seed, len(widths), vocab, "any")
            by_node, handed_down = (tokens(process, rule, widths, weights_down=down) for down in (False, True))
            assert handed_down >= by_node
            more += handed_down > by_node
    assert more > 12


@pytest.mark.parametrize(
    ("other", "condition"),
    [(IID, lambda hub, tv: hub >= tv * (1 - hub)), (DISTINCT, lambda hub, tv: hub >= tv)],
    ids=["iid", "distinct"],
)
def test_a_peaked_draft_law_is_the_hubs(other: Rule, condition: Callable[[Fraction, Fraction], bool]) -> None:
    """No rule is the best everywhere, but where the condition holds the hub is not worse."""
    holds, loses = 0, 0
    for target, draft in random_pairs(300, 5):
        gain = acceptance(target, draft, HUB, 2) - acceptance(target, draft, other, 2)
        if condition(max(draft), 1 - overlap(target, draft)):
            holds += 1
            assert gain >= 0
        loses += gain < 0
    assert holds > 30
    assert loses > 30


# Mistakes that were made elsewhere


def skip_duplicates(weight: Fraction, target: Law, draft: Law, children: Children) -> Verdict:
    """A repeated draft is not tested again, nor its share taken from the target."""
    return reject_recursively(weight, target, [(x, draft) for x in dict.fromkeys(children)])


def judge_apart(weight: Fraction, target: Law, draft: Law, children: Children) -> Verdict:
    """Each child on its own, by the draft law of the first; the longest accepted path is kept."""
    verdicts = [reject_recursively(weight, target, [(x, draft)]) for x in children if x != PHANTOM]
    return verdicts[0]._replace(tests=[test for verdict in verdicts for test in verdict.tests])


def believe_in_chance(weight: Fraction, target: Law, draft: Law, children: Children) -> Verdict:
    """The most probable tokens, as if they had been drawn from the draft law renormalised over them."""
    among = normalised(q if x in children else Fraction(0) for x, q in enumerate(draft))
    return DISTINCT.judge(weight, target, among, children)


def bonus_from_target(weight: Fraction, target: Law, draft: Law, children: Children) -> Verdict:
    return IID.judge(weight, target, draft, children)._replace(bonus=target)


def sharpened(draft: Law, n_children: int) -> dict[Children, Fraction]:
    """Drawn at temperature one half; the verdict uses the law at temperature one."""
    return IID.draft(normalised(q * q for q in draft), n_children)


MISTAKES = {
    "duplicates are skipped": (Rule(IID.draft, skip_duplicates), 0.05),
    "siblings are tested apart, drawn with replacement": (Rule(IID.draft, judge_apart), 0.1),
    "siblings are tested apart, drawn without": (Rule(DISTINCT.draft, judge_apart), 0.1),
    "top-k is taken for drawn": (Rule(TOP.draft, believe_in_chance), 0.1),
    "bonus from the target": (Rule(IID.draft, bonus_from_target), 0.1),
    "drafted at another temperature": (Rule(sharpened, IID.judge), 0.05),
}


@pytest.mark.parametrize(("rule", "at_least"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("widths", [(2,), (3, 2)])
def test_a_mistake_shows_in_the_output_law(widths: tuple[int, ...], rule: Rule, at_least: float) -> None:
    processes = [random_process(seed, len(widths), 4, "any") for seed in range(20)]
    assert max(distance(process, rule, widths) for process in processes) > at_least


def test_an_acceptance_of_zero_is_below_no_uniform() -> None:
    """Uniforms are multiples of a small number, and may be 0: `<` is exact, `<=` accepts what the target rules out."""

    def judge(accepts: Callable[[Fraction, Fraction], bool]) -> Rule:
        def judged(*arguments: Any) -> Verdict:
            verdict = IID.judge(*arguments)
            uniforms = [Fraction(i, 12) for i in range(12)]
            coins = [(x, Fraction(sum(accepts(u, Fraction(a)) for u in uniforms), 12)) for x, a in verdict.tests]
            return verdict._replace(tests=coins)

        return Rule(IID.draft, judged)

    process = one_node(law(0, 1, 3), law(2, 2, 0))
    strict, weak = judge(lambda u, a: u < a), judge(lambda u, a: u <= a)
    assert distance(process, strict, (1,)) == 0
    assert distance(process, weak, (1,)) > 0
    forbidden = (0, 1)
    assert step_law(process, (1,), verdicts_of(process, weak), weights_down=False)[forbidden] > 0


def test_an_empty_residual_is_not_renormalised() -> None:
    """A draft law that is the target's leaves nothing to draw a bonus from, and nothing is rejected."""

    def renormalise(weight: Fraction, target: Law, draft: Law, children: Children) -> Verdict:
        residual = [max(p - q, Fraction(0)) for p, q in zip(target, draft, strict=True)]
        verdict = IID.judge(weight, target, draft, children)
        return verdict._replace(bonus=[r / sum(residual) for r in residual])

    process = one_node(law(1, 2, 3), law(1, 2, 3))
    with pytest.raises(ZeroDivisionError):
        distance(process, Rule(IID.draft, renormalise), (1,))
    for rule in RULES.values():
        assert distance(process, rule, (2,)) == 0
    assert acceptance(law(1, 2, 3), law(1, 2, 3), IID, 1) == 1


def test_a_one_hot_draft_law_has_no_second_child() -> None:
    """Dividing by the mass outside of the hub would be dividing by zero."""

    def divide(weight: Fraction, target: Law, draft: Law, children: Children) -> Verdict:
        rest = [Fraction(0) if x == children[0] else q / (1 - draft[children[0]]) for x, q in enumerate(draft)]
        return reject_recursively(weight, target, [(children[1], tuple(rest))])

    target, draft = law(2, 1, 3), law(0, 4, 0)
    with pytest.raises(ZeroDivisionError):
        distance(one_node(target, draft), Rule(HUB.draft, divide), (2,))
    assert HUB.draft(draft, 3) == DISTINCT.draft(draft, 3) == {(1, PHANTOM, PHANTOM): 1}
    for rule in (HUB, DISTINCT, TOP):
        tests, exit_weight, bonus = rule.judge(Fraction(1), target, draft, (1, PHANTOM))
        assert (list(tests), exit_weight, bonus) == ([(1, target[1])], 1, law(2, 0, 3))
