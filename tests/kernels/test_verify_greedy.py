"""Greedy verification is the plain walk down the tree, on every path and for any arguments."""

from __future__ import annotations

import pytest
import torch
from aot import compiles_without_spilling, meta
from torch import Tensor
from trees import RAGGED, strided

from specdec.engine.tree import TokenTree
from specdec.kernels.verify.verify_greedy import verify_greedy, verify_greedy_reference, verify_greedy_triton

pytestmark = pytest.mark.kernels

TREES = {
    "root": TokenTree.chain(0),
    "chain": TokenTree.chain(5),
    "long chain": TokenTree.chain(130),
    "ragged": RAGGED,
    "wide": TokenTree.from_widths(4, 2, 2, 1),
    "two words": TokenTree.from_widths(2, 2, 2, 2, 2, 2),
    "broom": TokenTree((*range(-1, 62), *[62] * 5, 63, 67)),  # its word ends among siblings
}
CASES = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


def _case(tree: TokenTree, n_batch: int, n_ids: int, seed: int = 0) -> list[Tensor]:
    """chosen, tokens, n_nodes, topology, bits and starts; `n_ids` different ids, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    n, cpu = len(tree), torch.device("cpu")
    chosen = torch.randint(n_ids, (n_batch * n,), generator=generator) + 2**33
    tokens = torch.randint(n_ids, (n_batch, n - 1), generator=generator) + 2**33
    n_nodes = torch.randint(n + 1, (n_batch,), generator=generator)
    n_nodes[: n_batch // 2] = n
    return [chosen, tokens, n_nodes, tree.topology(cpu), tree.tensors(cpu)[0], torch.arange(n_batch + 1) * n]


def _walk(tree: TokenTree, chosen: list[int], tokens: list[int], n_nodes: int) -> tuple[list[int], int]:
    """The longest path of nodes that equal what was chosen after their parents, the first of several; and the bonus."""
    paths = {0: [0]}
    for node in range(1, n_nodes):
        parent = tree.parents[node]
        if parent in paths and tokens[node - 1] == chosen[parent]:
            paths[node] = [*paths[parent], node]
    best = max(paths.values(), key=len)
    return best, chosen[best[-1]]


@CASES
def test_is_the_plain_walk(tree: TokenTree, device: torch.device, poisoned: None) -> None:
    n_batch, n = 40, len(tree)
    lengths = set()
    for n_ids, seed in ((1, 0), (2, 1), (2, 2)):
        case = _case(tree, n_batch, n_ids, seed)
        path, n_accepted, bonus = (x.tolist() for x in verify_greedy(*(x.to(device) for x in case), tree.depth))
        chosen, tokens, n_nodes = (x.tolist() for x in case[:3])
        for b in range(n_batch):
            best, token = _walk(tree, chosen[b * n : (b + 1) * n], tokens[b], n_nodes[b])
            assert path[b] == best + [best[-1]] * (tree.depth + 1 - len(best))
            assert n_accepted[b] == len(best) - 1
            assert bonus[b] == token
            lengths.add(len(best) - 1)
    assert lengths >= {0, min(tree.depth, 2), tree.depth}


def test_of_equal_siblings_the_one_that_leads_on(device: torch.device) -> None:
    """Its first equal has no child that goes on; without one that does, the first is taken."""
    tree = TokenTree.from_widths(3, 1)
    bits, topology = tree.tensors(device)[0], tree.topology(device)
    chosen = torch.tensor([5, 0, 8, 9, 1, 2, 3] * 2, device=device)
    tokens = torch.tensor([[5, 5, 5, 1, 8, 9], [5, 5, 5, 1, 2, 3]], device=device)
    n_nodes, starts = torch.tensor([7, 7], device=device), torch.tensor([0, 7, 14], device=device)
    path, n_accepted, bonus = verify_greedy(chosen, tokens, n_nodes, topology, bits, starts, 2)
    assert path.tolist() == [[0, 2, 5], [0, 1, 1]]
    assert n_accepted.tolist() == [2, 1]
    assert bonus.tolist() == [2, 0]


def test_samples_bring_as_many_rows_as_they_have_nodes(device: torch.device) -> None:
    """Packed rows give what a grid gives; a sample without rows is given some other's."""
    tree = TokenTree.from_widths(2, 2)
    chosen, tokens, _, *fixed, starts = _case(tree, 10, 2)
    n_rows = torch.tensor([1, 7, 3, 2, 6, 0, 5, 7, 4, 0])
    expected = verify_greedy_reference(chosen, tokens, n_rows, *fixed, starts, 2)
    own = torch.cat([7 * b + torch.arange(n) for b, n in enumerate(n_rows.tolist())])
    starts = torch.nn.functional.pad(n_rows.cumsum(0), (1, 0))
    packed = chosen[own], tokens, torch.where(n_rows > 0, n_rows, 7), *fixed, starts
    got = [x.cpu() for x in verify_greedy(*(x.to(device) for x in packed), 2)]
    present = n_rows > 0
    for a, b, c in zip(got, expected, verify_greedy_reference(*packed, 2), strict=True):
        assert torch.equal(a[present], b[present])
        assert torch.equal(a, c)
    assert set(got[1].tolist()) == {0, 1, 2}


def test_strides_do_not_matter(device: torch.device) -> None:
    case = [x.to(device) for x in _case(RAGGED, 20, 2)]
    expected = verify_greedy(*case, RAGGED.depth)
    for i in range(len(case) + 1):  # one at a time, and all
        apart = [strided(x) if i in (j, len(case)) else x for j, x in enumerate(case)]
        got = verify_greedy(*apart, RAGGED.depth)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_no_samples(device: torch.device) -> None:
    chosen, tokens, n_nodes, topology, bits, starts = (x.to(device) for x in _case(RAGGED, 2, 2))
    out = verify_greedy(chosen, tokens[:0], n_nodes[:0], topology, bits, starts[:1], RAGGED.depth)
    assert [tuple(x.shape) for x in out] == [(0, RAGGED.depth + 1), (0,), (0,)]


def test_is_a_well_formed_op_and_traces(device: torch.device) -> None:
    arguments = (*(x.to(device) for x in _case(RAGGED, 3, 2)), RAGGED.depth)
    torch.library.opcheck(verify_greedy.op, arguments)
    traced = torch.compile(lambda *x: verify_greedy(*x), fullgraph=True, dynamic=True, backend="aot_eager")
    for a, b in zip(traced(*arguments), verify_greedy(*arguments), strict=True):
        assert torch.equal(a, b)


def _launch(n_batch: int, n: int, depth: int) -> object:
    shapes = (n_batch * n,), (n_batch, n - 1), (n_batch,), (5, n), (n, -(-n // 64)), (n_batch + 1,)
    return verify_greedy_triton(*(meta(*shape) for shape in shapes), depth)


LAUNCHES = {
    "root": lambda: _launch(8, 1, 0),
    "chain of 5": lambda: _launch(32, 6, 5),
    "N 16": lambda: _launch(8, 16, 3),
    "N 64": lambda: _launch(8, 64, 8),
    "chain of 255": lambda: _launch(8, 256, 255),
}

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
