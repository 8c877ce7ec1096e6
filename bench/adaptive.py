"""Adaptive tokens: what slots get accepted, in two forwards a step and in one, and what that makes of decoding.

    python -m bench.adaptive --sizes bundled,100m

The bundled target's adaptive tokens, or those of the same function at a larger model's cost, beside its draft model,
n-grams, and both; held-out prompts, one at a time, greedily and sampled at temperature 1. Ways with a number of slots
draft as many in every step; the others draft as much as pays. The ways take turns, and medians are compared. Compiling
is not timed.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel
from typer import Option

import specdec
from bench.end_to_end import SIZES, decode, words
from bench.report import heading, markdown_table, terminal_table
from specdec import zoo
from specdec.cli import measure
from specdec.drafters.adaptive import Adaptive
from specdec.hf.adaptive import AdaptiveTokens

HEADER = ("", "tokens/s", "vs no draft", "tokens/step", "tokens/forward", "accepted by place")
LAWS: dict[int, dict[str, Any]] = {0: {}, 1: {"do_sample": True, "temperature": 1.0, "top_k": 0}}
IN_ONE, IN_TWO = (1, 2, 3, 5), (1, 3)
"""Numbers of slots."""


def ways(
    target: PreTrainedModel, draft: PreTrainedModel, tokens: AdaptiveTokens, law: dict[str, Any]
) -> dict[str, measure.Path]:
    """By name, what is compared."""
    for model in (target, draft):
        model.generation_config.eos_token_id = None

    def way(label: str, source: Any, **options: Any) -> measure.Path:
        return measure.Path(label, specdec.compile(target, source, **options), law)

    own, two = Adaptive(tokens), Adaptive(tokens, in_one=False)
    found = {
        "no draft": way("no draft", None),
        "n-grams": way("n-grams", "ngram"),
        "draft model": way("draft model", draft),
        "model and n-grams": way("model and n-grams", [draft, "ngram"]),
        "adaptive tokens": way("adaptive tokens, one forward, as many as pay", own),
        "adaptive tokens and n-grams": way("adaptive tokens and n-grams", [own, "ngram"]),
    }
    for n in IN_ONE:
        found[f"one, {n}"] = way(f"one forward, {n} slot{'s' * (n > 1)}", own, depth=n, adapt=False)
    for n in IN_TWO:
        found[f"two, {n}"] = way(f"two forwards, {n} slot{'s' * (n > 1)}", two, depth=n + 1, adapt=False)
    return found


def compare(
    paths: dict[str, measure.Path], prompts: list[Tensor], new_tokens: int, repeats: int, bar: Progress
) -> list[dict[str, Any]]:
    """A row a way.

    Raises:
        NotMeasured: one did not run as it claims.
    """
    task = bar.add_task("", total=len(paths) * (repeats + 2))
    texts = {}
    for name, path in paths.items():
        bar.update(task, description=f"warming up {path.label}", refresh=True)
        for _ in range(2):  # policies settle
            path.model.specdec.seeds = [0]
            texts[name] = decode(path, prompts, new_tokens)
            bar.update(task, advance=1, refresh=True)
        path.model.specdec.stats.reset()
    runs = {name: partial(decode, path, prompts, new_tokens) for name, path in paths.items()}
    step = partial(bar.update, task, advance=1, refresh=True, description="measuring")
    seconds = measure.compare(runs, repeats, lambda name: step())
    bar.remove_task(task)
    rows, n_tokens = [], len(prompts) * new_tokens
    for name, path in paths.items():
        stats = path.model.specdec.stats
        measure.check(path.label, stats)
        by_place = stats.acceptance_by_position
        rows.append({
            "way": name, "label": path.label, "seconds": seconds[name],
            "tokens_per_second": n_tokens / statistics.median(seconds[name]),
            "tokens_per_step": stats.tokens_per_step, "acceptance_by_position": by_place,
            "same": torch.equal(texts[name], texts["no draft"]),
        })  # fmt: skip
    return rows


def lines(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Of a table."""
    plain = rows[0]["tokens_per_second"]
    made = []
    for row in rows:
        in_two, fixed = row["way"].startswith("two"), row["way"].startswith(("one", "two"))
        per_forward = row["tokens_per_step"] / (1 + in_two)
        # What was accepted of what was judged, where everything before it was.
        shares = [min(b / a, 1.0) if a else 0.0 for a, b in pairwise([1.0, *row["acceptance_by_position"]])]
        made.append((
            row["label"], f"{row['tokens_per_second']:.1f}", f"{row['tokens_per_second'] / plain:.2f}×",
            f"{row['tokens_per_step']:.2f}", f"{per_forward:.2f}" if fixed or row["way"] == "adaptive tokens" else "",
            ", ".join(f"{share:.2f}" for share in shares[:6]) if fixed else "",
        ))  # fmt: skip
    return made


