"""The attention that also writes the cache: in C++ and as Triton kernels, against the definition."""

from __future__ import annotations

import math
import re

import pytest
import torch
from aot import _compiling, compiles_without_spilling, meta
from torch import Tensor

from specdec.engine.packing import Nodes
from specdec.engine.tree import TokenTree
from specdec.kernels.attention import tree_attention as module
from specdec.kernels.attention.ragged_attention import (
    ragged_attention,
    ragged_attention_cpu,
    ragged_attention_reference,
    ragged_attention_triton,
)
from specdec.kernels.attention.tree_mask import n_words
from specdec.kernels.cache.kv_cache import cache_table
from specdec.kernels.library import runs_triton

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("poisoned_outputs")]

TREES = {
    "root": TokenTree.chain(0),
    "chain": TokenTree.chain(5),
    "bush": TokenTree((-1, 0, 0, 0, 1, 1, 2, 4, 4, 6)),
    "wide": TokenTree((-1, *([0] * 69), *range(1, 30))),  # 99 nodes: two ancestor words
}


@pytest.fixture
def poisoned_outputs(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, math.nan))


class Case:
    """Arguments of the op over caches that hold NaN wherever nothing has been written.

    Args:
        counts: tokens of each sample. lengths: committed slots. tree: name of the tree that all share.
        first: the first token's node; those before it are in the cache already. nobody: tokens after the last sample.
        spare: slots past the longest text.
    """

    def __init__(
        self, device: torch.device, counts: list[int], lengths: list[int], tree: str = "bush", n_heads: int = 4,
        n_groups: int = 2, dim: int = 16, window: int = 0, softcap: float = 0.0, first: int = 0, nobody: int = 2,
        spare: int = 5, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        n_tokens, rows = sum(counts) + nobody, max(counts)
        n_slots = max(lengths) + first + rows + spare
        bits, depths = TREES[tree].tensors(device)
        length, count = torch.tensor([lengths, counts], device=device)
        token = torch.arange(n_tokens, device=device)
        nodes = Nodes.packed(length, count, token, rows, n_slots, bits, depths, first)
        caches = torch.full((2, n_groups, len(counts), n_slots, dim), math.nan)
        for b, n in enumerate(lengths):
            caches[:, :, b, : max(n + first, 0)] = torch.randn(2, n_groups, max(n + first, 0), dim)
        self.q, *new = (torch.randn(n_tokens, heads, dim).to(device, dtype) for heads in (n_heads, n_groups, n_groups))
        self.new, self.caches = new, list(caches.to(device, dtype))
        self.where = nodes.slot, nodes.starts, length, nodes.node, bits, depths
        self.rest = window, dim**-0.5, softcap
        self.tolerance = 2e-3 if dtype == torch.float16 else 2e-6 if device.type == "cpu" else 1e-5

    @property
    def args(self) -> tuple[object, ...]:
        """The caches must outlive these, which know their addresses only."""
        return (
            self.q, *self.new, cache_table([(self.caches[0], self.caches[1])])[0], *self.where,
            self.caches[0].shape[2], *self.rest,
        )  # fmt: skip

    def check(self) -> None:
        """The output, and every slot of the caches, written or not."""
        expected_caches = [cache.clone() for cache in self.caches]
        expected = ragged_attention_reference(self.q, *self.new, *expected_caches, *self.where, *self.rest)
        assert expected.isfinite().all()
        out = ragged_attention(*self.args)
        torch.testing.assert_close(out, expected, atol=self.tolerance, rtol=self.tolerance)
        for cache, wanted in zip(self.caches, expected_caches, strict=True):
            torch.testing.assert_close(cache, wanted, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("window", [0, 3])
def test_a_tree_a_sample(window: int, device: torch.device) -> None:
    """What each sample sees is by its own tree: as by each tree alone, which all share."""
    case = Case(device, [10, 6, 10], [20, 0, 7], window=window)
    bits, depths = case.where[-2:]
    chain = TokenTree.chain(9).tensors(device)
    case.where = *case.where[:-2], torch.stack([bits, *chain[:1], bits]), torch.stack([depths, chain[1], depths])
    case.check()
    out = ragged_attention(*case.args)
    for trees, rows in ((bits, depths), [*range(10), *range(16, 26)]), (chain, range(10, 16)):
        case.where = *case.where[:-2], *trees
        alone = ragged_attention(*case.args)
        torch.testing.assert_close(out[list(rows)], alone[list(rows)], atol=0, rtol=0)
        others = [row for row in range(26) if row not in rows]
        assert not torch.equal(out[others], alone[others])


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (7, 0.0), (0, 5.0), (3, 2.0), (70, 0.0)])
@pytest.mark.parametrize("tree", TREES)
def test_tree(device, tree, window, softcap):
    n = len(TREES[tree])
    Case(device, [n, 0, 1, n], [77, 5, 30, 0], tree, window=window, softcap=softcap).check()


