"""What speculative decoding with several drafted children per node must come to, in exact rational arithmetic.

A drafting rule says which children a node gets, and how its verdict on them is reached:

- IID: drawn with replacement, verified by recursive rejection (SpecInfer, arXiv 2305.09781).
- DISTINCT: drawn without replacement, by recursive rejection from the draft law renormalised after each (Sequoia,
  arXiv 2402.12374).
- HUB: the most probable tokens and one drawn from the rest, verified as the optimal transport (SpecHub, arXiv
  2411.05289; more than two children: Hu et al., arXiv 2502.18779).
- TOP: the most probable tokens; what is deterministic is drawn from a one-hot law.
- PARTIAL: the most probable token and the others drawn without replacement from the rest: recursive rejection of the
  drawn ones, and then of the one from its one-hot law. With two children it must be HUB.
- MIXED: HUB where the draft law is peaked, DISTINCT elsewhere.

A subtree has a weight, the probability with which it must accept. `step_law` walks a tree node by node, each child
tossing a coin of its weight, or hands the weights down: block verification (arXiv 2403.10444) on a chain, traversal
verification (arXiv 2505.12398) on DISTINCT trees, and the same for the hub.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import prod
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog

Number = Fraction | float
Text = tuple[int, ...]
Law = tuple[Fraction, ...]
Children = tuple[int, ...]

PHANTOM = -1
"""A child that does not exist: the draft law has too few tokens."""
KINDS = ("any", "one-hot", "truncated", "flat", "mixed")


def normalised(weights: Iterable[Fraction]) -> Law:
    """All zeros stay all zeros."""
    weights = tuple(weights)
    total = sum(weights, Fraction(0))
    return tuple(w / total for w in weights) if total else weights


def without(law: Law, tokens: Sequence[int]) -> Law:
    """The law of a token that is none of these; all zeros if there is no other."""
    return normalised(Fraction(0) if x in tokens else prob for x, prob in enumerate(law))


def best_of(law: Law, n: int) -> Children:
    """The `n` most probable tokens, phantoms where there are fewer."""
    best = sorted((x for x, prob in enumerate(law) if prob), key=lambda x: (-law[x], x))[:n]
    return (*best, *[PHANTOM] * (n - len(best)))


# Processes


@dataclass(frozen=True)
class Process:
    """Laws over the vocabulary after every text: the target's, and the draft's after all but the longest."""

    target: dict[Text, Law]
    draft: dict[Text, Law]

    @property
    def vocab(self) -> int:
        return len(self.target[()])

    def completed(self, law: dict[Text, Number], length: int) -> dict[Text, Number]:
        """The law of `length` tokens that begin as `law` says and follow the target from there."""
        whole: defaultdict[Text, Number] = defaultdict(Fraction)
        for text, mass in law.items():
            for rest in itertools.product(range(self.vocab), repeat=length - len(text)):
                longer = text + rest
                whole[longer] += mass * prod(self.target[longer[:i]][longer[i]] for i in range(len(text), length))
        return {text: mass for text, mass in whole.items() if mass}

    def target_law(self, length: int) -> dict[Text, Number]:
        return self.completed({(): Fraction(1)}, length)


def random_law(rng: random.Random, vocab: int, kind: str = "any") -> Law:
    """A law with small denominators. "any" may hold zeros, "truncated" has two ids at most."""
    if kind == "mixed":
        kind = rng.choice(KINDS[:-1])
    weights = [1 if kind == "flat" else rng.choice([0, 1, 1, 2, 3, 5]) for _ in range(vocab)]
    if kind in ("one-hot", "truncated"):
        kept = rng.sample(range(vocab), 1 if kind == "one-hot" else min(2, vocab))
        weights = [w if x in kept else 0 for x, w in enumerate(weights)]
    if not any(weights):
        weights[rng.randrange(vocab)] = 1
    return normalised(map(Fraction, weights))


def random_process(seed: int, depth: int, vocab: int, kind: str = "mixed") -> Process:
    """Random laws after every text of up to `depth` tokens; "mixed" takes any kind of draft law after each."""
    rng = random.Random(seed)
    texts = [text for n in range(depth + 1) for text in itertools.product(range(vocab), repeat=n)]
    target = {text: random_law(rng, vocab) for text in texts}
    return Process(target, {text: random_law(rng, vocab, kind) for text in texts if len(text) < depth})


# Drafting rules: the law of a node's children, and the verdict on them


class Verdict(NamedTuple):
    """Children in the order they are tested, each with its subtree's weight given that those before it have failed;
    the probability of ending here when all have failed, and the law of the token then drawn."""

    tests: Sequence[tuple[int, Number]]
    exit_weight: Number
    bonus: Sequence[Number]


class Rule(NamedTuple):
    """`draft(draft_law, n_children)` and `judge(weight, target_law, draft_law, children)`."""

    draft: Callable[[Law, int], dict[Children, Fraction]]
    judge: Callable[[Fraction, Law, Law, Children], Verdict]


def reject_recursively(weight: Fraction, target: Law, drafts: Iterable[tuple[int, Law]]) -> Verdict:
    """Drafts with the laws that they were drawn from. What a draft has not covered is the next one's target."""
    tests = []
    for token, draft in drafts:
        tests.append((token, min(Fraction(1), weight * target[token] / draft[token])))
        residual = [max(weight * p - q, Fraction(0)) for p, q in zip(target, draft, strict=True)]
        left = sum(residual)
        # Nothing is left either of a weight of one, and the draft cannot be rejected, or of a smaller one: fail upward.
        weight = left / (left + (1 - weight)) if left else Fraction(0)
        target = normalised(residual)
    return Verdict(tests, weight, target)


