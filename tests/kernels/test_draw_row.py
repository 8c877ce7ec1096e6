"""A draw from a row's law with some weights changed makes the decisions of its definition, on every path."""

from __future__ import annotations

import math

import pytest
import torch
from aot import compiles_without_spilling, meta
from frequencies import in_bulk
from rows import OFF, Knobs, far_apart
from torch import Tensor

from specdec.kernels.library import INTERPRETED
from specdec.kernels.sampling.draw_row import draw_row, draw_row_cpu, draw_row_reference, draw_row_triton
from specdec.kernels.sampling.noise import BONUS
from specdec.kernels.sampling.row_law import row_law_reference, row_probs

pytestmark = pytest.mark.kernels

TRUNCATED: Knobs = (1.2, 0.9, 0.02, 20)


def _case(
    n_draws: int, n_rows: int, vocab: int, size: int, *, seed: int = 0, dtype: torch.dtype = torch.float32,
    setting: Knobs = OFF,
) -> list[Tensor]:  # fmt: skip
    """Arguments up to the stream: random rows, weights as large as their ids' probabilities or zero, some ids none."""
    generator = torch.Generator().manual_seed(seed + n_draws + vocab + size)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    *settings, top_k = setting
    knobs = torch.tensor(settings)
    logits = (torch.randn(n_rows, vocab, generator=generator) * 2).to(dtype)
    law = row_law_reference(logits, knobs, top_k)
    row = torch.randint(n_rows, (n_draws,), generator=generator)
    probs = row_probs(logits, knobs, *law)[row]
    ids = (probs / random(n_draws, vocab)).topk(size)[1]  # likely ones, in no order
    weights = (probs.gather(1, ids) + 0.1 / vocab) * random(n_draws, size) * 2 * (random(n_draws, size) < 0.7)
    ids[random(n_draws, size) < 0.3] = -1
    seeds = torch.randint(-(2**63), 2**63 - 1, (n_draws,), generator=generator)
    position, node = (torch.randint(500, (n_draws,), generator=generator) for _ in range(2))
    return [logits, knobs, *law, row, ids, weights, seeds, position, node]


def _peaked(n_draws: int, vocab: int, law: dict[int, float], changes: dict[int, float]) -> list[Tensor]:
    """Arguments up to the stream: one row with this law, its weights changed alike for each draw."""
    probs = torch.zeros(1, vocab)
    probs[0, list(law)] = torch.tensor(list(law.values()))
    key = torch.arange(n_draws)
    ids, weights = torch.tensor(list(changes)), torch.tensor(list(changes.values()))
    none = torch.full((1,), -math.inf)
    return [
        probs.log(), torch.tensor([1.0, 1.0, 0.0]), torch.zeros(1), none, torch.zeros(1, dtype=torch.int64), key * 0,
        ids.expand(n_draws, -1), weights.expand(n_draws, -1), key, key, key,
    ]  # fmt: skip


def _on(device: torch.device, case: list[Tensor]) -> list[Tensor]:
    return [x.to(device) for x in case]


def _drawn(case: list[Tensor], device: torch.device, flat: bool = False) -> Tensor:
    """What is drawn, the same on every path."""
    expected = draw_row_reference(*case, BONUS, flat)
    assert expected.dtype == torch.int64
    assert torch.equal(draw_row(*_on(device, case), BONUS, flat).cpu(), expected)
    if not INTERPRETED:  # it draws with an op itself
        assert torch.equal(draw_row_cpu(*case, BONUS, flat), expected)
    return expected


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("n_draws", "n_rows", "vocab", "size", "dtype", "setting"),
    [
        (3, 1, 1, 1, torch.float32, TRUNCATED),
        (4, 2, 97, 0, torch.float32, OFF),
        (12, 3, 97, 5, torch.float32, TRUNCATED),
        (6, 9, 97, 64, torch.bfloat16, OFF),
        (4, 2, 97, 97, torch.float16, TRUNCATED),
        (4, 4, 4095, 1, torch.bfloat16, OFF),
        (4, 4, 4096, 64, torch.float32, OFF),
        (4, 4, 4097, 3, torch.bfloat16, (0.7, 1.0, 0.0, 0)),
        (6, 4, 13_000, 64, torch.bfloat16, (0.5, 0.99, 0.0, 0)),
        (4, 2, 13_000, 300, torch.float32, (0.1, 1.0, 0.0, 0)),
        (4, 2, 13_000, 0, torch.float16, (0.1, 1.0, 0.0, 0)),
    ],
)
def test_draws_are_the_reference(
    n_draws: int, n_rows: int, vocab: int, size: int, dtype: torch.dtype, setting: Knobs, flat: bool,
    device: torch.device, poisoned: None,
) -> None:  # fmt: skip
    _drawn(_case(n_draws, n_rows, vocab, size, dtype=dtype, setting=setting), device, flat)


