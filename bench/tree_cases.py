"""Cases of drawing and verifying trees, beside PyTorch with dense laws and random numbers of its own.

A draft's logits are the target's plus noise. The ops keep supports of SUPPORT_SIZE ids, draw with the library's own
choice of hubs and verify as a sequence; PyTorch draws without replacement from the whole vocabulary and verifies node
by node (RRSw). Each verifies what it drew itself. All inner nodes of a tree are drawn from in one call, where a step
makes one for each level.

Letters: B samples, N nodes, M inner nodes, R = B * M rows, V vocabulary, C support size, K children of a node at most.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.case import Case, Ways
from specdec.drafters.model import SUPPORT_SIZE
from specdec.engine.laws import SamplingLaw
from specdec.engine.tree import TokenTree
from specdec.kernels.sampling.draw_children import draw_children, draw_children_reference
from specdec.kernels.sampling.draw_row import draw_row, draw_row_reference
from specdec.kernels.sampling.noise import BONUS, DRAFT
from specdec.kernels.verify.verify_greedy import verify_greedy, verify_greedy_reference
from specdec.kernels.verify.verify_tree import verify_tree, verify_tree_reference
from specdec.verifiers import AUTO
from specdec.verifiers.base import RowLaw

Widths = tuple[int, ...]
Walked = tuple[Tensor, Tensor, Tensor]
"""path [B, depth + 1], n_accepted [B] and bonus [B], int64."""


class _Batch:
    """Random logits for a batch of trees, and whose rows they are.

    Attributes:
        logits: [B * N, V], the target's. draft_logits: [R, V], after the inner nodes.
        counts: [R] int64, children of each row. keys: seed, position and node of each row's noise, [R] int64 each.
        entry, ordinal: [N - 1] int64, of each drafted node its parent's place among the M and its own among siblings.
    """

    def __init__(self, batch: int, widths: Widths, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tree, self.widest = TokenTree.from_widths(*widths), max(widths)
        self.topology = self.tree.topology(device)
        inner = torch.tensor(self.tree.inner, device=device)
        # A few tokens hold most of the mass, as after text, and some of every level are accepted, some not.
        logits = torch.randn(batch, len(self.tree), vocabulary, device=device).mul_(6)
        draft_logits = torch.randn(batch, len(inner), vocabulary, device=device).mul_(2).add_(logits[:, inner])
        self.logits, self.draft_logits = (x.to(dtype).flatten(0, 1) for x in (logits, draft_logits))
        self.seed = torch.arange(batch, device=device)
        self.position = self.seed + 300
        self.starts = torch.arange(batch + 1, device=device) * len(self.tree)
        self.n_nodes = torch.full((batch,), len(self.tree), device=device)
        node, row = inner.repeat(batch), self.seed.repeat_interleave(len(inner))
        self.counts = self.topology[3, node]
        self.keys = self.seed[row], self.position[row] + self.topology[1, node], node
        parent = self.topology[0, 1:]
        self.entry = self.topology[4, parent]
        self.ordinal = torch.arange(1, len(self.tree), device=device) - self.topology[2, parent]
        self.law = SamplingLaw(False, knobs=torch.tensor([1.0, 1.0, 0.0], device=device))

    @property
    def for_draw(self) -> tuple[Tensor, SamplingLaw, Tensor, tuple[Tensor, ...], int]:
        return self.draft_logits, self.law, self.counts, self.keys, self.widest

    def by_node(self, children: Tensor) -> Tensor:
        """[B, N - 1], of the children [R, K] those that the tree has."""
        return children.unflatten(0, (len(self.seed), -1))[:, self.entry, self.ordinal]


def _shape(batch: int, widths: Widths) -> str:
    return f"B {batch} N {len(TokenTree.from_widths(*widths))} ({' '.join(map(str, widths))})"


def _n_inner(widths: Widths) -> int:
    return len(TokenTree.from_widths(*widths).inner)


def _draw(
    logits: Tensor, law: SamplingLaw, counts: Tensor, keys: tuple[Tensor, ...], widest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Places [R, K], and the laws they are drawn from: ids and probabilities [R, C], numbers of hubs [R]."""
    ids, probs = law.support(logits, SUPPORT_SIZE)
    n_hubs = AUTO.hubs(probs, counts)
    return draw_children(ids, probs, n_hubs, counts, *keys, DRAFT, widest, False), ids, probs, n_hubs


