"""Would trees that differ from step to step get more accepted than the best fixed one of as many nodes?

    python -m bench.dynamic_trees

A dynamic tree holds the nodes that the draft model finds most probable, along their whole paths (EAGLE-2, arXiv
2406.16858). Measured on the bundled pair, without decoding: at places of the target's own texts, greedy and sampled,
the draft's tree is grown, and counts as accepted as far as the text is in it. The fixed tree is the best by the same
draft's acceptance on the other half of the places (`specdec.tune.best_tree`). Both propose the draft's most probable
tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel
from typer import Option

from bench.report import heading, markdown_table, terminal_table
from specdec import zoo
from specdec.cli import measure
from specdec.engine.tree import TokenTree
from specdec.tune.best_tree import best_tree

CONTEXT, WIDEST, BATCH = 64, 8, 64
HEADER = ("nodes", "chain", "best fixed tree", "dynamic trees", "over the fixed tree", "depth")


@torch.no_grad()
def following(draft: PreTrainedModel, ids: Tensor) -> Tensor:
    """[n, V] float64, the draft's law after each text [n, length]."""
    return draft(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].double().softmax(-1)


def ranks(draft: PreTrainedModel, contexts: Tensor, truth: Tensor) -> Tensor:
    """[n, D] int64: at which place among the draft's tokens each true one stands, after those before it."""
    found = []
    for level in range(truth.shape[1]):
        probs = following(draft, torch.cat([contexts, truth[:, :level]], 1)[:, level:])
        found.append((probs > probs.gather(1, truth[:, level, None])).sum(1))
    return torch.stack(found, 1)


def in_fixed(tree: TokenTree, ranks: Tensor) -> Tensor:
    """[n] int64, how deep each text goes down a fixed tree, by the ranks of its tokens."""
    depths = []
    for row in ranks.tolist():
        node = depth = 0
        for rank in row:
            children = list(tree.children(node))
            if rank >= len(children):
                break
            node, depth = children[rank], depth + 1
        depths.append(depth)
    return torch.tensor(depths, dtype=torch.int64, device="cpu")


