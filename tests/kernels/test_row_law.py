"""The law in three numbers is the law that transformers' own warpers give."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from aot import compiles_without_spilling, meta
from rows import OFF, Knobs, far_apart
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.kernels.library import INTERPRETED
from specdec.kernels.sampling import row_law as module
from specdec.kernels.sampling.row_law import row_law, row_law_reference, row_law_triton, row_probs

pytestmark = pytest.mark.kernels


def _logits(n_rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n_rows, vocab, generator=generator) * scale).to(dtype)


def _transformers_law(logits: Tensor, setting: Knobs) -> Tensor:
    """What generate() draws from; the warpers are those that it puts in for these settings, in its order."""
    inverse_temperature, top_p, min_p, top_k = setting
    scores = logits.float().cpu()
    if inverse_temperature != 1:
        scores = TemperatureLogitsWarper(1 / inverse_temperature)(None, scores)
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1)


def _law(logits: Tensor, setting: Knobs, op: Callable[..., Any] = row_law) -> Tensor:
    *knobs, top_k = setting
    device_knobs = torch.tensor(knobs, device=logits.device)
    log_total, threshold, first = op(logits, device_knobs, top_k)
    assert (log_total.dtype, threshold.dtype, first.dtype) == (torch.float32, torch.float32, torch.int64)
    assert log_total.shape == threshold.shape == first.shape == logits.shape[:1]
    return row_probs(logits, device_knobs, log_total, threshold, first).cpu()


@pytest.fixture
def stable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of equal logits top-p keeps is up to torch.sort, which promises nothing unless told to be stable."""
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda x, descending: sort(x, descending=descending, stable=True))