def judge_hub(weight: Fraction, target: Law, draft: Law, children: Children) -> Verdict:
    """The drawn child first; the best share what the draft law of the rest has too much of."""
    *best, drawn = children
    best = [x for x in best if x != PHANTOM]
    rest = without(draft, best)
    surplus = sum((max(q - weight * p, Fraction(0)) for p, q in zip(target, rest, strict=True)), Fraction(0))
    surplus += 1 - sum(rest)  # a phantom's own: probability one, and the target never has it
    tests = [] if drawn == PHANTOM else [(drawn, min(Fraction(1), weight * target[drawn] / rest[drawn]))]
    tested = Fraction(0)
    for x in best:
        share = weight * target[x] / surplus if surplus else Fraction(0)
        tests.append((x, share / (1 - tested) if share else share))
        tested += share
    residual = [Fraction(0) if x in best else max(weight * target[x] - q, Fraction(0)) for x, q in enumerate(rest)]
    left = sum(residual, Fraction(0))
    return Verdict(tests, left / (left + (1 - weight)) if left else left, normalised(residual))


def draft_iid(draft: Law, n: int) -> dict[Children, Fraction]:
    support = [x for x, prob in enumerate(draft) if prob]
    return {xs: prod((draft[x] for x in xs), start=Fraction(1)) for xs in itertools.product(support, repeat=n)}


def draft_distinct(draft: Law, n: int) -> dict[Children, Fraction]:
    laws: dict[Children, Fraction] = {(): Fraction(1)}
    for _ in range(n):
        laws = {(*xs, x): prob * q for xs, prob in laws.items() for x, q in _draws(without(draft, xs))}
    return laws


def draft_hub(draft: Law, n: int) -> dict[Children, Fraction]:
    best = best_of(draft, n - 1)
    return {(*best, x): q for x, q in _draws(without(draft, best))}


def _draws(law: Law) -> list[tuple[int, Fraction]]:
    return [(x, prob) for x, prob in enumerate(law) if prob] or [(PHANTOM, Fraction(1))]


def judge_iid(weight: Fraction, target: Law, draft: Law, children: Children) -> Verdict:
    return reject_recursively(weight, target, [(x, draft) for x in children])


def judge_distinct(weight: Fraction, target: Law, draft: Law, children: Children) -> Verdict:
    drafts = [(x, without(draft, children[:i])) for i, x in enumerate(children) if x != PHANTOM]
    return reject_recursively(weight, target, drafts)


def judge_top(weight: Fraction, target: Law, draft: Law, children: Children) -> Verdict:
    one_hot = [(x, tuple(Fraction(x == y) for y in range(len(target)))) for x in children if x != PHANTOM]
    return reject_recursively(weight, target, one_hot)


def draft_partial(draft: Law, n: int) -> dict[Children, Fraction]:
    best = best_of(draft, 1)
    return {(*best, *drawn): q for drawn, q in draft_distinct(without(draft, best), n - 1).items()}


def judge_partial(weight: Fraction, target: Law, draft: Law, children: Children) -> Verdict:
    best, *drawn = children
    drafts = [(x, without(draft, children[: i + 1])) for i, x in enumerate(drawn) if x != PHANTOM]
    one_hot = tuple(Fraction(best == y) for y in range(len(target)))
    return reject_recursively(weight, target, [*drafts, (best, one_hot)])


IID = Rule(draft_iid, judge_iid)
DISTINCT = Rule(draft_distinct, judge_distinct)
HUB = Rule(draft_hub, judge_hub)
PARTIAL = Rule(draft_partial, judge_partial)
TOP = Rule(lambda draft, n: {best_of(draft, n): Fraction(1)}, judge_top)


def rule_of_mixed(draft: Law) -> Rule:
    """Of the draft law alone: a choice that saw the children would change their law."""
    return HUB if max(draft) >= Fraction(1, 2) else DISTINCT


