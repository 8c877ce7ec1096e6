"""Attention over ragged samples and token trees, against a loop over every visible key in float64."""

from __future__ import annotations

import pytest
import torch
from aot import compiles_without_spilling, meta
from torch import Tensor

from specdec.kernels.attention import tree_attention as module
from specdec.kernels.attention.tree_attention import tree_attention, tree_attention_triton
from specdec.kernels.attention.tree_mask import ancestor_words_reference, n_words

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("poisoned")]

NAN = float("nan")
TREES = {
    "root": [-1],
    "chain": list(range(-1, 5)),
    "bush": [-1, 0, 0, 0, 1, 1, 2, 4, 4, 6],
    "wide": [-1, *([0] * 69), *range(1, 30)],  # 99 nodes: two ancestor words
    "full": [(n - 1) // 2 for n in range(128)],
}


def depths_of(parents: list[int]) -> list[int]:
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths


def ancestors(parents: list[int], node: int) -> list[int]:
    found = []
    while node >= 0:
        found.append(node)
        node = parents[node]
    return found


class Case:
    """Arguments of the op, and what it should return.

    Args:
        counts: tokens of each sample. lengths: committed slots. trees: parents of each sample's uncommitted slots, or
            one list for all; None for causal text. first: the first token's node. nobody: tokens after the last sample.
        poison: (sample, slot) whose keys or values are NaN, besides all the slots that nothing has been written to.
    """

    def __init__(
        self, device: torch.device, counts: list[int], lengths: list[int], trees: list[list[int]] | None,
        n_heads: int = 2, n_groups: int = 1, dim: int = 16, dim_v: int | None = None, window: int = 0,
        softcap: float = 0.0, sinks: bool = False, first: int = 0, nobody: int = 2, n_slots: int | None = None,
        dtype: torch.dtype = torch.float32, poison_k: tuple[int, int] | None = None,
        poison_v: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        n_batch, n_tokens, dim_v = len(counts), sum(counts) + nobody, dim_v or dim
        used = [max(0, length + first + count) for length, count in zip(lengths, counts, strict=True)]
        n_slots = n_slots or max(used) + 5
        q = torch.randn(n_tokens, n_heads, dim)
        k_cache = torch.full((n_groups, n_batch, n_slots, dim), NAN)
        v_cache = torch.full((n_groups, n_batch, n_slots, dim_v), NAN)
        for b, n in enumerate(used):
            k_cache[:, b, :n], v_cache[:, b, :n] = torch.randn(n_groups, n, dim), torch.randn(n_groups, n, dim_v)
        for cache, where in ((k_cache, poison_k), (v_cache, poison_v)):
            if where is not None:
                cache[:, where[0], where[1], dim // 2] = NAN
        q, k_cache, v_cache = (x.to(dtype) for x in (q, k_cache, v_cache))
        sink = torch.randn(n_heads) if sinks else None
        starts = [sum(counts[:b]) for b in range(n_batch + 1)]
        node = [first + i for count in counts for i in range(count)] + [10**6] * nobody
        bits = depths = None
        if trees is not None:
            parents = torch.full((len(trees), max(len(tree) for tree in trees)), -1)
            depths = torch.zeros_like(parents)
            for b, tree in enumerate(trees):
                parents[b, : len(tree)], depths[b, : len(tree)] = torch.tensor(tree), torch.tensor(depths_of(tree))
            bits = ancestor_words_reference(parents)
        scale = dim**-0.5
        tensors = (q, k_cache, v_cache, *(torch.tensor(x) for x in (starts, lengths, node)), bits, depths)
        sink_tensor = None if sink is None else sink.to(device)
        self.args = (
            *(None if x is None else x.to(device) for x in tensors), window, scale, softcap, sink_tensor,
        )  # fmt: skip
        self.tolerance = (2e-6 if device.type == "cpu" else 1e-5) if dtype == torch.float32 else 2e-3

        # By definition: every visible key of every token, one at a time.
        self.expected = torch.zeros(n_tokens, n_heads, dim_v, dtype=torch.float64)
        for b, count in enumerate(counts):
            length, tree = lengths[b], None if trees is None else trees[b if len(trees) > 1 else 0]
            for t in range(starts[b], starts[b] + count):
                n = first + t - starts[b]
                nodes = range(n + 1) if tree is None else ancestors(tree, n)
                depth = range(n + 1) if tree is None else depths_of(tree)
                keys = [(s, s) for s in range(length)] + [(length + i, length + depth[i]) for i in nodes]
                slots = [s for s, p in keys if s >= 0 and not (window and length + depth[n] - p >= window)]
                for h in range(n_heads):
                    g = h // (n_heads // n_groups)
                    scores = k_cache[g, b, slots].double() @ q[t, h].double() * scale
                    if softcap:
                        scores = softcap * torch.tanh(scores / softcap)
                    if sink is not None:
                        scores = torch.cat([scores, sink[h : h + 1].double()])
                    if len(scores):
                        probs = scores.softmax(-1)[: len(slots)]
                        self.expected[t, h] = probs @ v_cache[g, b, slots].double()
        self.expected = self.expected.to(device)

    def check(self, out: Tensor | None = None) -> None:
        out = tree_attention(*self.args) if out is None else out
        assert out.dtype == self.args[0].dtype
        torch.testing.assert_close(out.double(), self.expected, atol=self.tolerance, rtol=self.tolerance)


def split_into(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(module, "n_splits", lambda *args: n)


@pytest.mark.parametrize(("window", "softcap", "sinks"), [(0, 0.0, False), (3, 0.0, True), (70, 2.0, False)])
@pytest.mark.parametrize("tree", ["root", "chain", "bush"])
def test_tree(device, tree, window, softcap, sinks):
    n = len(TREES[tree])
    Case(device, [n, 0, n], [77, 5, 0], [TREES[tree]], window=window, softcap=softcap, sinks=sinks).check()


@pytest.mark.parametrize(("tree", "window"), [("wide", 0), ("wide", 2), ("full", 5)])
def test_tree_of_two_words(device, tree, window):
    Case(device, [0, len(TREES[tree])], [9, 83], [TREES[tree]], window=window).check()


@pytest.mark.parametrize("window", [0, 2])
def test_each_sample_has_its_own_tree(device, window):
    trees = [TREES["chain"], TREES["bush"], [-1, 0, 0, 0, 0, 0]]
    Case(device, [6, 6, 6], [1, 63, 64], trees, n_heads=4, n_groups=2, window=window).check()


@pytest.mark.parametrize("window", [0, 3])
def test_a_draft_level_attends_to_all_earlier_levels(device, window):
    Case(device, [3, 3], [62, 10], [TREES["bush"]], first=4, window=window).check()
    Case(device, [40], [50], [TREES["wide"]], first=59, window=window).check()  # across the word's boundary


@pytest.mark.parametrize(("window", "softcap", "sinks"), [(0, 0.0, False), (1, 0.0, False), (4, 3.0, True)])
def test_text_without_a_tree_is_causal(device, window, softcap, sinks):
    Case(device, [33, 0, 1, 70], [90, 3, 0, 5], None, window=window, softcap=softcap, sinks=sinks, nobody=9).check()


@pytest.mark.parametrize("trees", [None, [TREES["chain"]]])
def test_text_that_ends_with_a_block(device, trees):
    """Just before, at and just after the end of a block of keys, in either block size."""
    Case(device, [5] * 7, [14, 15, 16, 30, 31, 32, 62], trees).check()
    Case(device, [5] * 4, [30, 62, 63, 64], trees, n_heads=4, dtype=torch.float16).check()
    Case(device, [1, 1], [31, 63], trees, dim=24, dim_v=40).check()


@pytest.mark.parametrize("window", [1, 4, 33, 10**6])
def test_window(device, window):
    Case(device, [10, 10], [300, 31], [TREES["bush"]], window=window).check()
    Case(device, [20], [301], None, window=window).check()
    Case(device, [5], [2], None, first=200, window=window).check()  # text in chunks: slots before `first` count too


@pytest.mark.parametrize(
    ("n_heads", "n_groups", "dim", "dim_v"),
    [(1, 1, 16, 16), (3, 1, 24, 24), (5, 1, 16, 32), (6, 1, 32, 16), (7, 1, 64, 24), (8, 1, 80, 80), (4, 2, 64, 64),
     (16, 1, 128, 128), (32, 1, 16, 16), (6, 3, 96, 64), (2, 2, 256, 256), (2, 1, 72, 256)],
)  # fmt: skip
def test_heads_and_head_dims(device, n_heads, n_groups, dim, dim_v):
    case = {"n_heads": n_heads, "n_groups": n_groups, "dim": dim, "dim_v": dim_v}
    Case(device, [4, 1], [40, 7], [TREES["chain"]], **case).check()


@pytest.mark.parametrize(
    ("counts", "trees", "n_heads", "dim", "window", "softcap"),
    [([10, 0, 2], [TREES["bush"]], 1, 64, 0, 0.0), ([10, 3], [TREES["bush"]], 4, 128, 5, 3.0),
     ([40, 31], None, 4, 64, 0, 0.0), ([6, 6], [TREES["chain"]], 3, 256, 0, 2.0), ([70], None, 2, 256, 30, 0.0)],
)  # fmt: skip
def test_half_precision(device, counts, trees, n_heads, dim, window, softcap):
    """Every tile size that float32 does not take."""
    lengths = [130, 3, 64][: len(counts)]
    half = {"dtype": torch.float16, "window": window, "softcap": softcap, "sinks": True}
    Case(device, counts, lengths, trees, n_heads=n_heads, dim=dim, **half).check()


@pytest.mark.gpu
@pytest.mark.parametrize("trees", [None, [TREES["full"]]])
def test_bfloat16(trees):
    """Triton's interpreter multiplies bfloat16 wrongly, so on a GPU only."""
    case = Case(torch.device("cuda"), [128, 5], [1000, 40], trees, 8, 2, 128, dtype=torch.bfloat16, window=500)
    case.tolerance = 2e-2
    case.check()


@pytest.mark.parametrize("splits", [2, 3, 20])
@pytest.mark.parametrize(("window", "sinks"), [(0, False), (0, True), (40, True)])
def test_splits(device, monkeypatch, splits, window, sinks):
    """More splits than key blocks too; texts of which most splits get nothing; tokens of nobody."""
    split_into(monkeypatch, splits)
    counts, lengths = ([10, 0, 2], [500, 7, 3]) if splits < 4 else ([1], [300])
    Case(device, counts, lengths, [TREES["bush"]], window=window, sinks=sinks).check()


def test_splits_by_shape(device):
    Case(device, [6], [600], [TREES["chain"]], n_slots=1024).check()
    Case(device, [6], [20], [TREES["chain"]], n_slots=1024, dim=64, dim_v=128).check()


def test_causal_text_in_splits(device, monkeypatch):
    split_into(monkeypatch, 2)
    Case(device, [40, 9], [100, 290], None, n_heads=3).check()


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("sinks", [False, True])
def test_who_sees_nothing_gets_zero(device, monkeypatch, splits, sinks):
    """The root of a draft before a text of one token has no slot, and nothing before it."""
    split_into(monkeypatch, splits)
    case = Case(device, [6, 6], [-1, 0], [TREES["chain"]], sinks=sinks)
    assert case.expected[0].eq(0).all() and case.expected[1:12].ne(0).all()
    case.check()
    Case(device, [4, 3], [-1, -1], None, window=2, sinks=sinks).check()
    Case(device, [3], [-1], [TREES["bush"]], first=1, window=2, sinks=sinks).check()


@pytest.mark.parametrize("n_heads", [1, 3])
def test_every_token_finds_its_sample(device, n_heads):
    """More samples than are searched at once, many of them empty; sizes around those of a tile."""
    generator = torch.Generator().manual_seed(n_heads)
    counts = torch.randint(0, 3, (140,), generator=generator).tolist()
    counts[100], counts[130], counts[135:] = 16 // n_heads, 17, [0] * 5
    Case(device, counts, [1] * 140, None, n_heads=n_heads, nobody=21).check()


@pytest.mark.parametrize("nobody", [0, 1, 7, 8, 9, 16])
@pytest.mark.parametrize("count", [7, 8, 9])
def test_tile_boundaries(device, count, nobody):
    Case(device, [count, count, 0], [2, 0, 0], None, nobody=nobody).check()


def test_nobody_has_tokens(device):
    Case(device, [0, 0], [3, 0], [TREES["bush"]], nobody=5).check()
    args = Case(device, [0], [3], None, nobody=0).args
    assert tree_attention(*args).shape == (0, 2, 16)


@pytest.mark.parametrize("layout", ["slots outside", "heads inside", "part of a larger cache", "wider values"])
def test_strides(device, layout):
    """Queries as a slice of a fused projection; caches whose slots are neighbours in memory or not."""
    case = Case(device, [10, 0, 4], [70, 1, 64], [TREES["bush"]], n_heads=4, n_groups=2, dim_v=32)
    q, *caches, starts, lengths, node, bits, depths = case.args[:8]
    fused = torch.full((q.shape[1], q.shape[0] + 3, 40), NAN, device=device)
    q_slice = fused.transpose(0, 1)[1 : 1 + q.shape[0], :, 8:24].copy_(q)
    if layout == "slots outside":
        caches = [cache.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for cache in caches]
    elif layout == "heads inside":
        caches = [cache.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for cache in caches]
    elif layout == "wider values":
        caches[1] = torch.nn.functional.pad(caches[1], (0, 8))[..., :-8]
    else:
        caches = [torch.nn.functional.pad(cache, (0, 0, 2, 30))[:, :, 2:-30] for cache in caches]
    assert not caches[1].is_contiguous()
    starts, lengths, node = (torch.stack([x, x + 99], -1)[:, 0] for x in (starts, lengths, node))
    bits, depths = (torch.stack([x, ~x], 1)[:, 0] for x in (bits, depths))
    case.check(tree_attention(q_slice, *caches, starts, lengths, node, bits, depths, *case.args[8:]))


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("which", ["poison_k", "poison_v"])
def test_a_branch_full_of_nan_stays_among_its_own(device, which, window):
    """NaN in node 2 of the bush: its descendants are 6 and 9, and no other token may see any of it."""
    for n_heads in (1, 8):
        case = Case(device, [10, 10], [70, 3], [TREES["bush"]], n_heads=n_heads, window=window, **{which: (0, 72)})
        out, ill = tree_attention(*case.args), case.expected.isnan()
        rows = ill.flatten(1).any(1)
        assert rows.nonzero().flatten().tolist() == [2, 6, 9]
        assert out[ill].isnan().all()
        torch.testing.assert_close(out[~rows].double(), case.expected[~rows], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("slot", [5, 66])
@pytest.mark.parametrize("which", ["poison_k", "poison_v"])
def test_nan_in_the_text_is_not_hidden(device, which, slot):
    """Neither in a block that everyone sees in full, nor in the last one, which needs masks."""
    case = Case(device, [10, 10], [70, 3], [TREES["bush"]], **{which: (0, slot)})
    out = tree_attention(*case.args)
    assert out[case.expected.isnan()].isnan().all() and case.expected[:10].isnan().any()
    torch.testing.assert_close(out[10:].double(), case.expected[10:], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("slot", [62, 67])
@pytest.mark.parametrize("which", ["poison_k", "poison_v"])
def test_nan_behind_the_window_is_forgotten(device, which, slot):
    """By those whose window has left it behind, beside others that still see it: in a block of keys that everyone sees
    but for the window, and in the last one."""
    case = Case(device, [10, 10], [70, 3], [TREES["bush"]], window=72 - slot, **{which: (0, slot)})
    out, ill = tree_attention(*case.args), case.expected.isnan()
    rows = ill.flatten(1).any(1)
    assert 0 < rows.sum() < 10
    assert out[ill].isnan().all()
    torch.testing.assert_close(out[~rows].double(), case.expected[~rows], atol=2e-6, rtol=2e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("splits", [1, 3])
def test_nan_and_infinity_survive_the_splits(device, monkeypatch, splits):
    split_into(monkeypatch, splits)
    case = Case(device, [2], [400], [TREES["bush"]], poison_k=(0, 350))
    assert tree_attention(*case.args)[:2].isnan().all()
    case = Case(device, [2], [400], [TREES["bush"]])
    case.args[1][:, :, 7] = float("inf")
    assert not tree_attention(*case.args)[:2].isfinite().any()


def test_large_scores(device):
    """The whole range of exp(), and sums that overflow without a running maximum."""
    keys, values = torch.linspace(-200, 90, 600), torch.linspace(1, 2, 600)
    k_cache, v_cache = torch.zeros(2, 1, 1, 600, 16, device=device).unbind(0)
    k_cache[0, 0, :, 0], v_cache[0, 0, :, 0] = keys, values
    q = torch.zeros(2, 1, 16, device=device)
    q[0, 0, 0], q[1, 0, 0] = 1, -1
    starts, lengths, node = (torch.tensor(x, device=device) for x in ([0, 2], [599], [0, 0]))
    out = tree_attention(q, k_cache, v_cache, starts, lengths, node, None, None, 0, 1.0, 0.0, None)
    for row, sign in ((0, 1), (1, -1)):
        expected = ((sign * keys).double().softmax(-1) * values.double()).sum()
        assert abs(out[row, 0, 0].item() - expected.item()) < 2e-6


@pytest.mark.parametrize("far", ["heads", "samples", "slots", "queries"])
def test_offsets_past_two_to_the_31(device, far):
    """Tensors spread over more than 2^31 elements, of which hardly any is touched; every stride fits 32 bits."""
    case = Case(device, [1, 1, 1], [70, 66, 3], None, n_heads=3, n_groups=3, dtype=torch.float16)
    q, k_cache, _, *rest = case.args
    n_slots, step = k_cache.shape[2], 2**30 + 64
    strides = {
        "heads": (step, n_slots * 16, 16, 1), "samples": (n_slots * 16, step, 16, 1), "slots": (16, 64, 2**25, 1),
        "queries": (step, 16, 1),
    }[far]  # fmt: skip
    x = q if far == "queries" else k_cache
    n_elements = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
    assert n_elements > 2**31 > max(strides)
    spread = x.new_empty(n_elements).as_strided(x.shape, strides).copy_(x)
    expected = tree_attention(q, k_cache, k_cache, *rest)
    out = tree_attention(spread, k_cache, k_cache, *rest) if x is q else tree_attention(q, spread, spread, *rest)
    torch.testing.assert_close(out, expected)


def test_clear_errors():
    q, cache = torch.zeros(3, 2, 16), torch.zeros(1, 1, 8, 16)
    rest = (torch.tensor([0, 3]), torch.tensor([4]), torch.arange(3), None, None, 0, 1.0, 0.0, None)
    with pytest.raises(ValueError, match="contiguous in their last dimension"):
        tree_attention_triton(q, cache.mT.contiguous().mT, cache, *rest)
    with pytest.raises(ValueError, match="differ in dtype"):
        tree_attention_triton(q, cache.half(), cache.half(), *rest)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 1, 8, 131072, 1), 64),  # one text: fill the chip
        ((32 * 16, 32, 8, 8192, 16), 2),
        ((8 * 16, 8, 8, 32768, 16), 8),
        ((2, 8, 8, 131072, 16), 33),  # of eight texts two at most are left
        ((16, 1, 8, 131072, 16), 64),
        ((16, 1, 8, 512, 16), 2),  # nothing to split
        ((4096, 1, 8, 131072, 32), 1),  # a prefill has tiles enough
        ((0, 3, 1, 0, 16), 1),
    ],
)  # fmt: skip
def test_number_of_splits(shape, expected):
    assert module.n_splits(*shape) == expected


def test_op_is_registered_properly(device):
    for case in (
        Case(device, [6, 0, 3], [9, 4, 0], [TREES["chain"]], window=2, sinks=True, dim_v=24),
        Case(device, [6, 2], [9, 4], None, softcap=2.0),
    ):
        torch.library.opcheck(tree_attention.op, case.args)


def test_traced_without_a_graph_break(device, monkeypatch):
    monkeypatch.undo()  # Dynamo would trace the poisoning
    case = Case(device, [6, 0, 3], [9, 4, 0], [TREES["chain"]], window=2, sinks=True)
    case.check(torch.compile(lambda *args: tree_attention(*args), backend="eager", fullgraph=True)(*case.args))


def launch(
    n_batch: int, n: int, n_heads: int, n_groups: int, dim: int, n_slots: int, dtype: torch.dtype = torch.bfloat16,
    is_tree: bool = True, window: int = 0, softcap: float = 0.0, sinks: bool = False,
) -> Tensor:  # fmt: skip
    q = meta(n_batch * n, n_heads, dim, dtype=dtype)
    cache = meta(n_groups, n_batch, n_slots, dim, dtype=dtype)
    bits, depths = (meta(1, n, n_words(n)), meta(1, n)) if is_tree else (None, None)
    return tree_attention_triton(
        q, cache, cache, meta(n_batch + 1), meta(n_batch), meta(n_batch * n), bits, depths, window, dim**-0.5, softcap,
        meta(n_heads, dtype=dtype) if sinks else None,
    )  # fmt: skip


LAUNCHES = {
    "bf16 D128 one token": lambda: launch(32, 1, 32, 8, 128, 8192, is_tree=False),
    "bf16 D128 tree of 16": lambda: launch(8, 16, 32, 8, 128, 32768),
    "bf16 D128 tree of 16, window": lambda: launch(8, 16, 32, 8, 128, 8192, window=4096),
    "bf16 D128 tree of 64, window": lambda: launch(8, 64, 32, 8, 128, 8192, window=4096),
    "bf16 D128 prefill": lambda: launch(4, 1024, 32, 8, 128, 8192, is_tree=False),
    "bf16 D64 tree of 8, window, sinks": lambda: launch(8, 8, 64, 8, 64, 8192, window=128, sinks=True),
    "bf16 D256 tree of 16, window, softcap": lambda: launch(8, 16, 16, 8, 256, 8192, window=4096, softcap=50.0),
    "bf16 D256 prefill, window, softcap": lambda: launch(
        4, 1024, 16, 8, 256, 8192, is_tree=False, window=4096, softcap=50.0
    ),
    "fp16 D128 tree of 16": lambda: launch(64, 16, 32, 8, 128, 2048, torch.float16),
    "fp32 D128 tree of 16": lambda: launch(1, 16, 32, 8, 128, 2048, torch.float32),
}

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
