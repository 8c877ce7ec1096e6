"""The loop: schedule, launch, take. What runs on the device is one `specdec.engine.step`; here is what the host decides
between two steps: which texts are in the batch, how much is drafted, and which have ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from specdec.engine.beams import BeamDecoder
from specdec.engine.control import EXPLORE, Plan, Policy, policy_of
from specdec.engine.launch import Flight, Launcher, drafted_for
from specdec.engine.laws import SamplingLaw
from specdec.engine.memory import Buffers
from specdec.engine.ride import RidingStep
from specdec.engine.roles import Drafter, Steps, Target
from specdec.engine.slots import Rows
from specdec.engine.stats import SourceCounts, Stats
from specdec.engine.step import TreeStep
from specdec.engine.text import Text
from specdec.verifiers import AUTO
from specdec.verifiers.base import Verifier

LookUp: TypeAlias = Callable[[Mapping[int, Text], bool], dict[int, list[int]]]


@dataclass(frozen=True)
class Emitted:
    """What happened to one text: tokens were added, or it ended, or an error kept it from being decoded."""

    text: Text
    tokens: list[int]


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
        self, target: Target, drafter: Drafter, steps: Steps, stats: Stats, verifier: Verifier = AUTO,
        adapt: bool | None = None,
    ) -> None:  # fmt: skip
        self.target, self.drafter, self.steps, self.stats, self.verifier = target, drafter, steps, stats, verifier
        self.tree, self.adapt = drafter.tree, adapt
        kind = RidingStep if getattr(drafter, "rides", False) else TreeStep  # users' drafters need not say
        self.step = kind(target, drafter, verifier)
        self.launcher = Launcher(self.step, steps)
        self.buffers = Buffers(target, drafter, steps)
        self.look_up: LookUp | None = getattr(drafter, "look_up", None)  # users' drafters need not have it
        self.sources: tuple[str, ...] = getattr(drafter, "source_names", ())  # by `Track.source`
        self.policies: dict[object, Policy] = {}
        self._beams: dict[int, BeamDecoder] = {}

    def beams(self, n_beams: int) -> BeamDecoder:
        """What answers beam searches of this width."""
        if n_beams not in self._beams:
            self._beams[n_beams] = BeamDecoder(self.target, self.drafter, self.steps, self.stats, n_beams)
        return self._beams[n_beams]

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
        policy = self._policy(law)
        policy.ready = self._ready(law, n_rows)
        lag = 0 if law.by_text or self.look_up else self.steps.lag  # both see the text up to here
        flights: deque[Flight] = deque()
        try:
            while True:
                if failed := self._schedule(rows, n_rows):
                    yield [Emitted(text, []) for text in failed]
                live = rows.live
                if not live:
                    flights.clear()  # they know nothing new of texts that have ended
                    if not rows.is_writing and not failed:
                        break
                if not live or (rows.is_writing and not rows.is_under_way):  # the first step is of all
                    continue
                start = time.perf_counter()
                found = self._found(live, law)
                plan = self._plan(policy, law, live, found, n_rows)
                # What the drafter has to read must have arrived; and a step of texts that will have ended is wasted.
                waits = bool(flights) and (
                    any(rows.unread(drafted_for(live, plan)).values()) or _all_end(live, flights)
                )
                if not waits:
                    unread = len(flights) * (self.tree.depth + 1)  # at most; what came of them is not known yet
                    self.buffers.grow(min(rows.length + unread, longest))
                    flights.append(self.launcher.start(state, law, plan, rows, live, found))
                while flights and (waits or len(flights) > lag):
                    # The one host read, between two steps: what was added decides which samples go on.
                    yield self._take(flights.popleft(), policy, start)
                    start = time.perf_counter()  # what the caller does is not decoding
        finally:  # also when the caller has had enough
            self.stats.count_nodes(state, self.tree)
            self.stats.decisions = policy.decisions

    def _schedule(self, rows: Rows, n_rows: int) -> list[Text]:
        """Give free rows to waiting texts and write the next of their prompts; those with which that fails."""
        start = time.perf_counter()
        failed = rows.fill(n_rows)
        self.buffers.grow(rows.length)
        if rows.is_writing:
            failed += rows.write()
        self.stats.seconds["prefill"] += time.perf_counter() - start
        return failed

    def _take(self, flight: Flight, policy: Policy, start: float) -> list[Emitted]:
        """What a step's report says of the texts that had not ended."""
        emitted, allowed = [], dict(zip(flight.live, flight.plan.allowed, strict=True))
        for row, text, report in [each for each in flight.wait() if not each[1].finished]:
            new = report.tokens
            if report.broken:
                why = f"the target's logits in row {row} of the batch hold a NaN: there is no law to sample from"
                new = new[:-1] if text.error else []  # what came before an error of the user's own counts
                text.error = text.error or RuntimeError(why)
            reach = len(report.tokens) if report.finished else text.max_new_tokens - len(text.tokens)
            taken = text.take(new, report.finished)
            if self.look_up is not None:
                source = self.stats.sources.setdefault(self.sources[text.track.source], SourceCounts())
                source.count(min(report.n_judged, reach), min(report.n_accepted, len(taken)))
            if text.finished:  # what comes after its end is nobody's, also where the host ended it
                judged = self.tree.depths[report.n_judged]  # the deepest level of so many nodes
                self.stats.uncount(len(taken), report.n_accepted, min(judged, reach))
            elif flight.plan.depth or any(flight.plan.allowed):
                policy.count(text.track, allowed[row], report.n_found, report.n_judged, report.n_accepted)
            emitted.append(Emitted(text, taken))
        policy.learn(flight.plan, flight.seconds)
        n_tokens, seconds = sum(len(piece.tokens) for piece in emitted), time.perf_counter() - start
        self.stats.count_step(n_tokens, len(emitted), sum(flight.plan.allowed), seconds, compiling=flight.marks is None)
        return emitted

    def warm_up(self, prompts: list[Tensor], law: SamplingLaw, longest: int, eos_ids: Tensor) -> None:
        """Run every step that a batch like this comes to, as often as recording and timing it takes."""
        texts = [Text(prompt, longest - len(prompt)) for prompt in prompts]
        room, n_live = max(len(prompt) for prompt in prompts), {len(prompts)}
        if self.steps.keeps_buffers:  # what is recorded first makes the pool: the largest
            n_live |= {self.launcher.bucket(n, len(prompts)) for n in range(1, len(prompts))}
        state = self.buffers.open(len(prompts), longest, room, eos_ids)
        policy = self._policy(law)
        self.buffers.grow(min(room + self.tree.depth + 1, longest))
        self.buffers.record()

        def step(n: int, plan: Plan) -> None:
            rows = Rows(iter(texts[:n]), state, self.target, self.drafter, self.buffers.grow)
            rows.fill(n)
            while rows.is_writing:
                rows.write()
            flight = self.launcher.start(state, law, plan, rows, rows.live, {})
            flight.wait()
            policy.learn(plan, flight.seconds)

        for n in sorted(n_live, reverse=True):
            tracks = [text.track for text in texts[:n]]
            for depth in policy.levels:
                for _ in range(3 if self.steps.keeps_buffers else 2):  # compiled, recorded, timed
                    step(n, policy.uniform(n, depth, trial=EXPLORE))
            while policy.calibrates(n):
                step(n, policy.plan(tracks))

    def _ready(self, law: SamplingLaw, n_rows: int) -> tuple[int, ...]:
        """Depths that can be drafted without compiling in the middle of a text; the whole draft always is one."""
        depths = self.drafter.depths
        return tuple(d for d in depths if d == depths[-1] or self.launcher.is_ready(law, n_rows, d))

    def _found(self, live: dict[int, Text], law: SamplingLaw) -> dict[int, list[int]]:
        """By row, the drafts that these texts have by themselves, where the drafter is not needed."""
        found = {} if self.look_up is None else self.look_up(live, law.greedy or self.verifier.coupled)
        for row, text in live.items():
            text.track.source = int(row in found)
        return found

    def _plan(
        self, policy: Policy, law: SamplingLaw, live: dict[int, Text], found: dict[int, list[int]], n_rows: int
    ) -> Plan:
        """What the next step does: what the policy says, but for texts that the drafter cannot read to their ends,
        for which nothing is drafted."""
        if 0 in policy.levels and n_rows == 1 and not self.launcher.is_ready(law, 1, 0):
            return policy.uniform(1, 0)  # a function of its own: compiled at once, not in the middle of a later text
        plan = policy.plan([text.track for text in live.values()])
        if self.look_up is not None:
            drafted = plan.depth and policy.shape.nodes_to[min(plan.depth, policy.shape.source_levels[0])]
            plan = plan.within([len(found[row]) if row in found else drafted for row in live])
        context = getattr(self.drafter, "context", None)  # users' drafters need not have one
        if context is None or not plan.depth:
            return plan
        fits = [
            row in found or len(text.prompt) + len(text.tokens) + self.tree.depth <= context
            for row, text in live.items()
        ]
        if all(fits):
            return plan
        reason = f"texts past the draft's context of {context} tokens"
        self.stats.undrafted_texts[reason] += len(fits) - sum(fits)
        allowed = tuple(n if fit else 0 for n, fit in zip(plan.allowed, fits, strict=True))
        depth = plan.depth if any(allowed) else 0
        return replace(plan, depth=depth, allowed=allowed, n_tokens=len(fits) + sum(allowed))

    def _policy(self, law: SamplingLaw) -> Policy:
        """The policy of calls of this law; it remembers what earlier ones took and got accepted."""
        adapts = (law.greedy or self.verifier.coupled) if self.adapt is None else self.adapt
        if law.key not in self.policies:
            self.policies[law.key] = policy_of(
                self.tree, self.drafter.depths, adapts, getattr(self.drafter, "source_levels", None),
                self.step.rides(law, self.tree.depth),
            )  # fmt: skip
        return self.policies[law.key]


def _all_end(live: dict[int, Text], flights: Iterable[Flight]) -> bool:
    """Whether the steps on their way end every text: each adds a token to each of its texts at least."""
    return all(
        text.max_new_tokens - len(text.tokens) <= sum(flight.live.get(row) is text for flight in flights)
        for row, text in live.items()
    )