@pytest.mark.parametrize(
    ("n_heads", "n_groups", "dim"),
    [(1, 1, 64), (4, 2, 64), (3, 1, 24), (6, 3, 96), (5, 1, 80), (8, 1, 128), (16, 1, 128), (16, 16, 64), (2, 1, 256)],
)
def test_heads_and_head_dims(device, n_heads, n_groups, dim):
    Case(device, [4, 0, 2], [40, 3, 7], "chain", n_heads, n_groups, dim).check()


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 3.0)])
@pytest.mark.parametrize(("n_heads", "dim"), [(4, 64), (16, 128), (6, 20), (4, 256)])
def test_half_precision(device, n_heads, dim, window, softcap):
    """In Triton only; the C++ kernel says that it does not do it, for it would read past the end."""
    case = Case(device, [10, 0, 2], [130, 3, 64], "bush", n_heads, 2, dim, window, softcap, dtype=torch.float16)
    if runs_triton(case.q):
        case.check()
    else:
        with pytest.raises(ValueError, match="float32"):
            ragged_attention(*case.args)


@pytest.mark.parametrize("window", [0, 3])
def test_a_draft_level_attends_to_all_earlier_levels(device, window):
    Case(device, [3, 3], [62, 10], first=4, window=window).check()
    Case(device, [40], [50], "wide", first=59, window=window).check()  # across the word's boundary


def test_who_sees_nothing_gets_zero(device):
    """The root of a draft before a text of one token has no slot: it is written to scratch."""
    case = Case(device, [6, 6], [-1, 0], "chain", nobody=0)
    case.check()
    assert ragged_attention(*case.args)[0].eq(0).all()
    assert case.caches[0][:, 0, -1].isfinite().all()


@pytest.mark.parametrize("nobody", [0, 5])
@pytest.mark.parametrize("counts", [[0, 0], [0, 1], [9, 0]])
def test_few_tokens_or_none(device, counts, nobody):
    Case(device, counts, [3, 0], nobody=nobody).check()


def test_splits(device, monkeypatch):
    """A capacity by which the keys are split, and of which the texts fill little."""
    found = []
    n_splits = module.n_splits
    monkeypatch.setattr(module, "n_splits", lambda *args: found.append(n_splits(*args)) or found[-1])
    for window in (0, 40):
        Case(device, [10, 0, 2], [500, 7, 3], window=window, spare=1024).check()
    if runs_triton(torch.empty(0, device=device)):
        assert found == [5, 1]


