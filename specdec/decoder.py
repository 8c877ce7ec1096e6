"""The decoder: prefill, step, run. Read this file first.

A step drafts a tree from every sample's pending token, lets the target judge all of it in one forward, and commits the
path it accepts plus one token of its own. Nothing in a step asks the host anything: the whole of it is one compiled
function.

Letters: B samples, N nodes of the tree (node 0 is the pending token), D its depth, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.drafters.base import Draft, Drafter, DraftLaw
from specdec.graphs.captured import CapturedSteps, Readback
from specdec.graphs.compiled import CompiledSteps
from specdec.kernels.draw_row import draw_row
from specdec.kernels.noise import BONUS
from specdec.kernels.verify_greedy import verify_greedy
from specdec.kernels.verify_tree import verify_tree
from specdec.nodes import Nodes
from specdec.sampling import SamplingLaw
from specdec.state import BatchState
from specdec.stats import Stats
from specdec.verifiers import AUTO, Verifier
from specdec.view import ModelView

Steps = CompiledSteps | CapturedSteps
SLOT_BUCKET = 256
"""Cache capacity is a multiple of this many slots; attention reads the capacity, so it grows with the text."""


@dataclass(frozen=True)
class Emitted:
    """What one step added to one text: the tokens, and whether the text has ended."""

    row: int
    tokens: list[int]
    finished: bool


class Decoder:
    """Decodes batches of texts with one target and one drafter.

    Args:
        target: the model whose law is kept.
        drafter: where candidates come from.
        steps: compiles or records the step, or runs it as it is.
        stats: what happened is added here.
        verifier: the rule that accepts candidates when sampling.
    """

    def __init__(
        self, target: ModelView, drafter: Drafter, steps: Steps, stats: Stats, verifier: Verifier = AUTO
    ) -> None:
        self.target, self.drafter, self.steps, self.stats, self.verifier = target, drafter, steps, stats, verifier
        self.tree = drafter.tree
        self._state: BatchState | None = None
        self._places: tuple[int, ...] = ()
        self._live: dict[int, Tensor] = {}
        self.bits, self.depths = self.tree.tensors(target.device)
        self.topology = self.tree.topology(target.device)

    def prefill(self, prompts: list[Tensor], n_slots: int) -> None:
        """Write the keys and values of all but each prompt's last token, which becomes the pending one."""
        self.target.allocate(len(prompts), n_slots)
        self.target.prefill([prompt[:-1] for prompt in prompts])
        self.drafter.begin(prompts, n_slots)

    @torch.no_grad()
    def admit(self, state: BatchState, row: int, prompt: Tensor, max_new_tokens: int, seed: Tensor) -> None:
        """Begin another text, between two steps, in a row whose own has ended.

        Args:
            prompt: [length] int64, at least one token. seed: [] int64.

        Raises:
            ValueError: the row has no room for prompt and new tokens.
        """
        state.admit(row, prompt, max_new_tokens, seed)
        self._make_room(len(prompt))
        self.target.admit(row, prompt[:-1])
        self.drafter.admit(row, prompt)

    def step(self, state: BatchState, law: SamplingLaw, live: Tensor) -> Tensor:
        """Draft, verify, accept and commit, on the device.

        Args:
            live: [n] int64, 0, 1, ..., n - 1: at most n samples are unfinished.

        Returns:
            The state's report, [B, D + 4] int64.
        """
        draft = self.drafter.draft(state, law, live)
        n_nodes = torch.where(state.finished, 0, draft.counts + 1)
        rows, n_slots = len(self.tree), self.target.cache.n_slots
        token = torch.arange(len(live) * rows, device=live.device)
        nodes = Nodes.packed(state.lengths, n_nodes, token, rows, n_slots, self.bits, self.depths)
        tokens = torch.cat([state.pending[:, None], draft.tokens], 1)  # [B, N]
        logits = self.target.forward(tokens[nodes.sample, nodes.node], nodes)
        path, n_accepted, bonus = self.verify(state, law, draft, n_nodes, nodes, logits)
        if not self.tree.is_chain:  # a chain's accepted entries are already in place
            n_path = torch.where(state.finished, 0, n_accepted + 1)
            self.target.cache.commit(state.lengths, path, n_path)
            self.drafter.commit(state.lengths, path, n_path)
        state.commit(tokens, n_nodes, path, n_accepted, bonus)
        return state.report()

    def verify(
        self, state: BatchState, law: SamplingLaw, draft: Draft, n_nodes: Tensor, nodes: Nodes, logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The path the target accepts, given its logits [T, V] after each node: path [B, D + 1], n_accepted [B] and
        bonus [B], int64 (see the verification kernels)."""
        tree = self.topology, self.bits, nodes.starts, self.tree.depth
        if law.greedy:
            return verify_greedy(logits.argmax(-1), draft.tokens, n_nodes, *tree)
        laws = law.rows(logits)
        position = state.lengths + 1
        if self.verifier.coupled:
            row = torch.arange(len(logits), device=logits.device)
            none = nodes.node[:, None][:, :0]
            place = position[nodes.sample] + self.depths[nodes.node]
            chosen = draw_row(
                *laws, row, none, none.float(), state.seeds[nodes.sample], place, nodes.node * 0, BONUS, True
            )
            path, n_accepted, bonus = verify_greedy(chosen, draft.tokens, n_nodes, *tree)
        else:
            drawn = draft.law or DraftLaw.deterministic(draft.tokens, self.tree)
            path, n_accepted, row, ids, weights = verify_tree(
                *laws, self.topology, drawn.places, n_nodes, drawn.support_ids, drawn.support_probs, drawn.n_hubs,
                state.seeds, position, nodes.starts, self.tree.depth, self.verifier.sequence,
            )  # fmt: skip
            at = position + n_accepted
            bonus = draw_row(*laws, row, ids, weights, state.seeds, at, torch.zeros_like(at), BONUS, False)
        lawless = nodes.to_grid(~laws.log_total.isfinite())  # [B, N]
        state.broken |= lawless.gather(1, path).any(1) & ~state.finished
        return path, n_accepted, bonus

    def run(
        self, prompts: list[Tensor], law: SamplingLaw, max_new_tokens: int, seeds: Tensor, eos_ids: Tensor
    ) -> Generator[list[Emitted]]:
        """Decode until every text has ended, yielding what each step added.

        Args:
            prompts: one [length] int64 tensor a sample, at least one token each.
            law: the sampling law. max_new_tokens: at most this many are added to a text.
            seeds: [B] int64. eos_ids: [E] int64, tokens that end a text.

        Raises:
            RuntimeError: when the target's law holds a NaN; transformers' sampling raises the same.
        """
        start = time.perf_counter()
        state = self._begin(prompts, max_new_tokens, seeds, eos_ids)
        self.stats.seconds["prefill"] += time.perf_counter() - start

        ended, lengths = [False] * len(prompts), [len(p) for p in prompts]
        limit = max(lengths) + max_new_tokens  # room for which is all that buffers that stay in place ever need
        on_the_way: deque[Readback] = deque()
        start = time.perf_counter()
        try:
            while not all(ended):
                unread = len(on_the_way) * (self.tree.depth + 1)  # at most; what came of them is not known yet
                self._make_room(min(max(lengths) + unread, limit))
                live = self.live_for(ended.count(False), len(state.lengths))
                step = self._step_for(law, len(state.lengths), len(live))
                on_the_way.append(Readback(step(state, law, live)))
                if len(on_the_way) > self.steps.lag:
                    # The one host read, between two steps: what was added decides which samples go on.
                    emitted = self._emitted(on_the_way.popleft().wait(), ended)
                    seconds = time.perf_counter() - start
                    self.stats.count_step(len(emitted), seconds, compiling=self.steps.was_compiling)
                    for piece in emitted:
                        lengths[piece.row] += len(piece.tokens)
                    yield emitted
                    start = time.perf_counter()  # what the caller does is not decoding
        finally:  # also when the caller has had enough
            self.stats.count_nodes(state, self.tree)

    def warm_up(self, prompts: list[Tensor], law: SamplingLaw, max_new_tokens: int, eos_ids: Tensor) -> None:
        """Run every step once, or as often as recording it takes, that a batch like this comes to."""
        state = self._begin(prompts, max_new_tokens, torch.zeros(len(prompts), dtype=torch.int64), eos_ids)
        n_batch = len(state.lengths)
        sizes = {n_batch, *range(1, len(prompts) + 1)} if self.steps.keeps_buffers else {n_batch}
        shapes = {len(live): live for live in (self.live_for(n, n_batch) for n in sizes)}
        for size in sorted(shapes, reverse=True):  # what is recorded first makes the pool: the largest
            for _ in range(3 if self.steps.keeps_buffers else 1):
                state.finished.copy_(torch.arange(n_batch) >= size)
                self._step_for(law, n_batch, size)(state, law, shapes[size])

    @staticmethod
    def _emitted(report: list[list[int]], ended: list[bool]) -> list[Emitted]:
        """What a report says of the samples that had not ended, whose ends are noted in `ended`."""
        emitted = []
        for row, (*tokens, n_new, finished, broken) in enumerate(report[: len(ended)]):
            if ended[row]:
                continue
            if broken:
                raise RuntimeError(f"the target's logits for sample {row} hold a NaN: there is no law to sample from")
            emitted.append(Emitted(row, tokens[:n_new], bool(finished)))
            ended[row] = bool(finished)
        return emitted

    def _begin(self, prompts: list[Tensor], max_new_tokens: int, seeds: Tensor, eos_ids: Tensor) -> BatchState:
        """The batch on the device, prompts written to the caches.

        Where steps are recorded, buffers only ever grow, and have room for the whole of every text at once.
        """
        device = self.target.device
        wanted = (len(prompts), *BatchState.room_for(prompts, max_new_tokens, eos_ids))
        n_slots = self._slots_for(max(len(p) for p in prompts))
        state = self._state if self.steps.keeps_buffers else None
        if self.steps.keeps_buffers:
            wanted = wanted[0], self._slots_for(wanted[1]), wanted[2]
            if state is not None:
                rows, columns, ends = map(max, wanted, state.sizes)
                wanted = rows, columns, ends
            n_slots = self._slots_for(wanted[1])
        if state is None or state.sizes != wanted:
            state = self._state = BatchState(*wanted, self.tree, device)
        state.load(prompts, max_new_tokens, seeds.to(device), eos_ids.to(device))
        self.prefill(prompts + [prompts[0][:0]] * (wanted[0] - len(prompts)), n_slots)
        places = (id(state), self.target.cache.generation, self.drafter.generation)
        if places != self._places:
            self.steps.reset()
            self._places = places
        return state

    def live_for(self, n_live: int, n_batch: int) -> Tensor:
        """`live` of a step with `n_live` of `n_batch` samples unfinished.

        The last sample of a batch is decoded as two, one of them nobody: a size of one would be compiled on its own.
        What is recorded size by size comes in few sizes.
        """
        n_live = max(n_live, min(n_batch, 2))
        if self.steps.keeps_buffers and n_live > 2:
            n_live = min(4 if n_live <= 4 else -(-n_live // 8) * 8, n_batch)
        if n_live not in self._live:
            self._live[n_live] = torch.arange(n_live, device=self.target.device)
            torch._dynamo.maybe_mark_dynamic(self._live[n_live], 0)
        return self._live[n_live]

    def _step_for(self, law: SamplingLaw, n_batch: int, n_live: int) -> Callable[..., Tensor]:
        """The step for shapes like these: a recording serves one size, a compiled function any but one."""
        return self.steps.get(self.step, (law.key, n_batch == 1), n_live)

    def _slots_for(self, length: int) -> int:
        """Capacity for a text of `length` tokens, one step's nodes and the scratch slot."""
        needed = length + len(self.tree) + self.tree.depth + 2
        return -(-needed // SLOT_BUCKET) * SLOT_BUCKET

    def _make_room(self, longest: int) -> None:
        n_slots = self._slots_for(longest)
        if n_slots > self.target.cache.n_slots:
            self.target.cache.grow(n_slots)
            self.drafter.grow(n_slots)
