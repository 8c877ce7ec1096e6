"""`bench.dynamic_trees`: what is in a tree, against plain searches, and a small run."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from side_by_side import Tiny

from bench import dynamic_trees as bench
from specdec import TokenTree


@pytest.mark.parametrize("n_nodes", [2, 8, 12])
def test_dynamic_trees_hold_the_most_probable_paths(n_nodes: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WIDEST", 4)
    monkeypatch.setattr(bench, "CONTEXT", 6)
    draft = tiny("llama")
    contexts, found = torch.randint(97, (12, 6), generator=torch.Generator().manual_seed(0)), []
    truth = torch.zeros(12, 2, dtype=torch.int64)
    for row, context in enumerate(contexts):
        first = bench.following(draft, context[None])[0]
        nodes = []
        for a in first.topk(4).indices.tolist():
            nodes.append(((a,), first[a]))
            second = bench.following(draft, torch.tensor([[*context[1:], a]]))[0]
            nodes += [((a, b), first[a] * second[b]) for b in second.topk(4).indices.tolist()]
        kept = [path for path, _ in sorted(nodes, key=lambda node: -node[1])][: n_nodes - 1]
        truth[row] = torch.tensor([*nodes[row][0], 1][:2])
        goes = [path for path in kept if path == tuple(truth[row].tolist())[: len(path)]]
        found.append((max(map(len, goes), default=0), max(map(len, kept))))
    own, depth = bench.in_dynamic(draft, contexts, truth, n_nodes)
    assert list(zip(own.tolist(), depth.tolist(), strict=True)) == found
    assert len(set(own.tolist())) > 1 or n_nodes == 2


def test_fixed_trees_are_walked_by_rank() -> None:
    tree = TokenTree.from_widths(2, 1)
    ranks = torch.tensor(list(itertools.product(range(3), range(2))))
    assert bench.in_fixed(tree, ranks).tolist() == [2, 1, 2, 1, 0, 0]


def test_a_run_writes_its_tables(tmp_path: Path) -> None:
    bench.main(prompts=2, places_each=1, depth=2, nodes="4", out=tmp_path)
    assert "temperature 1" in (tmp_path / "dynamic_trees.md").read_text()
