"""The decoder: draft, judge, run. Read this file first.

A step drafts a tree from every sample's pending token, lets the target judge all of it in one forward, and commits the
path it accepts plus one token of its own. Drafting and judging are one compiled function each, and neither asks the
host anything. Which texts are in the batch and how much is drafted is decided between steps.

Letters: B samples, N nodes of the tree (node 0 is the pending token), D its depth, T tokens of the target's forward,
V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.engine.control import EXPLORE, Plan, Policy, policy_of
from specdec.engine.draft import Drafter, DraftLaw
from specdec.engine.laws import SamplingLaw
from specdec.engine.memory import Buffers
from specdec.engine.packing import Nodes
from specdec.engine.slots import Rows, Text
from specdec.engine.state import BatchState
from specdec.engine.stats import Stats
from specdec.graphs.captured import CapturedSteps, Mark, Readback
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.processors import Chosen, walk
from specdec.hf.view import ModelView
from specdec.kernels.sampling.draw_row import draw_row
from specdec.kernels.sampling.noise import BONUS
from specdec.kernels.verify.verify_greedy import verify_greedy
from specdec.kernels.verify.verify_tree import verify_tree
from specdec.verifiers.base import AUTO, Verifier

Steps = CompiledSteps | CapturedSteps


@dataclass(frozen=True)
class Emitted:
    """What happened to one text: tokens were added, or it ended, or an error kept it from being decoded."""

    text: Text
    tokens: list[int]


@dataclass(frozen=True)
class Flight:
    """A step on its way: what it was to do, for whom, its report, and when its parts began and ended."""

    plan: Plan
    live: dict[int, Text]
    report: Readback
    marks: tuple[Mark, Mark, Mark, Mark] | None

    @property
    def seconds(self) -> tuple[float, float, float] | None:
        """Of the drafter's reading, the draft and the judgement, once the report has arrived; None if it compiled."""
        if self.marks is None:
            return None
        begin, read, drafted, judged = self.marks
        return begin.until(read), read.until(drafted), drafted.until(judged)


