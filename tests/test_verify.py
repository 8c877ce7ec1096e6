"""Verification is lossless: by exact enumeration of every draft and every acceptance, and by frequencies on real noise.

The enumeration runs the op itself in float64. Its uniforms are replaced by one point of every interval between the
places where an acceptance can change, weighted by the interval's length, and its draw hands out the residual law.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from fractions import Fraction
from math import prod

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from specdec.kernels import draw as draw_module
from specdec.kernels import verify
from specdec.kernels.draw import draw, draw_reference, top_support
from specdec.kernels.noise import ACCEPT, BONUS, DRAFT
from specdec.kernels.verify import verify_chain, verify_greedy

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


def _output_law(chain: Chain, n_drafted: int, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, ...], float]:
    """The law of the next `depth + 1` tokens when the op verifies `n_drafted` of `depth` places; the tokens after the
    bonus follow the target."""
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
    monkeypatch.setattr(verify, "uniform", lambda *key: noise)
    monkeypatch.setattr(verify, "draw", residual_of)
    keys = torch.zeros(len(drafts), dtype=torch.int64)
    n_accepted, _ = verify_chain(
        target, torch.tensor(drafts), torch.full_like(keys, n_drafted), support_ids, support, keys, keys
    )
    (residual,) = captured
    bonus = residual / residual.sum(-1, keepdim=True)

    law = dict.fromkeys(itertools.product(range(chain.vocab), repeat=chain.depth + 1), 0.0)
    for row, (tokens, weight) in enumerate(zip(drafts, weights, strict=True)):
        kept = tokens[: int(n_accepted[row])]
        for x in range(chain.vocab):
            for rest in itertools.product(range(chain.vocab), repeat=chain.depth - len(kept)):
                text = (*kept, x, *rest)
                after = prod(float(chain.target[text[:i]][text[i]]) for i in range(len(kept) + 1, len(text)))
                law[text] += float(weight) * bonus[row, x].item() * after
    return law


@pytest.mark.parametrize("kind", ["any", "one-hot", "truncated"])
@pytest.mark.parametrize(("depth", "vocab"), [(1, 2), (1, 4), (2, 3), (2, 4), (3, 2), (3, 3)])
def test_output_law_is_exactly_the_targets(depth: int, vocab: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3 if depth == 3 else 8):
        chain = Chain(seed, depth, vocab, kind)
        expected = chain.target_law()
        law = _output_law(chain, depth, monkeypatch)
        assert max(abs(law[t] - float(expected[t])) for t in expected) < 1e-12


@pytest.mark.parametrize("n_drafted", [0, 1, 2])
def test_output_law_with_fewer_drafts_than_places(n_drafted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        chain = Chain(seed, 3, 3, "any")
        expected = chain.target_law()
        law = _output_law(chain, n_drafted, monkeypatch)
        assert max(abs(law[t] - float(expected[t])) for t in expected) < 1e-12


def test_a_draft_the_target_rules_out_is_rejected_whatever_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "uniform", lambda seed, *key: torch.zeros(seed.shape))
    key = torch.zeros(1, dtype=torch.int64)
    n_accepted, bonus = verify_chain(
        torch.tensor([[[0.0, 1.0], [0.5, 0.5]]]), torch.tensor([[0]]), torch.tensor([1]),
        torch.tensor([[[0, 1]]]), torch.tensor([[[0.5, 0.5]]]), key, key,
    )  # fmt: skip
    assert n_accepted.item() == 0
    assert bonus.item() == 1


def test_a_residual_lost_to_rounding_falls_back_to_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "uniform", lambda seed, *key: torch.ones(seed.shape))  # as if p / q were rounded down
    key = torch.arange(64)
    law = torch.tensor([0.25, 0.0, 0.75])
    n_accepted, bonus = verify_chain(
        law.expand(64, 2, 3), torch.full((64, 1), 2), torch.ones(64, dtype=torch.int64),
        torch.arange(3).expand(64, 1, 3), law.expand(64, 1, 3), key, key,
    )  # fmt: skip
    assert (n_accepted == 0).all()
    assert set(bonus.tolist()) == {0, 2}


def test_a_draft_law_of_nan_costs_the_draft_and_nothing_else() -> None:
    key = torch.arange(4000)
    law = torch.tensor([0.2, 0.0, 0.8])
    n_accepted, bonus = verify_chain(
        law.expand(4000, 2, 3), torch.zeros(4000, 1, dtype=torch.int64), torch.ones(4000, dtype=torch.int64),
        torch.arange(3).expand(4000, 1, 3), torch.full((4000, 1, 3), float("nan")), key, key,
    )  # fmt: skip
    assert (n_accepted == 0).all()
    assert _p_value(bonus.bincount(minlength=3), law) > P_VALUE


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
        n_accepted, _ = verify_chain(
            (law * torch.tensor([0.8, 1.2])).expand(1, 4, 2), torch.zeros(1, 3, dtype=torch.int64), torch.tensor([3]),
            torch.arange(2).expand(1, 3, 2), law.expand(1, 3, 2), torch.tensor([7]), torch.tensor([position]),
        )  # fmt: skip
        position += int(n_accepted) + 1
        counts.add(int(n_accepted))
    assert counts == {0, 1, 2, 3}
    assert {stream for stream, _, _ in seen} == {ACCEPT, BONUS}
    assert len(seen) == len(set(seen)) == 40 * 4


def _greedy_loop(target_ids: list[int], drafts: list[int], n_drafted: int) -> tuple[int, int]:
    n_accepted = 0
    while n_accepted < n_drafted and drafts[n_accepted] == target_ids[n_accepted]:
        n_accepted += 1
    return n_accepted, target_ids[n_accepted]


@pytest.mark.parametrize("n_places", [0, 1, 5])
def test_greedy_is_the_plain_loop(n_places: int) -> None:
    generator = torch.Generator().manual_seed(n_places)
    target_ids = torch.randint(0, 2, (300, n_places + 1), generator=generator)
    drafts = torch.randint(0, 2, (300, n_places), generator=generator)
    n_drafted = torch.randint(0, n_places + 1, (300,), generator=generator)
    n_accepted, bonus = verify_greedy(target_ids, drafts, n_drafted)
    rows = zip(target_ids.tolist(), drafts.tolist(), n_drafted.tolist(), strict=True)
    expected = [_greedy_loop(*row) for row in rows]
    assert list(zip(n_accepted.tolist(), bonus.tolist(), strict=True)) == expected
    assert set(n_accepted.tolist()) == set(range(n_places + 1))


# Frequencies on the real ops with the real noise. The noise is a function of its key: these tests cannot flake.

N_DRAWS = 200_000
P_VALUE = 1e-3


def _p_value(counts: Tensor, law: Tensor) -> float:
    """Of the counts under the law; 0 when something impossible was counted."""
    possible = law > 0
    if counts[~possible].any():
        return 0.0
    expected = law[possible].double()
    return float(chisquare(counts[possible], expected / expected.sum() * counts.sum()).pvalue)


def _keys(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct noise keys: what varies between them changes from one element to the next."""
    row = torch.arange(n)
    return row // 7, row % 7, torch.ones(n, dtype=torch.int64)


