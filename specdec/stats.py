"""What happened while decoding: counts, seconds and fallbacks; as a dict, a table or a plot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from specdec.state import BatchState


@dataclass
class Stats:
    """Running totals over all `generate()` calls since the last `reset()`.

    Attributes:
        steps: decoding steps run. sample_steps: the same, counted once per live sample.
        tokens: tokens emitted.
        proposed, accepted: drafted tokens by position in the draft (index 0 is the first drafted token).
        seconds: wall-clock seconds by phase: "prefill", "decode", and "compile" for steps that compiled.
        fallbacks: `generate()` calls that ran transformers' own loop, by reason.
    """

    steps: int = 0
    sample_steps: int = 0
    tokens: int = 0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "compile": 0.0, "decode": 0.0})
    fallbacks: Counter[str] = field(default_factory=Counter)

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens one step adds to one sample; 0 before the first step."""
        return self.tokens / self.sample_steps if self.sample_steps else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of drafted tokens accepted at each position (a position counts only where it was drafted)."""
        return [a / p if p else 0.0 for a, p in zip(self.accepted, self.proposed, strict=True)]

    def count_step(self, n_samples: int, seconds: float, *, compiling: bool) -> None:
        self.steps += 1
        self.sample_steps += n_samples
        self.seconds["compile" if compiling else "decode"] += seconds

    def count_positions(self, state: BatchState) -> None:
        """Move the device's counts by position into the totals."""
        for total, counts in ((self.proposed, state.proposed), (self.accepted, state.accepted)):
            total.extend([0] * (len(counts) - len(total)))
            for i, count in enumerate(counts.tolist()):
                total[i] += count
            counts.zero_()

    def to_dict(self) -> dict[str, Any]:
        """All totals and the ratios made of them, ready for JSON."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_per_step": self.tokens_per_step,
            "proposed": list(self.proposed),
            "accepted": list(self.accepted),
            "acceptance_by_position": self.acceptance_by_position,
            "seconds": dict(self.seconds),
            "fallbacks": dict(self.fallbacks),
        }

    def table(self) -> Table:
        """A table for a terminal (rich)."""
        from rich.table import Table

        table = Table(title="specdec", show_header=False)
        table.add_row("tokens", f"{self.tokens} in {self.steps} steps")
        table.add_row("tokens per step and sample", f"{self.tokens_per_step:.2f}")
        table.add_row(
            "acceptance by position", "  ".join(f"{a:.2f}" for a in self.acceptance_by_position) or "no draft"
        )
        table.add_row("seconds", ", ".join(f"{name} {value:.2f}" for name, value in self.seconds.items()))
        for reason, count in self.fallbacks.items():
            table.add_row("ran transformers' own loop", f"{count} x: {reason}")
        return table

    def plot(self, path: str) -> None:
        """Acceptance by position and seconds by phase, as a PNG at `path`."""
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
        from rich.console import Console

        console = Console(width=100)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()