class Decoder:
    """Decodes batches of texts with one target and one drafter.

    Args:
        target: the model whose law is kept.
        drafter: where candidates come from.
        steps: compiles or records the step, or runs it as it is.
        stats: what happened is added here.
        verifier: the rule that accepts candidates when sampling.
        adapt: whether to draft less where that is faster; None for where texts do not depend on it.
    """

    def __init__(
        self, target: ModelView, drafter: Drafter, steps: Steps, stats: Stats, verifier: Verifier = AUTO,
        adapt: bool | None = None,
    ) -> None:  # fmt: skip
        self.target, self.drafter, self.steps, self.stats, self.verifier = target, drafter, steps, stats, verifier
        self.tree, self.adapt = drafter.tree, adapt
        self.buffers = Buffers(target, drafter, steps)
        self._counts: dict[int, Tensor] = {}
        self._controllers: dict[object, Policy] = {}
        self.bits, self.depths = self.tree.tensors(target.device)
        self.topology = self.tree.topology(target.device)

    def draft(self, state: BatchState, law: SamplingLaw, live: Tensor, depth: int) -> None:
        """Draft `depth` levels of the tree, on the device.

        Args:
            live: [n] int64, 0, 1, ..., n - 1: at most n samples are unfinished.
        """
        state.check_rows()
        state.propose(self.drafter.draft(state, law, live, depth))

    def judge(self, state: BatchState, law: SamplingLaw, token: Tensor) -> Tensor:
        """Verify what was drafted, accept and commit, on the device.

        Args:
            token: [T] int64, 0, 1, ..., T - 1: of what was drafted as much is judged as is allowed and there is room
                for; every unfinished sample's root is.

        Returns:
            The state's report, [B, D + 6] int64.
        """
        nodes, n_nodes, logits = self._forward(state, token)
        path, n_accepted, bonus, is_lawless = self.verify(state, law, n_nodes, nodes, logits)
        self._commit(state, n_nodes, path, n_accepted, bonus)
        if is_lawless is not None:
            place = torch.arange(path.shape[1], device=path.device, dtype=torch.int64)
            state.broken |= torch.where(place < state.n_new[:, None], is_lawless, 0).sum(1) > 0
        return state.report()

    def look(self, state: BatchState, law: SamplingLaw, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first half of `judge`, where the host decides (see `specdec.hf.processors`): logits [T, V], how many
        nodes of each sample they come after, [B], and where each sample's begin, [B + 1] int64."""
        nodes, n_nodes, logits = self._forward(state, token)
        return logits, n_nodes, nodes.starts

    def settle(self, state: BatchState, n_nodes: Tensor, chosen: Chosen) -> Tensor:
        """The other half: commit what was chosen. Returns the state's report."""
        self._commit(state, n_nodes, chosen.path, chosen.n_accepted, chosen.bonus)
        state.broken |= chosen.broken
        return state.report()

    def _forward(self, state: BatchState, token: Tensor) -> tuple[Nodes, Tensor, Tensor]:
        """What the target judges, how many nodes of each sample, [B] int64, and its logits after them, [T, V]."""
        state.check_rows()
        n_nodes = state.n_nodes(token.shape[0])
        n_slots = self.target.cache.n_slots
        nodes = Nodes.packed(state.lengths, n_nodes, token, len(self.tree), n_slots, self.bits, self.depths)
        return nodes, n_nodes, self.target.forward(state.tree_tokens[nodes.sample, nodes.node], nodes)

    def _commit(self, state: BatchState, n_nodes: Tensor, path: Tensor, n_accepted: Tensor, bonus: Tensor) -> None:
        if not self.tree.is_chain:  # a chain's accepted entries are already in place
            n_path = torch.where(state.finished, 0, n_accepted + 1)
            self.target.cache.commit(state.lengths, path, n_path)
            self.drafter.commit(state.lengths, path, n_path)
        state.commit(state.tree_tokens, n_nodes, path, n_accepted, bonus)

    def verify(
        self, state: BatchState, law: SamplingLaw, n_nodes: Tensor, nodes: Nodes, logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The path the target accepts, given its logits [T, V] after each node: path [B, D + 1], n_accepted [B] and
        bonus [B], int64 (see the verification kernels); and [B, D + 1] int64, 1 where there was no law on it."""
        draft, tree = state.draft, (self.topology, self.bits, nodes.starts, self.tree.depth)
        if law.greedy:
            return *verify_greedy(law.choose(logits), draft.tokens, n_nodes, *tree), None
        laws = law.rows(logits)
        position = state.lengths + 1
        if self.verifier.coupled:
            row = torch.arange(len(logits), device=logits.device, dtype=torch.int64)
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
        return path, n_accepted, bonus, lawless.long().gather(1, path)

    def run(
        self, texts: Iterable[Text], n_rows: int, longest: int, room: int, law: SamplingLaw, eos_ids: Tensor
    ) -> Generator[list[Emitted]]:
        """Decode until every text has ended, yielding what each step added.

        Args:
            texts: taken one by one as rows come free. n_rows: so many are decoded at once.
            longest: no text is longer, prompt and new tokens. room: memory is allocated for texts of this length at
                first, and grows with them. law: the sampling law. eos_ids: [E] int64, tokens that end a text.
        """
        state = self.buffers.open(n_rows, longest, room, eos_ids)
        rows = Rows(iter(texts), state, self.target, self.drafter, self.buffers.grow)
        control = self._controller(law)
        control.ready = self._ready(law, n_rows)
        on_the_way: deque[Flight] = deque()
        try:
            while True:
                start = time.perf_counter()
                failed = rows.fill(n_rows)
                self.buffers.grow(rows.length)
                if rows.is_writing:
                    failed += rows.write()
                self.stats.seconds["prefill"] += time.perf_counter() - start
                if failed:
                    yield [Emitted(text, []) for text in failed]
                live = rows.live
                if not live:
                    on_the_way.clear()  # they know nothing new of texts that have ended
                    if not rows.is_writing and not failed:
                        break
                if not live or (rows.is_writing and not rows.is_under_way):  # the first step is of all
                    continue
                start = time.perf_counter()
                plan = self._plan(control, law, live, n_rows)
                # What the drafter has to read must have arrived; and a step of texts that will have ended is wasted.
                waits = bool(on_the_way) and (
                    any(rows.unread(_drafted(live, plan)).values()) or _all_end(live, on_the_way)
                )
                if not waits:
                    unread = len(on_the_way) * (self.tree.depth + 1)  # at most; what came of them is not known yet
                    self.buffers.grow(min(rows.length + unread, longest))
                    on_the_way.append(self._step(state, law, plan, rows, live))
                lag = 0 if law.by_text else self.steps.lag  # processors see the text up to here
                while on_the_way and (waits or len(on_the_way) > lag):
                    # The one host read, between two steps: what was added decides which samples go on.
                    yield self._landed(on_the_way.popleft(), control, start)
                    start = time.perf_counter()  # what the caller does is not decoding
        finally:  # also when the caller has had enough
            self.stats.count_nodes(state, self.tree)
            self.stats.decisions = control.decisions

    def _step(self, state: BatchState, law: SamplingLaw, plan: Plan, rows: Rows, live: dict[int, Text]) -> Flight:
        """Start a step for the live rows."""
        n_batch = len(state.lengths)
        compiling = False
        begin = read = Mark(self.target.device)
        if plan.depth:
            rows.read(_drafted(live, plan))
            read = Mark(self.target.device)
            counted = self.count(self._bucket(min(max(len(live), 2), n_batch), n_batch))
            draft = self.steps.get(self.draft, ("draft", law.key, n_batch == 1, plan.depth), len(counted))
            draft(state, law, counted, plan.depth)
            compiling |= self.steps.was_compiling
        else:
            rows.skip(live)
        drafted = Mark(self.target.device)
        allowed = dict(zip(live, plan.allowed, strict=True))
        state.allow([allowed.get(row, 0) for row in range(n_batch)])
        # The last sample of a batch is decoded as two, one of them nobody: one would be compiled on its own.
        token = self.count(self._bucket(max(plan.n_tokens, min(n_batch, 2)), n_batch * len(self.tree)))
        judge = self.look if law.by_text else self.judge
        judge = self.steps.get(judge, (judge.__name__, law.key, n_batch == 1, len(token) == 1), len(token))
        report = judge(state, law, token)
        compiling |= self.steps.was_compiling
        if law.by_text:
            logits, n_nodes, starts = report
            chosen = walk(live.items(), state, self.tree, logits, n_nodes, starts, law.greedy)
            report = self.settle(state, n_nodes, chosen)
        judged = Mark(self.target.device)  # before the report's own: all have passed when it has arrived
        marks = None if compiling else (begin, read, drafted, judged)
        return Flight(plan, live, Readback(report), marks)

    def _landed(self, flight: Flight, control: Policy, start: float) -> list[Emitted]:
        """What a step's report says of the texts that had not ended."""
        report, emitted = flight.report.wait(), []
        for row, text in flight.live.items():
            if text.finished:
                continue
            *tokens, n_new, n_found, n_judged, finished, broken = report[row]
            if broken:
                why = f"the target's logits in row {row} of the batch hold a NaN: there is no law to sample from"
                n_new = n_new - 1 if text.error else 0  # what came before an error of the user's own counts
                text.error = text.error or RuntimeError(why)
            taken = text.take(tokens[:n_new], bool(finished))
            if len(taken) < n_new:
                self.stats.uncount(len(taken), min(n_new, self.tree.depth), self._level_of(n_judged))
            elif flight.plan.depth and not (finished or broken):
                control.count(text.habit, n_found, n_judged, n_new - 1)
            emitted.append(Emitted(text, taken))
        control.learn(flight.plan, flight.seconds)
        n_tokens, seconds = sum(len(piece.tokens) for piece in emitted), time.perf_counter() - start
        self.stats.count_step(n_tokens, len(emitted), sum(flight.plan.allowed), seconds, compiling=flight.marks is None)
        return emitted

    def warm_up(self, prompts: list[Tensor], law: SamplingLaw, longest: int, eos_ids: Tensor) -> None:
        """Run every step that a batch like this comes to, as often as recording and timing it takes."""
        texts = [Text(prompt, longest - len(prompt)) for prompt in prompts]
        room, n_live = max(len(prompt) for prompt in prompts), {len(prompts)}
        if self.steps.keeps_buffers:  # what is recorded first makes the pool: the largest
            n_live |= {self._bucket(n, len(prompts)) for n in range(1, len(prompts))}
        state = self.buffers.open(len(prompts), longest, room, eos_ids)
        control = self._controller(law)
        self.buffers.grow(min(room + self.tree.depth + 1, longest))
        self.buffers.record()

        def step(n: int, plan: Plan) -> None:
            rows = Rows(iter(texts[:n]), state, self.target, self.drafter, self.buffers.grow)
            rows.fill(n)
            while rows.is_writing:
                rows.write()
            flight = self._step(state, law, plan, rows, rows.live)
            flight.report.wait()
            control.learn(plan, flight.seconds)

        for n in sorted(n_live, reverse=True):
            habits = [text.habit for text in texts[:n]]
            for depth in control.levels:
                for _ in range(3 if self.steps.keeps_buffers else 2):  # compiled, recorded, timed
                    step(n, control.uniform(n, depth, trial=EXPLORE))
            while control.calibrates(n):
                step(n, control.plan(habits))

    def _level_of(self, n_drafted: int) -> int:
        """The deepest level of the tree's first `n_drafted` drafted nodes."""
        return self.tree.depths[n_drafted]

    def _ready(self, law: SamplingLaw, n_rows: int) -> tuple[int, ...]:
        """Depths that can be drafted without compiling in the middle of a text; the whole draft always is one."""
        depths, key = self.drafter.depths, ("draft", law.key, n_rows == 1)
        return tuple(d for d in depths if d == depths[-1] or self.steps.has((*key, d)))

    def _plan(self, control: Policy, law: SamplingLaw, live: dict[int, Text], n_rows: int) -> Plan:
        """What the next step does: what the policy says, but for texts that the drafter cannot read to their ends,
        for which nothing is drafted."""
        root_alone = ("look" if law.by_text else "judge", law.key, True, True)
        if 0 in control.levels and n_rows == 1 and not self.steps.has(root_alone):
            return control.uniform(1, 0)  # a function of its own: compiled at once, not in the middle of a later text
        plan = control.plan([text.habit for text in live.values()])
        context = getattr(self.drafter, "context", None)  # users' drafters need not have one
        if context is None or not plan.depth:
            return plan
        fits = [len(text.prompt) + len(text.tokens) + self.tree.depth <= context for text in live.values()]
        if all(fits):
            return plan
        reason = f"texts past the draft's context of {context} tokens"
        self.stats.undrafted_texts[reason] += len(fits) - sum(fits)
        allowed = tuple(n if fit else 0 for n, fit in zip(plan.allowed, fits, strict=True))
        depth = plan.depth if any(allowed) else 0
        return replace(plan, depth=depth, allowed=allowed, n_tokens=len(fits) + sum(allowed))

    def _controller(self, law: SamplingLaw) -> Policy:
        """The policy of calls of this law; it remembers what earlier ones took and got accepted."""
        adapts = (law.greedy or self.verifier.coupled) if self.adapt is None else self.adapt
        if law.key not in self._controllers:
            self._controllers[law.key] = policy_of(self.tree, self.drafter.depths, adapts)
        return self._controllers[law.key]

    def count(self, n: int) -> Tensor:
        """[n] int64: 0, 1, ..., n - 1; compiled functions take them for any number."""
        if n not in self._counts:
            self._counts[n] = torch.arange(n, device=self.target.device, dtype=torch.int64)
            torch._dynamo.maybe_mark_dynamic(self._counts[n], 0)
        return self._counts[n]

    def _bucket(self, n: int, most: int) -> int:
        """At least `n`: what is recorded size by size comes in few sizes."""
        if not self.steps.keeps_buffers or n <= 2:
            return n
        return min(4 if n <= 4 else -(-n // 8) * 8, most)


def _drafted(live: dict[int, Text], plan: Plan) -> dict[int, Text]:
    """The texts for which there is something to judge."""
    return {row: text for (row, text), nodes in zip(live.items(), plan.allowed, strict=True) if nodes}


def _all_end(live: dict[int, Text], on_the_way: Iterable[Flight]) -> bool:
    """Whether the steps on their way end every text: each adds a token to each of its texts at least."""
    return all(
        text.max_new_tokens - len(text.tokens) <= sum(flight.live.get(row) is text for flight in on_the_way)
        for row, text in live.items()
    )
