"""Verification is lossless: by exact enumeration of every draft and every acceptance, and by frequencies on real noise.

The enumeration runs what is defined and what runs on a CPU in float64. Their uniforms are replaced by one point of
every interval between the places where an acceptance can change, weighted by the interval's length, and their draw
hands out the residual law. The kernel makes the same decisions from the same noise.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction
from math import prod
from typing import Any

import pytest
import torch
from aot import ARCHITECTURES, compile_launches
from scipy.stats import chisquare
from torch import Tensor

from specdec.kernels import draw as draw_module
from specdec.kernels import verify
from specdec.kernels.draw import draw, draw_reference
from specdec.kernels.library import INTERPRETED
from specdec.kernels.noise import ACCEPT, BONUS, DRAFT
from specdec.kernels.row_law import row_law, row_law_reference, row_probs
from specdec.kernels.top_support import top_support
from specdec.kernels.verify import (
    verify_greedy,
    verify_greedy_triton,
)

pytestmark = pytest.mark.kernels
many_draws = pytest.mark.skipif(INTERPRETED, reason="too many rows for the interpreter")

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


def _on_grid(function: Callable[..., Any]) -> Callable[..., Any]:
    """A chain rule without its last argument: sample b's rows begin at b * (K + 1)."""

    def call(*arguments: Tensor) -> Any:
        n_batch, n_places = arguments[5].shape
        return function(*arguments, torch.arange(n_batch + 1, device=arguments[5].device) * (n_places + 1))

    return call


verify_chain, verify_chain_cpu, verify_chain_reference, verify_chain_triton = map(
    _on_grid, (verify.verify_chain, verify.verify_chain_cpu, verify.verify_chain_reference, verify.verify_chain_triton)
)


def _rows(target_probs: Tensor) -> list[Tensor]:
    """The first five arguments of `verify_chain` for target laws [B, K + 1, V]."""
    n_rows = target_probs.shape[:2].numel()
    none = target_probs.new_full((n_rows,), -math.inf)
    knobs = target_probs.new_tensor([1, 1, 0])
    return [target_probs.log().flatten(0, 1), knobs, torch.zeros_like(none), none, none.new_zeros(n_rows).long()]


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
        *_rows(target), torch.tensor(drafts), torch.full_like(row, n_drafted), support_ids, support, row, row
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
        *_rows(torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])), torch.tensor([[0]]), torch.tensor([1]),
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
    rows = _rows(law.expand(20, 2, 3))
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
            *_rows((law * torch.tensor([0.8, 1.2])).expand(1, 4, 2)), torch.zeros(1, 3, dtype=torch.int64),
            torch.tensor([3]), torch.arange(2).expand(1, 3, 2), law.expand(1, 3, 2), torch.tensor([7]),
            torch.tensor([position]),
        )  # fmt: skip
        position += int(n_accepted) + 1
        counts.add(int(n_accepted))
    assert counts == {0, 1, 2, 3}
    assert {stream for stream, _, _ in seen} == {ACCEPT, BONUS}
    assert len(seen) == len(set(seen)) == 40 * 4


