"""The forest: all beams of a batch over one committed text a sample, and the uncommitted nodes in which they differ.

Beams of one sample mostly share their text. What they share is in the cache once, committed; the rest is a trie, whose
node i is in the sample's slot `lengths + i`. Node 0 is the last token that all beams have in common. Nodes that no beam
can come to again are dropped, and the others move down, when the beams are known to have gone on.

A forward takes any nodes of the tries, whose tokens see the committed text and their own ancestors, so that one cache
serves as many beams as there are.

Source: SpecInfer, arXiv 2305.09781 (ancestor mask); DSBD, arXiv 2409.16560, section 4 (one forward for all beams).
Letters: B samples, T tokens of a forward, N uncommitted slots a sample, V vocabulary, K best tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from specdec.engine.packing import Nodes
from specdec.engine.roles import Steps, Target
from specdec.engine.trie import Trie
from specdec.kernels.attention.tree_mask import ancestor_words

SLOTS = 128
"""Room for uncommitted nodes is a multiple of this many a sample."""


@dataclass
class Known:
    """What a model says after a node: its logits, row `row` of `logits` [T, V], and the K best tokens' ids and
    logarithms of probability."""

    logits: Tensor
    row: int
    best: list[tuple[int, float]]


class Reader:
    """A model that reads nodes of tries, one for each sample, into its own cache.

    Args:
        view: the model. steps: compiles or records its forward. n_best: K.

    Attributes:
        known: by sample, what it said after the nodes that it has read. was_compiling: whether a forward has compiled;
            to be set back by who asks.
    """

    def __init__(self, view: Target, steps: Steps, n_best: int) -> None:
        self.view, self._steps, self._n_best = view, steps, n_best
        self.known: list[dict[int, Known]] = []
        self.was_compiling = False
        self._places = -1

    def open(self, texts: Sequence[Tensor], n_slots: int) -> None:
        """Take in new texts, [length] int64 each, but for their last tokens; `n_slots` slots a sample."""
        self.view.allocate(len(texts), n_slots)
        self._look_where()
        self.known = [{} for _ in texts]
        left = {row: (0, text[:-1]) for row, text in enumerate(texts) if len(text) > 1}
        while left:
            left = self.view.write(left, 2048)

    def grow(self, n_slots: int) -> None:
        """Make room; what is there stays."""
        self.view.cache.grow(n_slots)
        self._look_where()

    def _look_where(self) -> None:
        if self._places != self.view.cache.generation:  # recorded forwards know other places
            self._steps.reset()
            self._places = self.view.cache.generation

    def read(self, tries: Sequence[Trie], wanted: Sequence[Sequence[int]]) -> None:
        """Run these nodes of each sample, ascending, whose ancestors are read before or with them."""
        flat = [(row, node) for row, nodes in enumerate(wanted) for node in nodes]
        if not flat:
            return
        last = max(trie.length + len(trie.tokens) for trie in tries)
        assert last < self.view.cache.n_slots, "nodes past the cache's end"
        room = -(-max(len(trie.tokens) for trie in tries) // SLOTS) * SLOTS
        size = -(-len(flat) // 8) * 8 if self._steps.keeps_buffers else len(flat)
        spare = [0] * (size - len(flat))
        starts = [0]
        for nodes in wanted:
            starts.append(starts[-1] + len(nodes))
        per_sample = [[t.length for t in tries], starts]
        parents = [trie.parents + [-1] * (room - len(trie.parents)) for trie in tries]
        depths = [trie.depths + [0] * (room - len(trie.depths)) for trie in tries]
        tokens = [[tries[row].tokens[node] for row, node in flat] + spare, [row for row, _ in flat] + spare,
                  [node for _, node in flat] + spare]  # fmt: skip
        given = [*map(self.sent, (*tokens, *per_sample)), self.sent(parents), self.sent(depths)]
        for tensor in given[:3]:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        for tensor in given[3:]:
            if len(tries) > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        for tensor in given[5:]:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        key = "forest", id(self.view), self._n_best, len(tries) == 1, size == 1
        logits, ids, logs = self._steps.get(self.forward, key, (size, room))(*given)
        self.was_compiling |= self._steps.was_compiling
        if self._steps.keeps_buffers:  # the next replay writes there
            logits = logits.clone()
        best = zip(ids.tolist(), logs.tolist(), strict=True)
        for i, ((row, node), pair) in enumerate(zip(flat, best, strict=False)):
            self.known[row][node] = Known(logits, i, list(zip(*pair, strict=True)))

    def forward(
        self, tokens: Tensor, sample: Tensor, node: Tensor, lengths: Tensor, starts: Tensor, parents: Tensor,
        depths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """One forward, on the device.

        Args:
            tokens, sample, node: [T] int64, sample by sample; those from `starts[B]` on are nobody's.
            lengths: [B] int64. starts: [B + 1] int64. parents, depths: [B, N] int64.

        Returns:
            Logits [T, V], and the K best tokens after each, [T, K], int64 and float32 logarithms of probability.
        """
        n_slots = self.view.cache.n_slots
        own = torch.arange(tokens.shape[0], device=tokens.device, dtype=torch.int64) < starts[-1]
        slot = sample * n_slots + torch.where(own, lengths[sample] + node, n_slots - 1)
        nodes = Nodes(
            slot, lengths[sample] + depths[sample, node], lengths, starts, sample, node, tokens.shape[0],
            ancestor_words(parents), depths,
        )  # fmt: skip
        logits = self.view.forward(tokens, nodes).logits
        logs, ids = logits.float().log_softmax(-1).topk(min(self._n_best, logits.shape[-1]), -1)
        return logits, ids, logs

    def move(self, lengths: Tensor, path: Tensor, n_path: Tensor, new: Sequence[dict[int, int]]) -> None:
        """Nodes have new numbers: move their entries, as `Trie.move` moved them."""
        self.view.cache.commit(lengths, path, n_path)
        self.known = [
            {new_of[node]: said for node, said in known.items() if node in new_of}
            for known, new_of in zip(self.known, new, strict=True)
        ]

    def sent(self, numbers: list[int] | list[list[int]]) -> Tensor:
        """Whole numbers on the model's device, which nobody waits for."""
        on_gpu = self.view.device.type == "cuda"
        host = torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        return host.to(self.view.device, non_blocking=True)


