"""How many drafted tokens each rule of verification accepts: exact figures for random laws, no model, no sampled draft.

    python -m bench.verification --processes 100 --seeds 100

One node, two children, V = 1000: acceptance by closed formulas, beside the most that any rule can accept of drafts with
that law: an optimal transport, whose value is a minimum over sets of tokens (SpecTr, arXiv 2310.15141; Hu et al.,
arXiv 2502.18779). Trees of three levels, V = 5, a law of its own after every prefix: tokens a step, summed over all
drafts from what `specdec.kernels.verify.tree_rules` has each subtree accept. The means stand beside expected ones,
which another program found for laws of the same families, drawn with seeds of its own.

Letters: V vocabulary and support, K children of a node, D ways to draft them, P processes, X prefixes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations, product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from typer import Option

from bench import verification_report as report
from specdec.cli import measure
from specdec.kernels.verify.tree_rules import WITH_REPLACEMENT, weigh_children_reference
from specdec.verifiers.tree import HUB_SHARE

Laws = tuple[Tensor, Tensor]  # target_probs, draft_probs
Family = Callable[[torch.Generator], Laws]


def zipf(exponent: float, sigma: float, noise: torch.Generator) -> Laws:
    """The draft's law falls with the rank, the target's is that times log-normal noise."""
    draft = torch.arange(1, 1001, dtype=torch.float64) ** -exponent
    target = draft * (sigma * torch.randn(1000, generator=noise, dtype=torch.float64)).exp()
    return target / target.sum(), draft / draft.sum()


def gauss(scale: float, correlation: float, temperature: float, noise: torch.Generator) -> Laws:
    """Normal logits, correlated."""
    shared, own = torch.randn(2, 1000, generator=noise, dtype=torch.float64) * scale / temperature
    return (correlation * shared + math.sqrt(1 - correlation**2) * own).softmax(0), shared.softmax(0)


def uniform_draft(noise: torch.Generator) -> Laws:
    """The draft knows nothing, the target's law is uniform on the simplex."""
    target = torch.empty(1000, dtype=torch.float64).exponential_(generator=noise)
    return target / target.sum(), torch.full_like(target, 1e-3)


FAMILIES: dict[str, tuple[Family, str]] = {
    "zipf 1.5, σ 0.5": (partial(zipf, 1.5, 0.5), "0.392 0.8184 0.8870 0.9787 0.8985 0.9889 0.9658"),
    "zipf 1.5, σ 1": (partial(zipf, 1.5, 1), "0.392 0.6587 0.7641 0.8418 0.7828 0.8700 0.8398"),
    "zipf 2, σ 1": (partial(zipf, 2, 1), "0.608 0.7178 0.8096 0.8742 0.8509 0.9340 0.9254"),
    "gauss 4, ρ 0.9, T 0.6": (partial(gauss, 4, 0.9, 0.6), "0.660 0.4155 0.4857 0.4957 0.5697 0.5909 0.5869"),
    "gauss 4, ρ 0.9, T 0.3": (partial(gauss, 4, 0.9, 0.3), "0.825 0.3901 0.4346 0.4366 0.5589 0.5650 0.5702"),
    "uniform draft": (uniform_draft, "0.001 0.6320 0.7450 0.8376 0.7451 0.8378 0.6328"),
}
"""Laws of one node, and the expected means of what `acceptance` returns."""
EXPONENTS = [i / 4 for i in range(11)]


class Rule(NamedTuple):
    """How a tree is drafted and verified: hubs and children of a node, whether weights are handed down."""

    n_hubs: int
    width: int
    hands_down: bool


RULES = {
    "chain": Rule(0, 1, False), "block": Rule(0, 1, True), "RRS": Rule(WITH_REPLACEMENT, 2, False),
    "RRSw": Rule(0, 2, False), "hub": Rule(1, 2, False), "traversal": Rule(0, 2, True), "seqhub": Rule(1, 2, True),
}  # fmt: skip
NEVER_LESS = (("seqhub", "hub"), ("traversal", "RRSw"))
"""Of the same drafts, the first accepts no fewer tokens than the second, whatever the laws."""
TREES = {
    (0.3, 1.0): "2.450 2.592 2.827 2.920 2.978 3.051 3.140",
    (1.0, 1.0): "2.574 2.702 2.962 3.148 3.378 3.262 3.449",
    (2.0, 1.0): "2.750 2.840 3.121 3.444 3.630 3.536 3.652",
    (3.0, 1.0): "2.908 2.966 3.235 3.609 3.763 3.654 3.773",
    (2.0, 2.0): "2.157 2.252 2.548 3.011 3.148 3.118 3.213",
}
"""Spread c of the draft's logits and σ of what the target's add, and the expected means of RULES."""
EXPECTED_OVER = {"seeds": 100, "processes": 12}
"""What the expected means are means of."""
LEVELS, TREE_VOCAB = 3, 5
BATCH = 4  # processes at once