# The same noise, the same decisions.


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated without being written holds NaN, or a number far from any id."""
    empty = torch.empty

    def poison(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(math.nan if out.is_floating_point() else -(2**40))

    monkeypatch.setattr(torch, "empty", poison)


Knobs = tuple[float, float, float, int]
"""Inverse temperature, top_p, min_p and top_k."""


def _case(
    n_batch: int, n_places: int, vocab: int, size: int, *, seed: int = 0, dtype: torch.dtype = torch.float32,
    setting: Knobs = (1.0, 1.0, 0.0, 0), spread: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """Arguments of `verify_chain`: random rows, and drafts from a law that differs from theirs by noise of `spread`.

    The support's ids are in no order, some of its entries have probability zero and hold another entry's id.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    *knobs, top_k = setting
    logits = (normal(n_batch * (n_places + 1), vocab) * 2).to(dtype)
    law = row_law_reference(logits, torch.tensor(knobs), top_k)
    logits_after = logits.unflatten(0, (n_batch, n_places + 1))[:, :-1].float()
    proposal = (logits_after + spread * normal(n_batch, n_places, vocab)).softmax(-1)
    support, ids = proposal.topk(min(size, vocab), dim=-1)
    order = torch.randperm(support.shape[-1], generator=generator)
    support, ids = support[..., order], ids[..., order]
    if support.shape[-1] > 2:
        support[..., 1] = 0
        ids[..., 1] = ids[..., 0]
    support = support / support.sum(-1, keepdim=True)
    pick = (support / torch.empty_like(support).exponential_(generator=generator)).argmax(-1, keepdim=True)
    n_drafted = torch.full((n_batch,), n_places)
    if seed % 2:
        n_drafted = torch.randint(n_places + 1, (n_batch,), generator=generator)
    keys = [torch.randint(-(2**62), 2**62, (n_batch,), generator=generator) for _ in "sp"]
    return [
        logits, torch.tensor(knobs), *law, ids.gather(-1, pick)[..., 0], n_drafted, ids, support, keys[0],
        keys[1] % 2**31,
    ]  # fmt: skip


def _on(device: torch.device, arguments: list[Tensor]) -> list[Tensor]:
    return [x.to(device) for x in arguments]


