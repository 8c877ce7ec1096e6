"""Appending to caches and committing accepted paths: rows are copied bit by bit, and nothing else changes."""

from __future__ import annotations

import random

import pytest
import torch
from aot import compiles_without_spilling, meta
from torch import Tensor

from specdec.kernels.cache import kv_cache
from specdec.kernels.cache.kv_cache import cache_table, kv_append_, kv_commit_, kv_commit_cpu_, kv_commit_reference_

pytestmark = pytest.mark.kernels

Caches = list[tuple[Tensor, Tensor]]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random bits: NaNs of all payloads, infinities and denormals included."""
    bits = torch.randint(-128, 128, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.int8)
    return bits.view(dtype).to(device)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    return torch.equal(a.contiguous().view(torch.int8), b.contiguous().view(torch.int8))


# kv_append_


def _assert_appends(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slot: Tensor) -> None:
    expected = [keys.clone(), values.clone()]
    for token, where in enumerate(slot.tolist()):
        for cache, new in zip(expected, (k, v), strict=True):
            cache[:, where // cache.shape[2], where % cache.shape[2]] = new[:, token]
    kv_append_(keys, values, k, v, slot)
    assert _same(keys, expected[0])
    assert _same(values, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "dim_v"), [(16, 16), (24, 7), (1, 5), (3, 40)])
def test_append_writes_its_slots_and_no_others(dim: int, dim_v: int, dtype: torch.dtype, device: torch.device) -> None:
    n_groups, n_batch, n_slots, n_tokens = 2, 3, 11, 13
    keys, values = (_noise((n_groups, n_batch, n_slots, d), dtype, device) for d in (dim, dim_v))
    k, v = (_noise((n_tokens, n_groups, d), dtype, device).transpose(0, 1) for d in (dim, dim_v))
    _assert_appends(keys, values, k, v, torch.randperm(n_batch * n_slots, device=device)[:n_tokens])


@pytest.mark.parametrize("n_tokens", [1, 7, 8, 9, 17])  # blocks of 8 tokens
@pytest.mark.parametrize("n_groups", [1, 3])
def test_append_takes_any_number_of_tokens(n_tokens: int, n_groups: int, device: torch.device) -> None:
    keys, values = (_noise((n_groups, 2, 10, 60), torch.float32, device) for _ in "kv")
    k, v = (_noise((n_groups, n_tokens, 60), torch.float32, device) for _ in "kv")
    _assert_appends(keys, values, k, v, torch.randperm(20, device=device)[:n_tokens])


def test_append_takes_any_strides(device: torch.device) -> None:
    keys, values = (_noise((2, 2, 9, d), torch.float16, device) for d in (8, 6))
    fused = _noise((5, 2, 14), torch.float16, device)  # keys and values out of one projection
    k, v = fused.transpose(0, 1).split((8, 6), -1)
    slot = torch.tensor([17, 3, 0, 9, 8], device=device)
    _assert_appends(keys, values, k, v, slot)
    every_other = _noise((2, 5, 28), torch.float16, device)[..., ::2]
    backward = torch.stack([slot, slot.flip(0)], 1)[:, 1]
    _assert_appends(keys, values, every_other[..., :8], every_other[..., 8:], backward)
    _assert_appends(keys, values, k[:1, :1].expand(2, 5, 8), v[:, :, :1].expand(2, 5, 6), slot)


def test_append_with_a_shared_scratch_slot(device: torch.device) -> None:
    keys, values = (_noise((2, 2, 5, 8), torch.bfloat16, device) for _ in "kv")
    k, v = (_noise((2, 6, 8), torch.bfloat16, device) for _ in "kv")
    old = [keys.clone(), values.clone()]
    slot = torch.tensor([4, 1, 4, 8, 4, 4], device=device)
    kv_append_(keys, values, k, v, slot)
    for cache, before, new in zip((keys, values), old, (k, v), strict=True):
        assert _same(cache[:, 0, 1], new[:, 1])
        assert _same(cache[:, 1, 3], new[:, 3])
        words, scratch = new.view(torch.int16)[:, slot == 4], cache.view(torch.int16)[:, 0, 4]
        assert (scratch[:, None] == words).any(1).all()
        assert _same(cache[:, 0, [0, 2, 3]], before[:, 0, [0, 2, 3]])
        assert _same(cache[:, 1, [0, 1, 2, 4]], before[:, 1, [0, 1, 2, 4]])


def test_append_beyond_31_bits(device: torch.device) -> None:
    n_slots, dim = 2**20, 1025
    keys = torch.empty(1, 2, n_slots, dim, dtype=torch.int8, device=device)
    values = torch.zeros(1, 2, n_slots, 1, dtype=torch.int8, device=device)
    slot = torch.tensor([2 * n_slots - 1, n_slots, 0], device=device)
    far = torch.empty(2**31 + dim, dtype=torch.int8, device=device).as_strided((1, 3, dim), (1, 2**30, 1))
    far.copy_(_noise((1, 3, dim), torch.int8, device))
    kv_append_(keys, values, far, far[..., :1], slot)
    for token, where in enumerate(slot.tolist()):
        assert torch.equal(keys[0, where // n_slots, where % n_slots], far[0, token])
        assert values[0, where // n_slots, where % n_slots, 0] == far[0, token, 0]
    keys, values = (_noise((3, 1, 4, dim), torch.int8, device) for _ in "kv")
    _assert_appends(keys, values, far.transpose(0, 1), far.transpose(0, 1), torch.tensor([2], device=device))


@pytest.mark.parametrize(("n_groups", "n_tokens"), [(2, 0), (0, 3)])
def test_append_nothing(n_groups: int, n_tokens: int, device: torch.device) -> None:
    keys, values = (_noise((n_groups, 1, 4, 8), torch.float32, device) for _ in "kv")
    k = _noise((n_groups, n_tokens, 8), torch.float32, device)
    _assert_appends(keys, values, k, k, torch.arange(n_tokens, device=device))


def test_append_refuses_what_does_not_fit(device: torch.device) -> None:
    keys, values = (torch.zeros(2, 1, 4, 8, device=device) for _ in "kv")
    k, slot = torch.zeros(2, 3, 8, device=device), torch.arange(3, device=device)
    for bad in (k[:, :2], k[..., :7], k[:1], k.half()):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            kv_append_(keys, values, k, bad, slot)


# kv_commit_


def _layers(
    n_slots: list[int], n_groups: int, n_batch: int, dims: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Caches:
    k, v = ([_noise((n_groups, n_batch, s, d), dtype, device) for s in n_slots] for d in dims)
    return list(zip(k, v, strict=True))


def _commit(caches: Caches, lengths: Tensor, path: Tensor, n_path: Tensor) -> None:
    keys, values = caches[0]
    sizes = (x.shape[3] * x.itemsize for x in (keys, values))
    kv_commit_(cache_table(caches), lengths, path, n_path, keys.shape[0], *sizes)


def _committed(caches: Caches, lengths: Tensor, path: Tensor, n_path: Tensor) -> Caches:
    """What committing should give, entry by entry."""
    old, new = ([(k.clone(), v.clone()) for k, v in caches] for _ in range(2))
    for before, after in zip(old, new, strict=True):
        for source, target in zip(before, after, strict=True):
            for b, (length, n) in enumerate(zip(lengths.tolist(), n_path.tolist(), strict=True)):
                for j in range(n):
                    target[:, b, length + j] = source[:, b, length + int(path[b, j])]
    return new


def _assert_same(caches: Caches, expected: Caches) -> None:
    for pair, expected_pair in zip(caches, expected, strict=True):
        for a, b in zip(pair, expected_pair, strict=True):
            assert _same(a, b)


def _paths(counts: list[int], n_places: int, n_nodes: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random accepted paths, [B, P] and [B], with garbage past their ends."""
    rng = random.Random(seed)
    garbage = [2**62, -(2**62), -1, 0, 10**6]
    rows = []
    for n in counts:
        nodes = [0, *sorted(rng.sample(range(1, n_nodes), n - 1))] if n else []
        rows.append(nodes + rng.choices(garbage, k=n_places - n))
    return torch.tensor(rows, device=device).view(len(counts), n_places), torch.tensor(counts, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(16, 16), (5, 24), (3, 1)])
