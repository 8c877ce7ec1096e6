"""Verification is lossless: by exact enumeration of every draft and every acceptance.

The enumeration runs what is defined and what runs on a CPU in float64. Their uniforms are replaced by one point of
every interval between the places where an acceptance can change, weighted by the interval's length, and their draw
hands out the residual law.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from fractions import Fraction
from math import prod
from typing import Any

import pytest
import torch
from chains import law_rows, verify_chain_cpu, verify_chain_reference
from torch import Tensor

from specdec.kernels import verify
from specdec.kernels.noise import ACCEPT, BONUS
from specdec.kernels.row_law import row_probs

pytestmark = pytest.mark.kernels

Law = tuple[Fraction, ...]


def _law(rng: random.Random, vocab: int, kind: str) -> Law:
    """A law with small denominators. Kinds: "any" (may hold zeros), "one-hot", "truncated" (two ids at most)."""
    weights = [rng.choice([0, 0, 1, 2, 3, 5]) for _ in range(vocab)]
    if kind == "one-hot":
        weights = [0] * vocab
    if kind == "truncated":
        kept = rng.sample(range(vocab), min(2, vocab))
        weights = [w if i in kept else 0 for i, w in enumerate(weights)]
    if not any(weights):
        weights[rng.randrange(vocab)] = 1
    return tuple(Fraction(w, sum(weights)) for w in weights)


class Chain:
    """Random target and draft laws after every prefix of up to `depth` tokens."""

    def __init__(self, seed: int, depth: int, vocab: int, kind: str) -> None:
        rng = random.Random(seed)
        self.depth, self.vocab = depth, vocab
        prefixes = [p for n in range(depth + 1) for p in itertools.product(range(vocab), repeat=n)]
        self.target = {p: _law(rng, vocab, "any") for p in prefixes}
        self.draft = {p: _law(rng, vocab, kind) for p in prefixes}

    def target_law(self) -> dict[tuple[int, ...], Fraction]:
        """The exact law of the next `depth + 1` tokens."""
        texts = itertools.product(range(self.vocab), repeat=self.depth + 1)
        return {t: prod((self.target[t[:i]][x] for i, x in enumerate(t)), start=Fraction(1)) for t in texts}


def _points(p: Fraction, q: Fraction) -> list[tuple[Fraction, Fraction]]:
    """(middle, length) of the intervals into which p / q divides (0, 1)."""
    ends = sorted({Fraction(0), Fraction(1)} | ({p / q} if 0 < p < q else set()))
    return [((a + b) / 2, b - a) for a, b in itertools.pairwise(ends)]


def _output_law(
    function: Callable[..., Any], chain: Chain, n_drafted: int, monkeypatch: pytest.MonkeyPatch
) -> dict[tuple[int, ...], float]:
    """The law of the next `depth + 1` tokens when `function` verifies `n_drafted` of `depth` places; the tokens after
    the bonus follow the target."""
    drafts, uniforms, weights = [], [], []
    for tokens in itertools.product(range(chain.vocab), repeat=n_drafted):
        laws = [(chain.target[tokens[:i]][x], chain.draft[tokens[:i]][x]) for i, x in enumerate(tokens)]
        if any(q == 0 for _, q in laws):
            continue
        for choice in itertools.product(*(_points(p, q) for p, q in laws)):
            padding = (0,) * (chain.depth - n_drafted)
            drafts.append(tokens + padding)
            uniforms.append([float(u) for u, _ in choice] + [1e-9] * len(padding))  # would accept, must not matter
            weights.append(prod([*(q for _, q in laws), *(w for _, w in choice)], start=Fraction(1)))
    assert sum(weights) == 1

    def law_after(table: dict[tuple[int, ...], Law], text: tuple[int, ...]) -> list[float]:
        return [float(x) for x in table[text]]

    places = range(chain.depth)
    target = torch.tensor(
        [[law_after(chain.target, d[:i]) for i in range(chain.depth + 1)] for d in drafts], dtype=torch.float64
    )
    support = torch.tensor([[law_after(chain.draft, d[:i]) for i in places] for d in drafts], dtype=torch.float64)
    support_ids = torch.arange(chain.vocab).expand(support.shape)
    order = torch.randperm(chain.vocab, generator=torch.Generator().manual_seed(0))  # ids need no order of their own
    support, support_ids = support[..., order], support_ids[..., order]
    captured: list[Tensor] = []

    def residual_of(residual: Tensor, *key: Tensor | int) -> Tensor:
        captured.append(residual)
        return torch.zeros(len(residual), dtype=torch.int64)

    noise = torch.tensor(uniforms, dtype=torch.float64)
    for name in ("uniform", "uniform_reference"):
        monkeypatch.setattr(verify, name, lambda row, position, node, stream: noise[row, node - 1])
    for name in ("draw", "draw_reference"):
        monkeypatch.setattr(verify, name, residual_of)
    row = torch.arange(len(drafts))
    n_accepted, _ = function(
        *law_rows(target), torch.tensor(drafts), torch.full_like(row, n_drafted), support_ids, support, row, row
    )
    residual = torch.cat(captured)
    bonus = residual / residual.sum(-1, keepdim=True)

    law = dict.fromkeys(itertools.product(range(chain.vocab), repeat=chain.depth + 1), 0.0)
    for i, (tokens, weight) in enumerate(zip(drafts, weights, strict=True)):
        kept = tokens[: int(n_accepted[i])]
        for x in range(chain.vocab):
            for rest in itertools.product(range(chain.vocab), repeat=chain.depth - len(kept)):
                text = (*kept, x, *rest)
                after = prod(float(chain.target[text[:i]][text[i]]) for i in range(len(kept) + 1, len(text)))
                law[text] += float(weight) * bonus[i, x].item() * after
    return law


IMPLEMENTATIONS = pytest.mark.parametrize("function", [verify_chain_reference, verify_chain_cpu])


@IMPLEMENTATIONS
@pytest.mark.parametrize("kind", ["any", "one-hot", "truncated"])
@pytest.mark.parametrize(("depth", "vocab"), [(1, 2), (1, 4), (2, 3), (2, 4), (3, 2), (3, 3)])
def test_output_law_is_exactly_the_targets(
    function: Callable[..., Any], depth: int, vocab: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3 if depth == 3 else 8):
        chain = Chain(seed, depth, vocab, kind)
        expected = chain.target_law()
        law = _output_law(function, chain, depth, monkeypatch)
        assert max(abs(law[t] - float(expected[t])) for t in expected) < 1e-12


@IMPLEMENTATIONS
@pytest.mark.parametrize("n_drafted", [0, 1, 2])
def test_output_law_with_fewer_drafts_than_places(
    function: Callable[..., Any], n_drafted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(5):
        chain = Chain(seed, 3, 3, "any")
        expected = chain.target_law()
        law = _output_law(function, chain, n_drafted, monkeypatch)
        assert max(abs(law[t] - float(expected[t])) for t in expected) < 1e-12


@IMPLEMENTATIONS
def test_a_draft_the_target_rules_out_is_rejected_whatever_the_noise(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("uniform", "uniform_reference"):
        monkeypatch.setattr(verify, name, lambda seed, *key: torch.zeros(seed.shape))
    key = torch.zeros(1, dtype=torch.int64)
    n_accepted, bonus = function(
        *law_rows(torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])), torch.tensor([[0]]), torch.tensor([1]),
        torch.tensor([[[0, 1]]]), torch.tensor([[[0.5, 0.5]]]), key, key,
    )  # fmt: skip
    assert n_accepted.item() == 0
    assert bonus.item() == 1


@IMPLEMENTATIONS
def test_a_residual_lost_to_rounding_falls_back_to_the_target(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("uniform", "uniform_reference"):  # as if p / q were rounded down
        monkeypatch.setattr(verify, name, lambda seed, *key: torch.ones(seed.shape))
    key = torch.arange(20)
    law = torch.tensor([0.25, 0.0, 0.75])
    rows = law_rows(law.expand(20, 2, 3))
    probs = row_probs(rows[0], *rows[1:]).view(20, 2, 3)[:, :1]  # p exactly
    n_accepted, bonus = function(
        *rows, torch.full((20, 1), 2), torch.ones(20, dtype=torch.int64), torch.arange(3).expand(20, 1, 3), probs,
        key, key,
    )  # fmt: skip
    assert (n_accepted == 0).all()
    assert set(bonus.tolist()) == {0, 2}


def test_no_noise_is_ever_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a sample's successive steps, whatever is accepted, no stream sees one (position, node) twice."""
    seen: list[tuple[int, int, int]] = []

    def spy_uniform(seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
        node = node.expand_as(position)
        seen.extend((stream, p, n) for p, n in zip(position.flatten().tolist(), node.flatten().tolist(), strict=True))
        return torch.rand(position.shape, generator=generator)

    def spy_draw(probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
        seen.append((stream, int(position), int(node)))
        return torch.zeros(1, dtype=torch.int64)

    monkeypatch.setattr(verify, "uniform", spy_uniform)
    monkeypatch.setattr(verify, "draw", spy_draw)
    generator = torch.Generator().manual_seed(0)
    position, law, counts = 1, torch.tensor([0.5, 0.5]), set()
    for _ in range(40):
        n_accepted, _ = verify_chain_cpu(
            *law_rows((law * torch.tensor([0.8, 1.2])).expand(1, 4, 2)), torch.zeros(1, 3, dtype=torch.int64),
            torch.tensor([3]), torch.arange(2).expand(1, 3, 2), law.expand(1, 3, 2), torch.tensor([7]),
            torch.tensor([position]),
        )  # fmt: skip
        position += int(n_accepted) + 1
        counts.add(int(n_accepted))
    assert counts == {0, 1, 2, 3}
    assert {stream for stream, _, _ in seen} == {ACCEPT, BONUS}
    assert len(seen) == len(set(seen)) == 40 * 4
