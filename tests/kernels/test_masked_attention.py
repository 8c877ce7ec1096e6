"""masked_attention: three implementations against the dense formula, under any mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from aot import compiles_without_spilling, meta
from torch import Tensor

from specdec.kernels.attention import masked_attention as module
from specdec.kernels.attention.masked_attention import masked_attention, masked_attention_triton
from specdec.kernels.library import runs_triton

pytestmark = pytest.mark.kernels

SHAPES = [  # B, H, G, Q, S, D, Dv
    (1, 4, 4, 1, 64, 16, 16),
    (2, 4, 2, 3, 70, 20, 20),
    (1, 6, 2, 1, 33, 64, 48),
    (3, 8, 1, 5, 200, 33, 16),
    (1, 16, 1, 9, 1, 32, 32),
    (1, 2, 1, 2, 1100, 16, 16),
    (2, 4, 2, 11, 1100, 16, 16),
]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q as a model makes it, [B, Q, H, D] seen as [B, H, Q, D]; k, v [B, G, S, D]."""
    n_batch, n_heads, n_groups, n_queries, n_slots, dim, dim_v = shape
    torch.manual_seed(0)
    q = torch.randn(n_batch, n_queries, n_heads, dim).transpose(1, 2)
    k, v = torch.randn(n_batch, n_groups, n_slots, dim), torch.randn(n_batch, n_groups, n_slots, dim_v)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _holes(shape: tuple[int, ...]) -> Tensor:
    """A mask with holes, padding on both sides, and one key that every query sees."""
    n_batch, _, _, n_queries, n_slots, *_ = shape
    mask = torch.rand(n_batch, 1, n_queries, n_slots) > 0.4
    mask[..., : n_slots // 5] = mask[..., n_slots // 2 :] = False
    mask[..., n_slots // 3] = True
    return mask


MASKS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "holes": _holes,
    "a mask a head": lambda s: torch.rand(s[0], s[1], s[3], s[4]) > torch.linspace(-0.1, 0.7, s[1])[:, None, None],
    "one row for all": lambda s: (torch.arange(s[4])[None, None, None] <= s[4] // 2).expand(s[0], -1, s[3], -1),
    "added": lambda s: torch.where(_holes(s), torch.randn(s[0], 1, s[3], s[4]), -torch.inf),
    "added, a head": lambda s: torch.randn(1, s[1], 1, s[4]),
}


def _expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The formula, in float64, every head with keys of its own."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeats, 1) for x in (k, v))
    bias = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
    return (scale * q.double() @ k.transpose(2, 3) + bias).softmax(-1) @ v


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_dense_formula(shape: tuple[int, ...], kind: str, device: torch.device, poisoned: None) -> None:
    q, k, v = _inputs(shape)
    mask = MASKS[kind](shape)
    out = masked_attention(*(x.to(device) for x in (q, k, v, mask)), 0.3)
    expected = _expected(q, k, v, mask, 0.3)
    expected = torch.where(expected.isnan(), 0, expected)  # a query that sees nothing
    torch.testing.assert_close(out.cpu().double(), expected, atol=3e-6, rtol=3e-6)


def test_what_no_query_sees_is_not_read(device: torch.device) -> None:
    """The unused slots of a cache may hold anything."""
    shape = (2, 4, 2, 3, 300, 16, 16)
    q, k, v = (x.to(device) for x in _inputs(shape))
    mask = (torch.arange(300)[None, None, None] < 100).expand(2, 1, 3, -1).to(device)
    clean = masked_attention(q, k, v, mask, 0.25)
    for x in (k, v):
        x[:, :, 128:] = torch.nan  # whole blocks; a slot beside visible ones is read, as the dense formula does
    assert torch.equal(masked_attention(q, k, v, mask, 0.25), clean)


def test_a_query_that_sees_nothing_gives_zero(device: torch.device) -> None:
    q, k, v = (x.to(device) for x in _inputs((1, 2, 1, 2, 40, 16, 16)))
    mask = torch.zeros(1, 1, 2, 40, dtype=torch.bool, device=device)
    mask[0, 0, 1, 7] = True
    out = masked_attention(q, k, v, mask, 0.25)
    assert (out[:, :, 0] == 0).all()
    torch.testing.assert_close(out[:, :, 1], v[:, :1, 7].expand(-1, 2, -1))


def test_nothing_is_left_over_from_the_call_before(device: torch.device) -> None:
    """Odd head dims are padded, in memory that is used again."""
    shape = (1, 4, 2, 3, 40, 33, 33)
    mask = _holes(shape).to(device)
    longer = (x.to(device).fill_(torch.nan) for x in _inputs((*shape[:5], 36, 36)))
    assert masked_attention(*longer, mask, 0.25).isnan().all()
    q, k, v = _inputs(shape)
    out = masked_attention(*(x.to(device) for x in (q, k, v)), mask, 0.25)
    torch.testing.assert_close(out.cpu().double(), _expected(q, k, v, mask.cpu(), 0.25), atol=3e-6, rtol=3e-6)


def test_a_row_of_the_lowest_numbers_is_even(device: torch.device) -> None:
    """Masks made with `finfo.min` instead of -inf: where it hides everything, the dense formula weighs all alike."""
    shape = (2, 4, 2, 3, 90, 16, 16)
    q, k, v = _inputs(shape)
    mask = torch.where(_holes(shape), 0.0, torch.finfo(torch.float32).min)
    mask[0, 0, 1] = torch.finfo(torch.float32).min
    out = masked_attention(*(x.to(device) for x in (q, k, v, mask)), 0.25)
    dense = (0.25 * q @ k.repeat_interleave(2, 1).transpose(2, 3) + mask).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out.cpu(), dense, atol=3e-6, rtol=3e-6)


def test_strides_do_not_matter(device: torch.device) -> None:
    """A cache that is a slice of a longer one, or laid out in another order."""
    q, k, v = (x.to(device) for x in _inputs((2, 4, 2, 3, 70, 16, 16)))
    mask = _holes((2, 4, 2, 3, 70, 16, 16)).to(device)
    expected = masked_attention(q.contiguous(), k, v, mask, 0.25)
    longer = torch.zeros(2, 2, 90, 16, device=device)
    longer[:, :, :70] = k
    other = v.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    rows = mask.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(masked_attention(q, longer[:, :, :70], other, rows, 0.25), expected)


SPANS: dict[str, tuple[list[range], list[int]]] = {  # slots that are seen, and how many blocks of 32 each split takes
    "the beginning": ([range(100)], [1] * 4),
    "one in the middle": ([range(2000, 2001)], [1]),
    "the middle": ([range(1505, 2600)], [3] * 11 + [2]),
    "both ends": ([range(40), range(3400, 4090)], [2] * 12),
    "everything": ([range(4100)], [9] * 14 + [3]),
    "nothing": ([], []),
}


@pytest.mark.skipif(not runs_triton(torch.empty(0)), reason="splits are for the Triton kernel")
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_splits_share_what_is_seen(
    span: str, dtype: torch.dtype, device: torch.device, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 splits of 4100 slots. Scores are all 0, so that a split's weight tells how many slots it saw."""
    ranges, expected_blocks = SPANS[span]
    shape = (1, 2, 1, 2, 4100, 16, 16)
    q, k, v = _inputs(shape)
    q[:] = 0
    seen = torch.zeros(1, 1, 2, 4100, dtype=torch.bool)
    for slots in ranges:
        seen[..., list(slots)] = True
    seen[:, :, 0] &= torch.rand(4100) > 0.3  # the second query sees all of it
    mask = seen if dtype == torch.bool else torch.where(seen, 0.0, -torch.inf)
    expected = _expected(q, k, v, mask, 0.3)
    hidden = F.pad(seen[0, 0, 1], (0, 28)).view(-1, 32).any(1).logical_not().repeat_interleave(32)[:4100]
    k[:, :, hidden] = v[:, :, hidden] = torch.nan
    weights: list[Tensor] = []
    combine = module.combine

    def spy(part: Tensor, lse: Tensor, sinks: None, out: Tensor) -> None:
        weights.append(lse.exp2()[:, 0, 1, 0].cpu())
        combine(part, lse, sinks, out)

    monkeypatch.setattr(module, "combine", spy)
    out = masked_attention(*(x.to(device) for x in (q, k, v, mask)), 0.3)
    torch.testing.assert_close(out.cpu().double(), torch.where(expected.isnan(), 0, expected), atol=3e-6, rtol=3e-6)
    assert len(weights[0]) == 16
    n_seen = weights[0].round()
    assert n_seen.sum() == sum(map(len, ranges))
    assert [math.ceil(n / 32) for n in n_seen.tolist() if n > 0] == expected_blocks


@pytest.mark.skipif(not runs_triton(torch.empty(0)), reason="half precision is for the Triton kernel")
@pytest.mark.parametrize("kind", ["holes", "added"])
def test_half_precision(kind: str, device: torch.device) -> None:
    shape = (2, 8, 2, 3, 90, 64, 64)
    q, k, v = _inputs(shape, torch.float16)
    mask = MASKS[kind](shape)
    out = masked_attention(*(x.to(device) for x in (q, k, v, mask)), 0.125)
    assert out.dtype == torch.float16
    expected = _expected(q, k, v, mask, 0.125)
    torch.testing.assert_close(out.cpu().double(), expected, atol=2e-3, rtol=2e-3)


def _launch(shape: tuple[int, ...], dtype: torch.dtype, mask: torch.dtype = torch.bool) -> Callable[[], Tensor]:
    n_batch, n_heads, n_groups, n_queries, n_slots, dim, dim_v = shape
    q = meta(n_batch, n_queries, n_heads, dim, dtype=dtype).transpose(1, 2)
    k, v = (meta(n_batch, n_groups, n_slots, d, dtype=dtype) for d in (dim, dim_v))
    return lambda: masked_attention_triton(q, k, v, meta(n_batch, 1, n_queries, n_slots, dtype=mask), 0.1)


BF16 = torch.bfloat16
LAUNCHES = {
    "bf16 D128, 1 query of 4 heads": _launch((1, 32, 8, 1, 4096, 128, 128), BF16),
    "bf16 D128, 8 queries of 4 heads": _launch((8, 32, 8, 8, 2048, 128, 128), BF16),
    "fp16 D64, added mask": _launch((1, 16, 16, 1, 1024, 64, 64), torch.float16, torch.float16),
    "bf16 D256, 1 query of 2 heads": _launch((1, 8, 4, 1, 4096, 256, 256), BF16),
    "fp32 D64, 1 query": _launch((1, 12, 12, 1, 1024, 64, 64), torch.float32),
}
test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
