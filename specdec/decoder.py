"""The decoder: prefill, step, run. Read this file first.

A step drafts from every sample's pending token, lets the target judge all drafts in one forward, and commits what it
accepts plus one token of its own. Nothing in a step asks the host anything: the whole of it is one compiled function.

Letters: B samples, K drafted tokens, N = K + 1 nodes (node 0 is the pending token), V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.drafters.base import Drafter
from specdec.graphs.compiled import CompiledSteps
from specdec.kernels.verify import verify_chain, verify_greedy
from specdec.nodes import Nodes
from specdec.sampling import SamplingLaw
from specdec.state import BatchState
from specdec.stats import Stats
from specdec.tree import TokenTree
from specdec.view import ModelView

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
        compiled: compiles the step, or runs it eagerly.
        stats: what happened is added here.
    """

    def __init__(self, target: ModelView, drafter: Drafter, compiled: CompiledSteps, stats: Stats) -> None:
        self.target, self.drafter, self.compiled, self.stats = target, drafter, compiled, stats
        self.bits, self.depths = TokenTree.chain(drafter.depth).tensors(target.device)

    def prefill(self, state: BatchState, prompts: list[Tensor]) -> None:
        """Write the keys and values of all but each prompt's last token, which becomes the pending one."""
        n_slots = self._slots_for(max(len(p) for p in prompts))
        self.target.allocate(len(prompts), n_slots)
        self.target.prefill([prompt[:-1] for prompt in prompts])
        self.drafter.begin(prompts, n_slots)

    def step(self, state: BatchState, law: SamplingLaw) -> Tensor:
        """Draft, verify, accept and commit, on the device. Returns the state's report, [B, K + 4] int64."""
        draft = self.drafter.draft(state, law)
        tokens = torch.cat([state.pending[:, None], draft.tokens], 1)
        n_batch, n_nodes = tokens.shape
        drafted = torch.arange(n_nodes, device=tokens.device) <= draft.counts[:, None]
        nodes = Nodes.of_tree(state.lengths, self.bits, self.depths, 0, n_nodes, drafted, self.target.cache.n_slots)
        logits = self.target.forward(tokens.flatten(), nodes)
        if law.greedy:
            target_ids = logits.argmax(-1).view(n_batch, n_nodes)
            n_accepted, bonus = verify_greedy(target_ids, draft.tokens, draft.counts)
        else:
            probs = law.probs(logits).view(n_batch, n_nodes, -1)
            n_accepted, bonus = verify_chain(
                probs, draft.tokens, draft.counts, draft.support_ids, draft.support_probs, state.seeds,
                state.lengths + 1,
            )  # fmt: skip
            reached = torch.arange(n_nodes, device=tokens.device) <= n_accepted[:, None]
            state.broken |= (probs.isnan().any(-1) & reached).any(1)
        state.commit(draft, n_accepted, bonus)  # a chain's accepted entries are already in place
        return state.report()

    def run(
        self, prompts: list[Tensor], law: SamplingLaw, max_new_tokens: int, seeds: Tensor, eos_ids: Tensor
    ) -> Iterator[list[Emitted]]:
        """Decode until every text has ended, yielding what each step added.

        Args:
            prompts: one [length] int64 tensor a sample, at least one token each.
            law: the sampling law. max_new_tokens: at most this many are added to a text.
            seeds: [B] int64. eos_ids: [E] int64, tokens that end a text.

        Raises:
            RuntimeError: when the target's law holds a NaN; transformers' sampling raises the same.
        """
        device = self.target.device
        start = time.perf_counter()
        state = BatchState(prompts, max_new_tokens, seeds.to(device), eos_ids.to(device), self.drafter.depth)
        self.prefill(state, prompts)
        self.stats.seconds["prefill"] += time.perf_counter() - start

        rows, longest = list(range(len(prompts))), max(len(p) for p in prompts)
        while rows:
            self._make_room(longest)
            start = time.perf_counter()
            step = self._step_for(law, len(rows))
            # The one host read, between two steps: what was added decides which samples go on.
            report = step(state, law).tolist()
            self.stats.count_step(len(rows), time.perf_counter() - start, compiling=self.compiled.was_compiling)
            emitted = []
            for row, (*tokens, n_new, finished, broken) in zip(rows, report, strict=True):
                if broken:
                    raise RuntimeError(
                        f"the target's logits for sample {row} hold a NaN: there is no law to sample from"
                    )
                emitted.append(Emitted(row, tokens[:n_new], bool(finished)))
            longest += self.drafter.depth + 1
            alive = [i for i, e in enumerate(emitted) if not e.finished]
            if len(alive) < len(rows):
                self.stats.count_positions(state)
                rows = [rows[i] for i in alive]
                if rows:
                    self._keep(state, torch.tensor(alive, device=device))
            yield emitted

    def _step_for(self, law: SamplingLaw, n_batch: int) -> Callable[[BatchState, SamplingLaw], Tensor]:
        return self.compiled.get(self.step, (law.key, n_batch == 1))

    def _slots_for(self, length: int) -> int:
        """Capacity for a text of `length` tokens, one step's nodes and the scratch slot."""
        needed = length + 2 * (self.drafter.depth + 1) + 1
        return -(-needed // SLOT_BUCKET) * SLOT_BUCKET

    def _make_room(self, longest: int) -> None:
        n_slots = self._slots_for(longest)
        if n_slots > self.target.cache.n_slots:
            self.target.cache.grow(n_slots)
            self.drafter.grow(n_slots)

    def _keep(self, state: BatchState, alive: Tensor) -> None:
        """Finished samples leave the batch: they cost nothing from the next step on."""
        state.keep(alive)
        self.target.cache.keep(alive)
        self.drafter.keep(alive)
