"""The primitive of tree verification keeps the target's law and accepts as much as it should.

By exact enumeration: the oracle's recursion over a step, with the library's weights.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable

import pytest
import torch
from oracle import (
    KINDS,
    MIXED,
    PHANTOM,
    RULES,
    Number,
    Process,
    Rule,
    Text,
    Verdict,
    Verdicts,
    best_of,
    expected_tokens,
    random_law,
    random_process,
    rule_of_mixed,
    step_law,
    verdicts_of,
)
from trees import N_HUBS

from specdec.kernels.verify.tree_rules import WITH_REPLACEMENT, weigh_children_reference

pytestmark = pytest.mark.kernels

SHAPES = [((1, 1, 1), 4), ((4,), 5), ((3, 2), 4), ((2, 2, 2), 3), ((3, 2, 1), 5)]
"""Widths by level and vocabulary."""


def library_verdicts(process: Process, rule: Rule, dtype: torch.dtype) -> Verdicts:
    """The library's verdicts. Of the target it is shown the draft's support and the mass outside of it.

    The support ends with two entries that do not belong to it, and hold the id of one that does.
    """

    def verdicts(text: Text, weight: Number, n_children: int) -> Iterable[tuple[float, Verdict]]:
        target, draft = process.target[text], process.draft[text]
        own = rule_of_mixed(draft) if rule is MIXED else rule
        n_hubs, drafts = N_HUBS[own](n_children), own.draft(draft, n_children)
        ids = best_of(draft, sum(q > 0 for q in draft))
        outside = [x for x in range(len(target)) if x not in ids]

        def repeated(*values: Number) -> torch.Tensor:
            return torch.tensor([float(value) for value in values], dtype=dtype).expand(len(drafts), -1)

        weights, exit_weights, residuals, scales = weigh_children_reference(
            n_hubs, repeated(weight)[:, 0], repeated(*(target[x] for x in ids), *[target[ids[0]]] * 2),
            repeated(sum(target[x] for x in outside))[:, 0], repeated(*(draft[x] for x in ids), 0, math.nan),
            torch.tensor([[-1 if x == PHANTOM else ids.index(x) for x in children] for children in drafts]),
        )  # fmt: skip
        for out in (weights, exit_weights, residuals, scales):
            assert out.dtype == dtype
        rows = zip(weights.tolist(), exit_weights.tolist(), residuals.tolist(), scales.tolist(), strict=True)
        for (children, prob), (child_weights, exit_weight, residual, scale) in zip(drafts.items(), rows, strict=True):
            tests = list(zip(children, child_weights, strict=True))
            if n_hubs > 0:  # the hubs are tested last
                tests = [*tests[n_hubs:], *tests[:n_hubs]]
            bonus = [scale * float(p) if x in outside else 0.0 for x, p in enumerate(target)]
            for x, mass in zip((*ids, ids[0], ids[0]), residual, strict=True):
                bonus[x] += mass
            total = sum(bonus) or 1.0
            assert all(w == 0 for x, w in tests if x == PHANTOM)
            yield float(prob), Verdict(tests, exit_weight, [mass / total for mass in bonus])

    return verdicts


def check(
    process: Process, rule: Rule, widths: tuple[int, ...], *, weights_down: bool, dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-12,
) -> None:  # fmt: skip
    """Output law and expected tokens are as they should be, and no text comes out that the target rules out."""
    law = step_law(process, widths, library_verdicts(process, rule, dtype), weights_down=weights_down)
    exact = step_law(process, widths, verdicts_of(process, rule), weights_down=weights_down)
    assert float(expected_tokens(law)) == pytest.approx(float(expected_tokens(exact)), abs=tolerance)
    whole, expected = process.completed(law, len(widths) + 1), process.target_law(len(widths) + 1)
    assert whole.keys() <= expected.keys()
    assert max(abs(float(mass) - float(whole.get(text, 0))) for text, mass in expected.items()) < tolerance


WALKS = pytest.mark.parametrize("weights_down", [False, True], ids=["by node", "weights down"])


@WALKS
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("widths", "vocab"), SHAPES)
def test_law_and_expected_tokens_are_the_oracles(
    widths: tuple[int, ...], vocab: int, rule: Rule, weights_down: bool
) -> None:  # fmt: skip
    for seed, kind in enumerate(KINDS * 3):
        check(random_process(seed, len(widths), vocab, kind), rule, widths, weights_down=weights_down)


@WALKS
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_single_precision_is_enough(rule: Rule, weights_down: bool) -> None:
    for seed, kind in enumerate(KINDS * 3):
        process = random_process(seed, 2, 4, kind)
        check(process, rule, (3, 2), weights_down=weights_down, dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize("n_hubs", [WITH_REPLACEMENT, 0, 1, 4])
def test_a_child_that_is_missing_changes_nothing(n_hubs: int) -> None:
    """Also where the draft law has more tokens: a tree may be cut short."""
    law = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    target, weight = law.flip(0) * 0.75, torch.tensor(0.875, dtype=torch.float64)
    full, short = (
        weigh_children_reference(n_hubs, weight, target, 1 - target.sum(), law, torch.tensor(places))
        for places in ([0, -1, 2, -1], [0, 2])
    )
    assert full[0].tolist() == [short[0][0], 0, short[0][1], 0]
    assert all(torch.equal(one, other) for one, other in zip(full[1:], short[1:], strict=True))


@pytest.mark.parametrize("rule", N_HUBS, ids=["iid", "distinct", "hub", "partial", "top"])
def test_a_batch_is_many_single_calls(rule: Rule) -> None:
    rng = random.Random(0)
    columns: list[list[object]] = [[], [], [], [], []]
    for _ in range(24):
        *target, outside = random_law(rng, 6)
        draft = random_law(rng, 5, "mixed")
        children = rng.choice(list(rule.draft(draft, 3)))  # tokens are places here
        row = (rng.random(), [float(p) for p in target], float(outside), [float(q) for q in draft], children)
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    arguments = [torch.tensor(column).unflatten(0, (4, 6)) for column in columns]
    together = weigh_children_reference(N_HUBS[rule](3), *arguments)
    for place in itertools.product(range(4), range(6)):
        alone = weigh_children_reference(N_HUBS[rule](3), *(argument[place] for argument in arguments))
        for one, many in zip(alone, together, strict=True):
            torch.testing.assert_close(one, many[place], rtol=0, atol=1e-14)
