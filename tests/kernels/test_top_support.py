"""The truncated law of the best entries is what sorting the row in plain Python gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aot import compiles_without_spilling, meta
from rows import OFF, Knobs, far_apart
from torch import Tensor

from specdec.kernels.library import jit, runs_triton, tl
from specdec.kernels.sampling.top_support import (
    MAX_SIZE,
    best_keys,
    key_id,
    key_value,
    sort_key,
    top_support,
    top_support_cpu,
    top_support_reference,
    top_support_triton,
)

pytestmark = pytest.mark.kernels


def _sorted_law(logits: Tensor, setting: Knobs, size: int) -> tuple[list[list[int]], Tensor]:
    """The definition, in double precision."""
    inverse_temperature, top_p, min_p, top_k = setting
    all_ids, all_probs = [], []
    for row in logits.tolist():
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        best = row[order[0]]
        mass = [math.exp((row[i] - best) * inverse_temperature) for i in order]
        total = sum(mass[:top_k] if 0 < top_k <= size else mass)
        kept = []
        for place in range(size):
            listed = top_k == 0 or place < top_k
            nucleus = top_p >= 1 or sum(mass[:place]) < top_p * total
            kept.append(mass[place] if place == 0 or (listed and nucleus and mass[place] >= min_p) else 0.0)
        all_ids.append(order[:size])
        all_probs.append(torch.tensor(kept, dtype=torch.float64) / sum(kept))
    return all_ids, torch.stack(all_probs)


def _logits(n_rows: int, vocab: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    return (torch.randn(n_rows, vocab, generator=generator) * scale).to(dtype)


def _call(logits: Tensor, setting: Knobs, size: int, op: Callable[..., Any] = top_support) -> tuple[Tensor, Tensor]:
    *knobs, top_k = setting
    ids, probs = op(logits, torch.tensor(knobs, device=logits.device), top_k, size)
    assert (ids.dtype, probs.dtype) == (torch.int64, torch.float32)
    assert ids.shape == probs.shape == (len(logits), size)
    return ids.cpu(), probs.cpu()


def _assert_is_sorted_law(
    logits: Tensor, setting: Knobs, size: int, device: torch.device, op: Callable[..., Any] = top_support
) -> None:
    ids, probs = _call(logits.to(device), setting, size, op)
    expected_ids, expected_probs = _sorted_law(logits, setting, size)
    assert ids.tolist() == expected_ids
    assert (probs - expected_probs).abs().max() < 1e-6
    assert torch.equal(probs > 0, expected_probs.float() > 0)
    assert (probs.double().sum(1) - 1).abs().max() < 1e-6


SETTINGS: list[Knobs] = [
    OFF,
    (1.7, 1.0, 0.0, 0),
    (0.7, 1.0, 0.0, 1),
    (1.0, 1.0, 0.0, 7),
    (1.0, 1.0, 0.0, 16),
    (1.0, 1.0, 0.0, 60),
    (1.0, 0.8, 0.0, 0),
    (1.3, 0.5, 0.0, 0),
    (1.0, 1e-9, 0.0, 0),
    (1.0, 0.0, 0.0, 0),
    (1.0, 0.8, 0.0, 7),  # 80% of the seven
    (1.0, 0.8, 0.0, 60),
    (1.0, 1.0, 0.1, 0),
    (2.0, 1.0, 1.0, 0),
    (0.8, 0.7, 0.15, 12),
    (0.5, 0.9, 0.3, 0),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_truncation(setting: Knobs, device: torch.device, poisoned: None) -> None:
    _assert_is_sorted_law(_logits(1, 150), setting, 16, device)


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_truncation_on_the_cpu_and_by_definition(setting: Knobs) -> None:
    for op in (top_support_cpu, top_support_reference):
        for vocab, size in [(16, 16), (150, 16), (9000, 40)]:
            _assert_is_sorted_law(_logits(2, vocab), setting, size, torch.device("cpu"), op)


SHAPES = [
    (1, 1), (2, 1), (2, 2), (3, 3), (63, 5), (64, 64), (65, 40), (97, 97), (1000, 1), (4097, 2), (8191, 4), (8192, 33),
    (8193, 16), (16384, 7), (20_001, 100),
]  # fmt: skip


@pytest.mark.parametrize(("vocab", "size"), SHAPES)
def test_shapes(vocab: int, size: int, device: torch.device, poisoned: None) -> None:
    _assert_is_sorted_law(_logits(2, vocab), (0.9, 0.95, 0.001, 0), size, device)


@pytest.mark.parametrize(("vocab", "size"), [(256, 256), (1025, 129), (40_000, 256)])
def test_long_lists(vocab: int, size: int, device: torch.device, poisoned: None) -> None:
    """Also more group maxima than are sorted at a time."""
    _assert_is_sorted_law(_logits(1, vocab, scale=1.0), OFF, size, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "size"), [(300, 20), (9001, 50)])
def test_ties_go_to_the_lowest_id(
    vocab: int, size: int, dtype: torch.dtype, device: torch.device, poisoned: None
) -> None:
    """Half-precision logits have them anyway; here every value comes many times, zero with both signs."""
    logits = _logits(2, vocab, dtype, scale=1.5)
    logits[1] = (logits[1] * 2).round().clamp(-2, 1)
    logits[1, ::7] = -0.0
    logits[1, ::3].clamp_(max=0)
    for setting in (OFF, (1.0, 0.5, 0.0, size - 3)):
        _assert_is_sorted_law(logits, setting, size, device)
    for op in (top_support_cpu, top_support_reference):
        _assert_is_sorted_law(logits, OFF, size, torch.device("cpu"), op)


def test_equal_everywhere(device: torch.device, poisoned: None) -> None:
    _assert_is_sorted_law(torch.full((1, 12_000), 3.0), (1.0, 1.04e-3, 0.0, 0), 20, device)
    _assert_is_sorted_law(torch.full((1, 70), -3.0), (1.0, 0.51, 0.5, 10), 20, device)
    _assert_is_sorted_law(torch.full((1, 70), -3.0), (1.0, 1.0, 1.0, 0), 20, device)


def test_top_p_counts_the_whole_row(device: torch.device, poisoned: None) -> None:
    """Over blocks of the vocabulary whose best entries are far apart."""
    logits = _logits(2, 20_001, scale=1.0)
    logits[0, 9000:] -= 3
    logits[1, :9000] -= 5
    for top_p in (0.02, 0.05, 0.1):
        _assert_is_sorted_law(logits, (1.0, top_p, 0.0, 0), 100, device)


def test_off_keeps_what_vanishes_in_the_sum(device: torch.device, poisoned: None) -> None:
    logits = torch.tensor([[0.0] + [-20.0] * 20])
    for op, where in ((top_support, device), (top_support_cpu, "cpu"), (top_support_reference, "cpu")):
        _assert_is_sorted_law(logits, OFF, 21, torch.device(where), op)


@pytest.mark.parametrize("vocab", [90, 9000, 17_000])
def test_impossible_entries_come_last_with_probability_zero(vocab: int, device: torch.device, poisoned: None) -> None:
    logits = torch.full((3, vocab), -math.inf)
    logits[0, vocab - 1], logits[0, 2] = 1.0, 0.5
    logits[1, 1::2] = _logits(1, vocab)[0, 1::2]
    logits[2, :20] = 1e4 * _logits(1, vocab)[0, :20]
    for op, where in ((top_support, device), (top_support_cpu, "cpu"), (top_support_reference, "cpu")):
        _assert_is_sorted_law(logits, (1.0, 0.99, 0.0, 0), 30, torch.device(where), op)


def test_logits_of_any_size(device: torch.device) -> None:
    for scale in (1e-30, 1e30):
        logits = _logits(1, 300) * scale
        ids, probs = _call(logits.to(device), (1 / scale, 0.9, 0.01, 0), 30)
        expected_ids, expected = _sorted_law(logits.double() / scale, (1.0, 0.9, 0.01, 0), 30)
        assert ids.tolist() == expected_ids
        assert (probs - expected).abs().max() < 1e-5


@pytest.mark.parametrize("vocab", [50, 9000])
def test_rows_without_a_law_give_ids_in_range(vocab: int, device: torch.device, poisoned: None) -> None:
    logits = _logits(4, vocab)
    logits[0], logits[1, 5], logits[2], logits[3, 7] = math.nan, math.nan, -math.inf, math.inf
    ids, probs = _call(logits.to(device), (1.0, 0.9, 0.1, 0), 9)
    assert (ids >= 0).all()
    assert (ids < vocab).all()
    assert all(len(set(row)) == 9 for row in ids.tolist())
    assert probs[3].tolist() == [1.0] + [0.0] * 8
    assert ids[3, 0] == 7
    assert probs[2].isfinite().all()


def test_strides_do_not_matter(device: torch.device, poisoned: None) -> None:
    logits = _logits(2, 9000).to(device)
    rows, columns = torch.full((2, 9100), 99.0, device=device), torch.full((9000, 5), 99.0, device=device)
    rows[:, 50:9050], columns[:, 1:5:2] = logits, logits.T
    knobs = torch.full((3, 2), 9.0, device=device)
    knobs[:, 1] = torch.tensor([1.2, 0.8, 0.01])
    expected = top_support(logits, knobs[:, 1].clone(), 0, 20)
    for strided in (rows[:, 50:9050], columns[:, 1:5:2].T):
        for a, b in zip(top_support(strided, knobs[:, 1], 0, 20), expected, strict=True):
            # A GPU loads it in another layout, and sums in another order.
            torch.testing.assert_close(a, b, rtol=1e-6 if device.type == "cuda" else 0, atol=0)


def test_rows_beyond_31_bits(device: torch.device) -> None:
    far = far_apart(_logits(3, 8200, torch.bfloat16).to(device))
    for a, b in zip(_call(far, OFF, 10), _call(far.clone(), OFF, 10), strict=True):
        assert torch.equal(a, b)


def test_nothing(device: torch.device) -> None:
    _call(torch.empty(0, 5, device=device), OFF, 3)


@pytest.mark.parametrize(("vocab", "size"), [(5, 6), (5, 0), (3000, MAX_SIZE + 1)])
def test_sizes_out_of_range(vocab: int, size: int, device: torch.device) -> None:
    for op in (top_support, top_support_cpu, top_support_triton, top_support_reference):
        with pytest.raises(ValueError, match="not in 1"):
            op(torch.zeros(1, vocab, device=device), torch.ones(3, device=device), 0, size)


@pytest.mark.parametrize("vocab", [50, 9000])
def test_is_a_well_formed_op_and_traces(vocab: int, device: torch.device) -> None:
    knobs = torch.tensor([1.0, 0.9, 0.1], device=device)
    logits = _logits(2, vocab).to(device)
    torch.library.opcheck(top_support.op, (logits, knobs, 7, 9))
    traced = torch.compile(lambda *x: top_support(*x, 0, 9), fullgraph=True, backend="aot_eager")
    for a, b in zip(traced(logits, knobs), top_support(logits, knobs, 0, 9), strict=True):
        assert torch.equal(a, b)


@jit
def _sort_kernel(x_ptr, value_ptr, id_ptr, LOG_N: tl.constexpr, LOG_K: tl.constexpr):
    i = tl.arange(0, 2**LOG_N)
    best = best_keys(sort_key(tl.load(x_ptr + i), i), LOG_N, LOG_K)
    place = tl.arange(0, 2**LOG_K)
    tl.store(value_ptr + place, key_value(best))
    tl.store(id_ptr + place, key_id(best))


@pytest.mark.parametrize(("log_n", "log_k"), [(1, 1), (2, 1), (2, 2), (5, 1), (5, 4), (5, 5), (9, 3), (11, 6), (12, 6)])
def test_kernels_sort(log_n: int, log_k: int, device: torch.device) -> None:
    if not runs_triton(torch.empty(0, device=device)):
        pytest.skip("Triton kernels run on a GPU or in the interpreter")
    x = _logits(1, 2**log_n, scale=1e3)[0]
    x[::2] = x[::2].round(decimals=-3)
    x[0], x[-1] = -math.inf, math.inf
    values, ids = torch.full((2**log_k,), math.nan, device=device), torch.full((2**log_k,), -9, device=device)
    _sort_kernel[(1,)](x.to(device), values, ids, LOG_N=log_n, LOG_K=log_k)
    expected = x.sort(descending=True, stable=True)
    assert torch.equal(values.cpu(), expected.values[: 2**log_k])
    assert torch.equal(ids.cpu(), expected.indices[: 2**log_k])


def _launch(vocab: int, size: int, top_k: int = 0, dtype: torch.dtype = torch.bfloat16) -> object:
    return top_support_triton(meta(64, vocab, dtype=dtype), meta(3, dtype=torch.float32), top_k, size)


LAUNCHES = {
    "bfloat16, V 128256, K 1": lambda: _launch(128_256, 1),
    "bfloat16, V 128256, K 16, top-k": lambda: _launch(128_256, 16, 16),
    "bfloat16, V 128256, K 64": lambda: _launch(128_256, 64),
    "float32, V 50257, K 64": lambda: _launch(50_257, 64, dtype=torch.float32),
    "bfloat16, V 262144, K 256": lambda: _launch(262_144, 256),
}

SLOW = ["bfloat16, V 262144, K 256", "float32, V 50257, K 64"]

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES, SLOW)
