"""Your own drafter: it proposes, after each token, the token that most often follows it in a given text.

    python examples/own_drafter.py                # counts in the text that is bundled with the models
    python examples/own_drafter.py FILE

The target is the bundled one. `specdec.Drafter` documents what a drafter must define, and what it may.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import specdec
from specdec import zoo


class BigramDrafter(specdec.Drafter):
    """Drafts from a table that holds the most frequent follower of each token.

    Args:
        text: [length] int64, the tokens to count. n_tokens: size of the vocabulary. depth: tokens to draft in a step.
    """

    def __init__(self, text: torch.Tensor, n_tokens: int, depth: int = 3) -> None:
        self.tree = specdec.TokenTree.chain(depth)
        self.follower = torch.full((n_tokens,), -1)  # -1: no follower is known
        pairs, counts = torch.stack([text[:-1], text[1:]]).unique(dim=1, return_counts=True)
        for token, follower in pairs[:, counts.argsort()].T.tolist():  # the most frequent comes last, so it stays
            self.follower[token] = follower

    def draft(self, state: Any, law: Any, live: torch.Tensor, depth: int) -> specdec.Draft:
        tokens = [state.pending]  # [B], the last token of each text
        for _ in range(depth):
            tokens.append(self.follower[tokens[-1].clamp(min=0)])
        drafted = torch.stack(tokens[1:], 1)
        known = (drafted >= 0).long().cumprod(1)  # up to the first token without a follower
        return specdec.Draft(drafted.clamp(min=0), known.sum(1))


def main(file: str | None = None, compile: bool = True) -> None:
    target, _, tokenizer = zoo.load_pair()
    text = Path(file).read_text(encoding="utf-8") if file else "\n".join(zoo.held_out_texts())
    counted = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    drafter = BigramDrafter(counted, target.config.vocab_size)
    # By default specdec drafts only while drafting is faster; adapt=False shows what this drafter can do.
    model = specdec.compile(target, draft=drafter, adapt=False, compile=compile)
    prompt = tokenizer("class Reader:\n    def __init__(", return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=96, do_sample=False)[0]))
    print(f"\n{model.specdec.stats.tokens_per_step:.2f} tokens per step")


if __name__ == "__main__":
    main(*sys.argv[1:2])
