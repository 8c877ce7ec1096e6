"""Launching a step: what is run, for whom, in which size, and where its report goes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.engine.control import Plan
from specdec.engine.laws import SamplingLaw
from specdec.engine.roles import Steps
from specdec.engine.slots import Rows
from specdec.engine.state import READ, BatchState, Report
from specdec.engine.step import TreeStep
from specdec.engine.text import Text
from specdec.engine.walk import walk
from specdec.graphs.captured import Mark, Readback


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

    def wait(self) -> list[tuple[int, Text, Report]]:
        """What the step says of each of its texts, by row; waits until it has arrived."""
        rows = self.report.wait()
        return [(row, text, Report.of(rows[row])) for row, text in self.live.items()]


class Launcher:
    """Starts steps, as they are, compiled or recorded; sizes are few where each is recorded."""

    def __init__(self, step: TreeStep, steps: Steps) -> None:
        self._step, self._steps = step, steps
        self._counts: dict[int, Tensor] = {}

    def start(
        self, state: BatchState, law: SamplingLaw, plan: Plan, rows: Rows, live: dict[int, Text],
        found: dict[int, list[int]],
    ) -> Flight:  # fmt: skip
        """A step with this plan, for the live rows; the drafter drafts for those of which nothing was found."""
        step, n_batch, device = self._step, len(state.lengths), self._step.target.device
        rides = step.rides(law, plan.depth)
        others = {row: text for row, text in live.items() if row not in found}
        wanted = {row: text for row, text in drafted_for(live, plan).items() if row in others}
        plan = replace(plan, n_drafted=len(others) if plan.depth and wanted and not rides else 0)
        compiling = False
        begin = read = Mark(device)
        if plan.n_drafted:
            reads = rows.read(others, wanted)
            read = Mark(device)
            compiling = self._draft(state, law, plan, reads)
        rows.skip({row: text for row, text in live.items() if not plan.n_drafted or row in found})
        if found:
            state.overlay(found, keeps=rides or bool(plan.n_drafted))
        drafted = Mark(device)
        allowed = dict(zip(live, plan.allowed, strict=True))
        state.allow([allowed.get(row, 0) for row in range(n_batch)])
        # The last sample of a batch is decoded as two, one of them nobody: one would be compiled on its own.
        token = self.count(self.bucket(max(plan.n_tokens, min(n_batch, 2)), n_batch * len(step.tree)))
        judge, n_rows, more = step.judgement(law, plan.depth)
        given = [token]
        if n_rows:
            given.append(self.count(self.bucket(n_rows * len(token), n_rows * n_batch * len(step.tree))))
        key = judge.__name__, law.key, n_batch == 1, len(token) == 1
        report = self._steps.get(judge, key, tuple(map(len, given)))(state, law, *given, *more)
        compiling |= self._steps.was_compiling
        if law.by_text:
            logits, n_nodes, starts = report
            chosen = walk(live.items(), state, step.tree, logits, n_nodes, starts, law.greedy)
            report = step.settle(state, n_nodes, *chosen)
        judged = Mark(device)  # before the report's own: all have passed when it has arrived
        marks = None if compiling else (begin, read, drafted, judged)
        return Flight(plan, live, Readback(report), marks)

    def _draft(self, state: BatchState, law: SamplingLaw, plan: Plan, reads: list[int]) -> bool:
        """Let the drafter draft, which reads so many last tokens of each row's text first; whether that compiled."""
        n_batch = len(state.lengths)
        counted = self.count(self.bucket(min(max(plan.n_drafted or 0, 2), n_batch), n_batch))
        n_fed, fewest = sum(reads), READ * len(counted)
        state.feed(reads, self.count(fewest if n_fed <= fewest else self.bucket(n_fed, n_batch * n_fed)))
        key, size = ("draft", law.key, n_batch == 1, plan.depth), (len(counted), len(state.fed))
        draft = self._steps.get(self._step.draft, key, size)
        draft(state, law, counted, plan.depth)
        return self._steps.was_compiling

    def is_ready(self, law: SamplingLaw, n_rows: int, depth: int) -> bool:
        """Whether a draft of this depth is launched without compiling; with 0, whether the judgement of one root is."""
        if depth and not self._step.rides(law, depth):
            return self._steps.has(("draft", law.key, n_rows == 1, depth))
        judge, *_ = self._step.judgement(law, depth)
        return self._steps.has((judge.__name__, law.key, n_rows == 1, depth == 0))

    def count(self, n: int) -> Tensor:
        """[n] int64: 0, 1, ..., n - 1; compiled functions take them for any number."""
        if n not in self._counts:
            self._counts[n] = torch.arange(n, device=self._step.target.device, dtype=torch.int64)
            torch._dynamo.maybe_mark_dynamic(self._counts[n], 0)
        return self._counts[n]

    def bucket(self, n: int, most: int) -> int:
        """At least `n`: what is recorded size by size comes in few sizes."""
        if not self._steps.keeps_buffers or n <= 2:
            return n
        return min(4 if n <= 4 else -(-n // 8) * 8, most)


def drafted_for(live: dict[int, Text], plan: Plan) -> dict[int, Text]:
    """The texts for which there is something to judge."""
    return {row: text for (row, text), nodes in zip(live.items(), plan.allowed, strict=True) if nodes}
