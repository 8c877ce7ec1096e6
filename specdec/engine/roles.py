"""The roles in a step: who judges, who drafts, what is known of a text before, and how steps are run.

What plays a role need not know this module: these are protocols. Letters: B samples, T tokens of a forward, M rows of
logits that are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from specdec.engine.draft import Draft
from specdec.engine.laws import SamplingLaw
from specdec.engine.packing import Nodes
from specdec.engine.state import BatchState
from specdec.engine.tree import TokenTree


class Steps(Protocol):
    """Runs steps as they are, compiled or recorded.

    Attributes:
        was_compiling: whether what `get` gave last has compiled, or will when it is called; that is not decoding time.
        lag: reports are read this many steps late, so that the device never waits for the host.
        keeps_buffers: state and caches must stay where they are from call to call; `reset` when they move.
    """

    @property
    def lag(self) -> int: ...

    @property
    def keeps_buffers(self) -> bool: ...

    @property
    def was_compiling(self) -> bool: ...

    @property
    def is_current(self) -> bool:
        """Whether what compiled functions have read is what it was."""

    def reset(self) -> None:
        """Forget what knows where buffers were."""

    def has(self, key: Hashable) -> bool:
        """Whether `get` has it without compiling."""

    def get(self, step: Callable[..., Any], key: Hashable, size: Hashable) -> Callable[..., Any]:
        """`step` under `key`, for tensors of this size."""


class Cache(Protocol):
    """Keys and values of a batch, every sample at its own length."""

    generation: int
    """Changes when the memory moves."""

    @property
    def n_batch(self) -> int: ...

    @property
    def n_slots(self) -> int:
        """Entries a sample has room for, the scratch slot included."""

    def commit(self, lengths: Tensor, path: Tensor, n_path: Tensor) -> None:
        """Move an accepted path's entries behind the committed text.

        Args:
            lengths: [B] int64, committed entries. path: [B, P] int64, nodes of the tree at slots `lengths[b] + node`,
                the root first. n_path: [B] int64, how many of them count.
        """

    def grow(self, n_slots: int) -> None:
        """Make room for `n_slots` entries a sample; what is there stays."""


class Output(NamedTuple):
    """What a model says of flat tokens: logits [T or M, V] after them, in its dtype; and features [L, T, H], what came
    out of L of its layers, or None where nobody asked for any."""

    logits: Tensor
    features: Tensor | None = None


class Target(Protocol):
    """The model whose law is kept, or one that drafts, over a cache of its own."""

    recorder: Any

    @property
    def cache(self) -> Cache: ...

    @property
    def device(self) -> torch.device: ...

    def allocate(self, n_batch: int, n_slots: int) -> None:
        """An empty cache for `n_batch` samples of `n_slots` entries each."""

    def cache_bytes(self, n_batch: int, n_slots: int) -> int:
        """Bytes of a cache of that size."""

    def activation_bytes(self, n_tokens: int, reach: int, n_logits: int) -> int:
        """About what a forward takes beside weights and cache: of `n_tokens` tokens in all that see `reach` each, or of
        one that makes `n_logits` rows of logits."""

    def forward(
        self, tokens: Tensor, nodes: Nodes, rows: Tensor | int = 0, slots: Tensor | None = None
    ) -> Output:  # fmt: skip
        """What it says of flat tokens [T] int64, whose keys and values are written to the cache.

        Args:
            rows: [M] int64, the tokens whose logits are wanted, or 0 for all. slots: [T] int64, which of them are
                adaptive tokens, 0 for none; None where none is.
        """

    def write(self, texts: Mapping[int, tuple[int, Tensor]], n_tokens: int) -> dict[int, tuple[int, Tensor]]:
        """Write the next tokens of some texts to the cache, at most `n_tokens` of all together.

        Args:
            texts: by place in the batch, how many of its leading tokens have been written, and the text, [length]
                int64.

        Returns:
            The same of those texts that are not all written yet.
        """

    def record(self) -> None:
        """Compile and record what writes texts, where that is recorded."""


class Prefix(Protocol):
    """Keys and values of first tokens of a batch's texts that somebody has already."""

    def write_to(self, cache: Any, row: int) -> int:
        """Put what is known of a text into its place; how many of its tokens these are."""


class Drafter(Protocol):
    """Proposes tokens. Everything in `draft` and `commit` runs on the device inside the compiled step."""

    tree: TokenTree
    """The shape of what is drafted a step."""
    depths: tuple[int, ...]
    """How many levels it can be asked for, ascending, the whole tree last: depths worth a compiled function each."""
    support_size: int
    """C, the ids kept of a draft law; 0 where tokens follow from the text without chance."""

    @property
    def is_current(self) -> bool:
        """Whether what this drafter was made from is still what the user's objects hold."""

    @property
    def generation(self) -> int:
        """Changes when memory that `draft` reads or writes has moved."""

    def allocate(self, n_batch: int, n_slots: int) -> None:
        """A new batch of `n_batch` samples; caches need `n_slots` slots a sample."""

    def read(self, texts: Mapping[int, tuple[int, Tensor]]) -> None:
        """Take in what `draft` has not seen of some rows' texts, the last token pending.

        Args:
            texts: by row, how many leading tokens are known, and the whole text, [length] int64. With none known it
                is another text than before.
        """

    def draft(self, state: BatchState, law: SamplingLaw, live: Tensor, depth: int) -> Draft:
        """Candidates for what follows each sample's pending token.

        Args:
            live: [n] int64, 0, 1, ..., n - 1: at most n samples are unfinished. What is drafted for finished ones is
                ignored. depth: how many levels, one of `depths`.
        """

    def commit(self, lengths: Tensor, path: Tensor, n_path: Tensor) -> None:
        """The target has accepted a path, not called where the tree is a chain.

        Args:
            lengths: [B] int64, before this step. path: [B, depth + 1] int64, nodes from the root on. n_path: [B]
                int64, how many of them count.
        """

    def grow(self, n_slots: int) -> None:
        """Texts are about to pass the capacity: make room."""
