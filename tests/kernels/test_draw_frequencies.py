"""Draws follow the laws they are draws from: frequencies on the real noise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product
from math import prod
from typing import Any

import pytest
import torch
from frequencies import N_DRAWS, P_VALUE, distinct_keys, in_bulk, p_value
from rows import random_laws
from torch import Tensor

from specdec.kernels.sampling import draw as draw_module
from specdec.kernels.sampling.draw import DRAW_BLOCK, draw, draw_reference
from specdec.kernels.sampling.draw_children import draw_children
from specdec.kernels.sampling.draw_row import draw_row
from specdec.kernels.sampling.noise import BONUS, DRAFT
from specdec.kernels.sampling.row_law import row_law, row_probs
from specdec.kernels.sampling.top_support import top_support
from specdec.kernels.verify.tree_rules import WITH_REPLACEMENT

pytestmark = pytest.mark.kernels


@in_bulk
def test_draw_frequencies(device: torch.device) -> None:
    law = torch.tensor([0.4, 0.0, 0.3, 0.05, 0.0, 0.2, 0.049, 0.001])
    rows, keys = law.to(device).expand(N_DRAWS, -1), distinct_keys(N_DRAWS, device)
    counts = draw(rows, *keys, DRAFT).bincount(minlength=len(law)).cpu()
    assert p_value(counts, law) > P_VALUE
    unnormalised = draw(rows * 1e-6, *keys, DRAFT).bincount(minlength=len(law)).cpu()
    assert torch.equal(counts, unnormalised)


@in_bulk
def test_draw_never_draws_what_is_impossible(device: torch.device) -> None:
    """One possible token of a tiny weight among a thousand impossible ones, and one of weight zero among many."""
    law = torch.zeros(2000, 1001, device=device)
    law[:, 517] = 1e-30
    assert (draw(law, *distinct_keys(2000, device), DRAFT) == 517).all()
    law = torch.full((2000, 1001), 1e-3, device=device)
    law[:, ::2] = 0
    assert (draw(law, *distinct_keys(2000, device), DRAFT) % 2 == 1).all()


def _sigmas_off_the_tail(race: Callable[..., Tensor], n_draws: int, device: torch.device) -> float:
    """How far the draws of rank 1000 and above are from their share under Zipf(1.2) over 32k tokens."""
    weights = torch.arange(1, 32_001, dtype=torch.float64) ** -1.2
    law = weights / weights.sum()
    hits = 0
    for start in range(0, n_draws, 250):
        row = torch.arange(start, start + 250, device=device)
        hits += int((race(law.float().to(device).expand(250, -1), row, row * 3, row % 5, DRAFT) >= 1000).sum())
    share = law[1000:].sum().item()
    return abs(hits - n_draws * share) / (n_draws * share * (1 - share)) ** 0.5


@in_bulk
def test_the_tail_of_a_large_vocabulary_is_drawn(device: torch.device) -> None:
    assert _sigmas_off_the_tail(draw, 2000, device) < 3


def test_the_tail_test_sees_noise_of_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = draw_module.exponential

    def rounded(*args: Any, **kwargs: Any) -> Tensor:
        return -torch.exp(-exact(*args, **kwargs)).half().float().log()

    monkeypatch.setattr(draw_module, "exponential", rounded)
    assert _sigmas_off_the_tail(draw_reference, 2000, torch.device("cpu")) > 4


@in_bulk
def test_top_support_then_draw_follows_the_truncated_law(device: torch.device) -> None:
    law = torch.tensor([0.05, 0.3, 0.0, 0.25, 0.2, 0.15, 0.05])
    rows, neutral = law.log().to(device).expand(N_DRAWS, -1), torch.tensor([1.0, 1.0, 0.0], device=device)
    ids, support = top_support(rows, neutral, 0, 4)
    assert torch.equal(ids[0].cpu(), torch.tensor([1, 3, 4, 5]))
    assert torch.allclose(support.sum(-1), torch.ones(N_DRAWS, device=device), atol=1e-6)
    pick = draw(support, *distinct_keys(N_DRAWS, device), DRAFT)
    counts = ids.gather(1, pick[:, None])[:, 0].bincount(minlength=7).cpu()
    assert p_value(counts, torch.tensor([0.0, 0.3, 0.0, 0.25, 0.2, 0.15, 0.0])) > P_VALUE


def _long_law() -> Tensor:
    """A law over many blocks: some all zeros, masses from 1e-3 to 0.5, and weight where both races' noise has low
    indices, which would show if they shared it."""
    size = 6 * DRAW_BLOCK + 300
    probs = torch.zeros(size, dtype=torch.float64)
    probs[:6] = torch.tensor([5, 1, 3, 1, 2, 4])
    probs[DRAW_BLOCK : 2 * DRAW_BLOCK : 97] = 0.3
    probs[2 * DRAW_BLOCK + 5] = 0.1
    probs[4 * DRAW_BLOCK - 1], probs[4 * DRAW_BLOCK] = 2, 7
    probs[6 * DRAW_BLOCK :: 3] = torch.arange(1, 101) / 200
    return probs / probs.sum()


def _assert_law(drawn: Tensor, probs: Tensor) -> None:
    """By chi-square, over single indices and then over blocks."""
    counts, law = torch.bincount(drawn, minlength=len(probs)), probs.double() / probs.double().sum()
    assert law[law > 0].min() * len(drawn) > 10
    assert p_value(counts, law) > P_VALUE
    by_block = [torch.stack([part.sum() for part in x.split(DRAW_BLOCK)]) for x in (counts, law)]
    assert len(probs) <= DRAW_BLOCK or p_value(*by_block) > P_VALUE


@in_bulk
def test_long_rows_are_drawn_from_their_law(device: torch.device) -> None:
    probs = _long_law()
    n = 250_000
    position = torch.arange(n, device=device)
    seed, node = torch.full_like(position, 11), torch.zeros_like(position)
    rows = probs.float().to(device).expand(n, -1)
    _assert_law(draw(rows, seed, position, node, DRAFT).cpu(), probs)
    some = rows[:99], seed[:99], position[:99], node[:99]
    assert not torch.equal(draw(*some, BONUS), draw(*some, DRAFT))


@in_bulk
@pytest.mark.parametrize("size", [2, 7, 97])
def test_short_rows_are_drawn_from_their_law(size: int, device: torch.device) -> None:
    probs = random_laws(1, size, seed=3)[0].clamp(0.05, 20) * (torch.arange(size) % 5 != 2)
    n = 200_000
    seed = torch.arange(n, device=device) * 2**20
    zeros = torch.zeros_like(seed)
    _assert_law(draw(probs.to(device).expand(n, -1), seed, zeros, zeros + 3, DRAFT).cpu(), probs)


CHILDREN_LAW = [0.4, 0.3, 0.2, 0.1]


def _law_of_children(n_hubs: int, count: int) -> dict[tuple[int, ...], float]:
    """Of every ordered outcome, by definition: the hubs, and draws from laws renormalised without what is gone."""
    p = CHILDREN_LAW
    if n_hubs == WITH_REPLACEMENT:
        return {o: prod(p[i] for i in o) for o in product(range(4), repeat=count)}
    hubs = tuple(range(min(n_hubs, count)))
    drawn = permutations([i for i in range(4) if i not in hubs], count - len(hubs))
    return {
        o: prod(p[i] / (1 - sum(p[j] for j in o[:k])) for k, i in enumerate(o) if k >= len(hubs))
        for o in (hubs + rest for rest in drawn)
    }


@in_bulk
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_children_follow_the_law_of_their_rule(count: int, shared: bool, device: torch.device) -> None:
    """All numbers of hubs side by side, with the same keys."""
    n, laws = 100_000, torch.tensor(CHILDREN_LAW, device=device)
    numbers = [WITH_REPLACEMENT, 0, 1, 2, 4]
    key = torch.arange(n, device=device).repeat_interleave(len(numbers))
    n_hubs, same = torch.tensor(numbers, device=device).repeat(n), torch.full_like(key, count)
    ids, probs = torch.tensor([7, 2, 9, 4], device=device), laws.mul(3)
    drawn = draw_children(
        ids.expand(len(key), -1), probs.expand(len(key), -1), n_hubs, same, same - 7, key, same * 0, DRAFT, 4, shared
    ).cpu()
    for first, hubs in enumerate(numbers):
        own = drawn[first :: len(numbers)]
        assert (own[:, count:] == -1).all()
        children, law = own[:, :count], _law_of_children(hubs, count)
        if hubs == WITH_REPLACEMENT and shared:  # one race, one winner
            assert torch.equal(children, children[:, :1].expand(-1, count))
        elif len(law) == 1:
            assert torch.equal(children, torch.tensor([*law]).expand(n, -1))
        else:
            expected = torch.zeros((4,) * count)
            for outcome, probability in law.items():
                expected[outcome] = probability
            counts = torch.bincount((children * 4 ** torch.arange(count - 1, -1, -1)).sum(1), minlength=4**count)
            assert p_value(counts, expected.flatten()) > P_VALUE


@in_bulk
@pytest.mark.parametrize("flat", [False, True])
def test_rows_are_drawn_from_their_law_with_weights_changed(flat: bool, device: torch.device) -> None:
    """Twelve tokens in four blocks; half have other weights, one none, and one gets some that the law cuts."""
    vocab, n = 13_000, 2000
    places = torch.tensor([3, 4, 4000, 4095, 4096, 4097, 8000, 8191, 8192, 12_287, 12_288, 12_999])
    generator = torch.Generator().manual_seed(0)
    logits = torch.full((1, vocab), -9.0)
    logits[0, places] = torch.rand(12, generator=generator) * 2
    knobs = torch.tensor([1.3, 1.0, 0.0], device=device)
    law = row_law(logits.to(device), knobs, 12)
    expected = row_probs(logits.to(device), knobs, *law)[0].cpu()
    assert set(expected.nonzero()[:, 0].tolist()) == set(places.tolist())
    ids = torch.tensor([12_288, -1, 4, 4097, 9999, 8191, 4095, -1, 3])
    weights = torch.tensor([0.08, 0.5, 0.0, 0.3, 0.1, 0.04, 0.01, 0.5, 0.15])
    expected[ids[ids >= 0]] = weights[ids >= 0]
    counts = torch.zeros(vocab, dtype=torch.int64)
    for start in range(0, 5 * n, n):
        key = torch.arange(start, start + n, device=device)
        drawn = draw_row(
            logits.to(device), knobs, *law, key * 0, *(x.to(device).expand(n, -1) for x in (ids, weights)), key,
            key % 5, key % 3, BONUS, flat,
        )  # fmt: skip
        counts += drawn.bincount(minlength=vocab).cpu()
    assert p_value(counts, expected) > P_VALUE


@in_bulk
def test_draws_that_share_noise_are_coupled(device: torch.device) -> None:
    """A target's draw and a draft's first child, of equal laws always the same token, of near ones as often as can be
    told: i wins both races with probability 1 / sum_j max(p_j / p_i, q_j / q_i)."""
    n, vocab = 50_000, 12
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, vocab, generator=generator)
    near = logits + 0.4 * torch.randn(1, vocab, generator=generator)
    knobs = torch.tensor([1.0, 1.0, 0.0], device=device)
    law = row_law(logits.to(device), knobs, 0)
    key = torch.arange(n, device=device)
    same = key * 0
    changes = torch.empty(n, 0, dtype=torch.int64, device=device), torch.empty(n, 0, device=device)
    target_ids = draw_row(logits.to(device), knobs, *law, same, *changes, key, same, same, DRAFT, True)

    def first_children(logits: Tensor, shared: bool) -> Tensor:
        probs, ids = logits.softmax(-1)[0].to(device).sort(descending=True)
        laws = ids.expand(n, -1), probs.expand(n, -1)
        children = draw_children(*laws, same, same + 2, key, same, same, DRAFT, 2, shared)
        return ids[children[:, 0]]

    assert torch.equal(first_children(logits, True), target_ids)
    drafted = first_children(near, True)
    p, q = logits.softmax(-1)[0], near.softmax(-1)[0]
    both = 1 / torch.maximum(p / p[:, None], q / q[:, None]).sum(1)
    outcomes = torch.where(drafted == target_ids, drafted, vocab).bincount(minlength=vocab + 1).cpu()
    assert p_value(outcomes, torch.cat([both, 1 - both.sum(0, True)])) > P_VALUE
    apart = (first_children(near, False) == target_ids).float().mean()
    assert outcomes[:vocab].sum() / n > 0.75 > 0.3 > apart