def _dense_draw(logits: Tensor, widest: int) -> tuple[Tensor, Tensor]:
    probs = logits.float().softmax(-1)
    return torch.multinomial(probs, widest), probs


def draw_of_logits(batch: int, widths: Widths, vocabulary: int, dtype: torch.dtype) -> Case:
    """From the draft's logits to children."""
    rows = batch * _n_inner(widths)

    def ways(device: torch.device) -> Ways:
        given = _Batch(batch, widths, vocabulary, dtype, device)
        return {
            "op": partial(_draw, *given.for_draw),
            "pytorch": partial(_dense_draw, given.draft_logits, given.widest),
        }

    shape = f"and draw_children, {_shape(batch, widths)} V {vocabulary}"
    return Case("top_support", shape, ways, rows * vocabulary * dtype.itemsize)


def draw(batch: int, widths: Widths) -> Case:
    """Given the laws [R, C]."""
    rows = batch * _n_inner(widths)

    def ways(device: torch.device) -> Ways:
        given = _Batch(batch, widths, 4 * SUPPORT_SIZE, torch.float32, device)
        _, ids, probs, n_hubs = _draw(*given.for_draw)
        args = ids, probs, n_hubs, given.counts, *given.keys, DRAFT, given.widest, False
        found: Ways = {
            "op": partial(draw_children, *args), "pytorch": partial(torch.multinomial, probs, given.widest),
        }  # fmt: skip
        return found | ({"reference": partial(draw_children_reference, *args)} if device.type == "cpu" else {})

    # A row's probabilities, number of hubs and of children, and key are read, and its children written.
    return Case("draw_children", _shape(batch, widths), ways, rows * (4 * SUPPORT_SIZE + 8 * (5 + max(widths))))


def _walk(
    verify: Callable[..., tuple[Tensor, ...]], draw: Callable[..., Tensor], laws: RowLaw, drafted: tuple[Tensor, ...],
    seed: Tensor, position: Tensor, starts: Tensor, depth: int,
) -> Walked:  # fmt: skip
    """As a step decides once it has the rows' laws."""
    path, n_accepted, row, ids, weights = verify(*laws, *drafted, seed, position, starts, depth, AUTO.sequence)
    at = position + n_accepted
    return path, n_accepted, draw(*laws, row, ids, weights, seed, at, torch.zeros_like(at), BONUS, False)


def _walk_of_logits(logits: Tensor, law: SamplingLaw, *args: object) -> Walked:
    return _walk(verify_tree, draw_row, law.rows(logits), *args)  # type: ignore[arg-type]


def _dense_walk(target_probs: Tensor, draft_probs: Tensor, tokens: Tensor, topology: Tensor, widths: Widths) -> Walked:
    """Recursive rejection as it is usually written, all samples at once: from level to level, from child to child.

    Args:
        target_probs: [B, N, V]. draft_probs: [B, M, V]. tokens: [B, N - 1]. topology: see `TokenTree.topology`.
    """
    _, _, first_child, _, inner = topology
    sample = torch.arange(len(tokens), device=tokens.device)
    node, goes_on = torch.zeros_like(sample), torch.ones_like(sample, dtype=torch.bool)
    path, n_accepted, residual = [node], node, target_probs[:, 0]
    for width in widths:
        law, seeks, first = draft_probs[sample, inner[node]], goes_on, first_child[node]
        for k in range(width):
            token = tokens[sample, first + k - 1]
            accepted = seeks & (torch.rand_like(law[:, 0]) * law[sample, token] < residual[sample, token])
            seeks = seeks & ~accepted
            node = torch.where(accepted, first + k, node)
            left = (residual - law).clamp(min=0)
            residual = torch.where(seeks[:, None], left / left.sum(-1, keepdim=True).clamp(min=1e-20), residual)
            law = law.scatter(1, token[:, None], 0)
            law = law / law.sum(-1, keepdim=True).clamp(min=1e-20)
        goes_on = goes_on & ~seeks
        residual = torch.where(goes_on[:, None], target_probs[sample, node], residual)
        path, n_accepted = [*path, node], n_accepted + goes_on
    return torch.stack(path, 1), n_accepted, torch.multinomial(residual + 1e-20, 1)[:, 0]


