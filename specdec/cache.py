"""RaggedCache: transformers' cache interface over one tensor a layer, every sample at its own length."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.hf import names
from specdec.kernels.kv_cache import cache_table, kv_append_, kv_commit_
from specdec.kernels.library import runs_triton
from specdec.nodes import Nodes


class RaggedLayer:
    """Keys [G, B, S, D] and values [G, B, S, Dv] of a layer. Slot S - 1 is scratch (see `specdec.kernels.kv_cache`)."""

    is_sliding = False
    is_compileable = True
    is_initialized = True

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        # The fused attention finds the layer through this table (see `specdec.kernels.ragged_attention`).
        self.table = cache_table([(keys, values)])[0]
        for tensor in (keys, values):
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
            if tensor.shape[1] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)


class RaggedCache(names.Cache):
    """A cache whose samples grow at their own pace. The current forward's `Nodes` say where new entries go.

    Args:
        can_fuse: whether the fused attention has a kernel here, and does what the model asks of it.

    Attributes:
        is_flat: whether the model's own attention runs, over all samples' slots in one row.
        asked: what each layer asked of its attention, where that is to be noted (see `specdec.proof`).
        is_asked_for_length: whether a layer wanted to know its length, which no one number is.

    `nodes` is the metadata of the forward in flight: it travels on the cache, which every model passes along,
    because models drop keyword arguments they do not know. `generation` changes when the memory moves.
    """

    def __init__(self, can_fuse: bool) -> None:
        self._hold([])
        self.can_fuse = can_fuse
        self.generation = 0
        self.nodes: Nodes | None = None
        self.is_flat = False
        self.asked: dict[int, Any] | None = None
        self.is_asked_for_length = False

    @property
    def is_fused(self) -> bool:
        """Whether the forward in flight is a step's, and runs the fused attention."""
        assert self.nodes is not None
        return self.nodes.bits is not None and self.can_fuse

    @property
    def is_dense(self) -> bool:
        """Whether the forward in flight needs a mask."""
        assert self.nodes is not None
        return not self.can_fuse or (self.nodes.bits is None and not runs_triton(self.nodes.slot))

    def allocate(self, shapes: list[tuple[int, int, int]], n_batch: int, n_slots: int, like: Tensor) -> None:
        """An empty cache for `shapes[layer] = (G, D, Dv)`, dtype and device as `like`.

        A cache of the right size stays where it is, because recorded steps know its addresses, and as it is: who takes
        a row clears it.
        """
        wanted = [tuple((groups, n_batch, n_slots, dim) for dim in dims) for groups, *dims in shapes]
        if [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in self.layers] == wanted:
            return
        self.release()  # the memory of the old one may be needed for the new one
        self._hold([RaggedLayer(like.new_zeros(keys), like.new_zeros(values)) for keys, values in wanted])

    def release(self) -> None:
        """Give the memory back."""
        self.generation += 1
        self._hold([])

    def clear(self, row: int) -> None:
        """Zeros for one sample: they keep the masked slots of the dense attention finite. Triton's kernel does not care
        what is in slots it may not see."""
        for layer in self.layers:
            if not (self.can_fuse and runs_triton(layer.keys)):
                layer.keys[:, row].zero_()
                layer.values[:, row].zero_()

    @property
    def n_batch(self) -> int:
        return self.layers[0].keys.shape[1]

    @property
    def n_slots(self) -> int:
        return self.layers[0].keys.shape[2]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values [1, G, T, D] of the flat tokens; return the whole layer, [G, B, S, D] each, or with the
        model's own attention [1, G, B * S, D].

        With the fused attention the new entries themselves are returned: it is the one to write them.
        """
        assert self.nodes is not None
        if self.is_fused:
            return key_states, value_states
        layer = self.layers[layer_idx]
        kv_append_(layer.keys, layer.values, key_states[0], value_states[0], self.nodes.slot)
        if self.is_flat:
            return layer.keys.flatten(1, 2)[None], layer.values.flatten(1, 2)[None]
        return layer.keys, layer.values

    def grow(self, n_slots: int) -> None:
        """Make room for `n_slots` slots a sample; committed entries keep their places."""
        more = n_slots - self.n_slots
        self.generation += 1
        self._hold([RaggedLayer(F.pad(x.keys, (0, 0, 0, more)), F.pad(x.values, (0, 0, 0, more))) for x in self.layers])

    def _hold(self, layers: list[RaggedLayer]) -> None:
        self.layers: list[Any] = layers  # transformers' class says they are its own
        self._table = cache_table([(layer.keys, layer.values) for layer in layers])

    def commit(self, lengths: Tensor, path: Tensor, n_path: Tensor) -> None:
        """Move an accepted path's entries behind the committed text.

        Args:
            lengths: [B] int64, committed entries. path: [B, P] int64, nodes of the tree at slots `lengths[b] + node`,
                the root first. n_path: [B] int64, how many of them count.
        """
        layer = self.layers[0]
        sizes = (x.shape[3] * x.itemsize for x in (layer.keys, layer.values))
        kv_commit_(self._table, lengths, path, n_path, layer.keys.shape[0], *sizes)

    # transformers asks these while it prepares masks; our own mask is built from `nodes`.
    def get_seq_length(self, layer_idx: int | None = None) -> int:
        if layer_idx is not None:  # a layer, which may count positions by it
            self.is_asked_for_length = True
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
