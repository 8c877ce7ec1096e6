"""Nodes: where the flat tokens of one forward belong.

Every forward sees the new tokens of all samples concatenated, [1, T], without padding. `Nodes` says for each of them
which sample it belongs to, where its keys go, at which position it sits and which keys it sees. Built on the device
from tensors: nothing here asks the host.

Letters: T tokens in this forward, B samples, R query rows a sample at most, N uncommitted slots, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.tree_mask import unpack_words


@dataclass
class Nodes:
    """The flat tokens of one forward and what they attend to.

    Attributes:
        slot: [T] int64, flat cache slot `sample * S + offset`; tokens of no sample go to scratch.
        position: [T] int64, position in the sample's own text, as the model's position ids see it.
        lengths: [B] int64, committed entries before this forward.
        grid_rows: R. The tokens viewed as [B, R] are this grid, or `token_of` maps it to them.
        token_of: [B, R] int64, the flat token at each place of the grid, or None when tokens are in grid order.
        grid_of: [T] int64, the grid place of each token, or None.
        row_node: [B, R] int64, the uncommitted slot of each row.
        row_position: [B, R] int64.
        bits, depths: ancestor words [N, W] and depths [N] of the uncommitted slots; None for plain causal text.
    """

    slot: Tensor
    position: Tensor
    lengths: Tensor
    grid_rows: int
    row_node: Tensor
    row_position: Tensor
    token_of: Tensor | None = None
    grid_of: Tensor | None = None
    bits: Tensor | None = None
    depths: Tensor | None = None

    @property
    def is_grid(self) -> bool:
        """Whether these are tree nodes in grid order, which the fused CPU attention takes."""
        return self.token_of is None

    @classmethod
    def of_tree(
        cls, lengths: Tensor, bits: Tensor, depths: Tensor, first: int, rows: int, valid: Tensor, n_slots: int
    ) -> Nodes:
        """Nodes `first .. first + rows` of every sample's tree, in grid order (T = B * rows).

        Args:
            lengths: [B] int64. bits, depths: the tree's. valid: [B, rows] bool, False for places without a token.
        """
        node = torch.arange(first, first + rows, device=lengths.device).repeat(len(lengths), 1)
        position = (lengths[:, None] + depths[first : first + rows]).clamp(min=0)
        slot = _slots(lengths[:, None] + node, valid, n_slots)
        return cls(slot.flatten(), position.flatten(), lengths, rows, node, position, bits=bits, depths=depths)

    @classmethod
    def of_text(cls, lengths: Tensor, counts: Tensor, n_tokens: int, rows: int, n_slots: int) -> Nodes:
        """`counts[b]` consecutive new tokens of every sample, packed without padding.

        Args:
            lengths, counts: [B] int64. n_tokens: T, at least the sum of `counts`; tokens past the sum belong to no
                sample. rows: R, at least the largest count.
        """
        device = lengths.device
        ends = counts.cumsum(0)
        token = torch.arange(n_tokens, device=device)
        sample = torch.searchsorted(ends, token, right=True).clamp(max=len(lengths) - 1)
        row = token - (ends - counts)[sample]
        valid = token < ends[-1]
        row_node = torch.arange(rows, device=device).expand(len(lengths), -1)
        position = lengths[sample] + row
        base = sample * n_slots
        return cls(
            torch.where(valid, base + position, n_slots - 1),
            torch.where(valid, position, 0),
            lengths,
            rows,
            row_node,
            lengths[:, None] + row_node,
            token_of=((ends - counts)[:, None] + row_node).clamp(max=n_tokens - 1),
            grid_of=torch.where(valid, sample * rows + row, 0),
        )

    def to_grid(self, x: Tensor) -> Tensor:
        """[T, ...] to [B, R, ...]; places without a token hold some other token's values."""
        if self.token_of is None:
            return x.view(-1, self.grid_rows, *x.shape[1:])
        return x[self.token_of]

    def from_grid(self, x: Tensor) -> Tensor:
        """[B, R, ...] to [T, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.grid_of is None else flat[self.grid_of]

    def mask(self, allowed: Callable[..., Tensor], n_slots: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [B, 1, R, S]: the committed text and one's ancestors, where the model's rule allows it.

        Args:
            allowed: transformers' mask function `(batch, head, query_position, key_position) -> bool`, evaluated at
                real positions, so that sliding windows and chunks count tokens of the text and not slots.
        """
        slot = torch.arange(n_slots, device=self.lengths.device)
        offset = slot - self.lengths[:, None]  # [B, S]; negative for the committed text
        if self.bits is None or self.depths is None:
            visible = offset[:, None] <= self.row_node[..., None]
            key_position = slot.expand(len(self.lengths), -1)
        else:
            n_nodes = len(self.depths)
            inside = (offset >= 0) & (offset < n_nodes)
            node = offset.clamp(0, n_nodes - 1)
            ancestors = unpack_words(self.bits, n_nodes)[self.row_node[0]]  # [R, N]: all samples share the rows
            committed = (offset < 0)[:, None]
            visible = committed | (inside[:, None] & ancestors[:, node].transpose(0, 1))
            key_position = torch.where(inside, self.lengths[:, None] + self.depths[node], slot)
        sample = torch.arange(len(self.lengths), device=slot.device)[:, None, None]
        visible = visible & allowed(sample, 0, self.row_position[..., None], key_position[:, None])
        # A place without a token may see nothing; its row must stay finite all the same, or the NaN it writes to
        # scratch would reach every other row as 0 * NaN.
        visible = visible | ~visible.any(-1, keepdim=True)
        return torch.where(visible, 0.0, float("-inf")).to(dtype)[:, None]


def _slots(offset: Tensor, valid: Tensor, n_slots: int) -> Tensor:
    """Flat slots [B, R]; places that hold no token, or would fall before the text, go to the sample's scratch slot."""
    base = torch.arange(len(offset), device=offset.device)[:, None] * n_slots
    return base + torch.where(valid & (offset >= 0), offset, n_slots - 1)