MIXED = Rule(
    lambda draft, n: rule_of_mixed(draft).draft(draft, n),
    lambda weight, target, draft, children: rule_of_mixed(draft).judge(weight, target, draft, children),
)
RULES = {"iid": IID, "distinct": DISTINCT, "hub": HUB, "partial": PARTIAL, "top": TOP, "mixed": MIXED}


# A step


Verdicts = Callable[[Text, Number, int], Iterable[tuple[Number, Verdict]]]
"""`verdicts(text, weight, n_children)`: of all children the node after `text` may get, probability and verdict."""


def verdicts_of(process: Process, rule: Rule) -> Verdicts:
    def verdicts(text: Text, weight: Number, n_children: int) -> Iterable[tuple[Number, Verdict]]:
        target, draft = process.target[text], process.draft[text]
        for children, prob in rule.draft(draft, n_children).items():
            yield prob, rule.judge(Fraction(weight), target, draft, children)

    return verdicts


def step_law(process: Process, widths: Sequence[int], verdicts: Verdicts, *, weights_down: bool) -> dict[Text, Number]:
    """The law of what one step emits, accepted tokens and the bonus, where nodes of level i have `widths[i]` children.

    Args:
        weights_down: hand the weights down to the leaves, or else decide at each node.
    """

    @cache
    def emitted(text: Text, weight: Number) -> dict[Text, Number]:
        """What the subtree after `text` emits; it fails upward with the mass that is missing."""
        if len(text) == len(widths):
            return {(*text, x): weight * p for x, p in enumerate(process.target[text])}
        law: defaultdict[Text, Number] = defaultdict(Fraction)
        for left, (tests, exit_weight, bonus) in verdicts(text, weight, widths[len(text)]):
            for x, child_weight in tests:  # their subtrees are independent, given their tokens
                if not child_weight:
                    continue
                subtree = emitted((*text, x), child_weight if weights_down else 1)
                share = left if weights_down else left * child_weight
                for longer, mass in subtree.items():
                    law[longer] += share * mass
                left -= share * sum(subtree.values())
            for x, prob in enumerate(bonus):
                law[(*text, x)] += left * exit_weight * prob
        return dict(law)

    return emitted((), 1)


def drafted_trees(process: Process, widths: Sequence[int], rule: Rule) -> dict[tuple[Text | None, ...], Fraction]:
    """All trees that may be drafted and their probabilities: the nodes' texts in level order, None for a phantom."""
    trees: dict[tuple[Text | None, ...], Fraction] = {((),): Fraction(1)}
    node = 0
    for level, width in enumerate(widths):
        for _ in range(prod(widths[:level])):
            longer = {}
            for tree, prob in trees.items():
                text = tree[node]
                drafts = {(PHANTOM,) * width: Fraction(1)} if text is None else rule.draft(process.draft[text], width)
                for children, q in drafts.items():
                    texts = (None if text is None or x == PHANTOM else (*text, x) for x in children)
                    longer[(*tree, *texts)] = prob * q
            trees, node = longer, node + 1
    return trees


def expected_tokens(law: dict[Text, Number]) -> Number:
    """A step's, the bonus included."""
    return sum(len(text) * mass for text, mass in law.items())


# The optimum of one node


def optimal_acceptance(drafts: dict[Children, Fraction], target: Law) -> float:
    """With which probability some child can be accepted at most: a linear programme of mass moved from a node's
    children to the token emitted (SpecTr, arXiv 2310.15141)."""
    pairs = [(i, x) for i, children in enumerate(drafts) for x in set(children) - {PHANTOM}]
    moved = np.zeros((len(drafts) + len(target), len(pairs)))
    for column, (i, x) in enumerate(pairs):
        moved[i, column] = moved[len(drafts) + x, column] = 1
    bounds = [float(prob) for prob in (*drafts.values(), *target)]
    return float(-linprog(-np.ones(len(pairs)), A_ub=moved, b_ub=bounds).fun)


def optimal_acceptance_by_prefixes(drafts: dict[Children, Fraction], target: Law, draft: Law) -> Fraction:
    """The same for drafts with or without replacement: the smallest cut is a prefix of the tokens in the order of
    draft over target probability (arXiv 2502.18779)."""
    order = sorted(range(len(target)), key=lambda x: draft[x] / target[x] if target[x] else np.inf, reverse=True)
    smallest = Fraction(1)
    for n in range(len(order)):
        prefix = {PHANTOM, *order[: n + 1]}
        inside = sum((prob for children, prob in drafts.items() if prefix.issuperset(children)), Fraction(0))
        smallest = min(smallest, 1 + sum(target[x] for x in order[: n + 1]) - inside)
    return smallest