SETTINGS: list[Knobs] = [
    OFF,
    (1.5, 1.0, 0.0, 0),
    (1.0, 1.0, 0.0, 1),
    (0.7, 1.0, 0.0, 50),
    (1.0, 1.0, 0.0, 20_000),
    (1.0, 0.9, 0.0, 0),
    (1.3, 0.5, 0.0, 0),
    (1.0, 1e-3, 0.0, 0),
    (1.0, 1e-9, 0.0, 0),
    (1.0, 0.0, 0.0, 0),
    (1.0, 0.9999, 0.0, 0),
    (1.0, 1.0, 0.1, 0),
    (2.0, 1.0, 1.0, 0),
    (0.8, 0.95, 0.02, 40),
    (1.0, 0.6, 1e-6, 3),
    (1.0, 0.8, 0.3, 20_000),
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_law_is_transformers(
    setting: Knobs, dtype: torch.dtype, device: torch.device, poisoned: None, stable: None
) -> None:
    for n_rows, vocab in [(2, 97), (1, 2500)]:
        logits = _logits(n_rows, vocab, dtype, seed=vocab)
        expected = _transformers_law(logits, setting)
        for op in (row_law, row_law_reference):
            assert (_law(logits.to(device), setting, op) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("vocab", [1, 2, 3, 2047, 2048, 2049, 8191, 8192, 8193, 20_000])
def test_law_is_transformers_at_every_size(vocab: int, device: torch.device, poisoned: None, stable: None) -> None:
    logits = _logits(1, vocab, torch.float16)
    logits[0, -1] = 15  # the best token is the last
    for setting in [OFF, (1.1, 0.9, 0.01, 300)]:
        assert (_law(logits.to(device), setting) - _transformers_law(logits, setting)).abs().max() < 1e-6


def test_ties_cut_like_transformers_but_for_which_of_them_stay(device: torch.device) -> None:
    """Logits of few values: the boundary always falls among equals, and transformers sorts them as it happens."""
    logits = _logits(2, 1500, scale=1.0).mul(2).round().div(2)
    for top_p in (0.02, 0.3, 0.6, 0.95):
        setting = (1.0, top_p, 0.0, 0)
        law, expected = _law(logits.to(device), setting), _transformers_law(logits, setting)
        assert (law.sort(-1)[0] - expected.sort(-1)[0]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ((1.0, 0.5, 0.0, 0), [4, 6]),  # of the equals the last ids
        ((1.0, 0.51, 0.0, 0), [3, 4, 6]),
        ((1.0, 0.25, 0.0, 0), [6]),
        ((1.0, 0.0, 0.0, 0), [6]),
        ((1.0, 0.99, 0.0, 0), [1, 3, 4, 6]),
        ((1.0, 1.0, 0.0, 2), [1, 3, 4, 6]),  # top-k keeps all equals
        ((1.0, 1.0, 0.9, 0), [1, 3, 4, 6]),
        ((1.0, 0.5, 1.0, 1), [4, 6]),
        ((1.0, 1.0, 0.0, 6), [1, 3, 4, 6]),  # fewer possible tokens than k
    ],
)
def test_equal_logits(setting: Knobs, kept: list[int], device: torch.device) -> None:
    logits = torch.full((2, 7), -math.inf)
    logits[:, [1, 3, 4, 6]] = torch.tensor([[2.0], [0.0]])
    logits[1, 3] = -0.0  # which equals 0
    for op in (row_law, row_law_reference):
        law = _law(logits.to(device), setting, op)
        expected = torch.zeros(7).index_fill(0, torch.tensor(kept), 1 / len(kept))
        assert torch.allclose(law, expected.expand(2, -1), atol=1e-6)


def test_min_p_above_a_cut_among_equals(device: torch.device) -> None:
    """Top-p keeps some of the lower equals, min-p none of them and all of the higher ones, whatever their ids."""
    logits = torch.tensor([[2.0, 0.0, 2.0, 0.0, 0.0, -1.0, 0.0]])
    for min_p in (0.0, 0.5):
        setting = (1.0, 0.85, min_p, 0)
        law = _law(logits.to(device), setting)
        assert law[0].nonzero()[:, 0].tolist() == ([0, 2] if min_p else [0, 2, 4, 6])
        assert (law.sort()[0] - _transformers_law(logits, setting).sort()[0]).abs().max() < 1e-6


@pytest.mark.parametrize("value", [1.0, -1.0, 1e-40, -3e38])
def test_neighbouring_floats_are_told_apart(value: float, device: torch.device) -> None:
    logits = torch.full((1, 5), value)
    for i in (1, 4, 0):  # ever higher
        logits[:, i] = torch.nextafter(logits.max(), torch.tensor(math.inf))
    for top_k, kept in [(1, [0]), (2, [0, 4]), (3, [0, 1, 4])]:
        law = _law(logits.to(device), (1e-38 if abs(value) > 1e30 else 1.0, 1.0, 0.0, top_k))
        assert law[0].nonzero()[:, 0].tolist() == kept


def test_the_cut_among_equals_in_any_block(device: torch.device, poisoned: None) -> None:
    """20,000 equals of which the last 5000, 10,000 or all but one stay."""
    logits = torch.zeros(1, 20_000, device=device)
    for top_p, n_kept in [(0.25, 5000), (0.5, 10_000), (0.99994, 19_999)]:
        law = _law(logits, (1.0, top_p, 0.0, 0))[0]
        n_off = abs(int((law > 0).sum()) - n_kept)
        assert n_off <= 1  # 0.25 and the like are exact; the last is not
        assert n_off == 0 or top_p > 0.9
        assert (law[-n_kept + 1 :] > 0).all()
        assert abs(law.sum() - 1) < 1e-4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("setting", [OFF, (1.0, 0.9, 0.1, 5)])
def test_a_row_without_a_law_says_so_and_harms_no_other(
    bad: float, setting: Knobs, device: torch.device, poisoned: None
) -> None:
    logits = _logits(3, 2500)
    logits[1, 1700] = bad
    if bad < 0:
        logits[1] = bad
    *knobs, top_k = setting
    for op in (row_law, row_law_reference):
        log_total, _, first = op(logits.to(device), torch.tensor(knobs, device=device), top_k)
        assert log_total[1].isnan() if bad != -math.inf else log_total[1] == -math.inf
        assert (first >= 0).all()
        law = _law(logits.to(device), setting, op)
        assert (law[::2] - _transformers_law(logits[::2], setting)).abs().max() < 1e-6
        assert torch.allclose(law[::2].sum(-1), torch.ones(2), atol=1e-5)


def test_tokens_ruled_out_beforehand_stay_out(device: torch.device) -> None:
    logits = _logits(2, 3000)
    logits[:, ::3] = -math.inf
    logits[1, 1:] = -math.inf
    logits[1, 77] = -5
    for setting in [OFF, (1.0, 0.9, 0.0, 0), (1.0, 1.0, 0.0, 2500), (1.0, 0.999, 1e-4, 2500)]:
        law = _law(logits.to(device), setting)
        assert (law[:, ::3] == 0).all()
        assert (law - _transformers_law(logits, setting)).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e4])
def test_logits_of_any_size(scale: float, device: torch.device) -> None:
    """Values whose bit patterns are far apart and whose distances are not, and the other way round."""
    logits = _logits(2, 300, scale=scale)
    for setting in [(1 / scale, 0.9, 0.0, 0), (1 / scale, 0.7, 0.0, 20), (1 / scale, 1.0, 0.05, 0)]:
        expected = _transformers_law(logits / scale, (1.0, *setting[1:]))
        assert (_law(logits.to(device), setting) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [8191, 12_289])