class Forest:
    """The beams of a batch, and what is speculated of them.

    Args:
        target: whose logits are asked for. draft: reads ahead; None to speculate nothing. n_beams: W. ends: ids that
            end a text, after which no beam goes on.

    Attributes:
        n_forwards: of the target.
    """

    def __init__(self, target: Reader, draft: Reader | None, n_beams: int, ends: frozenset[int]) -> None:
        self._target, self._draft, self._n_beams, self._ends = target, draft, n_beams, ends
        self._tries: list[Trie] = []
        self._beams: list[list[int]] = []
        self.n_forwards = 0

    def knows(self, beams: Sequence[Sequence[Sequence[int]]]) -> bool:
        """Whether the target has read all of these."""
        nodes = [[self._at(trie, beam) for beam in own] for trie, own in zip(self._tries, beams, strict=True)]
        return all(node in known for known, own in zip(self._target.known, nodes, strict=True) for node in own)

    @property
    def compiled(self) -> bool:
        """Whether something of the last forward compiled."""
        return any(reader.was_compiling for reader in self._readers)

    @property
    def _readers(self) -> list[Reader]:
        return [self._target, *([] if self._draft is None else [self._draft])]

    def open(self, texts: Sequence[Tensor], longest: int) -> None:
        """New texts, [length] int64 each, which all their beams begin with; none gets longer than `longest`."""
        self._tries = [Trie(len(text) - 1, [int(text[-1])]) for text in texts]
        self._beams = [[0] * self._n_beams for _ in texts]
        for reader in self._readers:
            reader.open(texts, longest + SLOTS + 1)

    def answer(self, beams: Sequence[Sequence[Sequence[int]]], depth: int) -> Tensor:
        """The target's logits [B * W, V] after each beam.

        Args:
            beams: by sample and beam, its tokens after the sample's node 0 (see `committed`). depth: how many layers
                are speculated where the target has to run.
        """
        self._beams = [[self._at(trie, beam) for beam in own] for trie, own in zip(self._tries, beams, strict=True)]
        known = self._target.known
        for reader in self._readers:
            reader.was_compiling = False
        if not self.knows(beams):
            if self._draft is not None and depth:
                self._speculate(self._draft, depth)
            self._read(self._target, [range(len(trie.tokens)) for trie in self._tries])
            self.n_forwards += 1
        rows = [known[b][node] for b, own in enumerate(self._beams) for node in own]
        logits = torch.stack([said.logits[said.row] for said in rows])
        self._commit()
        return logits

    def committed(self, sample: int) -> int:
        """How many tokens of a sample's text come before its node 0."""
        return self._tries[sample].length

    @staticmethod
    def _at(trie: Trie, tokens: Sequence[int]) -> int:
        node = 0
        for token in tokens:
            node = trie.child(node, token)
        return node

    def _read(self, reader: Reader, nodes: Sequence[Sequence[int]]) -> None:
        """Let a model read those of these nodes of each sample that it has not read, ascending."""
        needed = max(trie.length + len(trie.tokens) for trie in self._tries) + 1
        for each in self._readers:  # both: nodes move in both caches
            if needed > each.view.cache.n_slots:
                each.grow(needed + SLOTS)
        unread = [[node for node in own if node not in known] for own, known in zip(nodes, reader.known, strict=True)]
        reader.read(self._tries, unread)

    def _speculate(self, draft: Reader, depth: int) -> None:
        """Let the draft search `depth` layers ahead from where the beams are, and make nodes of what it comes to."""
        frontier = [self._scored(b) for b in range(len(self._tries))]
        for layer in range(depth):
            above = [{n for node in nodes for n in self._tries[b].path(node)} for b, nodes in enumerate(frontier)]
            if not layer or any(n not in self._target.known[b] for b, nodes in enumerate(frontier) for n in nodes):
                self._read(draft, [sorted(nodes) for nodes in above])
            frontier = [self._next(draft, b, nodes) for b, nodes in enumerate(frontier)]

    def _scored(self, sample: int) -> dict[int, float]:
        """A sample's beams with the logarithms of their probabilities after node 0, as far as is known."""
        scores, trie = {}, self._tries[sample]
        for beam in set(self._beams[sample]):
            score, path = 0.0, trie.path(beam)
            for parent, node in pairwise(path):
                best = dict(self._target.known[sample][parent].best)
                score += best.get(trie.tokens[node], min(best.values()))
            scores[beam] = score
        return scores

    def _next(self, draft: Reader, sample: int, frontier: dict[int, float]) -> dict[int, float]:
        """The best continuations of a layer's nodes, as many as there are beams, by what the target has said or else
        the draft says."""
        trie, offers = self._tries[sample], []
        for node, score in frontier.items():
            said = self._target.known[sample].get(node) or draft.known[sample][node]
            offers += [(score + log, node, token) for token, log in said.best if token not in self._ends]
        offers.sort(key=lambda offer: -offer[0])
        return {trie.child(node, token): score for score, node, token in offers[: self._n_beams]}

    def _commit(self) -> None:
        """Commit what all beams share, and drop what no beam can come to."""
        moves = []
        for b, (trie, beams) in enumerate(zip(self._tries, self._beams, strict=True)):
            is_done = set.intersection(*(set(reader.known[b]) for reader in self._readers))
            moves.append(trie.kept(beams, is_done))
        if all(len(path) + len(stays) == len(trie.tokens) and not path
               for (path, stays), trie in zip(moves, self._tries, strict=True)):  # fmt: skip
            return
        width = max(len(path) + len(stays) for path, stays in moves)
        lengths = self._target.sent([trie.length for trie in self._tries])
        sent = [path + stays + [0] * (width - len(path) - len(stays)) for path, stays in moves]
        n_path = self._target.sent([len(path) + len(stays) for path, stays in moves])
        new = [trie.move(*move) for trie, move in zip(self._tries, moves, strict=True)]
        self._beams = [[n[node] for node in own] for n, own in zip(new, self._beams, strict=True)]
        for reader in self._readers:
            reader.move(lengths, self._target.sent(sent), n_path, new)
