"""Nodes: where the flat tokens of one forward belong.

Every forward sees the new tokens of all samples concatenated, [1, T], without padding. `Nodes` says for each of them
which sample it belongs to, where its keys go, at which position it sits and which keys it sees. Built on the device
from tensors: nothing here asks the host.

Letters: T tokens in this forward, B samples, R query rows a sample at most, N uncommitted slots, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.attention.tree_mask import unpack_words


@dataclass
class Nodes:
    """The flat tokens of one forward and what they attend to.

    Attributes:
        slot: [T] int64, flat cache slot `sample * S + offset`; tokens of no sample go to scratch.
        position: [T] int64, position in the sample's own text, as the model's position ids see it.
        lengths: [B] int64, committed entries before this forward.
        starts: [B + 1] int64: tokens `starts[b] .. starts[b + 1] - 1` are sample b's; any others are nobody's.
        sample: [T] int64, the sample of each token; some sample for tokens of nobody.
        node: [T] int64, the uncommitted slot of each token.
        rows: R, the most tokens of one sample.
        bits, depths: ancestor words [N, W] and depths [N] of the uncommitted slots, or [B, N, W] and [B, N] where each
            sample has a tree of its own; None for plain causal text.
        among, reach: what the host knows of a prompt's text, and not of a step: [A] int64, the samples that have
            tokens, of which a grid then has rows, and the number of slots any of them can see.
    """

    slot: Tensor
    position: Tensor
    lengths: Tensor
    starts: Tensor
    sample: Tensor
    node: Tensor
    rows: int
    bits: Tensor | None = None
    depths: Tensor | None = None
    among: Tensor | None = None
    reach: int = 0

    @classmethod
    def packed(
        cls,
        lengths: Tensor,
        counts: Tensor,
        token: Tensor,
        rows: int,
        n_slots: int,
        bits: Tensor | None = None,
        depths: Tensor | None = None,
        first: int = 0,
    ) -> Nodes:
        """`counts[b]` nodes of every sample's tree from node `first` on, or next tokens of plain text, unpadded.

        Args:
            lengths, counts: [B] int64. token: [T] int64, 0, 1, ..., at least as many as `counts` sum to; those past
                the sum belong to no sample. rows: R, at least the largest count. bits, depths: the tree's, or None
                for text.
        """
        ends = counts.cumsum(0)
        starts = F.pad(ends, (1, 0))
        # Not in `starts[1:]`, which are these: for CUDA, Inductor 2.11 looks things up in no view of a tensor.
        sample = torch.searchsorted(ends, token, right=True).clamp(max=len(lengths) - 1)
        length = lengths[sample]
        valid = token < starts[-1]
        node = torch.where(valid, first + token - starts[sample], first)
        offset = length + node
        slot = sample * n_slots + torch.where(valid & (offset >= 0), offset, n_slots - 1)
        position = offset if depths is None else length + depths[node]
        return cls(slot, position.clamp(min=0), lengths, starts, sample, node, rows, bits, depths)

    def spread(self, nodes: Tensor, n_slots: int) -> Nodes:
        """Of one token a sample, several: `nodes` [w] int64 of each sample's tree."""
        assert self.depths is not None
        width = len(nodes)
        own = torch.arange(len(self.slot), device=self.slot.device, dtype=torch.int64) < self.starts[-1]
        length = self.lengths[self.sample]
        slot = torch.where(own[:, None], length[:, None] + nodes, n_slots - 1) + (self.sample * n_slots)[:, None]
        position = length[:, None] + self.depths[nodes]
        return replace(
            self,
            slot=slot.flatten(),
            position=position.flatten(),
            starts=self.starts * width,
            sample=self.sample[:, None].expand(-1, width).flatten(),
            node=nodes.repeat(len(self.slot)),
            rows=width,
        )

    def to_grid(self, x: Tensor) -> Tensor:
        """[T, ...] to [B, R, ...]; places without a token hold some other token's values."""
        first = self.starts[:-1] if self.among is None else self.starts[self.among]
        place = first[:, None] + torch.arange(self.rows, device=x.device, dtype=torch.int64)
        return x[place.clamp(max=len(x) - 1)]

    def from_grid(self, x: Tensor) -> Tensor:
        """[B, R, ...] to [T, ...]; tokens of nobody get some other token's values."""
        row = torch.arange(len(self.sample), device=x.device, dtype=torch.int64) - self.starts[self.sample]
        sample = self.sample if self.among is None else torch.searchsorted(self.among, self.sample)
        return x[sample, row.clamp(0, self.rows - 1)]

    def mask(self, allowed: Callable[..., Tensor], n_slots: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [B or A, 1, R, S]: the committed text and one's ancestors, where the model's rule allows it.

        Args:
            allowed: transformers' mask function `(batch, head, query_position, key_position) -> bool`, evaluated at
                real positions, so that sliding windows and chunks count tokens of the text and not slots.
        """
        row_node, row_position = self.to_grid(self.node), self.to_grid(self.position)
        lengths = self.lengths if self.among is None else self.lengths[self.among]
        slot = torch.arange(n_slots, device=lengths.device, dtype=torch.int64)
        offset = slot - lengths[:, None]  # [B, S]; negative for the committed text
        if self.bits is None or self.depths is None:
            visible = offset[:, None] <= row_node[..., None]
            key_position = slot.expand(len(lengths), -1)
        else:
            n_nodes, n_batch = self.depths.shape[-1], len(lengths)
            bits, depths = self.bits.expand(n_batch, -1, -1), self.depths.expand(n_batch, -1)
            inside = (offset >= 0) & (offset < n_nodes)
            key_node = offset.clamp(0, n_nodes - 1)
            sample = torch.arange(n_batch, device=lengths.device, dtype=torch.int64)
            ancestors = unpack_words(bits[sample[:, None], row_node], n_nodes)  # [B, R, N]
            ancestors = ancestors.gather(2, key_node[:, None].expand(-1, self.rows, -1))
            visible = (offset < 0)[:, None] | (inside[:, None] & ancestors)
            key_position = torch.where(inside, lengths[:, None] + depths.gather(1, key_node), slot)
        visible = visible & allowed(0 * slot[0], 0, row_position[..., None], key_position[:, None])  # one text to it
        # A place without a token may see nothing; its row must stay finite all the same, or the NaN it writes to
        # scratch would reach every other row as 0 * NaN.
        visible = visible | ~visible.any(-1, keepdim=True)
        zero = torch.zeros((), dtype=dtype, device=visible.device)
        return torch.where(visible, zero, -torch.inf)[:, None]

    def flat_mask(self, allowed: Callable[..., Tensor], n_slots: int, dtype: torch.dtype) -> Tensor:
        """The same [1, 1, T, B * S], over the slots of all samples one after the other."""
        nodes = replace(self, among=None)
        own = nodes.from_grid(nodes.mask(allowed, n_slots, dtype)[:, 0])  # [T, S]
        sample = torch.arange(len(self.lengths), device=own.device, dtype=torch.int64)
        lowest = torch.finfo(dtype).min  # a model's own attention may not expect infinity
        mask = torch.where(self.sample[:, None, None] == sample[:, None], own[:, None].clamp(min=lowest), lowest)
        return mask.flatten(1)[None, None]
