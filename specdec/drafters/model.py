"""A smaller model as drafter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specdec.drafters.vocabulary import Overlap
from specdec.engine.draft import Draft
from specdec.engine.laws import SamplingLaw
from specdec.engine.packing import Nodes
from specdec.engine.state import READ, BatchState
from specdec.engine.tree import TokenTree
from specdec.hf.view import ModelView
from specdec.kernels.sampling.draw_children import draw_children
from specdec.kernels.sampling.noise import BONUS, DRAFT
from specdec.verifiers import AUTO
from specdec.verifiers.base import DraftLaw, Verifier

DEPTHS = (1, 2, 3, 5, 8, 13, 21)
"""Levels it can be asked for: deep drafts need not be choosable to the token, and each depth is compiled."""
SUPPORT_SIZE = 64
"""Ids kept of a draft law. Tokens are drawn from exactly the kept, renormalised law, so any size is lossless."""


class _Level:
    """What is fixed about drafting the nodes of one depth from those above them. Tensors are on the draft's device.

    Attributes:
        nodes: [w] int64, the nodes one level up that have children: the ones that are run.
        counts: [w] int64, how many children each has. widest: the largest of these.
        flat: [level] int64, where each of the level's nodes stands among w times `widest` children.
        run: int64, those of the level that have children themselves, by place in the level.
    """

    def __init__(self, tree: TokenTree, depth: int, device: torch.device) -> None:
        above = [node for node in tree.inner if tree.depths[node] == depth - 1]
        own = [node for node, d in enumerate(tree.depths) if d == depth]
        self.nodes = torch.tensor(above, device=device, dtype=torch.int64)
        self.counts = torch.tensor([tree.n_children[node] for node in above], device=device, dtype=torch.int64)
        self.widest = max(tree.n_children[node] for node in above)
        flat = [row * self.widest + k for row, node in enumerate(above) for k in range(tree.n_children[node])]
        self.flat = torch.tensor(flat, device=device, dtype=torch.int64)
        inner = [i for i, node in enumerate(own) if tree.n_children[node]]
        self.run = torch.tensor(inner, device=device, dtype=torch.int64)


class ModelDrafter:
    """Drafts a tree with a causal language model.

    Args:
        view: the draft model, on the target's device.
        tree: the shape of the draft, at least one level, and at most SUPPORT_SIZE children a node.
        reads_at_once: last tokens of a text that a step reads at most before it drafts; what is more is read between
            steps.
        verifier: says how children are drawn.
        overlap: what its vocabulary and the target's share; None where they are the same.
        stop_below: a sample's chain ends after the first token less probable than this, None: never. That token stays:
            whether it is verified must not depend on what it is.
        shares_cache: whether it is part of the target, over the target's cache, which has all texts, and what is
            accepted of drafts.

    Its cache trails the target's: after a fully accepted draft the entry before the pending token's is missing,
    otherwise writing it again changes nothing; and of steps for which it did not draft, all are. So each step first
    reads the text's last tokens, as many of each as the state says; over the target's own cache only the pending one.
    Leaves are never run.
    """

    def __init__(
        self, view: ModelView, tree: TokenTree, verifier: Verifier = AUTO, overlap: Overlap | None = None,
        reads_at_once: int = READ, stop_below: float | None = None, shares_cache: bool = False,
    ) -> None:  # fmt: skip
        if tree.depth < 1:
            raise ValueError("the tree of a draft model needs a level of drafts at least")
        if stop_below is not None and not tree.is_chain:
            raise ValueError(f"stop_below={stop_below} ends chains early, and tree={tree.parents} is none")
        self.view, self.tree, self.verifier = view, tree, verifier
        device, config = view.device, view.source.config.get_text_config()
        self._bits, self._depths = tree.tensors(device)
        self.shares_cache = shares_cache
        self.reads_at_once = 1 if self.shares_cache else reads_at_once  # what is there is not written again
        self._text = TokenTree.chain(self.reads_at_once - 1).tensors(device)
        self.depths = (*(depth for depth in DEPTHS if depth < tree.depth), tree.depth)
        self.overlap = None if overlap is None else overlap.to(device)
        n_tokens = config.vocab_size if overlap is None else len(overlap.draft_ids)
        self.context = getattr(config, "max_position_embeddings", None)
        # On the device: another value compiles nothing.
        self._stop_below = None if stop_below is None else torch.tensor(stop_below, dtype=torch.float32, device=device)
        self.support_size = min(SUPPORT_SIZE, n_tokens)
        self._levels = [_Level(tree, depth, device) for depth in range(1, tree.depth + 1)]

    @property
    def is_current(self) -> bool:
        return self.shares_cache or self.view.is_current  # the target is looked at anyway

    @property
    def generation(self) -> int:
        return self.view.cache.generation

    def allocate(self, n_batch: int, n_slots: int) -> None:
        if not self.shares_cache:
            self.view.allocate(n_batch, n_slots)

    def read(self, texts: Mapping[int, tuple[int, Tensor]]) -> None:
        # The last tokens are read by `draft`.
        unread = {row: (max(n_known - READ, 0), self._read_as(text[:-READ])) for row, (n_known, text) in texts.items()}
        self.view.prefill(unread)

    def _read_as(self, tokens: Tensor) -> Tensor:
        """What the draft reads for tokens of the target, int64 of any shape."""
        return tokens if self.overlap is None else self.overlap.draft_ids[tokens.to(self.view.device)]

    def _forward(self, tokens: Tensor, nodes: Nodes, rows: Tensor | int = 0) -> Tensor:
        """As the view's forward, in the target's tokens."""
        logits = self.view.forward(self._read_as(tokens), nodes, rows).logits
        return logits if self.overlap is None else self.overlap.logits(logits)

    def draft(self, state: BatchState, law: SamplingLaw, live: Tensor, depth: int) -> Draft:
        n_slots = self.view.cache.n_slots
        n_read = torch.where(state.finished, 0, torch.minimum(state.unread, state.lengths + 1))
        first = state.lengths + 1 - n_read
        text = Nodes.packed(first, n_read, state.fed, self.reads_at_once, n_slots, *self._text)
        pending = Nodes.packed(state.lengths, n_read.clamp(max=1), live, 1, n_slots, self._bits, self._depths)
        last = (text.starts[pending.sample + 1] - 1).clamp(min=0)
        logits = self._forward(state.tokens[text.sample, first[text.sample] + text.node], text, last)
        levels: list[tuple[Tensor, ...]] = []
        probs: list[Tensor] = []  # of each level's token, where that ends a chain
        for above, level in enumerate(self._levels[:depth]):
            if above > 0:
                fed = levels[-1][0][:, self._levels[above - 1].run].flatten()
                logits = self._forward(fed, pending.spread(level.nodes, n_slots))
            levels.append(self._children(logits, law, state, pending.sample, above, level))
            if self._stop_below is not None:
                probs.append(_probability(logits, *levels[-1][1:]))
        row = pending.starts[:-1].clamp(max=len(live) - 1)  # of each sample in what was drafted
        return self._drafted(levels, probs, row, state)

    def _drafted(
        self, levels: list[tuple[Tensor, ...]], probs: list[Tensor], row: Tensor, state: BatchState
    ) -> Draft:  # fmt: skip
        """The levels together. probs: of each level's token, where an unlikely one ends a chain. row: [B] int64, where
        each sample is in what was drafted."""
        tokens, *rest = (torch.cat(x, 1)[row] for x in zip(*levels, strict=True))
        counts = torch.full_like(state.lengths, tokens.shape[1])
        if self._stop_below is not None:
            n_sure = (torch.stack(probs, 1) >= self._stop_below).long().cumprod(1).sum(1)[row]
            counts = torch.minimum(counts, n_sure + 1)
        if self.context is not None:  # past its positions it knows nothing; that depends on nothing but the length
            counts = torch.where(state.lengths + 1 + self.tree.depth <= self.context, counts, 0)
        return Draft(tokens, counts, DraftLaw(*rest) if rest else None)

    def _children(
        self, logits: Tensor, law: SamplingLaw, state: BatchState, sample: Tensor, depth: int, level: _Level
    ) -> tuple[Tensor, ...]:
        """A level drafted from the logits [n * w, V] of the nodes above it; `sample` [n] says whose they are.

        Returns:
            tokens [n, level], and unless decoding greedily places [n, level] and the laws of the w nodes: ids and
            probabilities [n, w, C], and how many hubs each has [n, w].
        """
        n, width = len(sample), len(level.nodes)
        if law.greedy:
            if level.widest == 1:
                chosen = law.choose(logits)[:, None]
            else:
                best = logits.topk(min(level.widest, logits.shape[-1])).indices
                chosen = torch.cat([best, best[:, :1].expand(-1, level.widest - best.shape[1])], 1)  # few tokens
            return (chosen.view(n, width * level.widest)[:, level.flat],)
        ids, probs = law.support(logits, SUPPORT_SIZE)
        rows = sample[:, None].expand(-1, width).flatten()
        node, counts = (x.expand(n, -1).flatten() for x in (level.nodes, level.counts))
        position = state.lengths[rows] + depth + 1
        coupled = self.verifier.coupled
        n_hubs = self.verifier.hubs(probs, counts)
        places = draw_children(
            ids, probs, n_hubs, counts, state.seeds[rows], position, node * 0 if coupled else node,
            BONUS if coupled else DRAFT, level.widest, coupled,
        )  # fmt: skip
        tokens = ids.gather(1, places.clamp(min=0))
        tokens, places = (x.view(n, width * level.widest)[:, level.flat] for x in (tokens, places))
        return tokens, places, ids.unflatten(0, (n, width)), probs.unflatten(0, (n, width)), n_hubs.view(n, width)

    def commit(self, lengths: Tensor, path: Tensor, n_path: Tensor) -> None:
        # The pending token is at slot `lengths` here too, and what the tree holds follows it in the same order.
        if not self.shares_cache:
            self.view.cache.commit(lengths, path, n_path)

    def grow(self, n_slots: int) -> None:
        if not self.shares_cache:
            self.view.cache.grow(n_slots)


def _probability(logits: Tensor, *law: Tensor) -> Tensor:
    """[n] float32, of the token of a chain's level, drafted from logits [n, V]: by the law that it was drawn from,
    if it was (see `ModelDrafter._children`)."""
    if not law:
        return logits.float().softmax(-1).amax(-1)  # the best
    places, _, probs, _ = law
    return probs[:, 0].gather(1, places.clamp(min=0))[:, 0]