def title(entry: dict[str, Any]) -> str:
    """What one table is about."""
    size = "bundled target" if entry["size"] == "bundled" else f"{entry['size']} target"
    return f"{size} ({entry['parameters'] / 1e6:.0f}M parameters), temperature {entry['temperature']}"


def write(result: dict[str, Any], folder: Path) -> None:
    """`adaptive.json` and `adaptive.md` in `folder`."""
    (folder / "adaptive.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    settings = result["settings"]
    text = [
        *heading("Adaptive tokens", result),
        f"float32, {settings['prompts']} held-out prompts of 64 tokens, one at a time, {settings['new_tokens']} new "
        f"tokens each; medians of {settings['repeats']} interleaved rounds. *accepted by place*: the share of the "
        "judged tokens at each place of a draft that were accepted, where those before them were; of two forwards, the "
        "first is the target's own. The paper (arXiv 2403.18647) reports speedups of over 3.0 and 3.5 for fine-tuned "
        "models of 7B and 13B on a GPU with two forwards a step: these take 6 to 7 tokens a step, of which 4 to 5 are "
        "drafted.",
    ]  # fmt: skip
    for entry in result["results"]:
        text += markdown_table(title(entry), HEADER, lines(entry["rows"]))
    (folder / "adaptive.md").write_text("\n".join([*text, ""]), encoding="utf-8")


def main(
    sizes: Annotated[str, Option(help=f"Of {', '.join(SIZES)}.")] = "bundled,100m",
    prompts: Annotated[int, Option(help="Held-out prompts.", min=1)] = 4,
    new_tokens: Annotated[int, Option(min=1)] = 128,
    repeats: Annotated[int, Option(help="Timed rounds.", min=1)] = 5,
    out: Annotated[Path, Option(help="Folder of adaptive.json and .md.")] = Path("bench/results"),
) -> None:
    """Measure, print and write tables. Exits with 1 if a part was left out, or a greedy text differs."""
    chosen = words(sizes, SIZES)
    out.mkdir(parents=True, exist_ok=True)
    measure.quiet()
    console, faults = Console(), measure.Faults()
    settings = {"prompts": prompts, "new_tokens": new_tokens, "repeats": repeats}
    result: dict[str, Any] = {
        **measure.run_facts("bench.adaptive"), "settings": settings, "faults": faults, "results": []
    }  # fmt: skip
    for size in chosen:
        target, draft, tokenizer = measure.load_pair(size)
        tokens = measure.load_adaptive(target)
        ids = list(zoo.held_out_prompts(tokenizer, prompts, 64).split(1))
        for temperature, law in LAWS.items():
            entry = {
                "size": size, "temperature": temperature, "parameters": sum(p.numel() for p in target.parameters())
            }  # fmt: skip
            with faults.of(f"{size}, temperature {temperature}"), measure.progress(console) as bar:
                entry["rows"] = compare(ways(target, draft, tokens, law), ids, new_tokens, repeats, bar)
                result["results"].append(entry)
                shown = {
                    line: temperature > 0 or row["same"]
                    for line, row in zip(lines(entry["rows"]), entry["rows"], strict=True)
                }
                console.print(terminal_table(title(entry), HEADER, shown))
                for row in entry["rows"] if not temperature else ():
                    faults.same(f"{title(entry)}: {row['label']}", row["same"])
                write(result, out)  # after each part: a long run that is stopped leaves what it has
    faults.exit()


if __name__ == "__main__":
    typer.run(main)