def acceptance(target_probs: Tensor, draft_probs: Tensor) -> dict[str, float]:
    """Acceptance of one node with two children by every rule, for laws [V], after the draft's highest probability."""
    left, rejected = (target_probs - draft_probs).clamp(min=0), (draft_probs - target_probs).clamp(min=0)
    single, distance = torch.minimum(target_probs, draft_probs).sum(), left.sum()
    odds = draft_probs / (1 - draft_probs)
    without = draft_probs / (1 - draft_probs)[:, None]  # [first, second]; nothing is left of a rejected first
    again = torch.minimum(left / distance, without).sum(-1)
    hub = draft_probs.argmax()
    rest = draft_probs.index_fill(0, hub, 0)
    # Drafts all in a set can only become tokens of it. The sets that matter: where the draft exceeds the target most.
    order = (draft_probs / target_probs).argsort(descending=True)
    in_target, in_draft = target_probs[order].cumsum(0), draft_probs[order].cumsum(0)
    both_distinct = in_draft * odds[order].cumsum(0) - (odds * draft_probs)[order].cumsum(0)
    found = {
        "draft max": draft_probs.max(),
        "single": single,
        "RRS": single + torch.minimum(left, distance * draft_probs).sum(),
        "optimum i.i.d.": (1 + in_target - in_draft**2).min(),
        "RRSw": single + (rejected * again).sum(),
        "optimum distinct": (1 + in_target - both_distinct).min(),
        "hub": target_probs[hub] + torch.minimum(target_probs, rest / rest.sum()).sum(),
    }
    return {name: value.item() for name, value in found.items()}


def drafts(n_hubs: int, width: int, draft_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Every way to draft a node's children: places [D, K] and probabilities [..., D]; `draft_probs` [..., V] falls."""
    vocab = range(draft_probs.shape[-1])
    if n_hubs == WITH_REPLACEMENT:
        places = torch.tensor(list(product(vocab, repeat=width)))
        return places, draft_probs[..., places].prod(-1)
    hubs = tuple(range(n_hubs))
    places = torch.tensor([hubs + drawn for drawn in permutations(vocab[n_hubs:], width - n_hubs)])
    probs = draft_probs[..., places]  # [..., D, K]
    return places, (probs / (1 - (probs.cumsum(-1) - probs)))[..., n_hubs:].prod(-1)


def accepted_below(rule: Rule, levels: Sequence[Laws], prefix: Tensor, weight: Tensor) -> Tensor:
    """[P, X] drafted tokens accepted below each node, on average, where its subtree must accept with `weight`.

    Over all that can be drafted below it a subtree accepts with just its weight: that is what the weights are for.

    Args:
        levels: laws [P, V ** level, V], best of the draft first, of the node's level and those below.
        prefix: [P, X] int64, where in its level a node's laws are. weight: [P, X].
    """
    if not levels:
        return torch.zeros_like(weight)
    row = prefix[..., None].expand(*prefix.shape, levels[0][0].shape[-1])
    target_probs, draft_probs = (law.gather(1, row)[:, :, None] for law in levels[0])  # [P, X, 1, V]
    places, probs = drafts(rule.n_hubs, rule.width, draft_probs[:, :, 0])
    places = places.expand(*probs.shape, rule.width)  # [P, X, D, K]
    weights, *_ = weigh_children_reference(
        rule.n_hubs, weight[..., None].expand_as(probs), target_probs, torch.zeros_like(probs), draft_probs, places
    )
    if rule.n_hubs > 0:  # tested last
        weights, places = weights.roll(-rule.n_hubs, -1), places.roll(-rule.n_hubs, -1)
    child = (row.shape[-1] * prefix[..., None, None] + places).flatten(1)
    if rule.hands_down:
        below = accepted_below(rule, levels[1:], child, weights.flatten(1)).view_as(weights)
    else:  # an accepted child counts 1, and only its prefix tells it from others
        every = torch.arange(row.shape[-1] * levels[0][0].shape[1]).expand(len(prefix), -1)
        each = accepted_below(rule, levels[1:], every, torch.ones(every.shape, dtype=weight.dtype))
        below = weights * each.gather(1, child).view_as(weights)
    failed = (1 - weights).cumprod(-1)
    tested = torch.cat([torch.ones_like(failed[..., :1]), failed[..., :-1]], -1)
    return (probs * (tested * (weights + below)).sum(-1)).sum(-1)


def tokens_per_step(rule: Rule, levels: Sequence[Laws]) -> Tensor:
    """[P] tokens a step: those accepted on average and one of the target's."""
    root = torch.zeros(len(levels[0][0]), 1, dtype=torch.int64)
    return 1 + accepted_below(rule, levels, root, torch.ones(root.shape, dtype=torch.float64))[:, 0]


def processes(spread: float, sigma: float, seeds: Sequence[int]) -> list[Laws]:
    """Laws [P, V ** level, V] after every prefix of each level, the draft's best first, as a support has them."""
    sizes = [TREE_VOCAB**level for level in range(LEVELS)]
    shape = (2, sum(sizes), TREE_VOCAB)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    draft, added = torch.stack(noise, 1)
    draft = spread * draft.sort(descending=True).values
    target = draft + sigma * added  # independent of the draft's, so any order will do
    return list(zip(target.softmax(-1).split(sizes, 1), draft.softmax(-1).split(sizes, 1), strict=True))


def figures(values: dict[str, Tensor], expected: str, n_expected: int) -> report.Figures:
    """Of each column [n] the mean, its standard error, and how far off the expected mean it is.

    That is in standard errors of the difference: the expected mean varies too, and is rounded.
    """
    found = {}
    for (name, column), text in zip(values.items(), expected.split(), strict=True):
        mean, variance, unit = column.mean().item(), column.var().item(), 10 ** -len(text.partition(".")[2])
        error = math.sqrt(variance / len(column) + variance / n_expected + unit**2 / 12)
        found[name] = {
            "mean": mean, "standard_error": math.sqrt(variance / len(column)), "expected": text,
            "off": (mean - float(text)) / error,
        }  # fmt: skip
    return found


def node_values(family: Family, seeds: int, step: Callable[[], object]) -> dict[str, Tensor]:
    """[seeds] values of every column of `acceptance`."""
    rows = []
    for seed in range(seeds):
        rows.append(acceptance(*family(torch.Generator().manual_seed(seed))))
        step()
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}