def test_a_sample_does_not_depend_on_those_beside_it(device):
    together = Case(device, [4, 0, 10, 1], [3, 9, 0, 20], window=4)
    out, start = ragged_attention(*together.args), 0
    for b, count in enumerate([4, 0, 10, 1]):
        own = slice(start, start + count)
        alone = Case(device, [count], [[3, 9, 0, 20][b]], window=4, nobody=0)
        alone.q, alone.new = together.q[own], [x[own] for x in together.new]
        fresh = Case(device, [4, 0, 10, 1], [3, 9, 0, 20], window=4).caches
        n_slots = alone.caches[0].shape[2]
        alone.caches = [x[:, b : b + 1, :n_slots].contiguous() for x in fresh]
        torch.testing.assert_close(ragged_attention(*alone.args), out[own], atol=0, rtol=0)
        for mine, other in zip(alone.caches, together.caches, strict=True):
            torch.testing.assert_close(mine[:, 0], other[:, b, :n_slots], atol=0, rtol=0, equal_nan=True)
        start += count


@pytest.mark.parametrize(("n_heads", "n_groups", "dim"), [(1, 1, 64), (3, 1, 32), (4, 2, 24)])
def test_a_token_does_not_depend_on_those_after_it(device, n_heads, n_groups, dim):
    """However many rows go through the C++ kernel together, each has its one order of summation."""

    def attend(count):
        case = Case(device, [count], [37], "chain", n_heads, n_groups, dim, nobody=0)
        case.q, case.new = whole.q[:count], [x[:count] for x in whole.new]
        case.caches = [x[:, :, : case.caches[0].shape[2]].clone() for x in whole.caches]
        return ragged_attention(*case.args)

    whole = Case(device, [6], [37], "chain", n_heads, n_groups, dim, nobody=0)
    tolerance = whole.tolerance if runs_triton(whole.q) else 0
    together = attend(6)
    for count in range(1, 6):
        torch.testing.assert_close(attend(count), together[:count], atol=tolerance, rtol=tolerance)


def test_threads_share_the_work_and_nothing_else():
    """Enough of it for the C++ kernel to wake them."""
    case = Case(torch.device("cpu"), [10, 3, 10], [2000, 90, 1500], n_heads=8, n_groups=4)
    before, outs = torch.get_num_threads(), []
    for n_threads in (1, 3, 3, 3, before):
        torch.set_num_threads(n_threads)
        outs.append(ragged_attention_cpu(*case.args))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_nan_stays_in_its_branch():
    """In C++, where a weight of zero keeps a value out, and a query that is NaN is not one that sees nothing."""
    case = Case(torch.device("cpu"), [10], [20], nobody=0)
    clean, sick = ragged_attention_cpu(*case.args), 1
    for x in case.new:
        x[sick] = math.nan
    out = ragged_attention_cpu(*case.args)
    below = torch.tensor([sick, 4, 5, 7, 8])  # of the bush
    assert out[below].isnan().all()
    others = [node for node in range(10) if node not in below]
    assert torch.equal(out[others], clean[others])

    case = Case(torch.device("cpu"), [10], [20], nobody=0)
    case.q[3] = math.nan
    out = ragged_attention_cpu(*case.args)
    assert out[3].isnan().all()
    assert torch.equal(out[:3], clean[:3])


@pytest.mark.parametrize("window", [7, 70])
def test_a_nan_behind_the_window_is_forgotten(window):
    """In C++: by the rows behind whose windows it is, and by no other."""
    case = Case(torch.device("cpu"), [10, 3], [200, 90], window=window, nobody=0)
    clean = ragged_attention_cpu(*case.args)
    position = case.where[2].repeat_interleave(case.where[1].diff()) + case.where[5][case.where[3]]
    for cache in case.caches:
        cache[:, 0, : 200 - window + 3] = math.nan  # the root still sees two of them, its children one
    out = ragged_attention_cpu(*case.args)
    sees = (torch.arange(13) < 10) & (position < 202)
    assert sees.sum() == 4
    assert out[sees].isnan().all()
    assert torch.equal(out[~sees], clean[~sees])


