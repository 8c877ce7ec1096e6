"""BatchState: what a batch is, on the device, between two steps.

Letters: B samples, M longest text + 1, N nodes of the drafted tree, D its depth.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.tree import TokenTree


class BatchState:
    """Texts, lengths and ends of a batch of samples; every step updates it in place, without asking the host.

    Args:
        n_rows: B. n_columns: M, one more than the longest text. n_ends: E, room for so many end-of-text ids.
        tree: the shape of what a step drafts.

    Attributes:
        limits: [B] int64, the length each text may not pass.
        tokens: [B, M] int64. `tokens[b, :lengths[b]]` are committed (their keys and values are in the cache);
            `tokens[b, lengths[b]]` is pending.
        lengths: [B] int64.
        finished: [B] bool.
        new_tokens: [B, D + 1] int64, what the last step added to each text.
        n_new: [B] int64, how many of them count.
        proposed, accepted, reached: [N] int64, by node, summed over live samples and steps: how often the node was
            drafted, was on the accepted path (the root always is), and was there with children to go on to.
        broken: [B] bool, the target's law held a NaN.
    """

    _PER_SAMPLE = ("limits", "tokens", "lengths", "finished", "broken", "seeds", "new_tokens", "n_new")

    def __init__(self, n_rows: int, n_columns: int, n_ends: int, tree: TokenTree, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.limits, self.lengths, self.seeds, self.n_new = (zeros(n_rows) for _ in range(4))
        self.tokens = zeros(n_rows, n_columns)
        self.finished, self.broken = (zeros(n_rows, dtype=torch.bool) for _ in range(2))
        self.eos_ids = zeros(n_ends)
        self.new_tokens = zeros(n_rows, tree.depth + 1)
        self.proposed, self.accepted, self.reached = (zeros(len(tree)) for _ in range(3))
        _, self._depths, self._first_child, *_ = tree.topology(device)
        self._mark_dynamic()

    @classmethod
    def of(
        cls, prompts: list[Tensor], max_new_tokens: int, seeds: Tensor, eos_ids: Tensor, tree: TokenTree
    ) -> BatchState:
        """A state of exactly this size; see `load`."""
        n_columns, n_ends = cls.room_for(prompts, max_new_tokens, eos_ids)
        state = cls(len(prompts), n_columns, n_ends, tree, seeds.device)
        state.load(prompts, max_new_tokens, seeds, eos_ids)
        return state

    @staticmethod
    def room_for(prompts: list[Tensor], max_new_tokens: int, eos_ids: Tensor) -> tuple[int, int]:
        """Columns and end-of-text ids that these need; the ids in whole eights, so that few numbers occur."""
        return max(len(p) for p in prompts) + max_new_tokens + 1, 8 * (len(eos_ids) // 8 + 1)

    def load(self, prompts: list[Tensor], max_new_tokens: int, seeds: Tensor, eos_ids: Tensor) -> None:
        """Begin a batch in place. Rows beyond the prompts are finished from the start.

        Args:
            prompts: one [length] int64 tensor a sample, at least one token each.
            max_new_tokens: at most this many tokens are added to a text.
            seeds: [B] int64, one per prompt. eos_ids: [E] int64, tokens that end a text; may be empty.
        """
        n_rows, n_columns = self.tokens.shape
        tokens = torch.zeros(n_rows, n_columns, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        sizes = torch.tensor([len(p) for p in prompts] + [1] * (n_rows - len(prompts)))
        self.tokens.copy_(tokens)
        self.lengths.copy_(sizes - 1)
        self.limits.copy_(sizes + max_new_tokens)
        self.seeds[: len(prompts)] = seeds
        self.finished.copy_(torch.arange(n_rows) >= len(prompts))
        self.broken.zero_()
        # Filled up with an id no token has.
        self.eos_ids.copy_(F.pad(eos_ids, (0, len(self.eos_ids) - len(eos_ids)), value=-1))
        for counts in (self.proposed, self.accepted, self.reached):
            counts.zero_()

    def admit(self, row: int, prompt: Tensor, max_new_tokens: int, seed: Tensor) -> None:
        """Begin another text in a row whose own has ended; the other rows go on.

        Args:
            prompt: [length] int64, at least one token. seed: [] int64.

        Raises:
            ValueError: there is no prompt or nothing to write, or the row has no room for it.
        """
        length, n_columns = len(prompt), self.tokens.shape[1]
        if length < 1 or max_new_tokens < 1:
            raise ValueError(f"a prompt of {length} tokens and {max_new_tokens} new ones: both must be at least 1")
        if length + max_new_tokens + 1 > n_columns:
            raise ValueError(f"{length} tokens and {max_new_tokens} new ones do not fit into {n_columns} columns")
        self.tokens[row].zero_()
        self.tokens[row, :length] = prompt
        self.lengths[row], self.limits[row] = length - 1, length + max_new_tokens
        self.seeds[row] = seed
        self.finished[row] = self.broken[row] = False

    def _mark_dynamic(self) -> None:
        """One compiled step serves texts of any length, and one serves all batches of several samples."""
        torch._dynamo.maybe_mark_dynamic(self.tokens, 1)
        if len(self.lengths) > 1:
            for name in self._PER_SAMPLE:
                torch._dynamo.maybe_mark_dynamic(getattr(self, name), 0)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, columns and end-of-text ids there is room for."""
        return (*self.tokens.shape, len(self.eos_ids))

    @property
    def pending(self) -> Tensor:
        """[B] int64, the last token of each text, not yet in the cache."""
        return self.tokens.gather(1, self.lengths[:, None])[:, 0]

    def commit(self, tokens: Tensor, n_nodes: Tensor, path: Tensor, n_accepted: Tensor, bonus: Tensor) -> None:
        """Append the accepted path's tokens and the bonus token, up to the first end of text or the length limit.

        Args:
            tokens: [B, N] int64, of all nodes. n_nodes: [B] int64, how many of them were there. path: [B, D + 1]
                int64, the accepted nodes, the root first. n_accepted: [B] int64, drafted ones among them.
            bonus: [B] int64.
        """
        place = torch.arange(path.shape[1], device=bonus.device)
        following = F.pad(path[:, 1:], (0, 1))  # the nodes whose tokens are new
        new = torch.where(place < n_accepted[:, None], tokens.gather(1, following), bonus[:, None])

        room = (self.limits - self.lengths - 1).clamp(min=0)
        n_new = torch.minimum(n_accepted + 1, room)
        ends = (new[..., None] == self.eos_ids).any(-1) & (place < n_new[:, None])
        n_new = torch.where(ends.any(1), ends.int().argmax(1) + 1, n_new)
        n_new = torch.where(self.finished, 0, n_new)

        node = torch.arange(len(self.proposed), device=bonus.device)
        self.proposed += ((node < n_nodes[:, None]) & (self._depths <= room[:, None])).sum(0)
        counted = (place <= torch.minimum(n_accepted, room)[:, None]) & ~self.finished[:, None]
        taken = (path[..., None] == node) & counted[..., None]  # [B, D + 1, N]
        self.accepted += taken.sum((0, 1))
        goes_on = (place < room[:, None])[..., None] & (self._first_child < n_nodes[:, None])[:, None]
        self.reached += (taken & goes_on).sum((0, 1))

        # Places past the end write the text's last column, which no text reaches.
        column = torch.where(place < n_new[:, None], self.lengths[:, None] + 1 + place, self.tokens.shape[1] - 1)
        self.tokens.scatter_(1, column, new)
        self.lengths += n_new
        self.finished |= ends.any(1) | (self.lengths + 1 >= self.limits)
        self.new_tokens.copy_(new)
        self.n_new.copy_(n_new)

    def report(self) -> Tensor:
        """[B, D + 4] int64 for the host: the new tokens, their number, whether finished, whether broken."""
        flags = torch.stack([self.n_new, self.finished.long(), self.broken.long()], 1)
        return torch.cat([self.new_tokens, flags], 1)
