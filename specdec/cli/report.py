"""What `specdec bench` shows: tables, the verdict, a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from specdec.cli.bench import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def show(result: Result, console: Console) -> None:
    """Print what was measured, and what it comes to."""
    say = partial(console.print, markup=False, highlight=False)
    if result.ways:
        say(f"\n{_title(result)}", style="bold")
        for shown in (_speeds(result), _steps(result), _shares(result)):
            console.print(shown)
            console.print()
        say("middle half: of the rounds. draft cost: of a drafted token, in target steps without a draft.", style="dim")
    for way in result.ways:
        if way.difference is not None:
            say(f"{way.label}: {way.difference}.", style="" if way.difference.is_rounding else "red")
    for note in result.notes:
        say(note, style="dim")
    say(result.verdict.sentence, style="bold")
    if result.verdict.code:
        say(f"    {result.verdict.code}", soft_wrap=True)


def table(*columns: str) -> Table:
    """A table without lines, of a column of names and others of numbers."""
    out = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    out.add_column("", no_wrap=True)
    for column in columns:
        out.add_column(column, justify="right", no_wrap=True)
    return out


def _title(result: Result) -> str:
    settings = result.settings
    model = settings.sources.model or f"{settings.sources.size} target"
    law = f"temperature {settings.temperature:g}" if settings.temperature else "greedy"
    size = f"{result.parameters / 1e6:.0f}M parameters"
    return f"{model}: {size}, {result.dtype}, {law}, batch {settings.batch}, medians of {result.rounds} rounds"


def _speeds(result: Result) -> Table:
    base, fastest = result.ways[0], max(result.ways, key=lambda way: way.speed)
    out = table("tokens/s", "middle half", "ratio", "per step")
    out.add_column("text")
    for way in result.ways:
        low, high = way.middle
        per_step = f"{way.stats.tokens_per_step:.2f}" if way.stats is not None else ""
        text = "identical" if way.difference is None else "rounding" if way.difference.is_rounding else "different"
        out.add_row(
            way.label,
            f"{way.speed:.1f}",
            f"{low:.1f}-{high:.1f}",
            f"{way.speed / base.speed:.2f}×",
            per_step,
            "" if way is base else "sampled" if result.settings.temperature else text,
            style="bold" if way is fastest else "",
        )
    return out


def _steps(result: Result) -> Table:
    """What specdec's steps took and drafted."""
    out = table("warm-up", "prefill", "decode", "compile", "drafted", "draft cost")
    for way in result.ways:
        if way.stats is not None:
            seconds = [f"{way.stats.seconds[phase]:.1f} s" for phase in ("prefill", "decode", "compile")]
            drafted = f"{way.drafted:.1f} of {way.depth}" if way.depth else ""
            cost = "" if way.draft_cost is None else f"{way.draft_cost:.2g}"
            out.add_row(way.label, f"{way.warmup_seconds:.1f} s", *seconds, drafted, cost)
    return out


def _shares(result: Result) -> Table:
    """How often drafted tokens were accepted."""
    out = table()
    out.add_column("accepted by position", header_style="dim")
    for way in result.ways:
        if way.depth and way.stats is not None:
            known = zip(way.stats.acceptance_by_position, way.stats.proposed, strict=True)
            shares = "  ".join(f"{share:.2f}" for share, proposed in known if proposed)
            out.add_row(way.label, shares or "nothing was drafted")
    return out


def plot(result: Result, path: str) -> None:
    """Tokens a second by way, with the middle half of the rounds, as a PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.45 * len(result.ways)), layout="constrained")
    axes = figure.subplots()
    ours = [way.stats is not None for way in result.ways]
    bars(axes, {way.label: way.speed for way in result.ways}, ours, [way.middle for way in result.ways])
    axes.set_title(_title(result), loc="left", fontsize=10)
    figure.savefig(path, dpi=150, format="png")


def bars(
    axes: Axes, speeds: Mapping[str, float], ours: Sequence[bool], middles: Sequence[tuple[float, float]] | None = None
) -> None:
    """Tokens a second by label, the first of which the others are compared with; specdec's are marked `ours`.

    Args:
        middles: what the middle half of each one's rounds lies between, if that is drawn.
    """
    labels, values = list(speeds)[::-1], list(speeds.values())[::-1]
    colors = ["tab:blue" if is_ours else "0.7" for is_ours in reversed(ours)]
    noise = None
    if middles is not None:
        away = [(value - low, high - value) for value, (low, high) in zip(speeds.values(), middles, strict=True)]
        noise = list(zip(*reversed(away), strict=True))
    names = [label.replace(", ", ",\n") for label in labels]
    drawn = axes.barh(names, values, color=colors, height=0.6, xerr=noise, ecolor="0.2", capsize=3)
    axes.bar_label(drawn, [f"{value:.0f}  ({value / values[-1]:.2f}×)" for value in values], padding=4)
    axes.set(xlabel="tokens per second (median)", xlim=(0, 1.3 * max(values)))
    axes.spines[["top", "right"]].set_visible(False)
