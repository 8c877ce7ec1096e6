"""Why a step has one root: several roots drawn from the target's own law, of which the one whose draft is accepted
furthest wins, are not lossless ("Improving Multi-candidate Speculative Decoding", arXiv 2409.10644, section 3.1, where
the output law is P_out(t) = P_target(t) P(accept continuation | t)). In exact fractions."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from math import prod

import pytest
from oracle import Law, random_law

VOCAB = 3


def _laws(seed: int) -> tuple[Law, list[Fraction]]:
    """The target's law of a root, and with what probability the token drafted after each root is accepted: the overlap
    of the two models' laws there (Leviathan et al., arXiv 2211.17192, corollary 3.6)."""
    chance = random.Random(seed)
    p = [random_law(chance, VOCAB) for _ in range(VOCAB + 1)]
    q = [random_law(chance, VOCAB) for _ in range(VOCAB)]
    return p[-1], [sum(map(min, p[t], q[t]), Fraction(0)) for t in range(VOCAB)]


def _winner(roots: Law, accepts: list[Fraction], n_roots: int) -> list[Fraction]:
    """By root, with what probability it is the one that is emitted: the first of those drawn whose drafted token is
    accepted, or else the first; every case counted."""
    law = [Fraction(0)] * VOCAB
    for drawn in itertools.product(range(VOCAB), repeat=n_roots):
        for accepted in itertools.product((False, True), repeat=n_roots):
            coins = [accepts[t] if yes else 1 - accepts[t] for t, yes in zip(drawn, accepted, strict=True)]
            winner = drawn[accepted.index(True)] if any(accepted) else drawn[0]
            law[winner] += prod(roots[t] for t in drawn) * prod(coins)
    return law


@pytest.mark.parametrize("seed", [0, 1, 2, 4, 5])
def test_one_root_is_exact_and_several_are_not(seed: int) -> None:
    roots, accepts = _laws(seed)
    assert tuple(_winner(roots, accepts, 1)) == roots
    off = [sum(abs(a - b) for a, b in zip(_winner(roots, accepts, n), roots, strict=True)) / 2 for n in (2, 3, 4)]
    assert 0 < off[0] < off[1] < off[2]


@pytest.mark.parametrize("seed", [0, 1, 2, 4, 5])
def test_many_roots_follow_the_papers_law(seed: int) -> None:
    """Each further root closes the distance to it by the same factor."""
    roots, accepts = _laws(seed)
    overall = sum(p * a for p, a in zip(roots, accepts, strict=True))
    paper = [p * a / overall for p, a in zip(roots, accepts, strict=True)]
    for n_roots in (1, 2, 3, 4):
        left = (1 - overall) ** n_roots
        # Where none is accepted the first is emitted, and that it was not tells something of it
        rejected = [p * (1 - a) / (1 - overall) for p, a in zip(roots, accepts, strict=True)]
        expected = [(1 - left) * out + left * no for out, no in zip(paper, rejected, strict=True)]
        assert _winner(roots, accepts, n_roots) == expected