def test_large_scores_neither_overflow_nor_lose_the_small(device):
    """exp() over its whole range, against float64."""
    case = Case(device, [1], [600], "root", 1, 1)
    keys, values = torch.linspace(-200, 90, 600), torch.linspace(1, 2, 600)
    for cache, column in zip(case.caches, (keys, values), strict=True):
        cache.zero_()
        cache[0, 0, :600, 0] = column
    case.q.zero_()[..., 0] = 4  # times the scale, 1
    case.new[0].fill_(-300)
    case.check()
    expected = (keys.double().softmax(-1) * values.double()).sum()
    assert abs(ragged_attention(*case.args)[0, 0, 0].item() - expected.item()) < 2e-6


def test_strange_arguments_are_refused(device):
    case = Case(device, [3], [4])
    q, k, *rest = case.args
    for wrong in (k.double(), k.mT.contiguous().mT):
        with pytest.raises(ValueError, match="contiguous, and of one dtype"):
            ragged_attention(q, wrong, *rest)


def test_op_is_registered_properly(device):
    case = Case(device, [6, 0, 3], [9, 4, 0], window=2)
    torch.library.opcheck(ragged_attention.op, case.args)


def test_a_grown_cache_needs_no_new_graph(device, monkeypatch):
    monkeypatch.undo()  # Dynamo would trace the poisoning
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=record, fullgraph=True)
    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor, keys: Tensor, *where: Tensor) -> Tensor:
        return ragged_attention(q, k, v, table, *where, keys.shape[2], 0, 0.25, 0.0)

    for spare in (5, 261, 517):
        case = Case(device, [6, 0, 3], [9, 4, 0], spare=spare)
        torch._dynamo.mark_dynamic(case.caches[0], 2)
        table = cache_table([(case.caches[0], case.caches[1])])[0]
        out = attend(case.q, *case.new, table, case.caches[0], *case.where)
        assert case.caches[1][:, 0, 9 : 9 + 6].isfinite().all()
        torch.testing.assert_close(out, ragged_attention(*case.args))
    assert len(graphs) == 1


def launch(
    n_batch: int, n: int, n_heads: int, n_groups: int, dim: int, n_slots: int, dtype: torch.dtype = torch.bfloat16,
    window: int = 0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    q, new = (meta(n_batch * n, heads, dim, dtype=dtype) for heads in (n_heads, n_groups))
    where = meta(n_batch * n), meta(n_batch + 1), meta(n_batch), meta(n_batch * n), meta(n, n_words(n)), meta(n)
    return ragged_attention_triton(q, new, new, meta(3), *where, n_slots, window, dim**-0.5, softcap)


LAUNCHES = {
    "bf16 D128 root": lambda: launch(32, 1, 32, 8, 128, 8192),
    "bf16 D128 tree of 16": lambda: launch(8, 16, 32, 8, 128, 32768),
    "bf16 D128 tree of 64, window": lambda: launch(8, 64, 32, 8, 128, 8192, window=4096),
    "bf16 D64 tree of 6": lambda: launch(1, 6, 32, 8, 64, 2048),
    "bf16 D256 tree of 16, window, softcap": lambda: launch(
        8, 16, 16, 8, 256, 8192, window=4096, softcap=50.0
    ),
    "fp16 D128 tree of 16": lambda: launch(64, 16, 32, 8, 128, 2048, torch.float16),
    "fp32 D128 tree of 16": lambda: launch(1, 16, 32, 8, 128, 2048, torch.float32),
}  # fmt: skip


@pytest.mark.aot
def test_rows_are_read_and_written_16_bytes_at_a_time():
    """An address out of a table has no alignment of its own."""
    with _compiling(90) as kernels:
        launch(8, 16, 32, 8, 128, 32768)
    ptx = {kernel.metadata.name: kernel.asm["ptx"] for kernel in kernels}
    assert set(re.findall(r"st\.global\.\S+", ptx["_append_kernel"])) == {"st.global.v4.b32"}
    reads = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (\w+)", ptx["_tree_attention_kernel"])
    assert set(reads) == {"0x8", "0x10"}  # words of the tree; keys and values
    assert reads.count("0x10") == 64


test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