def test_draw_frequencies() -> None:
    law = torch.tensor([0.4, 0.0, 0.3, 0.05, 0.0, 0.2, 0.049, 0.001])
    counts = draw(law.expand(N_DRAWS, -1), *_keys(N_DRAWS), DRAFT).bincount(minlength=len(law))
    assert _p_value(counts, law) > P_VALUE
    unnormalised = draw(law.expand(N_DRAWS, -1) * 1e-6, *_keys(N_DRAWS), DRAFT).bincount(minlength=len(law))
    assert torch.equal(counts, unnormalised)


def test_draw_never_draws_what_is_impossible() -> None:
    """One possible token of a denormal weight among a thousand impossible ones, and one of weight zero among many."""
    law = torch.zeros(2000, 1001)
    law[:, 517] = 1e-30
    assert (draw(law, *_keys(2000), DRAFT) == 517).all()
    law = torch.full((2000, 1001), 1e-3)
    law[:, ::2] = 0
    assert (draw(law, *_keys(2000), DRAFT) % 2 == 1).all()


def _sigmas_off_the_tail(race: Callable[..., Tensor], n_draws: int) -> float:
    """How far the draws of rank 1000 and above are from their share under Zipf(1.2) over 32k tokens."""
    weights = torch.arange(1, 32_001, dtype=torch.float64) ** -1.2
    law = weights / weights.sum()
    hits = 0
    for start in range(0, n_draws, 250):
        row = torch.arange(start, start + 250)
        hits += int((race(law.float().expand(250, -1), row, row * 3, row % 5, DRAFT) >= 1000).sum())
    share = law[1000:].sum().item()
    return abs(hits - n_draws * share) / (n_draws * share * (1 - share)) ** 0.5


