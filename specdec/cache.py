"""RaggedCache: transformers' cache interface over one tensor a layer, every sample at its own length."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from specdec.kernels.kv_cache import kv_append_
from specdec.nodes import Nodes


class RaggedLayer:
    """Keys and values of one layer, [G, B, S, D] each. Slot S - 1 is scratch (see `specdec.kernels.kv_cache`)."""

    is_sliding = False
    is_compileable = True
    is_initialized = True

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        # The fused CPU attention finds the layer through this table (see `specdec.kernels.ragged_attention`).
        self.table = torch.tensor([keys.data_ptr(), values.data_ptr(), keys.shape[2]])
        for tensor in (keys, values):
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
            if tensor.shape[1] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)


class RaggedCache(Cache):
    """A cache whose samples grow at their own pace. The current forward's `Nodes` say where new entries go.

    Args:
        can_fuse: run tree nodes through the fused CPU attention: for float32 on a CPU with a C++ compiler.

    `nodes` is the metadata of the forward in flight: it travels on the cache, which every model passes along,
    because models drop keyword arguments they do not know.
    """

    def __init__(self, can_fuse: bool) -> None:
        self.layers: list[Any] = []  # of RaggedLayer
        self.can_fuse = can_fuse
        self.nodes: Nodes | None = None

    @property
    def is_fused(self) -> bool:
        """Whether the forward in flight runs the fused CPU attention."""
        assert self.nodes is not None
        return self.can_fuse and self.nodes.is_grid

    def allocate(self, shapes: list[tuple[int, int]], n_batch: int, n_slots: int, like: Tensor) -> None:
        """Fresh zeros for `shapes[layer] = (G, D)`; zeros keep masked slots finite. Dtype and device as `like`."""
        self.layers = [RaggedLayer(*(like.new_zeros(g, n_batch, n_slots, d) for _ in range(2))) for g, d in shapes]

    @property
    def n_slots(self) -> int:
        return self.layers[0].keys.shape[2]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values [1, G, T, D] of the flat tokens; return the whole layer, [G, B, S, D] each.

        With the fused attention the new entries themselves are returned: it is the one to write them.
        """
        assert self.nodes is not None
        if self.is_fused:
            return key_states, value_states
        layer = self.layers[layer_idx]
        kv_append_(layer.keys, layer.values, key_states[0], value_states[0], self.nodes.slot)
        return layer.keys, layer.values

    def keep(self, rows: Tensor) -> None:
        """Keep only these samples, in this order."""
        self.layers = [RaggedLayer(x.keys.index_select(1, rows), x.values.index_select(1, rows)) for x in self.layers]

    def grow(self, n_slots: int) -> None:
        """Make room for `n_slots` slots a sample; committed entries keep their places."""
        more = n_slots - self.n_slots
        self.layers = [
            RaggedLayer(F.pad(x.keys, (0, 0, 0, more)), F.pad(x.values, (0, 0, 0, more))) for x in self.layers
        ]

    # transformers asks these while it prepares masks; our own mask is built from `nodes`.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 1

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.n_slots, 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layers)

    @property
    def is_compileable(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.layers)