def in_dynamic(draft: PreTrainedModel, contexts: Tensor, truth: Tensor, n_nodes: int) -> tuple[Tensor, Tensor]:
    """How deep each text goes down its own tree of `n_nodes`, the root included, and how deep that tree is: [n] int64
    each. A level grows from the most probable nodes of the one above, as many as WIDEST."""
    n, n_levels = truth.shape
    paths, logs = contexts[:, None], torch.zeros(n, 1, dtype=torch.float64, device="cpu")
    on_path = torch.ones(n, 1, dtype=torch.bool, device="cpu")
    all_logs, all_true, level_of = [], [], []
    for level in range(n_levels):
        flat = paths.flatten(0, 1)[:, level:]
        probs = torch.cat([following(draft, part) for part in flat.split(512)])
        best, tokens = probs.topk(WIDEST)
        logs = (logs[..., None] + best.log().view(n, -1, WIDEST)).flatten(1)
        tokens = tokens.view(n, -1)
        on_path = on_path.repeat_interleave(WIDEST, 1) & (tokens == truth[:, level, None])
        all_logs.append(logs)
        all_true.append(on_path)
        level_of.append(torch.full_like(tokens[0], level + 1))
        kept = logs.topk(min(WIDEST, logs.shape[1])).indices
        parents = (kept // WIDEST)[..., None].expand(-1, -1, paths.shape[2])
        paths = torch.cat([paths.gather(1, parents), tokens.gather(1, kept)[..., None]], 2)
        logs, on_path = logs.gather(1, kept), on_path.gather(1, kept)
    chosen = torch.cat(all_logs, 1).topk(n_nodes - 1).indices  # a node is more probable than those below it
    depth = torch.cat(level_of)[chosen]
    return (torch.cat(all_true, 1).gather(1, chosen).long() * depth).amax(1), depth.amax(1)


def acceptance(ranks: Tensor) -> dict[int, tuple[float, ...]]:
    """What `best_tree` is made from: how often a text goes on through the draft's first, second, ... token."""
    reached = torch.cat([torch.ones_like(ranks[:, :1]), (ranks[:, :-1] < WIDEST).cumprod(1)], 1).bool()
    shares = [float((ranks[reached] == rank).double().mean()) for rank in range(WIDEST)]
    return {k: tuple(shares[:k]) for k in range(1, WIDEST + 1)}


def compare(draft: PreTrainedModel, contexts: Tensor, truth: Tensor, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Tokens a step, by numbers of nodes: fixed trees are fitted on one half and used on the other, both ways."""
    n_levels, halves = truth.shape[1], (slice(0, None, 2), slice(1, None, 2))
    by_rank, rows = ranks(draft, contexts, truth), []
    for n_nodes in sizes:
        fixed, chain = [], []
        for fitted, used in (halves, halves[::-1]):
            tree = best_tree(acceptance(by_rank[fitted]), n_nodes, n_levels)
            fixed.append(in_fixed(tree, by_rank[used]))
            chain.append(in_fixed(TokenTree.chain(min(n_nodes - 1, n_levels)), by_rank[used]))
        parts = [
            in_dynamic(draft, c, t, n_nodes) for c, t in zip(contexts.split(BATCH), truth.split(BATCH), strict=True)
        ]
        own, depth = (torch.cat(each) for each in zip(*parts, strict=True))
        means = [1 + float(x.double().mean()) for x in (torch.cat(chain), torch.cat(fixed), own)]
        rows.append(dict(zip(("chain", "fixed", "dynamic"), means, strict=True)) | {
            "nodes": n_nodes, "depth": float(depth.double().mean())
        })  # fmt: skip
    return rows


def places(
    target: PreTrainedModel, prompts: Tensor, n_levels: int, n_each: int, sampled: bool
) -> tuple[Tensor, Tensor]:
    """[n, CONTEXT] texts of the target's, and the [n, n_levels] tokens that follow them there."""
    new_tokens = n_each * n_levels
    law = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sampled else {"do_sample": False}
    torch.manual_seed(0)
    mask = torch.ones_like(prompts)
    ids = target.generate(prompts, attention_mask=mask, min_new_tokens=new_tokens, max_new_tokens=new_tokens, **law)
    starts = range(prompts.shape[1], ids.shape[1], n_levels)
    before, after = ([ids[:, at + a : at + b] for at in starts] for a, b in ((-CONTEXT, 0), (0, n_levels)))
    return torch.cat(before), torch.cat(after)


def main(
    prompts: Annotated[int, Option(help="Held-out prompts.", min=2)] = 64,
    places_each: Annotated[int, Option(help="Places in each text.", min=1)] = 8,
    depth: Annotated[int, Option(help="Levels at most.", min=1)] = 8,
    nodes: Annotated[str, Option(help="Nodes of a tree, the root included.")] = "8,16,32",
    out: Annotated[Path, Option(help="Folder of dynamic_trees.json and .md.")] = Path("bench/results"),
) -> None:
    """Grow, count, print and write a table."""
    measure.quiet()
    console, sizes = Console(), tuple(int(size) for size in nodes.split(","))
    target, draft, tokenizer = zoo.load_pair()
    ids = zoo.held_out_prompts(tokenizer, prompts, CONTEXT)
    result: dict[str, Any] = {**measure.run_facts("bench.dynamic_trees"), "results": []}
    lines = [
        *heading("Dynamic trees", result),
        f"Tokens a step, the target's own included, at {prompts * places_each} places of the target's texts after "
        f"{prompts} held-out prompts; trees of up to {depth} levels and {WIDEST} children a node. Fixed trees "
        "are fitted on one half of the places and used on the other. *depth*: of the dynamic trees, on average.",
    ]  # fmt: skip
    for temperature in (0, 1):
        contexts, truth = places(target, ids, depth, places_each, bool(temperature))
        rows = compare(draft, contexts, truth, sizes)
        result["results"].append({"temperature": temperature, "rows": rows})
        table = [
            (f"{row['nodes']}", *(f"{row[name]:.2f}" for name in ("chain", "fixed", "dynamic")),
             f"{row['dynamic'] / row['fixed']:.3f}×", f"{row['depth']:.1f}")
            for row in rows
        ]  # fmt: skip
        title = f"temperature {temperature}"
        console.print(terminal_table(title, HEADER, dict.fromkeys(table, True)))
        lines += markdown_table(title, HEADER, table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "dynamic_trees.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (out / "dynamic_trees.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
