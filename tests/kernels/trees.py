"""Arguments of `verify_tree` for its tests, and that what runs decides what is defined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import oracle
import pytest
import torch
from rows import OFF, Knobs
from torch import Tensor

from specdec.engine.tree import TokenTree
from specdec.kernels.sampling.draw_children import draw_children_cpu
from specdec.kernels.sampling.draw_row import draw_row
from specdec.kernels.sampling.noise import BONUS, DRAFT
from specdec.kernels.sampling.row_law import row_law_reference
from specdec.kernels.verify.tree_rules import WITH_REPLACEMENT
from specdec.kernels.verify.verify_tree import verify_tree, verify_tree_cpu, verify_tree_reference

Verified = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

HUBS = {"with replacement": WITH_REPLACEMENT, "no hub": 0, "one hub": 1, "all hubs": 99}
RULES = pytest.mark.parametrize("n_hubs", HUBS.values(), ids=HUBS)
WALKS = pytest.mark.parametrize("sequence", [False, True], ids=["by node", "as a sequence"])
N_HUBS: dict[oracle.Rule, Callable[[int], int]] = {
    oracle.IID: lambda n: WITH_REPLACEMENT, oracle.DISTINCT: lambda n: 0, oracle.HUB: lambda n: n - 1,
    oracle.PARTIAL: lambda n: 1, oracle.TOP: lambda n: n,
}  # fmt: skip
"""What the library calls the oracle's rules: a number of hubs among n children."""
RAGGED = TokenTree((-1, 0, 0, 0, 1, 1, 2, 4, 4, 4, 6, 10))


@dataclass
class TreeCase:
    """The arguments of `verify_tree` but the last."""

    logits: Tensor
    knobs: Tensor
    log_total: Tensor
    threshold: Tensor
    first: Tensor
    topology: Tensor
    places: Tensor
    n_nodes: Tensor
    support_ids: Tensor
    support_probs: Tensor
    n_hubs: Tensor
    seed: Tensor
    position: Tensor
    starts: Tensor
    depth: int

    def map(self, change: Callable[[Tensor], Tensor]) -> TreeCase:
        """Another, of what `change` makes of every tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(x) for name, x in values.items() if isinstance(x, Tensor)})

    def on(self, device: torch.device) -> TreeCase:
        return self.map(lambda x: x.to(device))

    def set_logits(self, logits: Tensor, top_k: int = 0) -> None:
        self.logits = logits
        self.log_total, self.threshold, self.first = row_law_reference(logits, self.knobs, top_k)

    def arguments(self, sequence: bool) -> tuple[Any, ...]:
        return *(getattr(self, field.name) for field in fields(self)), sequence


def tree_case(
    tree: TokenTree, n_batch: int, vocab: int, size: int, n_hubs: int | None = None, *, seed: int = 0,
    dtype: torch.dtype = torch.float32, setting: Knobs = OFF, spread: float = 1.0, cut: bool = False,
) -> TreeCase:  # fmt: skip
    """Random rows, and children drawn from laws that differ from theirs by noise of `spread`.

    A third of the laws are short, so that some children do not exist. The supports are in no order, and entries of
    probability zero hold another entry's id.

    Args:
        n_hubs: of all nodes; None for a random number at each. cut: samples have some of the tree's nodes, or none.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    *knobs, top_k = setting
    topology, inner = tree.topology(torch.device("cpu")), list(tree.inner)
    n_all, n_inner, size = len(tree), len(inner), min(size, vocab)
    logits = (normal(n_batch * n_all, vocab) * 2).to(dtype)
    after = logits.unflatten(0, (n_batch, n_all))[:, inner].float()
    probs, ids = (after + spread * normal(n_batch, n_inner, vocab)).softmax(-1).topk(size)
    n_listed = torch.where(integers(0, 3, n_batch, n_inner) == 0, integers(1, size + 1, n_batch, n_inner), size)
    listed = torch.arange(size) < n_listed[..., None]
    probs, ids = torch.where(listed, probs, 0), torch.where(listed, ids, ids[..., :1])
    probs /= probs.sum(-1, keepdim=True)
    hubs = integers(-1, 4, n_batch, n_inner) if n_hubs is None else torch.full((n_batch, n_inner), n_hubs)
    seeds, position = integers(-(2**62), 2**62, n_batch), integers(1, 2**31, n_batch)

    row = torch.arange(n_batch).repeat_interleave(n_inner)
    node = torch.tensor(inner, dtype=torch.int64).repeat(n_batch)
    drawn = draw_children_cpu(
        ids.flatten(0, 1), probs.flatten(0, 1), hubs.flatten(), topology[3, node], seeds[row],
        position[row] + topology[1, node], node, DRAFT, max(tree.n_children), False,
    ).unflatten(0, (n_batch, n_inner))  # fmt: skip
    parent = topology[0, 1:]
    entry = topology[4, parent]
    places = drawn[:, entry, torch.arange(1, n_all) - topology[2, parent]]

    order = torch.rand(n_batch, n_inner, size, generator=generator).argsort(-1)
    moved = order.argsort(-1)[:, entry].gather(2, places.clamp(min=0)[..., None])[..., 0]
    n_nodes = torch.full((n_batch,), n_all)
    if cut:
        n_nodes = integers(0, n_all + 1, n_batch)
    return TreeCase(
        logits, torch.tensor(knobs), *row_law_reference(logits, torch.tensor(knobs), top_k), topology,
        torch.where(places >= 0, moved, -1), n_nodes, ids.gather(2, order), probs.gather(2, order), hubs, seeds,
        position, torch.arange(n_batch + 1) * n_all, tree.depth,
    )  # fmt: skip


def check_decisions(case: TreeCase, sequence: bool, device: torch.device) -> Verified:
    """The op itself and what runs on a CPU do what is defined."""
    expected = verify_tree_reference(*case.arguments(sequence))
    for got in (verify_tree(*case.on(device).arguments(sequence)), verify_tree_cpu(*case.arguments(sequence))):
        for a, b in zip(got[:4], expected[:4], strict=True):
            assert a.dtype == torch.int64
            assert torch.equal(a.cpu(), b)
        torch.testing.assert_close(got[4].cpu(), expected[4], rtol=1e-4, atol=1e-5, equal_nan=True)
    return expected


def bonus_of(case: TreeCase, sequence: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The path, its number of drafted nodes and the bonus token, by the ops and as a step draws it."""
    case = case.on(device)
    path, n_accepted, row, ids, weights = verify_tree(*case.arguments(sequence))
    at = case.position + n_accepted
    laws = case.logits, case.knobs, case.log_total, case.threshold, case.first
    return path, n_accepted, draw_row(*laws, row, ids, weights, case.seed, at, at * 0, BONUS, False)


def strided(x: Tensor) -> Tensor:
    """The same values, transposed in memory, with other numbers between them."""
    wide = x.new_full((2 * x.shape[-1] + 1, *reversed(x.shape[:-1])), 3)
    values = wide[1::2].permute(*reversed(range(x.dim())))
    return values.copy_(x)
