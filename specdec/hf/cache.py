"""RaggedCache: transformers' cache interface over one tensor a layer, every sample at its own length.

What a mask hides still counts: 0 * NaN is NaN, and a rejected draft may have left anything in a slot. The kernels
leave out what a query does not see. Where PyTorch attends, under a mask, values that are not finite are never written,
and the slot's key says it, with NaN: a mask selects among scores. A model's own attention does not, and gets neither;
such slots are lost, and so are the logits of whoever sees one.
"""

from __future__ import annotations

from enum import Enum
from functools import reduce
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.engine.packing import Nodes
from specdec.hf import names
from specdec.kernels.cache.kv_cache import cache_table, kv_append_, kv_commit_
from specdec.kernels.library import runs_triton


class Way(Enum):
    """How a forward attends."""

    FUSED = "the fused op, which appends by itself: a step's nodes, where it has a kernel"
    CAUSAL = "the Triton kernel for a text without branches"
    MASKED = "dense PyTorch under a mask"
    OWN = "the model's own attention, under a mask of all samples' slots"


class _Forward:
    """While it lasts, the cache serves one forward; no exception leaves it in that state.

    A class, because Dynamo traces these in every version of torch.
    """

    def __init__(self, cache: RaggedCache, nodes: Nodes) -> None:
        self._cache, self._nodes = cache, nodes

    def __enter__(self) -> dict[int, Tensor]:
        """Where the layers that are asked to put what comes out of them."""
        cache = self._cache
        cache.nodes, cache.now, cache.features = self._nodes, cache.way_of(self._nodes), {}
        return cache.features

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache.nodes = self._cache.now = self._cache.features = None


class RaggedLayer:
    """Keys [G, B, S, D] and values [G, B, S, Dv] of a layer. Slot S - 1 is scratch (see
    `specdec.kernels.cache.kv_cache`).

    Attributes:
        lost: [B, S] bool, where models attend by themselves: slots whose keys or values were not finite; else None.
    """

    is_sliding = False
    is_compileable = True
    is_initialized = True

    def __init__(self, keys: Tensor, values: Tensor, lost: Tensor | None = None) -> None:
        self.keys, self.values, self.lost = keys, values, lost
        # The fused attention finds the layer through this table (see `specdec.kernels.attention.ragged_attention`).
        self.table = cache_table([(keys, values)])[0]
        for tensor, batch in (keys, 1), (values, 1), (lost, 0):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, batch + 1)
                if tensor.shape[batch] > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, batch)