def _check(arguments: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The op itself and what runs on a CPU do what is defined."""
    expected = verify_chain_reference(*arguments)
    functions = [verify_chain] if INTERPRETED else [verify_chain, verify_chain_cpu]  # it draws with an op itself
    for function in functions:
        got = function(*_on(device, arguments)) if function is verify_chain else function(*arguments)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == torch.int64
            assert torch.equal(a.cpu(), b)
    return expected


TRUNCATED: Knobs = (1.2, 0.9, 0.02, 20)


@pytest.mark.parametrize(
    ("n_batch", "n_places", "vocab", "size", "dtype", "setting"),
    [
        (3, 1, 1, 1, torch.float32, TRUNCATED),
        (4, 0, 97, 5, torch.float32, TRUNCATED),
        (8, 3, 97, 5, torch.float32, (1.0, 1.0, 0.0, 0)),
        (6, 4, 97, 64, torch.bfloat16, TRUNCATED),
        (2, 5, 97, 97, torch.float16, (1.0, 1.0, 0.0, 0)),
        (4, 1, 4095, 1, torch.bfloat16, (1.0, 1.0, 0.0, 0)),
        (4, 2, 4096, 64, torch.float32, (1.0, 1.0, 0.0, 0)),
        (4, 2, 4097, 3, torch.bfloat16, (0.7, 1.0, 0.0, 0)),
        (4, 4, 13_000, 64, torch.bfloat16, (0.5, 0.99, 0.0, 0)),
        (2, 2, 13_000, 300, torch.float32, (0.5, 1.0, 0.0, 0)),
    ],
)
def test_decisions_are_those_of_the_definition(
    n_batch: int, n_places: int, vocab: int, size: int, dtype: torch.dtype, setting: Knobs, device: torch.device,
    poisoned: None,
) -> None:  # fmt: skip
    seed = n_batch + n_places + vocab  # odd: not all places are drafted
    _check(_case(n_batch, n_places, vocab, size, seed=seed, dtype=dtype, setting=setting), device)


def test_every_way_to_end_is_met(device: torch.device) -> None:
    """Rejected at the first or a later place, accepted in full, and with the support's own ids as bonus."""
    arguments = _case(16, 3, 60, 8, spread=0.7)
    n_accepted, bonus = _check(arguments, device)
    assert set(n_accepted.tolist()) == {0, 1, 2, 3}
    rejected = (n_accepted < 3).nonzero()[:, 0]
    assert (arguments[7][rejected, n_accepted[rejected]] == bonus[rejected, None]).any()


def test_winners_come_from_all_blocks(device: torch.device) -> None:
    """Flat laws over three blocks, with and without a draft."""
    arguments = _case(14, 1, 12_000, 30, seed=3, setting=(0.1, 1.0, 0.0, 0), spread=0.0)
    _, bonus = _check(arguments, device)
    assert set((bonus // 4096).tolist()) == {0, 1, 2}


def test_only_the_residual_is_left(device: torch.device) -> None:
    """The support has most of the law's mass, and the last id of one block and the first of the next among its own."""
    arguments = _case(16, 1, 5000, 4)
    logits, ids, support = arguments[0], arguments[7], arguments[8]
    logits[:] = -math.inf
    logits[:, [4095, 4096, 4097, 4999]] = torch.tensor([0.2, 0.4, 0.15, 0.25]).log()
    arguments[2:5] = row_law_reference(logits, arguments[1], 0)
    ids[:] = torch.tensor([4999, 4097, 4095, 4096])
    support[:] = torch.tensor([0.0, 0.1, 0.4, 0.5])
    arguments[5] = torch.tensor([4095, 4096]).repeat(8)[:, None]
    n_accepted, bonus = _check(arguments, device)
    assert set(n_accepted.tolist()) == {0, 1}
    assert set(bonus[n_accepted == 0].tolist()) == {4097, 4999}


def test_long_chains_and_wide_supports(device: torch.device) -> None:
    """The draft is the last entry of its support, almost certain there and likely to the target."""
    arguments = _case(6, 127, 50, 20, seed=1)
    logits, drafts, support = arguments[0].view(6, 128, 50), arguments[5], arguments[8]
    drafts[:] = torch.arange(127) % 50
    logits[:, :-1].scatter_(2, drafts[..., None], 7.0)
    arguments[2:5] = row_law_reference(arguments[0], arguments[1], 0)
    arguments[7][:] = (drafts[..., None] + torch.arange(1, 21)) % 50
    arguments[7][..., -1] = drafts
    support[:] = torch.tensor([*[0.001] * 19, 0.981])
    n_accepted, _ = _check(arguments, device)
    assert len(set(n_accepted.tolist()) - set(arguments[6].tolist())) > 3


def test_places_have_supports_of_their_own(device: torch.device) -> None:
    """The next place's first entry is this one's draft, with a probability at which it would be rejected."""
    arguments = _case(12, 2, 30, 3)
    logits, ids, support = arguments[0], arguments[7], arguments[8]
    logits[:, 7] = logits.logsumexp(-1)
    arguments[2:5] = row_law_reference(logits, arguments[1], 0)
    arguments[5][:] = 7
    ids[:] = torch.tensor([[1, 2, 7], [7, 3, 4]])
    support[:] = torch.tensor([[0.3, 0.3, 0.4], [20.0, 0.0, 0.0]])
    n_accepted, _ = _check(arguments, device)
    assert set(n_accepted.tolist()) == {1}


def test_a_draft_outside_its_support(device: torch.device) -> None:
    """Its q is 0: accepted where the target gives it any probability, and rejected where it gives none."""
    arguments = _case(10, 1, 30, 4)
    arguments[0][::4] = -math.inf  # every other root
    arguments[0][::4, 11] = 1.0
    arguments[2:5] = row_law_reference(arguments[0], arguments[1], 0)
    arguments[7][:] = torch.tensor([1, 2, 3, 4])
    arguments[5][:] = 17
    n_accepted, bonus = _check(arguments, device)
    assert n_accepted.tolist() == [0, 1] * 5
    assert (bonus[::2] == 11).all()


def test_a_draft_law_above_the_targets_leaves_the_target(device: torch.device) -> None:
    """As rounding could: rejected, and (p - q)+ empty."""
    arguments = _case(16, 1, 5000, 3)
    logits, ids, support = arguments[0], arguments[7], arguments[8]
    logits[:] = -math.inf
    logits[:, [0, 4200, 4999]] = torch.tensor([0.25, 0.25, 0.5]).log()
    arguments[2:5] = row_law_reference(logits, arguments[1], 0)
    ids[:] = torch.tensor([0, 4200, 4999])
    support[:] = torch.tensor([1.0, 1.0, 2.0])
    arguments[5] = torch.tensor([[4999]]).expand(16, 1)
    n_accepted, bonus = _check(arguments, device)
    assert set(n_accepted.tolist()) == {0, 1}
    assert set(bonus.tolist()) == {0, 4200, 4999}


def test_laws_of_nan_harm_no_other_sample(device: torch.device) -> None:
    arguments = _case(8, 2, 5000, 4)
    expected = verify_chain_reference(*arguments)
    logits = arguments[0]
    logits[3, 77] = math.nan  # sample 1's root
    arguments[2:5] = row_law_reference(logits, arguments[1], 0)
    n_accepted, bonus = (x.cpu() for x in verify_chain(*_on(device, arguments)))
    others = torch.arange(8) != 1
    assert torch.equal(n_accepted[others], expected[0][others])
    assert torch.equal(bonus[others], expected[1][others])
    assert n_accepted[1] == 0
    assert 0 <= bonus[1] < 5000


def test_a_draft_law_of_nan_leaves_the_target(device: torch.device) -> None:
    """Were it taken for zero the rest of the draft law would count."""
    arguments = _case(12, 1, 5000, 3)
    logits, ids, support = arguments[0], arguments[7], arguments[8]
    logits[:] = -math.inf
    logits[:, [3, 4, 4500]] = torch.tensor([0.2, 0.4, 0.4]).log()
    arguments[2:5] = row_law_reference(logits, arguments[1], 0)
    ids[:] = torch.tensor([3, 4, 4500])
    support[:] = torch.tensor([math.nan, 0.5, 0.5])
    arguments[5] = torch.tensor([[4]]).expand(12, 1)
    n_accepted, bonus = _check(arguments, device)
    assert (n_accepted == 0).all()
    assert set(bonus.tolist()) == {3, 4, 4500}


def test_strides_do_not_matter(device: torch.device, poisoned: None) -> None:
    arguments = _on(device, _case(6, 3, 300, 5, setting=TRUNCATED, spread=0.5))
    expected = verify_chain(*arguments)
    assert set(expected[0].tolist()) & {1, 2}  # rejected, but not at the first place
    for i in range(len(arguments) + 1):  # one at a time, and all
        strided = [_strided(x) if i in (j, len(arguments)) else x for j, x in enumerate(arguments)]
        assert all(torch.equal(a, b) for a, b in zip(verify_chain(*strided), expected, strict=True))
    target_ids, drafts, n_drafted = (x.to(device) for x in _greedy_case(20, 4))
    expected = verify_greedy(target_ids, drafts, n_drafted)
    got = verify_greedy(*map(_strided, (target_ids, drafts, n_drafted)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def _strided(x: Tensor) -> Tensor:
    """The same values, transposed in memory, with other numbers between them."""
    wide = x.new_full((2 * x.shape[-1] + 1, *reversed(x.shape[:-1])), 3)
    values = wide[1::2].permute(*reversed(range(x.dim())))
    return values.copy_(x)


def test_rows_beyond_31_bits(device: torch.device) -> None:
    arguments = _on(device, _case(1, 2, 97, 4, dtype=torch.bfloat16))
    arguments[8] = torch.zeros_like(arguments[8])  # all drafts are accepted
    far = torch.empty(2**31 + 100, dtype=torch.bfloat16, device=device).as_strided((3, 97), (2**30, 1))
    n_accepted, bonus = verify_chain(far.copy_(arguments[0]), *arguments[1:])
    expected = verify_chain(*arguments)
    assert n_accepted == expected[0] == 2
    assert bonus == expected[1]


@pytest.mark.parametrize("n_places", [0, 2])
def test_no_samples(n_places: int, device: torch.device) -> None:
    arguments = _on(device, _case(1, n_places, 7, 3))
    none = [arguments[0][:0], arguments[1], *(x[:0] for x in arguments[2:])]
    for x in (*verify_chain(*none), *verify_greedy(*(x[:0].to(device) for x in _greedy_case(2, n_places)))):
        assert x.shape == (0,)


def test_are_well_formed_ops_and_trace(device: torch.device) -> None:
    chain = [*_on(device, _case(3, 2, 20, 4, setting=TRUNCATED)), torch.arange(4, device=device) * 3]
    for op, arguments in [(verify.verify_chain, chain), (verify_greedy, [x.to(device) for x in _greedy_case(3, 2)])]:
        torch.library.opcheck(op.op, tuple(arguments))
        traced = torch.compile(lambda *x, op=op: op(*x), fullgraph=True, dynamic=True, backend="aot_eager")
        for a, b in zip(traced(*arguments), op(*arguments), strict=True):
            assert torch.equal(a, b)


def test_samples_bring_as_many_rows_as_they_drafted(device: torch.device) -> None:
    """Packed rows give what a grid gives; a sample without rows disturbs nobody."""
    arguments = _case(12, 4, 60, 8, spread=0.7)
    n_drafted = arguments[6] = torch.tensor([0, 4, 2, 1, 3, 4, 0, 2, 4, 1, 0, 3])
    expected = verify_chain_reference(*arguments)
    absent = torch.tensor([5, 11])
    n_rows = n_drafted + 1
    n_rows[absent] = 0
    own = torch.cat([5 * b + torch.arange(n) for b, n in enumerate(n_rows.tolist())])
    packed = [x[own] if i in (0, 2, 3, 4) else x for i, x in enumerate(arguments)]
    packed[6] = torch.where(n_rows == 0, 0, n_drafted)
    starts = torch.nn.functional.pad(n_rows.cumsum(0), (1, 0))
    present = n_rows > 0
    for function in (verify.verify_chain, verify.verify_chain_reference):
        for a, b in zip(function(*_on(device, [*packed, starts])), expected, strict=True):
            assert torch.equal(a.cpu()[present], b[present])


def _greedy_loop(target_ids: list[int], drafts: list[int], n_drafted: int) -> tuple[int, int]:
    n_accepted = 0
    while n_accepted < n_drafted and drafts[n_accepted] == target_ids[n_accepted]:
        n_accepted += 1
    return n_accepted, target_ids[n_accepted]


def _greedy_case(n_batch: int, n_places: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n_places)
    target_ids = torch.randint(0, 2, (n_batch, n_places + 1), generator=generator) + 2**33
    drafts = torch.randint(0, 2, (n_batch, n_places), generator=generator) + 2**33
    return [target_ids, drafts, torch.randint(0, n_places + 1, (n_batch,), generator=generator)]


@pytest.mark.parametrize("n_places", [0, 1, 5, 8, 130])
def test_greedy_is_the_plain_loop(n_places: int, device: torch.device, poisoned: None) -> None:
    case = _greedy_case(300, n_places)
    n_accepted, bonus = verify_greedy(*(x.to(device) for x in case))
    expected = [_greedy_loop(*row) for row in zip(*(x.tolist() for x in case), strict=True)]
    assert list(zip(n_accepted.tolist(), bonus.tolist(), strict=True)) == expected
    assert set(n_accepted.tolist()) >= set(range(min(n_places, 5) + 1))


def test_greedy_accepts_all_that_is_right(device: torch.device) -> None:
    target_ids = torch.arange(40, device=device).view(2, 20)
    n_drafted = torch.tensor([19, 7], device=device)
    n_accepted, bonus = verify_greedy(target_ids, target_ids[:, :-1], n_drafted)
    assert n_accepted.tolist() == [19, 7]
    assert bonus.tolist() == [19, 27]


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


def _keys(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct noise keys: what varies between them changes from one element to the next."""
    row = torch.arange(n, device=device)
    return row // 7, row % 7, torch.ones_like(row)


@many_draws
def test_draw_frequencies(device: torch.device) -> None:
    law = torch.tensor([0.4, 0.0, 0.3, 0.05, 0.0, 0.2, 0.049, 0.001])
    rows, keys = law.to(device).expand(N_DRAWS, -1), _keys(N_DRAWS, device)
    counts = draw(rows, *keys, DRAFT).bincount(minlength=len(law)).cpu()
    assert _p_value(counts, law) > P_VALUE
    unnormalised = draw(rows * 1e-6, *keys, DRAFT).bincount(minlength=len(law)).cpu()
    assert torch.equal(counts, unnormalised)


@many_draws
def test_draw_never_draws_what_is_impossible(device: torch.device) -> None:
    """One possible token of a tiny weight among a thousand impossible ones, and one of weight zero among many."""
    law = torch.zeros(2000, 1001, device=device)
    law[:, 517] = 1e-30
    assert (draw(law, *_keys(2000, device), DRAFT) == 517).all()
    law = torch.full((2000, 1001), 1e-3, device=device)
    law[:, ::2] = 0
    assert (draw(law, *_keys(2000, device), DRAFT) % 2 == 1).all()


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


@many_draws
def test_the_tail_of_a_large_vocabulary_is_drawn(device: torch.device) -> None:
    assert _sigmas_off_the_tail(draw, 2000, device) < 3


def test_the_tail_test_sees_noise_of_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = draw_module.exponential

    def rounded(*args: Any, **kwargs: Any) -> Tensor:
        return -torch.exp(-exact(*args, **kwargs)).half().float().log()

    monkeypatch.setattr(draw_module, "exponential", rounded)
    assert _sigmas_off_the_tail(draw_reference, 2000, torch.device("cpu")) > 4


@many_draws
def test_top_support_then_draw_follows_the_truncated_law(device: torch.device) -> None:
    law = torch.tensor([0.05, 0.3, 0.0, 0.25, 0.2, 0.15, 0.05])
    rows, neutral = law.log().to(device).expand(N_DRAWS, -1), torch.tensor([1.0, 1.0, 0.0], device=device)
    ids, support = top_support(rows, neutral, 0, 4)
    assert torch.equal(ids[0].cpu(), torch.tensor([1, 3, 4, 5]))
    assert torch.allclose(support.sum(-1), torch.ones(N_DRAWS, device=device), atol=1e-6)
    pick = draw(support, *_keys(N_DRAWS, device), DRAFT)
    counts = ids.gather(1, pick[:, None])[:, 0].bincount(minlength=7).cpu()
    assert _p_value(counts, torch.tensor([0.0, 0.3, 0.0, 0.25, 0.2, 0.15, 0.0])) > P_VALUE


@many_draws
@pytest.mark.parametrize("support_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("vocab", "dtype", "setting"),
    [(4, torch.float32, (1.0, 1.0, 0.0, 0)), (9, torch.bfloat16, (0.8, 0.9, 0.05, 5))],
)
def test_draft_and_verify_frequencies(
    support_size: int, vocab: int, dtype: torch.dtype, setting: Knobs, device: torch.device
) -> None:
    """Two drafted places, drawn and verified with the real noise: pairs of tokens follow the target's law."""
    generator = torch.Generator().manual_seed(support_size)
    logits = (torch.rand(1 + vocab, vocab, generator=generator) ** 2).log().to(dtype)  # row 1 + x follows token x
    logits[0, 1] = logits[3, 2] = -math.inf
    logits = logits.to(device)
    knobs, top_k = torch.tensor(setting[:3], device=device), setting[3]
    law = row_law(logits, knobs, top_k)
    target = row_probs(logits, knobs, *law)
    assert (target == 0).sum() > 2 or top_k == 0
    noise = torch.rand(1 + vocab, vocab, generator=generator).to(device)
    proposal = logits.float().clamp(min=-3) + 2 * noise
    neutral = torch.tensor([1.0, 1.0, 0.0], device=device)
    seed = torch.arange(N_DRAWS, device=device)
    position, one, root = seed % 5 + 3, torch.ones_like(seed), torch.zeros_like(seed)

    ids_1, support_1 = top_support(proposal[:1].expand(N_DRAWS, -1), neutral, 0, support_size)
    first = ids_1.gather(1, draw(support_1, seed, position, one, DRAFT)[:, None])[:, 0]
    ids_2, support_2 = top_support(proposal[1:][first], neutral, 0, support_size)
    second = ids_2.gather(1, draw(support_2, seed, position + 1, 2 * one, DRAFT)[:, None])[:, 0]
    rows = torch.stack([root, 1 + first, 1 + second], 1).flatten()
    n_drafted = seed % 3  # 0, 1 and 2 of the two places
    n_accepted, bonus = verify_chain(
        logits[rows], knobs, *(x[rows] for x in law), torch.stack([first, second], 1), n_drafted,
        torch.stack([ids_1, ids_2], 1), torch.stack([support_1, support_2], 1), seed, position,
    )  # fmt: skip
    assert (n_accepted <= n_drafted).all()
    assert set(n_accepted.tolist()) == {0, 1, 2}

    x = torch.where(n_accepted >= 1, first, bonus)
    y_left = draw(target[1:][x], seed, position + 1, one, DRAFT + 17)  # the next step, had it been run
    y = torch.where(n_accepted >= 2, second, torch.where(n_accepted == 1, bonus, y_left))
    for n in range(3):
        own = n_drafted == n
        counts = (x * vocab + y)[own].bincount(minlength=vocab**2).cpu()
        assert _p_value(counts, (target[0][:, None] * target[1:]).flatten().cpu()) > P_VALUE


@many_draws
def test_a_draft_law_of_nan_costs_the_draft_and_nothing_else(device: torch.device) -> None:
    key = torch.arange(4000)
    law = torch.tensor([0.2, 0.0, 0.8])
    arguments = [
        *_rows(law.expand(4000, 2, 3)), torch.zeros(4000, 1, dtype=torch.int64), torch.ones(4000, dtype=torch.int64),
        torch.arange(3).expand(4000, 1, 3), torch.full((4000, 1, 3), math.nan), key, key,
    ]  # fmt: skip
    n_accepted, bonus = verify_chain(*_on(device, arguments))
    assert (n_accepted == 0).all()
    assert _p_value(bonus.bincount(minlength=3).cpu(), law) > P_VALUE


@many_draws
def test_frequencies_over_several_blocks(device: torch.device) -> None:
    """Twelve tokens in four blocks, more than half of them drafted: what is emitted follows the target's law."""
    vocab, n_rows = 13_000, 2000
    places = torch.tensor([3, 4, 4000, 4095, 4096, 4097, 8000, 8191, 8192, 12_287, 12_288, 12_999])
    generator = torch.Generator().manual_seed(0)
    logits = torch.full((1, vocab), -9.0)
    logits[0, places] = torch.rand(12, generator=generator) * 2
    knobs = torch.tensor([1.3, 1.0, 0.0], device=device)
    law = row_law(logits.to(device), knobs, 12)
    target = row_probs(logits.to(device), knobs, *law)[0].cpu()
    assert set(target.nonzero()[:, 0].tolist()) == set(places.tolist())
    ids = places[torch.randperm(12, generator=generator)[:7]].to(device)
    support = torch.rand(7, generator=generator).to(device) + 0.1
    support /= support.sum()
    counts, n_rejected = torch.zeros(vocab, dtype=torch.int64), 0
    for start in range(0, 3 * n_rows, n_rows):
        seed = torch.arange(start, start + n_rows, device=device)
        node = torch.ones_like(seed)
        draft = ids[draw(support.expand(n_rows, -1), seed, node * 5, node, DRAFT)]
        n_accepted, bonus = verify_chain(
            logits.to(device).expand(2 * n_rows, -1), knobs, *(x.expand(2 * n_rows) for x in law), draft[:, None],
            node, ids.expand(n_rows, 1, -1), support.expand(n_rows, 1, -1), seed, node * 5,
        )  # fmt: skip
        counts += torch.where(n_accepted > 0, draft, bonus).bincount(minlength=vocab).cpu()
        n_rejected += int((n_accepted == 0).sum())
    assert n_rejected > 500
    assert _p_value(counts, target) > P_VALUE


def test_what_the_law_cuts_is_never_emitted(device: torch.device) -> None:
    """Drafts from a law that is not cut, against one that is: at all places, accepted or not."""
    n_cut = 0
    for seed, vocab in enumerate((60, 5000)):
        arguments = _case(8, 3, vocab, 14, seed=seed, spread=0.5)
        arguments[0] = arguments[0].round()  # the cut falls among equals
        arguments[1] = torch.tensor([1.0, 0.8, 0.0])
        arguments[2:5] = row_law_reference(*arguments[:2], 7)
        target = row_probs(arguments[0], *arguments[1:5]).view(8, 4, vocab)
        n_accepted, bonus = _check(arguments, device)
        n_cut += int((target[:, :3].gather(2, arguments[5][..., None]) == 0).sum())
        for b in range(8):
            n = int(n_accepted[b])
            emitted = [*arguments[5][b, :n].tolist(), int(bonus[b])]
            assert all(target[b, place, token] > 0 for place, token in enumerate(emitted))
    assert n_cut > 10


def _launch(n_batch: int, n_places: int, size: int, vocab: int, dtype: torch.dtype) -> object:
    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    n_rows, support = n_batch * (n_places + 1), (n_batch, n_places, size)
    return verify_chain_triton(
        meta(n_rows, vocab, dtype=dtype), meta(3, dtype=torch.float32), meta(n_rows, dtype=torch.float32),
        meta(n_rows, dtype=torch.float32), meta(n_rows), meta(n_batch, n_places), meta(n_batch), meta(*support),
        meta(*support, dtype=torch.float32), meta(n_batch), meta(n_batch),
    )  # fmt: skip


def _launch_greedy(n_batch: int, n_places: int) -> object:
    shapes = (n_batch, n_places + 1), (n_batch, n_places), (n_batch,)
    return verify_greedy_triton(*(torch.empty(shape, dtype=torch.int64, device="meta") for shape in shapes))


LAUNCHES: dict[str, Callable[[], object]] = {
    "chain, bfloat16, V 128256, K 5, C 64": lambda: _launch(8, 5, 64, 128_256, torch.bfloat16),
    "chain, float16, V 128256, K 16, C 64": lambda: _launch(32, 16, 64, 128_256, torch.float16),
    "chain, float32, V 128256, K 5, C 64": lambda: _launch(8, 5, 64, 128_256, torch.float32),
    "chain, bfloat16, V 50257, K 10, C 1": lambda: _launch(8, 10, 1, 50_257, torch.bfloat16),
    "chain, bfloat16, V 128256, K 127, C 1024": lambda: _launch(8, 127, 1024, 128_256, torch.bfloat16),
    "greedy": lambda: _launch_greedy(32, 5),
}


@pytest.mark.aot
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", LAUNCHES)
def test_compiles_without_spilling(case: str, arch: int, compiled_table: list[Any]) -> None:
    for kernel in compile_launches(LAUNCHES[case], arch):
        compiled_table.append((case, arch, kernel))
        assert kernel.stack == 0
