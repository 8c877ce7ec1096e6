"""BatchState: what a batch is, on the device, between two steps.

Letters: B samples, M columns, N nodes of the drafted tree, D its depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.engine.draft import Draft
from specdec.engine.tree import TokenTree
from specdec.graphs.captured import Upload
from specdec.verifiers.base import DraftLaw

READ = 2
"""Tokens of each text that a drafter reads in a step after one in which it has drafted: the pending one, and the one
before it, which it may have drafted itself and then not read."""


class BatchState:
    """Texts, lengths and ends of a batch of samples; every step updates it in place, without asking the host.

    Args:
        n_rows: B. n_columns: M, more than any text is to have tokens before `grow`. n_ends: E, room for so many
            end-of-text ids.
        tree: what is drafted a step. support_size: C, the ids kept of a draft law, or 0 where there is none.

    Attributes:
        limits: [B] int64, the length each text may not pass.
        tokens: [B, M] int64. `tokens[b, :lengths[b]]` are committed (their keys and values are in the cache);
            `tokens[b, lengths[b]]` is pending.
        lengths: [B] int64.
        finished: [B] bool; also where there is no text, or not all of its prompt is in the cache.
        draft: what was drafted last for each text.
        allowed: [B] int64, how many drafted nodes of each the target is to judge, at most.
        unread: [B] int64, how many of each text's last tokens, the pending one included, a drafter reads in this step
            before it drafts; none where it drafts nothing. fed: [F] int64, 0, 1, ..., F - 1, as many as these at least.
        new_tokens: [B, D + 1] int64, what the last step added to each text.
        n_new: [B] int64, how many of them count. n_judged: [B] int64, how many drafted nodes the target judged.
        proposed, accepted, reached: [N] int64, by node, summed over live samples and steps: how often the node was
            drafted, was on the accepted path (the root always is), and was there with children to go on to.
        broken: [B] bool, the target's law held a NaN.
    """

    _PER_SAMPLE = (
        "limits", "tokens", "lengths", "finished", "broken", "seeds", "new_tokens", "n_new", "allowed", "n_judged",
        "unread",
    )  # fmt: skip

    def __init__(
        self, n_rows: int, n_columns: int, n_ends: int, tree: TokenTree, support_size: int, device: torch.device
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._longest = n_columns - 1
        self.limits, self.lengths, self.seeds, self.n_new, self.allowed, self.n_judged = (
            zeros(n_rows) for _ in range(6)
        )
        self._allowed = Upload(self.allowed)
        self.unread = zeros(n_rows) + READ
        self.fed = torch.arange(READ * n_rows, dtype=torch.int64, device=device)
        self._unread = Upload(self.unread)
        self.tokens = zeros(n_rows, n_columns)
        self.finished, self.broken = (zeros(n_rows, dtype=torch.bool) for _ in range(2))
        self.eos_ids = zeros(n_ends)
        self.new_tokens = zeros(n_rows, tree.depth + 1)
        self.draft = Draft(zeros(n_rows, len(tree) - 1), zeros(n_rows))
        if support_size:
            n_inner = len(tree.inner)
            ids, probs = (zeros(n_rows, n_inner, support_size, dtype=dtype) for dtype in (torch.int64, torch.float32))
            self.draft.law = DraftLaw(zeros(n_rows, len(tree) - 1), ids, probs, zeros(n_rows, n_inner))
        self.proposed, self.accepted, self.reached = (zeros(len(tree)) for _ in range(3))
        _, self._depths, self._first_child, *_ = tree.topology(device)
        self._mark_dynamic()

    def clear(self, eos_ids: Tensor, longest: int) -> None:
        """No texts; `eos_ids` [E] int64 end those to come, and may be empty, as do `longest` tokens."""
        self._longest = longest
        self.finished.fill_(True)
        self.lengths.zero_()
        # Filled up with an id no token has.
        self.eos_ids.copy_(F.pad(eos_ids, (0, len(self.eos_ids) - len(eos_ids)), value=-1))
        for counts in (self.proposed, self.accepted, self.reached):
            counts.zero_()

    def admit(self, row: int, prompt: Tensor, max_new_tokens: int, seed: int) -> None:
        """Another text in a row that has none, or whose own has ended; `finished` until `start`.

        Args:
            prompt: [length] int64, at least one token. seed: int64.

        Raises:
            ValueError: there is no prompt or nothing to write, or the row has no room for it.
        """
        length, n_columns = len(prompt), self.tokens.shape[1]
        if length < 1 or max_new_tokens < 1:
            raise ValueError(f"a prompt of {length} tokens and {max_new_tokens} new ones: both must be at least 1")
        if length + max_new_tokens > self._longest or length >= n_columns:
            room = f"a batch of texts of {self._longest} tokens, {n_columns} columns"
            raise ValueError(f"{length} tokens and {max_new_tokens} new ones do not fit into {room}")
        self.finished[row] = True
        self.tokens[row].zero_()
        self.tokens[row, :length] = prompt
        self.lengths[row], self.limits[row] = length - 1, length + max_new_tokens
        self.seeds[row] = seed
        self.broken[row] = False
        self.draft.counts[row] = 0  # nothing has been drafted for it

    def grow(self, n_columns: int) -> None:
        """Room for longer texts; what is there stays."""
        self.tokens = F.pad(self.tokens, (0, n_columns - self.tokens.shape[1]))
        self._mark_dynamic()

    def start(self, row: int) -> None:
        """The row's prompt is in the caches: decode it."""
        self.finished[row] = False

    def stop(self, row: int) -> None:
        """Decode it no further."""
        self.finished[row] = True

    def allow(self, n_nodes: list[int]) -> None:
        """Of each row, let so many drafted nodes be judged."""
        self._allowed.send(n_nodes)

    def feed(self, n_tokens: list[int], fed: Tensor) -> None:
        """Let a drafter read so many last tokens of each row's text; `fed` [F] int64 counts at least as many."""
        self._unread.send(n_tokens)
        self.fed = fed

    def _mark_dynamic(self) -> None:
        """One compiled step serves texts of any length, and one serves all batches of several samples."""
        torch._dynamo.maybe_mark_dynamic(self.tokens, 1)
        if len(self.lengths) > 1:
            for tensor in self._per_sample():
                torch._dynamo.maybe_mark_dynamic(tensor, 0)

    def _per_sample(self) -> list[Tensor]:
        law = () if self.draft.law is None else self.draft.law.tensors
        return [*(getattr(self, name) for name in self._PER_SAMPLE), self.draft.tokens, self.draft.counts, *law]

    def check_rows(self) -> None:
        """Every tensor has B rows. A compiled function must know before its first layer: layers are compiled with the
        names of sizes, which change when two turn out to be one."""
        for tensor in self._per_sample():
            torch._check(tensor.shape[0] == self.lengths.shape[0])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, columns and end-of-text ids there is room for."""
        return (*self.tokens.shape, len(self.eos_ids))

    @property
    def pending(self) -> Tensor:
        """[B] int64, the last token of each text, not yet in the cache."""
        return self.tokens.gather(1, self.lengths[:, None])[:, 0]

    @property
    def tree_tokens(self) -> Tensor:
        """[B, N] int64, the pending token and what was drafted after it."""
        return torch.cat([self.pending[:, None], self.draft.tokens], 1)

    def propose(self, draft: Draft) -> None:
        """Keep a draft of the tree, or of its first levels."""
        pairs = [(self.draft.tokens, draft.tokens)]
        if self.draft.law is not None and draft.law is not None:
            pairs += zip(self.draft.law.tensors, draft.law.tensors, strict=True)
        for kept, new in pairs:
            kept[:, : new.shape[1]].copy_(new)
        self.draft.counts.copy_(draft.counts)

    def overlay(self, found: dict[int, list[int]], keeps: bool) -> None:
        """Propose chains that follow from the texts without chance, which the host has found, by row, one token at
        least each; of other rows keep what has been drafted, or nothing."""
        n_rows, width = self.draft.tokens.shape
        none = [0 if keeps else 1, 0, *[0] * width]
        given = [[1, len(found[row]), *found[row], *[0] * (width - len(found[row]))] if row in found else none
                 for row in range(n_rows)]  # fmt: skip
        sent = torch.tensor(given, dtype=torch.int64, device="cpu", pin_memory=self.lengths.is_cuda)
        sent = sent.to(self.lengths.device, non_blocking=True)
        ours, counts, tokens = sent[:, 0] > 0, sent[:, 1], sent[:, 2:]
        self.draft.counts.copy_(torch.where(ours, counts, self.draft.counts))
        self.draft.tokens.copy_(torch.where(ours[:, None], tokens, self.draft.tokens))
        if (law := self.draft.law) is not None:  # each the only child, and certain
            ours = ours[:, None]
            law.places.masked_fill_(ours, 0)
            law.n_hubs.masked_fill_(ours, 1)
            law.support_probs.masked_fill_(ours[..., None], 0.0)
            law.support_probs[..., 0].masked_fill_(ours, 1.0)
            law.support_ids[..., 0] = torch.where(ours, tokens, law.support_ids[..., 0])

    def n_nodes(self, n_tokens: int) -> Tensor:
        """[B] int64: how many nodes of each tree a forward of `n_tokens` tokens takes: all roots of unfinished samples,
        and of their drafts as much as is allowed and there is room for, first come, first served."""
        alive = (~self.finished).long()
        wanted = torch.minimum(self.draft.counts, self.allowed) * alive
        room = n_tokens - alive.sum() - (wanted.cumsum(0) - wanted)
        return alive + torch.minimum(wanted, room.clamp(min=0))

    def commit(self, tokens: Tensor, n_nodes: Tensor, path: Tensor, n_accepted: Tensor, bonus: Tensor) -> Tensor:
        """Append the accepted path's tokens and the bonus token, up to the first end of text or the length limit.

        Args:
            tokens: [B, N] int64, of all nodes. n_nodes: [B] int64, how many of them were there. path: [B, D + 1]
                int64, the accepted nodes, the root first. n_accepted: [B] int64, drafted ones among them.
            bonus: [B] int64.

        Returns:
            [B] int64, how many of the accepted nodes are within the text.
        """
        place = torch.arange(path.shape[1], device=bonus.device, dtype=torch.int64)
        following = F.pad(path[:, 1:], (0, 1))  # the nodes whose tokens are new
        new = torch.where(place < n_accepted[:, None], tokens.gather(1, following), bonus[:, None])

        room = (self.limits - self.lengths - 1).clamp(min=0)
        n_new = torch.minimum(n_accepted + 1, room)
        ends = (new[..., None] == self.eos_ids).any(-1) & (place < n_new[:, None])
        n_new = torch.where(ends.any(1), ends.int().argmax(1) + 1, n_new)
        n_new = torch.where(self.finished, 0, n_new)

        # What came after the text's end was verified, and is nobody's.
        reach = torch.where(ends.any(1), n_new, room)
        node = torch.arange(len(self.proposed), device=bonus.device, dtype=torch.int64)
        self.proposed += ((node < n_nodes[:, None]) & (self._depths <= reach[:, None])).sum(0)
        counted = (place <= torch.minimum(n_accepted, reach)[:, None]) & ~self.finished[:, None]
        taken = (path[..., None] == node) & counted[..., None]  # [B, D + 1, N]
        self.accepted += taken.sum((0, 1))
        goes_on = (place < reach[:, None])[..., None] & (self._first_child < n_nodes[:, None])[:, None]
        self.reached += (taken & goes_on).sum((0, 1))

        # Places past the end write the text's last column, which no text reaches.
        column = torch.where(place < n_new[:, None], self.lengths[:, None] + 1 + place, self.tokens.shape[1] - 1)
        self.tokens.scatter_(1, column, new)
        self.lengths += n_new
        self.finished |= ends.any(1) | (self.lengths + 1 >= self.limits)
        self.new_tokens.copy_(new)
        self.n_new.copy_(n_new)
        self.n_judged.copy_((n_nodes - 1).clamp(min=0))
        return torch.minimum(n_accepted, n_new)

    def report(self, n_accepted: Tensor) -> Tensor:
        """[B, D + 7] int64 for the host, a `Report` of each sample; `n_accepted` [B] as `commit` says."""
        counts = (self.n_new, self.draft.counts, self.n_judged, n_accepted)
        return torch.cat([self.new_tokens, torch.stack([*counts, self.finished.long(), self.broken.long()], 1)], 1)


@dataclass(frozen=True)
class Report:
    """What a step says of one sample.

    Attributes:
        tokens: new ones. n_found: how many nodes were drafted. n_judged: how many of them the target judged.
        n_accepted: how many of those it accepted, up to the text's end.
        finished: whether the text has ended. broken: whether there was no law to sample from, or the user's code
            failed.
    """

    tokens: list[int]
    n_found: int
    n_judged: int
    n_accepted: int
    finished: bool
    broken: bool

    @classmethod
    def of(cls, row: list[int]) -> Report:
        """One row of `BatchState.report`."""
        *tokens, n_new, n_found, n_judged, n_accepted, finished, broken = row
        return cls(tokens[:n_new], n_found, n_judged, n_accepted, bool(finished), bool(broken))