def readable(keys: Tensor, values: Tensor, lost: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Keys [G, ..., D] and values [G, ..., Dv] that PyTorch may attend to under a mask: of slots that are lost, [...]
    bool, the values are zeros, and the keys `sign`."""
    return torch.where(lost[..., None], sign, keys), torch.where(lost[..., None], 0, values)


class RaggedCache(names.Cache):
    """A cache whose samples grow at their own pace. The current forward's `Nodes` say where new entries go.

    Args:
        way: how a step's nodes are attended to, which the proof finds out: FUSED, MASKED or OWN.

    Attributes:
        nodes, now, features: of the forward in flight, the way it attends, and by layer what came out of those that
            are asked (see `ModelView.keep_features`); None between forwards.
        asked: what each layer asked of its attention, where that is to be noted (see `specdec.hf.proof`).
        is_asked_for_length: whether a layer wanted to know its length, which no one number is.

    `nodes` is the metadata of the forward in flight: it travels on the cache, which every model passes along,
    because models drop keyword arguments they do not know. `generation` changes when the memory moves.
    """

    def __init__(self, way: Way) -> None:
        self._hold([])
        self.way = way
        self.generation = 0
        self.nodes: Nodes | None = None
        self.now: Way | None = None
        self.features: dict[int, Tensor] | None = None
        self.asked: dict[int, Any] | None = None
        self.is_asked_for_length = False

    def forward(self, nodes: Nodes) -> _Forward:
        """A context: the forward in it is of these nodes."""
        return _Forward(self, nodes)

    def way_of(self, nodes: Nodes) -> Way:
        """How a forward of these nodes attends."""
        if self.way is not Way.FUSED or nodes.bits is not None:
            return self.way
        return Way.CAUSAL if runs_triton(nodes.slot) else Way.MASKED

    def allocate(self, shapes: list[tuple[int, int, int]], n_batch: int, n_slots: int, like: Tensor) -> None:
        """An empty cache for `shapes[layer] = (G, D, Dv)`, dtype and device as `like`.

        A cache of the right size stays where it is, because recorded steps know its addresses, and as it is.
        """
        wanted = [tuple((groups, n_batch, n_slots, dim) for dim in dims) for groups, *dims in shapes]
        held = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in self.layers]
        if held == wanted and all((layer.lost is not None) == (self.way is Way.OWN) for layer in self.layers):
            return
        self.release()  # the memory of the old one may be needed for the new one
        lost = (like.new_zeros(n_batch, n_slots, dtype=torch.bool) if self.way is Way.OWN else None for _ in wanted)
        pairs = ((like.new_zeros(keys), like.new_zeros(values)) for keys, values in wanted)
        self._hold([RaggedLayer(*pair, none) for pair, none in zip(pairs, lost, strict=True)])

    def release(self) -> None:
        """Give the memory back."""
        self.generation += 1
        self._hold([])

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
        if self.now is Way.FUSED:
            return key_states, value_states
        layer = self.layers[layer_idx]
        keys, values, lost = self._writable(key_states[0], value_states[0])
        if layer.lost is not None:
            layer.lost.view(-1).index_copy_(0, self.nodes.slot, lost)
        kv_append_(layer.keys, layer.values, keys, values, self.nodes.slot)
        if self.now is Way.OWN:
            return layer.keys.flatten(1, 2)[None], layer.values.flatten(1, 2)[None]
        return layer.keys, layer.values

    def _writable(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [G, T, D] as they are written, and [T] bool, which of them are lost."""
        lost = ~values.isfinite().all(-1).all(0)
        if self.way is Way.FUSED:  # kernels look for themselves
            return keys, values, lost
        if self.way is Way.OWN:
            lost = lost | ~keys.isfinite().all(-1).all(0)  # in place, torch 2.11 makes no region of it
        return *readable(keys, values, lost, 0.0 if self.way is Way.OWN else torch.nan), lost

    def put(self, index: int, row: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write a sample's entries of a layer, [G, n, D] and [G, n, Dv], from its slot `start` on."""
        layer, end = self.layers[index], start + keys.shape[1]
        keys, values, lost = self._writable(keys, values)
        if layer.lost is not None:
            layer.lost[row, start:end] = lost
        layer.keys[:, row, start:end], layer.values[:, row, start:end] = keys, values

    def take(self, index: int, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """A sample's entries of a layer in its slots from `start` to `end`; what is lost is NaN again."""
        layer = self.layers[index]
        keys, values = layer.keys[:, row, start:end], layer.values[:, row, start:end]
        if layer.lost is not None:
            values = torch.where(layer.lost[row, start:end, None], torch.nan, values)
        return keys, values

    def sees_lost(self, nodes: Nodes) -> Tensor:
        """[T] bool: which of the flat tokens see a lost slot of any layer."""
        lost = reduce(torch.logical_or, [layer.lost for layer in self.layers])
        seen = nodes.mask(lambda batch, head, query, key: key <= query, self.n_slots, torch.float32)[:, 0] == 0
        return nodes.from_grid((seen & lost[:, None]).any(-1))

    def grow(self, n_slots: int) -> None:
        """Make room for `n_slots` slots a sample; committed entries keep their places."""
        more = n_slots - self.n_slots
        self.generation += 1
        self._hold(
            [
                RaggedLayer(
                    F.pad(x.keys, (0, 0, 0, more)), F.pad(x.values, (0, 0, 0, more)),
                    None if x.lost is None else F.pad(x.lost, (0, more)),
                )
                for x in self.layers
            ]
        )  # fmt: skip

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
        if layer.lost is not None:
            place = torch.arange(path.shape[1], dtype=torch.int64, device=path.device)
            moved = torch.where(place < n_path[:, None], path, place) + lengths[:, None]
            for layer in self.layers:
                layer.lost.scatter_(1, lengths[:, None] + place, layer.lost.gather(1, moved))

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