def test_the_tail_of_a_large_vocabulary_is_drawn() -> None:
    assert _sigmas_off_the_tail(draw, 2000) < 3


def test_the_tail_test_sees_noise_of_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = draw_module.exponential
    monkeypatch.setattr(draw_module, "exponential", lambda *key: -torch.exp(-exact(*key)).half().float().log())
    assert _sigmas_off_the_tail(draw_reference, 250) > 4


def test_top_support_then_draw_follows_the_truncated_law() -> None:
    law = torch.tensor([0.05, 0.3, 0.0, 0.25, 0.2, 0.15, 0.05])
    ids, support = top_support(law.expand(N_DRAWS, -1), 4)
    assert torch.equal(ids[0], torch.tensor([1, 3, 4, 5]))
    assert torch.allclose(support.sum(-1), torch.ones(N_DRAWS), atol=1e-6)
    pick = draw(support, *_keys(N_DRAWS), DRAFT)
    counts = ids.gather(1, pick[:, None])[:, 0].bincount(minlength=7)
    assert _p_value(counts, torch.tensor([0.0, 0.3, 0.0, 0.25, 0.2, 0.15, 0.0])) > P_VALUE


@pytest.mark.parametrize("support_size", [1, 2, 4])
def test_draft_and_verify_frequencies(support_size: int) -> None:
    """Two drafted places, drawn and verified with the real noise: pairs of tokens follow the target's law."""
    generator = torch.Generator().manual_seed(support_size)
    vocab = 4
    target = torch.rand(1 + vocab, vocab, generator=generator) ** 2
    target[0, 1] = target[3, 2] = 0
    target = target / target.sum(-1, keepdim=True)
    proposal = torch.rand(1 + vocab, vocab, generator=generator).softmax(-1)
    seed, position, one = torch.arange(N_DRAWS), torch.arange(N_DRAWS) % 5 + 3, torch.ones(N_DRAWS, dtype=torch.int64)

    ids_1, support_1 = top_support(proposal[:1].expand(N_DRAWS, -1), support_size)
    first = ids_1.gather(1, draw(support_1, seed, position, one, DRAFT)[:, None])[:, 0]
    ids_2, support_2 = top_support(proposal[1:][first], support_size)
    second = ids_2.gather(1, draw(support_2, seed, position + 1, 2 * one, DRAFT)[:, None])[:, 0]
    after_first = target[1:][first]
    target_probs = torch.stack([target[:1].expand(N_DRAWS, -1), after_first, target[1:][second]], 1)
    n_drafted = torch.arange(N_DRAWS) % 3  # 0, 1 and 2 of the two places
    n_accepted, bonus = verify_chain(
        target_probs, torch.stack([first, second], 1), n_drafted, torch.stack([ids_1, ids_2], 1),
        torch.stack([support_1, support_2], 1), seed, position,
    )  # fmt: skip
    assert (n_accepted <= n_drafted).all()
    assert set(n_accepted.tolist()) == {0, 1, 2}

    x = torch.where(n_accepted >= 1, first, bonus)
    y_left = draw(target[1:][x], seed, position + 1, one, DRAFT + 17)  # the next step, had it been run
    y = torch.where(n_accepted >= 2, second, torch.where(n_accepted == 1, bonus, y_left))
    for n in range(3):
        own = n_drafted == n
        counts = (x * vocab + y)[own].bincount(minlength=vocab**2)
        assert _p_value(counts, (target[0][:, None] * target[1:]).flatten()) > P_VALUE
