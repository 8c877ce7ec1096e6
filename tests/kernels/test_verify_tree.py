"""Tree verification makes the decisions of its definition from the same noise, on every path and for any arguments."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from aot import compiles_without_spilling, meta
from rows import OFF, Knobs, far_apart
from trees import RAGGED, RULES, WALKS, check_decisions, strided, tree_case

from specdec.engine.tree import TokenTree
from specdec.kernels.library import jit, runs_triton, tl
from specdec.kernels.verify.tree_rules import weigh_children, weigh_children_reference
from specdec.kernels.verify.verify_tree import verify_tree, verify_tree_reference, verify_tree_triton

pytestmark = pytest.mark.kernels

TRUNCATED: Knobs = (1.2, 0.9, 0.02, 20)
BINARY = TokenTree.from_widths(2, 2, 2)
WIDE = TokenTree.from_widths(4, 2, 2, 1)


@WALKS
@pytest.mark.parametrize(
    ("tree", "n_batch", "vocab", "size", "dtype", "setting"),
    [
        (TokenTree.chain(1), 3, 1, 1, torch.float32, TRUNCATED),
        (TokenTree.chain(0), 3, 97, 5, torch.float32, TRUNCATED),
        (TokenTree.chain(3), 6, 97, 5, torch.float32, OFF),
        (TokenTree.chain(4), 5, 97, 64, torch.bfloat16, TRUNCATED),
        (BINARY, 8, 97, 97, torch.float16, OFF),
        (BINARY, 6, 13_000, 300, torch.float32, (0.5, 1.0, 0.0, 0)),
        (RAGGED, 8, 40, 3, torch.bfloat16, (0.7, 1.0, 0.0, 0)),
        (RAGGED, 8, 4097, 8, torch.float32, TRUNCATED),
        (WIDE, 5, 60, 16, torch.bfloat16, (0.7, 0.95, 0.0, 0)),
        (TokenTree((-1, *[0] * 20, *[1] * 30, *[2] * 30)), 2, 97, 64, torch.float32, OFF),
    ],
)
def test_decisions_are_those_of_the_definition(
    tree: TokenTree, n_batch: int, vocab: int, size: int, dtype: torch.dtype, setting: Knobs, sequence: bool,
    device: torch.device, poisoned: None,
) -> None:  # fmt: skip
    """Every node has a rule of its own, and samples have some of the levels only."""
    case = tree_case(tree, n_batch, vocab, size, seed=len(tree) + vocab, dtype=dtype, setting=setting, cut=True)
    check_decisions(case, sequence, device)


@WALKS
@RULES
def test_decisions_of_every_rule(n_hubs: int, sequence: bool, device: torch.device) -> None:
    """Paths end at the root, at inner nodes, among them ones whose children have failed, and at leaves."""
    whole = tree_case(BINARY, 16, 30, 6, n_hubs, seed=2, spread=0.7)
    path, _, _, ids, _ = check_decisions(whole, sequence, device)
    ends = set(path[:, -1].tolist())
    assert 0 in ends
    assert ends & {1, 2, 3, 4, 5, 6}
    assert ends & set(range(7, 15))
    assert ((ids >= 0).any(1) == (path[:, -1] < 7)).all()
    check_decisions(tree_case(RAGGED, 6, 30, 6, n_hubs, seed=3, cut=True), sequence, device)


@jit
def _weigh_kernel(n_hubs, inputs_ptr, places_ptr, weights_ptr, out_ptr, C: tl.constexpr):
    i, i_c, i_k = tl.program_id(0), tl.arange(0, C), tl.arange(0, 8)
    p_inputs, p_out = inputs_ptr + i * (2 + 2 * C), out_ptr + i * (2 + C)
    places = tl.load(places_ptr + i * 8 + i_k)
    target_probs, draft_probs = tl.load(p_inputs + 2 + i_c), tl.load(p_inputs + 2 + C + i_c)
    weights, exit_weight, residual, scale = weigh_children(
        n_hubs, tl.load(p_inputs), target_probs, tl.load(p_inputs + 1), draft_probs, places, 2, 6
    )
    tl.store(weights_ptr + i * 8 + i_k, weights)
    tl.store(p_out, exit_weight)
    tl.store(p_out + 1, scale)
    tl.store(p_out + 2 + i_c, residual)


@RULES
def test_weights_of_the_kernel_are_those_of_the_definition(n_hubs: int, device: torch.device) -> None:
    """Of random nodes; decisions would show a small difference rarely."""
    if not runs_triton(torch.empty(0, device=device)):
        pytest.skip("Triton kernels run on a GPU or in the interpreter")
    n, size = 40, 16
    case = tree_case(TokenTree.chain(1), n, 20, size, spread=2.0)
    draft_probs, ids = case.support_probs[:, 0], case.support_ids[:, 0]
    target_probs = case.logits[::2].softmax(-1).gather(1, ids)
    outside = 1 - (target_probs * (draft_probs > 0)).sum(-1)
    generator = torch.Generator().manual_seed(n_hubs)
    weight = torch.where(torch.arange(n) % 2 == 0, 1.0, torch.rand(n, generator=generator) + 0.05).clamp(max=1)
    shuffled = torch.where(draft_probs > 0, torch.rand(n, size, generator=generator), -1)
    places = shuffled.topk(4).indices
    is_drafted = (draft_probs.gather(1, places) > 0) & (torch.rand(n, 4, generator=generator) < 0.7)
    places = torch.where(is_drafted, places, -1)
    expected = weigh_children_reference(n_hubs, weight, target_probs, outside, draft_probs, places)
    inputs = torch.cat([weight[:, None], outside[:, None], target_probs, draft_probs], 1).to(device)
    among_others = torch.nn.functional.pad(places, (2, 2)).to(device)
    weights, out = torch.empty(n, 8, device=device), torch.empty(n, 2 + size, device=device)
    _weigh_kernel[(n,)](n_hubs, inputs, among_others, weights, out, C=size)
    for got, want in zip((weights[:, 2:6], out[:, 0], out[:, 2:], out[:, 1]), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)
    assert (weights[:, [0, 1, 6, 7]] == 0).all()


def test_long_chains(device: torch.device) -> None:
    """Every draft is the last entry of its support, almost certain there; then certain to the target."""
    case = tree_case(TokenTree.chain(127), 3, 50, 20, 0, seed=1)
    case.support_ids[:] = (torch.arange(127)[:, None] + torch.arange(20, 0, -1)) % 50
    case.support_probs[:] = torch.tensor([*[0.001] * 19, 0.981])
    case.places[:] = 19
    rows, drafts = case.logits.view(3, 128, 50)[:, :-1], case.support_ids[..., -1:]
    rows.scatter_(2, drafts, 7.0)
    case.set_logits(case.logits)
    for sequence in (False, True):
        n_accepted = check_decisions(case, sequence, device)[1]
        assert len(set(n_accepted.tolist())) > 1
    rows.scatter_(2, drafts, 40.0)
    case.set_logits(case.logits)
    case.n_nodes[:] = torch.tensor([128, 101, 0])
    assert check_decisions(case, True, device)[1].tolist() == [127, 100, 0]


@WALKS
def test_nodes_have_supports_of_their_own(sequence: bool, device: torch.device) -> None:
    """The next node's first entry is this one's draft; there the target rules it out, and might take the others."""
    case = tree_case(TokenTree.chain(2), 12, 30, 3, 0)
    rows = case.logits.view(12, 3, 30)
    rows[:, 0, 7] = rows[:, 0].logsumexp(-1)
    rows[:, 1] = -math.inf
    rows[:, 1, [1, 2, 4]] = 0.0
    case.set_logits(case.logits)
    case.support_ids[:] = torch.tensor([[1, 2, 7], [7, 3, 4]])
    case.support_probs[:] = torch.tensor([[0.3, 0.3, 0.4], [1.0, 0.0, 0.0]])
    case.places[:] = torch.tensor([2, 0])
    assert set(check_decisions(case, sequence, device)[1].tolist()) == {1}


@WALKS
def test_strides_do_not_matter(sequence: bool, device: torch.device, poisoned: None) -> None:
    case = tree_case(TokenTree.from_widths(2, 1), 4, 300, 5, seed=1, setting=TRUNCATED, spread=0.5).on(device)
    expected = verify_tree(*case.arguments(sequence))
    assert expected[1].max() > 0
    apart = case.map(strided)
    names = [field.name for field in fields(case) if field.name != "depth"]
    for other in (*(replace(case, **{name: getattr(apart, name)}) for name in names), apart):
        got = verify_tree(*other.arguments(sequence))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_rows_beyond_31_bits(device: torch.device) -> None:
    case = tree_case(TokenTree.chain(2), 1, 5, 5, 0, seed=9, dtype=torch.bfloat16).on(device)
    case.starts += 1  # the second node's row is the third
    case.support_probs[:, 0] = 1e-6  # accepted
    expected = verify_tree(*case.arguments(False))
    got = verify_tree(*replace(case, logits=far_apart(case.logits)).arguments(False))
    assert got[1] == 1
    assert got[4].sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@WALKS
def test_samples_bring_as_many_rows_as_they_have_nodes(sequence: bool, device: torch.device) -> None:
    """Packed rows give what a grid gives; a sample without rows disturbs nobody."""
    case = tree_case(TokenTree.from_widths(2, 2), 12, 60, 8, 0, spread=0.7)
    n_rows = case.n_nodes = torch.tensor([1, 7, 3, 2, 6, 0, 1, 5, 7, 2, 4, 0])
    expected = verify_tree_reference(*case.arguments(sequence))
    own = torch.cat([7 * b + torch.arange(n) for b, n in enumerate(n_rows.tolist())])
    rows = {name: getattr(case, name)[own] for name in ("logits", "log_total", "threshold", "first")}
    packed = replace(case, **rows, starts=torch.nn.functional.pad(n_rows.cumsum(0), (1, 0)))
    packed.n_nodes = torch.where(n_rows > 0, n_rows, 7)
    path, n_accepted, row, *exit_law = check_decisions(packed, sequence, device)
    present = n_rows > 0
    assert torch.equal(own[row][present], expected[2][present])
    for a, b in zip((path, n_accepted, *exit_law), (*expected[:2], *expected[3:]), strict=True):
        assert torch.equal(a[present], b[present])
    assert set(path[:, -1].tolist()) >= {0, 1, 3}


@pytest.mark.parametrize("tree", [TokenTree.chain(0), TokenTree.chain(2)])
def test_no_samples(tree: TokenTree, device: torch.device) -> None:
    case = tree_case(tree, 2, 7, 3).on(device)
    names = ("places", "n_nodes", "support_ids", "support_probs", "n_hubs", "seed", "position")
    none = replace(case, **{name: getattr(case, name)[:0] for name in names}, starts=case.starts[:1])
    shapes = [tuple(x.shape) for x in verify_tree(*none.arguments(True))]
    assert shapes == [(0, tree.depth + 1), (0,), (0,), (0, 3), (0, 3)]


def test_is_a_well_formed_op_and_traces(device: torch.device) -> None:
    arguments = tree_case(TokenTree.from_widths(2, 1), 3, 20, 4, setting=TRUNCATED).on(device).arguments(True)
    torch.library.opcheck(verify_tree.op, arguments)
    traced = torch.compile(lambda *x: verify_tree(*x), fullgraph=True, dynamic=True, backend="aot_eager")
    for a, b in zip(traced(*arguments), verify_tree(*arguments), strict=True):
        assert torch.equal(a, b)


def _launch(n_nodes: int, size: int, dtype: torch.dtype, sequence: bool) -> object:
    n_batch, n_inner, n_rows, floats = 8, n_nodes // 2, 8 * n_nodes, torch.float32
    return verify_tree_triton(
        meta(n_rows, 128_256, dtype=dtype), meta(3, dtype=floats), meta(n_rows, dtype=floats),
        meta(n_rows, dtype=floats), meta(n_rows), meta(5, n_nodes), meta(n_batch, n_nodes - 1), meta(n_batch),
        meta(n_batch, n_inner, size), meta(n_batch, n_inner, size, dtype=floats), meta(n_batch, n_inner),
        meta(n_batch), meta(n_batch), meta(n_batch + 1), min(n_inner, 8), sequence,
    )  # fmt: skip


LAUNCHES = {
    f"{'float32' if dtype == torch.float32 else 'bfloat16'}, N {n_nodes}, C {size}, {walk}": partial(
        _launch, n_nodes, size, dtype, walk == "as a sequence"
    )
    for n_nodes, size, dtype in [
        (1, 64, torch.bfloat16),
        (6, 1, torch.bfloat16),
        (16, 64, torch.bfloat16),
        (16, 256, torch.float32),
        (64, 64, torch.bfloat16),
        (64, 256, torch.bfloat16),
        (128, 1024, torch.bfloat16),
    ]
    for walk in ("by node", "as a sequence")
}

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
