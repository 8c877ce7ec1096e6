"""Buffers: the memory of a batch, kept from call to call: its state, and both models' caches."""

from __future__ import annotations

from torch import Tensor

from specdec.engine.roles import Drafter, Steps, Target
from specdec.engine.slots import FIRST_CHUNK
from specdec.engine.state import BatchState

SLOT_BUCKET = 256
"""Cache capacity is a multiple of this many slots, and grows with the text."""
AT_ONCE = 8192
"""Where steps are recorded, texts that end within so many tokens have room for all of them at once."""


class Buffers:
    """What batches of one decoder live in.

    Args:
        steps: forgotten where what they know has moved.
    """

    def __init__(self, target: Target, drafter: Drafter, steps: Steps) -> None:
        self._target, self._drafter, self._steps = target, drafter, steps
        self.state: BatchState | None = None
        self._places: tuple[int, ...] = ()
        self._longest = 0

    def open(self, n_rows: int, longest: int, room: int, eos_ids: Tensor) -> BatchState:
        """An empty batch on the device.

        Where steps are recorded, buffers only ever grow, and have room for much at once.

        Args:
            longest: no text is longer, prompt and new tokens: a limit, which texts need not come near. room: there are
                slots for texts of this length. eos_ids: [E] int64, tokens that end a text.
        """
        device, state = self._target.device, None
        if self._steps.keeps_buffers:
            state, room = self.state, min(longest, max(2 * room, AT_ONCE))
        # End-of-text ids in whole eights, so that few numbers of them occur.
        wanted = n_rows, self._slots_for(room), 8 * (len(eos_ids) // 8 + 1)
        if state is not None:
            rows, n_slots, ends = map(max, wanted, state.sizes)
            wanted = rows, n_slots, ends
        if state is None or state.sizes != wanted:
            state = self.state = BatchState(*wanted, self._drafter.tree, self._drafter.support_size, device)
        for view in self._views:
            view.recorder = self._steps if self._steps.keeps_buffers else None
        state.clear(eos_ids.to(device), longest)
        self._target.allocate(*wanted[:2])
        self._drafter.allocate(*wanted[:2])
        self._longest = longest
        self._look_where()
        return state

    def grow(self, length: int) -> None:
        """Make room for texts of this length; what is there stays."""
        assert self.state is not None
        n_slots, before = self._slots_for(length), self._target.cache.n_slots
        if n_slots <= before:
            return
        if self._steps.keeps_buffers:  # every time, steps are recorded anew
            n_slots = max(n_slots, min(2 * before, self._slots_for(self._longest)))
        self.state.grow(n_slots)
        self._target.cache.grow(n_slots)
        self._drafter.grow(n_slots)
        self._look_where()

    def _look_where(self) -> None:
        """Recorded steps that know other places than these are forgotten."""
        assert self.state is not None
        places = self.state.tokens.data_ptr(), self._target.cache.generation, self._drafter.generation
        if places != self._places:
            self._steps.reset()
            self._places = places

    def memory(self, n_rows: int, longest: int) -> int:
        """Bytes for a batch of `n_rows` texts of `longest` tokens: caches, and the largest forward's activations."""
        n_slots, n_nodes = self._slots_for(longest), len(self._drafter.tree)
        n_tokens = n_rows * max(min(FIRST_CHUNK, longest), n_nodes)  # prompts are laid out in a grid
        caches = sum(view.cache_bytes(n_rows, n_slots) for view in self._views)
        return caches + max(view.activation_bytes(n_tokens, longest, n_rows * n_nodes) for view in self._views)

    @property
    def _views(self) -> list[Target]:
        """Of the models that write to caches of their own; users' drafters need not have one."""
        drafts = getattr(self._drafter, "view", None)
        return [self._target, *([] if drafts is None or drafts.cache is self._target.cache else [drafts])]

    def record(self) -> None:
        """Compile and record what writes prompts, where that is recorded."""
        for view in self._views:
            view.record()

    def _slots_for(self, length: int) -> int:
        """Capacity for a text of `length` tokens, one step's nodes and slots, and the scratch slot."""
        tree = self._drafter.tree
        needed = length + len(tree) + getattr(self._drafter, "n_riders", 0) + tree.depth + 2
        return -(-needed // SLOT_BUCKET) * SLOT_BUCKET