@in_bulk
def test_many_draws_are_the_reference(device: torch.device) -> None:
    for vocab, size in [(50, 8), (9000, 64)]:
        for flat in (False, True):
            case = _case(200, 30, vocab, size, setting=(1.5, 1.0, 0.0, 0))
            drawn = _drawn(case, device, flat)
            changed = (case[6] == drawn[:, None]).any(1)
            assert 10 < changed.sum() < 190


@pytest.mark.parametrize("flat", [False, True])
def test_winners_come_from_all_blocks(flat: bool, device: torch.device) -> None:
    drawn = _drawn(_case(16, 4, 12_000, 30, seed=3, setting=(0.1, 1.0, 0.0, 0)), device, flat)
    assert set((drawn // 4096).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("flat", [False, True])
def test_changed_weights_count_and_no_others(flat: bool, device: torch.device) -> None:
    """On both sides of a block's border, in any order, and more of them than any probability; the rest is excluded."""
    law = {5: 0.2, 4095: 0.2, 4096: 0.2, 4097: 0.2, 4999: 0.2}
    changes = {4999: 0.0, 4096: 3.0, 77: 5.0, 4095: 2.0, 5: -0.0, 4097: 0.0}
    drawn = _drawn(_peaked(24, 5000, law, changes), device, flat)
    assert set(drawn.tolist()) == {77, 4095, 4096}
    none = _peaked(24, 5000, law, changes)
    none[6] = torch.tensor([4999, -1, -1, 4095, 5, 4097]).expand(24, -1)
    assert set(_drawn(none, device, flat).tolist()) == {4095, 4096}


@pytest.mark.parametrize("flat", [False, True])
def test_what_is_small_beside_what_was_excluded_is_drawn(flat: bool, device: torch.device) -> None:
    """A block's mass is summed without the excluded: a difference would have lost it."""
    law = {0: 0.5, 9: 0.5, 10: 1e-9, 4096: 0.1, 4100: 2e-9}
    drawn = _drawn(_peaked(24, 9000, law, {0: 0.0, 9: 0.0, 4096: 0.0}), device, flat)
    assert set(drawn.tolist()) == {10, 4100}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("weight", [0.0, math.nan])
def test_with_nothing_left_the_law_is_drawn_from(weight: float, flat: bool, device: torch.device) -> None:
    """Also where one weight is NaN, and others would have won."""
    law = {0: 0.25, 4200: 0.25, 4999: 0.5}
    changes = {4200: 0.0, 0: weight, 4999: 0.0, 300: 0.0 if weight == 0 else 9.0}
    case = _peaked(24, 5000, law, changes)
    assert set(_drawn(case, device, flat).tolist()) == set(law)
    case[6] = torch.tensor([4200, -1, 0, -1]).expand(24, -1)  # what belongs to no id does not matter
    case[7] = torch.tensor([0.0, weight, 0.5, 9.0]).expand(24, -1)
    assert set(_drawn(case, device, flat).tolist()) == {0, 4999}


@pytest.mark.parametrize("flat", [False, True])
def test_rows_without_a_law_give_an_id_in_range_and_harm_no_other(flat: bool, device: torch.device) -> None:
    case = _case(12, 4, 5000, 6)
    case[5] = torch.arange(12) % 4
    expected = draw_row_reference(*case, BONUS, flat)
    case[0][1, 77], case[0][2], case[0][3, 4999] = math.nan, -math.inf, math.inf
    case[2:5] = row_law_reference(case[0], case[1], 0)
    assert not case[2][1:].isfinite().any()
    drawn = draw_row(*_on(device, case), BONUS, flat).cpu()
    assert torch.equal(drawn[::4], expected[::4])
    assert (drawn >= 0).all()
    assert (drawn < 5000).all()


@pytest.mark.parametrize("flat", [False, True])
def test_what_the_law_cuts_is_never_drawn(flat: bool, device: torch.device) -> None:
    """The cut falls among equals, in any block; what was cut can be given a weight."""
    case = _case(12, 4, 9000, 2, setting=(1.0, 0.02, 0.0, 0))
    case[0] = (case[0] / 2).round()
    case[2:5] = row_law_reference(case[0], case[1], 0)
    assert (case[4] > 0).all()
    probs = row_probs(case[0], *case[1:5])[case[5]]
    case[6][:] = -1
    drawn = _drawn(case, device, flat)
    assert (probs.gather(1, drawn[:, None]) > 0).all()
    cut = probs.argmin(-1)
    case[6][::2, 1], case[7][:, 1] = cut[::2], 100.0
    assert torch.equal(_drawn(case, device, flat) == cut, torch.arange(12) % 2 == 0)


def test_strides_do_not_matter(device: torch.device, poisoned: None) -> None:
    case = _on(device, _case(6, 4, 300, 5, setting=(0.5, 0.9, 0.0, 0)))
    for flat in (False, True):
        expected = draw_row(*case, BONUS, flat)
        for i in range(len(case) + 1):  # one at a time, and all
            strided = [_strided(x) if i in (j, len(case)) else x for j, x in enumerate(case)]
            assert torch.equal(draw_row(*strided, BONUS, flat), expected)


def _strided(x: Tensor) -> Tensor:
    """The same values, transposed in memory, with other numbers between them."""
    wide = x.new_full((2 * x.shape[-1] + 1, *reversed(x.shape[:-1])), 3)
    return wide[1::2].permute(*reversed(range(x.dim()))).copy_(x)


def test_rows_beyond_31_bits(device: torch.device) -> None:
    case = _on(device, _case(3, 3, 97, 4, dtype=torch.bfloat16))
    case[5] = torch.tensor([2, 0, 2], device=device)
    far = far_apart(case[0])
    for flat in (False, True):
        assert torch.equal(draw_row(far, *case[1:], BONUS, flat), draw_row(*case, BONUS, flat))


def test_nothing(device: torch.device) -> None:
    case = _on(device, _case(2, 2, 7, 3))
    assert draw_row(*case[:5], *(x[:0] for x in case[5:]), BONUS, False).shape == (0,)


@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize("flat", [False, True])
def test_is_a_well_formed_op_and_traces(size: int, flat: bool, device: torch.device) -> None:
    case = _on(device, _case(5, 3, 20, size, setting=TRUNCATED))
    torch.library.opcheck(draw_row.op, (*case, BONUS, flat))
    traced = torch.compile(lambda *x: draw_row(*x, BONUS, flat), fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(traced(*case), draw_row(*case, BONUS, flat))


def _launch(vocab: int, size: int, dtype: torch.dtype = torch.bfloat16, flat: bool = False, n_draws: int = 8) -> Tensor:
    law = (meta(64, dtype=torch.float32), meta(64, dtype=torch.float32), meta(64))
    changes = meta(n_draws, size), meta(n_draws, size, dtype=torch.float32)
    return draw_row_triton(
        meta(64, vocab, dtype=dtype), meta(3, dtype=torch.float32), *law, meta(n_draws), *changes,
        *(meta(n_draws) for _ in "spn"), BONUS, flat,
    )  # fmt: skip


LAUNCHES = {
    "bfloat16, V 128256, C 64": lambda: _launch(128_256, 64),
    "float16, V 128256, C 64": lambda: _launch(128_256, 64, torch.float16),
    "float32, V 128256, C 256": lambda: _launch(128_256, 256, torch.float32),
    "bfloat16, V 128256, C 0": lambda: _launch(128_256, 0),
    "bfloat16, V 50257, C 64": lambda: _launch(50_257, 64),
    "bfloat16, V 4096, C 64": lambda: _launch(4096, 64),
    "bfloat16, V 128256, C 64, flat": lambda: _launch(128_256, 64, flat=True),
    "float32, V 128256, C 256, flat": lambda: _launch(128_256, 256, torch.float32, flat=True),
    "bfloat16, V 50257, C 0, flat": lambda: _launch(50_257, 0, flat=True),
}

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