def test_commit_moves_overlapping_paths(dims: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    lengths = torch.tensor([0, 1, 9, 20], device=device)
    for seed, counts in enumerate([[1, 4, 0, 3], [4, 2, 3, 4]]):
        caches = _layers([32, 40, 29], 3, 4, dims, dtype, device)
        path, n_path = _paths(counts, 4, 8, seed, device)
        expected = _committed(caches, lengths, path, n_path)
        _commit(caches, lengths, path, n_path)
        _assert_same(caches, expected)


@pytest.mark.parametrize("n_places", [1, 7, 8, 9, 16, 17])  # tiles of 8 entries
def test_commit_moves_long_paths(n_places: int, device: torch.device) -> None:
    counts = [n_places, max(n_places - 1, 1), n_places // 2]
    for n_nodes in (n_places + 1, 3 * n_places):  # nearly a chain; far apart
        caches = _layers([64], 2, 3, (8, 8), torch.float32, device)
        path, n_path = _paths(counts, n_places, n_nodes, n_nodes, device)
        lengths = torch.tensor([0, 11, 3], device=device)
        expected = _committed(caches, lengths, path, n_path)
        _commit(caches, lengths, path, n_path)
        _assert_same(caches, expected)


@pytest.mark.parametrize(("dim", "dim_v", "n_groups"), [(256, 256, 3), (20, 500, 5), (16384, 3, 2)])
def test_commit_moves_wide_rows(
    dim: int, dim_v: int, n_groups: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    caches = _layers([12, 13], n_groups, 2, (dim, dim_v), torch.float32, device)
    path, n_path = _paths([4, 3], 4, 7, 0, device)
    lengths = torch.tensor([5, 0], device=device)
    expected = _committed(caches, lengths, path, n_path)
    _commit(caches, lengths, path, n_path)
    _assert_same(caches, expected)


def test_commit_of_chains_and_of_nothing_changes_nothing(device: torch.device) -> None:
    caches = _layers([16, 17], 2, 3, (8, 4), torch.bfloat16, device)
    before = [(k.clone(), v.clone()) for k, v in caches]
    path = torch.tensor([[0, 1, 2, 3], [0, 1, 10**6, -5], [-7, 2**60, 0, 0]], device=device)
    lengths = torch.tensor([12, 3, 0], device=device)
    _commit(caches, lengths, path, torch.tensor([4, 2, 0], device=device))
    _commit(caches, lengths, path[:, :0], torch.zeros_like(lengths))
    _commit(caches, lengths[:0], path[:0], lengths[:0])
    _assert_same(caches, before)


def test_commit_takes_any_strides(device: torch.device) -> None:
    caches = _layers([24, 21], 2, 3, (8, 8), torch.float16, device)
    path, n_path = _paths([3, 1, 3], 3, 8, 3, device)
    lengths = torch.tensor([2, 9, 5], device=device)
    expected = _committed(caches, lengths, path, n_path)
    apart = torch.stack([lengths, n_path], 1)
    _commit(caches, apart[:, 0], path.T.contiguous().T, apart[:, 1])
    _assert_same(caches, expected)


def test_commit_beyond_31_bits(device: torch.device) -> None:
    n_slots, dim = 2**20, 1025
    keys = torch.empty(1, 2, n_slots, dim, dtype=torch.int8, device=device)
    values = torch.zeros(1, 2, n_slots, 1, dtype=torch.int8, device=device)
    row = _noise((dim,), torch.int8, device)
    keys[0, 1, n_slots - 2], values[0, 1, n_slots - 2] = row, 7
    lengths, n_path = torch.tensor([0, n_slots - 8], device=device), torch.tensor([0, 2], device=device)
    _commit([(keys, values)], lengths, torch.tensor([[0, 6], [0, 6]], device=device), n_path)
    assert torch.equal(keys[0, 1, n_slots - 7], row)
    assert values[0, 1, :, 0].nonzero()[:, 0].tolist() == [n_slots - 7, n_slots - 2]


def test_what_is_defined_and_what_runs_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_commit_cpp", lambda: None)
    cpu = torch.device("cpu")
    for seed in range(3):
        caches = _layers([30, 24], 2, 3, (5, 8), torch.bfloat16, cpu)
        again = [(k.clone(), v.clone()) for k, v in caches]
        path, n_path = _paths([5, 2, 0], 5, 9, seed, cpu)
        lengths = torch.tensor([3, 0, 14])
        expected = _committed(caches, lengths, path, n_path)
        kv_commit_reference_(caches, lengths, path, n_path)
        _assert_same(caches, expected)
        kv_commit_cpu_(cache_table(again), lengths, path, n_path, 2, 10, 16)
        _assert_same(again, expected)


def test_commit_refuses_what_does_not_fit(device: torch.device) -> None:
    caches = _layers([16], 2, 3, (8, 8), torch.float32, device)
    lengths, path = torch.zeros(3, dtype=torch.int64, device=device), torch.zeros(2, 4).long().to(device)
    with pytest.raises(ValueError, match=r"lengths are of 3 samples, path of 2 and n_path of 3"):
        _commit(caches, lengths, path, lengths)
    with pytest.raises(ValueError, match=r"table is \[L, 3\], not \[1, 2\]"):
        kv_commit_(cache_table(caches)[:, :2], lengths[:2], path, lengths[:2], 2, 32, 32)
    wide = torch.zeros(2, 3, 16, 16, device=device)
    with pytest.raises(ValueError, match="contiguous"):
        cache_table([(wide[..., :8], wide[..., 8:])])
    with pytest.raises(ValueError, match="aligned"):
        cache_table([(wide.flatten()[1:-15].view(-1, 1, 1, 8),) * 2])


# Both as ops


def test_are_well_formed_ops(device: torch.device) -> None:
    keys, values = (torch.randn(2, 3, 8, d, device=device) for d in (4, 6))
    k, v = (torch.randn(2, 3, d, device=device) for d in (4, 6))
    torch.library.opcheck(kv_append_.op, (keys, values, k, v, torch.tensor([0, 9, 5], device=device)))
    lengths, n_path = (torch.tensor(x, device=device) for x in ([1, 3, 0], [2, 1, 2]))
    path = torch.tensor([[0, 2], [0, 1], [0, 3]], device=device)
    torch.library.opcheck(kv_commit_.op, (cache_table([(keys, values)] * 2), lengths, path, n_path, 2, 16, 24))


def test_a_graph_keeps_the_commit(device: torch.device) -> None:
    caches = _layers([16, 12], 2, 1, (8, 4), torch.float32, device)
    lengths, path, n_path = (torch.tensor(x, device=device) for x in ([4], [[0, 2, 3]], [3]))
    expected = _committed(caches, lengths, path, n_path)

    def step(table: Tensor, lengths: Tensor) -> Tensor:
        kv_commit_(table, lengths, path, n_path, 2, 32, 16)
        return lengths + 1

    torch.compile(step, fullgraph=True, backend="aot_eager")(cache_table(caches), lengths)
    _assert_same(caches, expected)


def _append(n_tokens: int, n_groups: int, dim: int, dim_v: int, dtype: torch.dtype = torch.bfloat16) -> None:
    caches = (meta(n_groups, 32, 32768, d, dtype=dtype) for d in (dim, dim_v))
    new = (meta(n_tokens, n_groups, d, dtype=dtype).transpose(0, 1) for d in (dim, dim_v))
    kv_cache.kv_append_triton_(*caches, *new, meta(n_tokens))


def _commit_launch(n_batch: int, n_places: int, n_groups: int, k_bytes: int, v_bytes: int) -> None:
    numbers = meta(32, 3), meta(n_batch), meta(n_batch, n_places), meta(n_batch)
    kv_cache.kv_commit_triton_(*numbers, n_groups, k_bytes, v_bytes)


LAUNCHES = {
    "append, bf16, D 128": lambda: _append(512, 8, 128, 128),
    "append, bf16, D 576 and 512": lambda: _append(17, 1, 576, 512),
    "append, fp32, D 80": lambda: _append(16, 32, 80, 80, torch.float32),
    "commit, bf16, D 128": lambda: _commit_launch(32, 16, 8, 256, 256),
    "commit, bf16, D 576 and 512": lambda: _commit_launch(8, 6, 1, 1152, 1024),
    "commit, fp32, D 256": lambda: _commit_launch(1, 6, 4, 1024, 1024),
}

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