def tree_values(spread: float, sigma: float, n: int, step: Callable[[int], object]) -> dict[str, Tensor]:
    """[n] tokens a step of every one of RULES."""
    parts = []
    for seeds in torch.arange(n).split(BATCH):
        levels = processes(spread, sigma, seeds.tolist())
        parts.append(torch.stack([tokens_per_step(rule, levels) for rule in RULES.values()]))
        step(len(seeds))
    return dict(zip(RULES, torch.cat(parts, 1), strict=True))


def main(
    n_processes: Annotated[int, Option("--processes", help="Random laws of whole trees.", min=2)] = 100,
    seeds: Annotated[int, Option(help="Random laws of one node, each family's.", min=2)] = 100,
    out: Annotated[Path, Option(help="Folder of verification.md, .json and .png.")] = Path("bench/results"),
) -> None:
    """Compute, print and write. Exits with 1 if a rule accepts less than one it must never fall behind."""
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    settings = {"seeds": seeds, "processes": n_processes, "expected_over": EXPECTED_OVER}
    result: dict[str, Any] = {**measure.run_facts("bench.verification"), "settings": settings}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        step = partial(bar.advance, bar.add_task("one node", total=seeds * (len(FAMILIES) + len(EXPONENTS))))
        result["acceptance"] = [
            {"laws": name, "figures": figures(node_values(family, seeds, step), expected, EXPECTED_OVER["seeds"])}
            for name, (family, expected) in FAMILIES.items()
        ]
        sweep = {exponent: node_values(partial(zipf, exponent, 1), seeds, step) for exponent in EXPONENTS}
        for values in sweep.values():
            values["auto"] = torch.where(values["draft max"] >= HUB_SHARE, values["hub"], values["RRSw"])
        result["sweep"] = [
            {"exponent": exponent, "means": {name: column.mean().item() for name, column in values.items()}}
            for exponent, values in sweep.items()
        ]
        step = partial(bar.advance, bar.add_task("trees", total=n_processes * len(TREES)))
        result["tokens"] = []
        for (spread, sigma), expected in TREES.items():
            values = tree_values(spread, sigma, n_processes, step)
            never_less = {f"{a} ≥ {b}": int((values[a] - values[b] > -1e-9).sum()) for a, b in NEVER_LESS}
            found = figures(values, expected, EXPECTED_OVER["processes"])
            laws = {"laws": f"c {spread:g}, σ {sigma:g}", "spread": spread, "sigma": sigma}
            result["tokens"].append(laws | {"figures": found, "never_less": never_less})
    for table in report.tables(result):
        console.print(table)
    console.print(report.verdict(result), highlight=False)
    report.write(result, out)
    console.print(f"[dim]written to {out}/verification.md, .json and .png[/]", highlight=False)
    if any(n < n_processes for entry in result["tokens"] for n in entry["never_less"].values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