def _dense_walk_of_logits(logits: Tensor, n_nodes: int, *args: object) -> Walked:
    return _dense_walk(logits.float().softmax(-1).unflatten(0, (-1, n_nodes)), *args)  # type: ignore[arg-type]


def verify(batch: int, widths: Widths, vocabulary: int, dtype: torch.dtype, of_logits: bool = False) -> Case:
    """Where paths end, and their bonus tokens, given the rows' laws, which to PyTorch are dense, or their logits."""
    tree = TokenTree.from_widths(*widths)

    def ways(device: torch.device) -> Ways:
        given = _Batch(batch, widths, vocabulary, dtype, device)
        places, *laws = _draw(*given.for_draw)
        own = (x.unflatten(0, (batch, -1)) for x in laws)
        drafted = given.topology, given.by_node(places), given.n_nodes, *own
        args = drafted, given.seed, given.position, given.starts, tree.depth
        tokens, draft_probs = _dense_draw(given.draft_logits, given.widest)
        dense = draft_probs.unflatten(0, (batch, -1)), given.by_node(tokens), given.topology, widths
        if of_logits:
            return {
                "op": partial(_walk_of_logits, given.logits, given.law, *args),
                "pytorch": partial(_dense_walk_of_logits, given.logits, len(tree), *dense),
            }
        rows, probs = given.law.rows(given.logits), given.logits.float().softmax(-1)
        found: Ways = {
            "op": partial(_walk, verify_tree, draw_row, rows, *args),
            "pytorch": partial(_dense_walk, probs.unflatten(0, (batch, -1)), *dense),
        }
        if device.type == "cpu":
            found["reference"] = partial(_walk, verify_tree_reference, draw_row_reference, rows, *args)
        return found

    # At least the root is visited and the bonus row read: of a node's law an id, a probability and a logit each.
    support = min(SUPPORT_SIZE, vocabulary) * (12 + dtype.itemsize)
    read = len(tree) * vocabulary * dtype.itemsize if of_logits else vocabulary * dtype.itemsize + support
    after = "row_law and verify_tree" if of_logits else "verify_tree"
    return Case("draw_row", f"after {after}, {_shape(batch, widths)} V {vocabulary}", ways, batch * read)


def _walk_of_choices(chosen: Tensor, tokens: Tensor, first_child: Tensor, widths: Widths) -> Walked:
    """From level to level, all samples at once; chosen [B, N]."""
    node, goes_on = torch.zeros_like(chosen[:, 0]), torch.ones_like(chosen[:, 0], dtype=torch.bool)
    path, n_accepted = [node], node
    for width in widths:
        child = first_child[node][:, None] + torch.arange(width, device=node.device)
        equal = tokens.gather(1, child - 1) == chosen.gather(1, node[:, None])
        goes_on = goes_on & equal.any(1)
        node = torch.where(goes_on, child.gather(1, equal.int().argmax(1, keepdim=True))[:, 0], node)
        path, n_accepted = [*path, node], n_accepted + goes_on
    return torch.stack(path, 1), n_accepted, chosen.gather(1, node[:, None])[:, 0]


def greedy(batch: int, widths: Widths) -> Case:
    """A token is its place among its siblings, and a choice one of these or one that no child has."""
    tree = TokenTree.from_widths(*widths)

    def ways(device: torch.device) -> Ways:
        topology, (bits, _) = tree.topology(device), tree.tensors(device)
        tokens = torch.arange(1, len(tree), device=device) - topology[2, topology[0, 1:]]
        tokens = tokens.expand(batch, -1).contiguous()
        chosen = torch.randint(max(widths) + 1, (batch, len(tree)), device=device)
        n_nodes, starts = torch.full((batch,), len(tree), device=device), torch.arange(batch + 1, device=device)
        args = chosen.flatten(), tokens, n_nodes, topology, bits, starts * len(tree), tree.depth
        return {
            "op": partial(verify_greedy, *args),
            "reference": partial(verify_greedy_reference, *args),
            "pytorch": partial(_walk_of_choices, chosen, tokens, topology[2], widths),
        }

    shared = len(tree) * (2 + -(-len(tree) // 64))  # parents, depths and ancestor words
    return Case("verify_greedy", _shape(batch, widths), ways, 8 * (batch * (2 * len(tree) + tree.depth + 4) + shared))
