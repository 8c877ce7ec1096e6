"""What happened while decoding: counts, seconds and fallbacks; as a dict, a table or a plot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specdec.errors import needs_cli
from specdec.fallbacks import remedy

if TYPE_CHECKING:
    from rich.table import Table

    from specdec.engine.control import Decisions
    from specdec.engine.state import BatchState
    from specdec.engine.tree import TokenTree


@dataclass
class SourceCounts:
    """What one of several sources drafted: for how many steps of a sample, how many tokens of them were verified, and
    how many of those accepted."""

    drafts: int = 0
    verified: int = 0
    accepted: int = 0

    def count(self, n_verified: int, n_accepted: int) -> None:
        """A step of a sample."""
        self.drafts += n_verified > 0
        self.verified += n_verified
        self.accepted += n_accepted


@dataclass
class Stats:
    """Running totals over all `generate()` calls since the last `reset()`.

    Attributes:
        steps: decoding steps run; undrafted: those of them that drafted nothing. sample_steps: all, counted once per
            live sample. allowed: drafted nodes that steps were to judge at most.
        tokens: tokens emitted.
        proposed, accepted: by position in the draft (index 0 is the first drafted token): how often a token was
            drafted there, be it one or several to choose from, and how often one was accepted.
        slots: by number of children k of a node: how often such a node was reached, and how often the path went on
            through its 1st, ..., k-th child.
        sources: by name, what each source drafted, where there are several.
        seconds: wall-clock seconds by phase: "prefill", "decode", and "compile" for steps that compiled.
        beam_layers, beam_forwards: of beam searches, layers of all beams, and forwards of the target that served them.
        tree: how the tree was chosen, if `tune()` has chosen it.
        decisions: how much was drafted in the last call's last steps, and why (see `specdec.engine.control`).
        undrafted_texts: by reason, how often a step drafted nothing for a text that it drafts for otherwise.
        decoded: `generate()` calls decoded by specdec. fallbacks: those that ran transformers' own loop, by reason.
        dropped_drafts: those decoded by specdec without their draft, which could not be prepared, by reason.
        eager: drafts and judgements that ran eagerly though they were to be compiled, by reason.
    """

    steps: int = 0
    undrafted: int = 0
    sample_steps: int = 0
    allowed: int = 0
    tokens: int = 0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    slots: dict[int, list[int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "compile": 0.0, "decode": 0.0})
    sources: dict[str, SourceCounts] = field(default_factory=dict)
    beam_layers: int = 0
    beam_forwards: int = 0
    tree: str | None = None
    decisions: Decisions | None = None
    undrafted_texts: Counter[str] = field(default_factory=Counter)
    decoded: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    dropped_drafts: Counter[str] = field(default_factory=Counter)
    eager: Counter[str] = field(default_factory=Counter)

    def reset(self) -> None:
        """Forget everything but the tree that is used."""
        self.eager.clear()  # the very counter that steps count in
        self.__init__(tree=self.tree, eager=self.eager)  # type: ignore[misc]

    @property
    def control(self) -> str | None:
        """The decisions as a sentence."""
        return None if self.decisions is None else str(self.decisions)

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens one step adds to one sample; 0 before the first step."""
        return self.tokens / self.sample_steps if self.sample_steps else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of drafted tokens accepted at each position (a position counts only where it was drafted)."""
        return [a / p if p else 0.0 for a, p in zip(self.accepted, self.proposed, strict=True)]

    def count_step(self, n_tokens: int, n_samples: int, allowed: int, seconds: float, *, compiling: bool) -> None:
        """A step added tokens to samples, and may have judged some drafted nodes."""
        self.steps += 1
        self.undrafted += not allowed
        self.tokens += n_tokens
        self.sample_steps += n_samples
        self.allowed += allowed
        self.seconds["compile" if compiling else "decode"] += seconds

    def uncount(self, n_kept: int, n_accepted: int, n_proposed: int) -> None:
        """A text ended after `n_kept` tokens of a step's, on the host, where the device had counted `n_accepted` levels
        accepted of `n_proposed`."""
        for totals, n in (self.accepted, n_accepted), (self.proposed, n_proposed):
            totals.extend([0] * (n - len(totals)))
            for level in range(n_kept, n):
                totals[level] -= 1

    @property
    def acceptance_by_slot(self) -> dict[int, tuple[float, ...]]:
        """By number of children k of a node: the share of visits after which the path went on through each child."""
        return {k: tuple(n / reached for n in taken) for k, (reached, *taken) in sorted(self.slots.items()) if reached}

    def count_nodes(self, state: BatchState, tree: TokenTree) -> None:
        """Move the device's counts by node into the totals."""
        proposed, accepted, reached = (x.tolist() for x in (state.proposed, state.accepted, state.reached))
        for device_counts in (state.proposed, state.accepted, state.reached):
            device_counts.zero_()
        for totals in (self.proposed, self.accepted):
            totals.extend([0] * (tree.depth - len(totals)))
        for depth in range(1, tree.depth + 1):
            self.proposed[depth - 1] += proposed[tree.depths.index(depth)]
        for node in range(1, len(tree)):
            self.accepted[tree.depths[node] - 1] += accepted[node]
        for node in tree.inner:
            first, k = tree.first_child[node], tree.n_children[node]
            if reached[node]:
                counts = [reached[node], *accepted[first : first + k]]
                self.slots[k] = [a + b for a, b in zip(self.slots.get(k, [0] * (k + 1)), counts, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """All totals and the ratios made of them, ready for JSON."""
        return {
            "steps": self.steps,
            "undrafted": self.undrafted,
            "allowed": self.allowed,
            "tokens": self.tokens,
            "tokens_per_step": self.tokens_per_step,
            "proposed": list(self.proposed),
            "accepted": list(self.accepted),
            "acceptance_by_position": self.acceptance_by_position,
            "acceptance_by_slot": {str(k): list(shares) for k, shares in self.acceptance_by_slot.items()},
            "sources": {name: dict(vars(counts)) for name, counts in self.sources.items()},
            "seconds": dict(self.seconds),
            "tree": self.tree,
            "beam_layers": self.beam_layers,
            "beam_forwards": self.beam_forwards,
            "control": self.control,
            "decisions": None if self.decisions is None else self.decisions.to_dict(),
            "undrafted_texts": dict(self.undrafted_texts),
            "decoded": self.decoded,
            "fallbacks": dict(self.fallbacks),
            "dropped_drafts": dict(self.dropped_drafts),
            "eager": dict(self.eager),
        }

    def lines(self) -> list[tuple[str, str]]:
        """What there is to say, and what of."""
        undrafted = f", {self.undrafted} of them without a draft" if self.undrafted and self.accepted else ""
        spent = {"prefill": "prompts", "compile": "steps that compiled", "decode": "all other steps"}
        lines = [
            ("new tokens", f"{self.tokens} in {self.steps} steps of the target{undrafted}"),
            ("tokens per step", f"{self.tokens_per_step:.2f} of each sample; without a draft it is 1"),
            ("drafted tokens accepted", self._accepted()),
            ("seconds", ", ".join(f"{value:.2f} {spent.get(name, name)}" for name, value in self.seconds.items())),
        ]
        for name, source in self.sources.items():
            mean = source.accepted / source.drafts if source.drafts else 0.0
            lines.append((f"drafts by {name}", f"{source.drafts}, of each {mean:.2f} tokens accepted"))
        if self.beam_forwards:
            mean = self.beam_layers / self.beam_forwards
            lines.append(("beam search", f"{mean:.2f} layers a forward of the target; without a draft it is 1"))
        lines += [("tree chosen by tune()", self.tree)] if self.tree is not None else []
        lines += [("how much is drafted", self.control)] if self.control is not None else []
        for reason, count in self.fallbacks.items():
            lines.append(("ran transformers' own loop", f"{count} x: {reason}. {remedy(reason)}".rstrip()))
        for name, counts in (
            ("decoded without the draft", self.dropped_drafts),
            ("ran eagerly", self.eager),
            ("samples without a draft", self.undrafted_texts),
        ):
            lines += [(name, f"{count} x: {reason}") for reason, count in counts.items()]
        return lines

    def _accepted(self) -> str:
        if not any(self.proposed):
            return "none was drafted"
        return f"{' '.join(f'{share:.0%}' for share in self.acceptance_by_position)}, by position in the draft"

    def table(self) -> Table:
        """A table for a terminal (rich)."""
        with needs_cli("a table"):
            from rich.table import Table

        table = Table(title="specdec", show_header=False)
        for line in self.lines():
            table.add_row(*line)
        return table

    @property
    def verdict(self) -> str | None:
        """How many calls were decoded here, and why the others were not; None if all were."""
        if not self.fallbacks:
            return None
        n_calls, reasons = self.decoded + self.fallbacks.total(), list(self.fallbacks.items())
        why = "; ".join(reason if len(reasons) == 1 else f"{reason} ({count} calls)" for reason, count in reasons)
        return f"{self.decoded} of {n_calls} calls were decoded by specdec: {why}"

    def plot(self, path: str) -> None:
        """Acceptance by position and seconds by phase, as a PNG at `path`."""
        with needs_cli("a plot"):
            from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.bar(range(1, len(self.accepted) + 1), self.acceptance_by_position)
        left.set(xlabel="position in the draft", ylabel="share accepted", ylim=(0, 1))
        left.set_title(f"{self.tokens_per_step:.2f} tokens per step")
        right.barh(list(self.seconds), list(self.seconds.values()))
        right.set(xlabel="seconds")
        figure.savefig(path, dpi=150)

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            lines = [f"{name:<26}  {said}" for name, said in self.lines()]
            return "\n".join(lines if self.verdict is None else [self.verdict, *lines])
        console = Console(width=100)
        with console.capture() as capture:
            if self.verdict is not None:
                console.print(self.verdict, markup=False, highlight=False)
            console.print(self.table())
        return capture.get()
