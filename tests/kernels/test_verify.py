"""Verification makes the decisions of its definition from the same noise, on every path and for any arguments."""

from __future__ import annotations

import math

import pytest
import torch
from aot import compiles_without_spilling, meta
from chains import chain_case, check_decisions, on, verify_chain, verify_chain_reference, verify_chain_triton
from rows import OFF, Knobs, far_apart
from torch import Tensor

from specdec.kernels import verify
from specdec.kernels.row_law import row_law_reference
from specdec.kernels.verify import verify_greedy, verify_greedy_triton

pytestmark = pytest.mark.kernels

TRUNCATED: Knobs = (1.2, 0.9, 0.02, 20)


@pytest.mark.parametrize(
    ("n_batch", "n_places", "vocab", "size", "dtype", "setting"),
    [
        (3, 1, 1, 1, torch.float32, TRUNCATED),
        (4, 0, 97, 5, torch.float32, TRUNCATED),
        (8, 3, 97, 5, torch.float32, OFF),
        (6, 4, 97, 64, torch.bfloat16, TRUNCATED),
        (2, 5, 97, 97, torch.float16, OFF),
        (4, 1, 4095, 1, torch.bfloat16, OFF),
        (4, 2, 4096, 64, torch.float32, OFF),
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
    check_decisions(chain_case(n_batch, n_places, vocab, size, seed=seed, dtype=dtype, setting=setting), device)


def test_every_way_to_end_is_met(device: torch.device) -> None:
    """Rejected at the first or a later place, accepted in full, and with the support's own ids as bonus."""
    arguments = chain_case(16, 3, 60, 8, spread=0.7)
    n_accepted, bonus = check_decisions(arguments, device)
    assert set(n_accepted.tolist()) == {0, 1, 2, 3}
    rejected = (n_accepted < 3).nonzero()[:, 0]
    assert (arguments[7][rejected, n_accepted[rejected]] == bonus[rejected, None]).any()


def test_winners_come_from_all_blocks(device: torch.device) -> None:
    """Flat laws over three blocks, with and without a draft."""
    arguments = chain_case(14, 1, 12_000, 30, seed=3, setting=(0.1, 1.0, 0.0, 0), spread=0.0)
    _, bonus = check_decisions(arguments, device)
    assert set((bonus // 4096).tolist()) == {0, 1, 2}


def test_only_the_residual_is_left(device: torch.device) -> None:
    """The support has most of the law's mass, and the last id of one block and the first of the next among its own."""
    arguments = chain_case(16, 1, 5000, 4)
    logits, ids, support = arguments[0], arguments[7], arguments[8]
    logits[:] = -math.inf
    logits[:, [4095, 4096, 4097, 4999]] = torch.tensor([0.2, 0.4, 0.15, 0.25]).log()
    arguments[2:5] = row_law_reference(logits, arguments[1], 0)
    ids[:] = torch.tensor([4999, 4097, 4095, 4096])
    support[:] = torch.tensor([0.0, 0.1, 0.4, 0.5])
    arguments[5] = torch.tensor([4095, 4096]).repeat(8)[:, None]
    n_accepted, bonus = check_decisions(arguments, device)
    assert set(n_accepted.tolist()) == {0, 1}
    assert set(bonus[n_accepted == 0].tolist()) == {4097, 4999}


def test_long_chains_and_wide_supports(device: torch.device) -> None:
    """The draft is the last entry of its support, almost certain there and likely to the target."""
    arguments = chain_case(6, 127, 50, 20, seed=1)
    logits, drafts, support = arguments[0].view(6, 128, 50), arguments[5], arguments[8]
    drafts[:] = torch.arange(127) % 50
    logits[:, :-1].scatter_(2, drafts[..., None], 7.0)
    arguments[2:5] = row_law_reference(arguments[0], arguments[1], 0)
    arguments[7][:] = (drafts[..., None] + torch.arange(1, 21)) % 50
    arguments[7][..., -1] = drafts
    support[:] = torch.tensor([*[0.001] * 19, 0.981])
    n_accepted, _ = check_decisions(arguments, device)
    assert len(set(n_accepted.tolist()) - set(arguments[6].tolist())) > 3


def test_places_have_supports_of_their_own(device: torch.device) -> None:
    """The next place's first entry is this one's draft, with a probability at which it would be rejected."""
    arguments = chain_case(12, 2, 30, 3)
    logits, ids, support = arguments[0], arguments[7], arguments[8]
    logits[:, 7] = logits.logsumexp(-1)
    arguments[2:5] = row_law_reference(logits, arguments[1], 0)
    arguments[5][:] = 7
    ids[:] = torch.tensor([[1, 2, 7], [7, 3, 4]])
    support[:] = torch.tensor([[0.3, 0.3, 0.4], [20.0, 0.0, 0.0]])
    n_accepted, _ = check_decisions(arguments, device)
    assert set(n_accepted.tolist()) == {1}


def test_a_draft_outside_its_support(device: torch.device) -> None:
    """Its q is 0: accepted where the target gives it any probability, and rejected where it gives none."""
    arguments = chain_case(10, 1, 30, 4)
    arguments[0][::4] = -math.inf  # every other root
    arguments[0][::4, 11] = 1.0
    arguments[2:5] = row_law_reference(arguments[0], arguments[1], 0)
    arguments[7][:] = torch.tensor([1, 2, 3, 4])
    arguments[5][:] = 17
    n_accepted, bonus = check_decisions(arguments, device)
    assert n_accepted.tolist() == [0, 1] * 5
    assert (bonus[::2] == 11).all()


def test_a_draft_law_above_the_targets_leaves_the_target(device: torch.device) -> None:
    """As rounding could: rejected, and (p - q)+ empty."""
    arguments = chain_case(16, 1, 5000, 3)
    logits, ids, support = arguments[0], arguments[7], arguments[8]
    logits[:] = -math.inf
    logits[:, [0, 4200, 4999]] = torch.tensor([0.25, 0.25, 0.5]).log()
    arguments[2:5] = row_law_reference(logits, arguments[1], 0)
    ids[:] = torch.tensor([0, 4200, 4999])
    support[:] = torch.tensor([1.0, 1.0, 2.0])
    arguments[5] = torch.tensor([[4999]]).expand(16, 1)
    n_accepted, bonus = check_decisions(arguments, device)
    assert set(n_accepted.tolist()) == {0, 1}
    assert set(bonus.tolist()) == {0, 4200, 4999}


def test_laws_of_nan_harm_no_other_sample(device: torch.device) -> None:
    arguments = chain_case(8, 2, 5000, 4)
    expected = verify_chain_reference(*arguments)
    logits = arguments[0]
    logits[3, 77] = math.nan  # sample 1's root
    arguments[2:5] = row_law_reference(logits, arguments[1], 0)
    n_accepted, bonus = (x.cpu() for x in verify_chain(*on(device, arguments)))
    others = torch.arange(8) != 1
    assert torch.equal(n_accepted[others], expected[0][others])
    assert torch.equal(bonus[others], expected[1][others])
    assert n_accepted[1] == 0
    assert 0 <= bonus[1] < 5000


def test_a_draft_law_of_nan_leaves_the_target(device: torch.device) -> None:
    """Were it taken for zero the rest of the draft law would count."""
    arguments = chain_case(12, 1, 5000, 3)
    logits, ids, support = arguments[0], arguments[7], arguments[8]
    logits[:] = -math.inf
    logits[:, [3, 4, 4500]] = torch.tensor([0.2, 0.4, 0.4]).log()
    arguments[2:5] = row_law_reference(logits, arguments[1], 0)
    ids[:] = torch.tensor([3, 4, 4500])
    support[:] = torch.tensor([math.nan, 0.5, 0.5])
    arguments[5] = torch.tensor([[4]]).expand(12, 1)
    n_accepted, bonus = check_decisions(arguments, device)
    assert (n_accepted == 0).all()
    assert set(bonus.tolist()) == {3, 4, 4500}


def test_strides_do_not_matter(device: torch.device, poisoned: None) -> None:
    arguments = on(device, chain_case(6, 3, 300, 5, setting=TRUNCATED, spread=0.5))
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
    arguments = on(device, chain_case(1, 2, 97, 4, dtype=torch.bfloat16))
    arguments[8] = torch.zeros_like(arguments[8])  # all drafts are accepted
    n_accepted, bonus = verify_chain(far_apart(arguments[0]), *arguments[1:])
    expected = verify_chain(*arguments)
    assert n_accepted == expected[0] == 2
    assert bonus == expected[1]


@pytest.mark.parametrize("n_places", [0, 2])
def test_no_samples(n_places: int, device: torch.device) -> None:
    arguments = on(device, chain_case(1, n_places, 7, 3))
    none = [arguments[0][:0], arguments[1], *(x[:0] for x in arguments[2:])]
    for x in (*verify_chain(*none), *verify_greedy(*(x[:0].to(device) for x in _greedy_case(2, n_places)))):
        assert x.shape == (0,)


def test_are_well_formed_ops_and_trace(device: torch.device) -> None:
    chain = [*on(device, chain_case(3, 2, 20, 4, setting=TRUNCATED)), torch.arange(4, device=device) * 3]
    for op, arguments in [(verify.verify_chain, chain), (verify_greedy, [x.to(device) for x in _greedy_case(3, 2)])]:
        torch.library.opcheck(op.op, tuple(arguments))
        traced = torch.compile(lambda *x, op=op: op(*x), fullgraph=True, dynamic=True, backend="aot_eager")
        for a, b in zip(traced(*arguments), op(*arguments), strict=True):
            assert torch.equal(a, b)


def test_samples_bring_as_many_rows_as_they_drafted(device: torch.device) -> None:
    """Packed rows give what a grid gives; a sample without rows disturbs nobody."""
    arguments = chain_case(12, 4, 60, 8, spread=0.7)
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
        for a, b in zip(function(*on(device, [*packed, starts])), expected, strict=True):
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


def _launch(n_batch: int, n_places: int, size: int, vocab: int, dtype: torch.dtype) -> object:
    n_rows, support = n_batch * (n_places + 1), (n_batch, n_places, size)
    return verify_chain_triton(
        meta(n_rows, vocab, dtype=dtype), meta(3, dtype=torch.float32), meta(n_rows, dtype=torch.float32),
        meta(n_rows, dtype=torch.float32), meta(n_rows), meta(n_batch, n_places), meta(n_batch), meta(*support),
        meta(*support, dtype=torch.float32), meta(n_batch), meta(n_batch),
    )  # fmt: skip


def _launch_greedy(n_batch: int, n_places: int) -> object:
    shapes = (n_batch, n_places + 1), (n_batch, n_places), (n_batch,)
    return verify_greedy_triton(*(meta(*shape) for shape in shapes))


LAUNCHES = {
    "chain, bfloat16, V 128256, K 5, C 64": lambda: _launch(8, 5, 64, 128_256, torch.bfloat16),
    "chain, float16, V 128256, K 16, C 64": lambda: _launch(32, 16, 64, 128_256, torch.float16),
    "chain, float32, V 128256, K 5, C 64": lambda: _launch(8, 5, 64, 128_256, torch.float32),
    "chain, bfloat16, V 50257, K 10, C 1": lambda: _launch(8, 10, 1, 50_257, torch.bfloat16),
    "chain, bfloat16, V 128256, K 127, C 1024": lambda: _launch(8, 127, 1024, 128_256, torch.bfloat16),
    "greedy": lambda: _launch_greedy(32, 5),
}

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
