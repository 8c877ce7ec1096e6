"""Choosing the tree: what this machine takes for a step, and what the draft model gets accepted.

Trees of several shapes are decoded with, uncompiled, for how often the path goes on through each child; the target's
forward is timed, compiled, at several numbers of nodes. `specdec.tune.best_tree` makes the rest of it.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.config import Config
from specdec.engine.decide import decide
from specdec.engine.packing import Nodes
from specdec.engine.stats import Stats
from specdec.engine.tree import TokenTree
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.twin import is_seen
from specdec.hf.view import ModelView
from specdec.kernels.sampling.best_token import best_token
from specdec.progress import spinner
from specdec.tune.best_tree import Acceptance, StepCost, expected_tokens, fastest_tree

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of nodes at which a forward is timed."""
PROBES = (
    TokenTree.chain(6),
    TokenTree.from_widths(2, 2, 2),
    TokenTree.from_widths(3, 3, 1),
    TokenTree.from_widths(4, 2),
)
"""Trees that acceptance is counted with: nodes with 1, 2, 3 and 4 children."""
COMMITTED = 256  # tokens that a timed forward attends to


@dataclass(frozen=True)
class Choice:
    """The tree that was chosen, and why.

    Attributes:
        tree: the fastest; chain: the fastest chain.
        acceptance, cost: what they were chosen by (see `specdec.tune.best_tree`).
    """

    tree: TokenTree
    chain: TokenTree
    acceptance: Acceptance
    cost: StepCost

    def __str__(self) -> str:
        return f"{self._of(self.tree)}; best chain: {self._of(self.chain)}"

    def _of(self, tree: TokenTree) -> str:
        tokens, milliseconds = expected_tokens(tree, self.acceptance), 1000 * self.cost.of(tree)
        return f"{tree.summary}, {tokens:.2f} tokens in {milliseconds:.1f} ms a step"


def choose(
    probe: Callable[[TokenTree, bool], Stats], target: ModelView, draft: ModelView, max_nodes: int, max_depth: int,
    config: Config,
) -> Choice:  # fmt: skip
    """Measure, and choose the tree and the chain of most tokens a second, of one level at least.

    Args:
        probe: decodes with a tree, and says what happened; with True, compiled and timed.
    """
    slots: Counter[tuple[int, int]] = Counter()
    with spinner("tunes", config.progress) as bar:
        for tree in PROBES:
            if tree.is_chain or config.verifier != "block":
                bar.say(f"tunes: acceptance with {len(tree) - 1} drafted nodes")
                for k, counts in probe(tree, False).slots.items():
                    slots.update({(k, i): count for i, count in enumerate(counts)})
        acceptance = {
            k: [slots[k, i] / slots[k, 0] for i in range(1, k + 1)] for k, i in slots if i == 0 and slots[k, i]
        }
        bar.say("tunes: seconds of a step")
        stats = probe(TokenTree.chain(1), True)
        step = stats.seconds["decode"] / max(stats.steps, 1)
        cost = decide("seconds of forwards", measure_cost(target, draft, max_nodes, config.compile, step))
    found = [fastest_tree(shares, cost, max_depth) for shares in (acceptance, {1: acceptance[1]})]
    tree, chain = (tree if tree.depth else TokenTree.chain(1) for tree in found)
    return Choice(tree, chain, acceptance, cost)


def measure_cost(target: ModelView, draft: ModelView, n_nodes: int, compiled: bool, step: float) -> StepCost:
    """Seconds of a step of one sample: the target's forward of up to `n_nodes` nodes, the draft's of a level, the rest.

    What a level takes hardly depends on how wide it is: it is counted as one of two nodes, and as what a forward adds
    to others of the same graph.

    Args:
        step: seconds of a whole step that drafts one token, of which the forwards are only part.
    """
    forwards = forward_seconds(target, n_nodes, compiled)
    level = max(forward_seconds(draft, 2, compiled, times=4)[2] - forward_seconds(draft, 2, compiled)[2], 0) / 3
    rest = max(step - forwards[2] - level, 0)
    return StepCost({n: seconds + rest for n, seconds in forwards.items()}, level)


class TimedForward:
    """A model's forward of some flat nodes of one sample, `times` over."""

    def __init__(self, view: ModelView, n_nodes: int, times: int) -> None:
        self.view, self.n_nodes, self.times = view, n_nodes, times
        self.bits, self.depths = TokenTree.chain(n_nodes - 1).tensors(view.device)
        self.lengths = torch.tensor([COMMITTED], device=view.device, dtype=torch.int64)

    def run(self, token: Tensor) -> Tensor:
        count = torch.ones_like(self.lengths) * token.shape[0]
        n_slots = self.view.cache.n_slots
        nodes = Nodes.packed(self.lengths, count, token, self.n_nodes, n_slots, self.bits, self.depths)
        tokens = torch.zeros_like(token)
        for _ in range(self.times):
            tokens = best_token(self.view.forward(tokens, nodes).logits)
        return tokens


@torch.no_grad()
def forward_seconds(
    view: ModelView, n_nodes: int, compiled: bool, times: int = 1, repeats: int = 15
) -> dict[int, float]:
    """Median seconds of `times` forwards of one sample's nodes, by their number, up to `n_nodes`.

    The numbers take turns, so that what else the machine does falls on all alike. The view's cache is used up.
    """
    view.allocate(1, COMMITTED + n_nodes + 1)  # the last slot is scratch
    forward = TimedForward(view, n_nodes, times)
    counts = sorted({n for n in COUNTS if n < n_nodes} | {n_nodes})
    run = CompiledSteps(compiled, is_seen=is_seen).get(forward.run, None, 0)
    tokens = {n: torch.arange(n, device=view.device, dtype=torch.int64) for n in counts}
    seconds: dict[int, list[float]] = {n: [] for n in counts}
    for turn in range(repeats + 2):  # the first two compile
        for n, token in tokens.items():
            torch._dynamo.maybe_mark_dynamic(token, 0)
            _wait(view.device)
            start = time.perf_counter()
            run(token)
            _wait(view.device)
            if turn > 1:
                seconds[n].append(time.perf_counter() - start)
    return {n: statistics.median(values) for n, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