def test_rows_in_several_slices(vocab: int, dtype: torch.dtype, device: torch.device, poisoned: None) -> None:
    """Slices of 4096 logits: of values all different or few, the best of them in the last slice, or none but -inf."""
    logits = _logits(4, vocab, torch.float32)
    logits[1] = logits[1].round()  # equals in all slices
    logits[2, 5000:] -= 30
    logits[2, -2:] = 14
    logits[3, 4096:8000] = -math.inf
    logits = logits.to(dtype)
    settings: list[Knobs] = [
        (0.9, 1.0, 0.0, 1), (0.9, 1.0, 0.0, vocab), (0.9, 1e-6, 0.0, 0), (0.9, 0.7, 0.0, 5000), (0.3, 0.99, 0.0, 0),
        (0.9, 0.9, 0.2, 200), (0.9, 1.0, 0.01, 100), (0.9, 0.5, 1.0, 0), (0.9, 0.45, 1e-3, 1),
    ]  # fmt: skip
    for setting in settings:
        expected = _law(logits, setting, row_law_reference)
        law = _law(logits.to(device), setting)
        assert torch.equal(law > 0, expected > 0)
        assert (law - expected).abs().max() < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("setting", [OFF, (1.0, 0.9, 0.1, 5)])
def test_one_slice_spoils_its_row(bad: float, setting: Knobs, device: torch.device, poisoned: None) -> None:
    logits = _logits(2, 10_000)
    logits[0, 9000] = bad
    *knobs, top_k = setting
    for op in (row_law, row_law_reference):
        log_total = op(logits.to(device), torch.tensor(knobs, device=device), top_k)[0]
        assert log_total.isnan().tolist() == [True, False]


def test_the_same_row_has_the_same_law(device: torch.device) -> None:
    """Beside how many others it may be, where it does not change the slices."""
    logits, knobs = _logits(33, 9000).to(device), torch.tensor([1.2, 0.8, 0.01], device=device)
    logits[1:] = logits[0]
    for few, many in zip(row_law(logits[:1], knobs, 40), row_law(logits, knobs, 40), strict=True):
        assert (many == few).all()


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.bfloat16, 4), (torch.float16, 5), (torch.float32, 6)], ids=["bf16", "fp16", "fp32"]
)
@pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter calls")
def test_few_passes(dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that lost one of its brackets would find it again, later."""
    n_passes, reaching = 0, module.reaching

    def spy(p_row: Any, stride: Any, begin: Any, *args: Any) -> Any:
        nonlocal n_passes
        n_passes += int(begin) == 0
        return reaching(p_row, stride, begin, *args)

    monkeypatch.setattr(module, "reaching", spy)
    for scale, top_k, top_p in product([1.0, 3.0, 30.0], [0, 50], [1.0, 0.9, 0.5]):
        for seed in range(3):
            n_passes = 0
            logits = _logits(1, 10_000, dtype, seed, scale)
            _law(logits, (1.4, top_p, 0.0, top_k))
            assert n_passes <= most * (top_k > 0 or top_p < 1)


def test_strides_do_not_matter(device: torch.device, poisoned: None) -> None:
    logits = _logits(2, 9000).to(device)
    rows, columns = torch.full((2, 9200), 99.0, device=device), torch.full((9000, 5), 99.0, device=device)
    rows[:, 50:9050], columns[:, 1:5:2] = logits, logits.T
    knobs = torch.full((3, 2), 9.0, device=device)
    knobs[:, 1] = torch.tensor([1.2, 0.8, 0.01])
    expected = row_law(logits, knobs[:, 1].clone(), 20)
    for strided in (rows[:, 50:9050], columns[:, 1:5:2].T):
        for a, b in zip(row_law(strided, knobs[:, 1], 20), expected, strict=True):
            assert torch.equal(a, b)


def test_rows_beyond_31_bits(device: torch.device) -> None:
    far = far_apart(_logits(3, 97, torch.bfloat16).to(device))
    assert torch.equal(_law(far, (1.0, 0.9, 0.0, 9)), _law(far.clone(), (1.0, 0.9, 0.0, 9)))


def test_nothing(device: torch.device) -> None:
    for x in row_law(torch.empty(0, 5, device=device), torch.ones(3, device=device), 0):
        assert x.shape == (0,)


def test_is_a_well_formed_op_and_traces(device: torch.device) -> None:
    arguments = _logits(2, 50).to(device), torch.tensor([1.0, 0.9, 0.1], device=device), 7
    torch.library.opcheck(row_law.op, arguments)
    traced = torch.compile(lambda *x: row_law(*x), fullgraph=True, dynamic=True, backend="aot_eager")
    for a, b in zip(traced(*arguments), row_law(*arguments), strict=True):
        assert torch.equal(a, b)


def _launch(n_rows: int, vocab: int, dtype: torch.dtype) -> object:
    return row_law_triton(meta(n_rows, vocab, dtype=dtype), meta(3, dtype=torch.float32), 50)


LAUNCHES = {
    "bfloat16, V 128256": lambda: _launch(256, 128_256, torch.bfloat16),
    "float16, V 128256": lambda: _launch(48, 128_256, torch.float16),
    "float32, V 128256": lambda: _launch(48, 128_256, torch.float32),
    "bfloat16, V 50257": lambda: _launch(48, 50_257, torch.bfloat16),
}

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
