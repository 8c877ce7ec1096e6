"""A drafter of one's own: of every token it proposes the one that followed most often in a text read beforehand.

    python examples/own_drafter.py [file]

Reads the file, or else the text bundled beside the models, and decodes with the bundled target.
"""

import sys
from pathlib import Path

import torch

import specdec
from specdec import zoo


class BigramDrafter(specdec.Drafter):
    """Args: text: [length] int64, what is counted. n_tokens: of the vocabulary. depth: tokens proposed a step."""

    def __init__(self, text: torch.Tensor, n_tokens: int, depth: int = 3) -> None:
        self.tree = specdec.TokenTree.chain(depth)
        pairs, counts = (text[:-1] * n_tokens + text[1:]).unique(return_counts=True)
        order = counts.argsort(stable=True)  # the most frequent follower is written last, and stays
        self.follower = torch.full((n_tokens,), -1)
        for pair in pairs[order].tolist():
            self.follower[pair // n_tokens] = pair % n_tokens

    def draft(self, state, law, live, depth):
        tokens = [state.pending]
        for _ in range(depth):
            tokens.append(self.follower[tokens[-1].clamp(min=0)])
        drafted = torch.stack(tokens[1:], 1)
        known = (drafted >= 0).long().cumprod(1)  # up to the first token without a follower
        return specdec.Draft(drafted.clamp(min=0), known.sum(1))


def main(path: str | None = None) -> None:
    target, _, tokenizer = zoo.load_pair()
    text = Path(path).read_text(encoding="utf-8") if path else "\n".join(zoo.held_out_texts())
    drafter = BigramDrafter(tokenizer(text, return_tensors="pt")["input_ids"][0], target.config.vocab_size)
    model = specdec.compile(target, draft=drafter, adapt=False)
    prompt = tokenizer("def read_lines(path):\n", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    print(tokenizer.decode(out[0]))
    print(f"{model.specdec.stats.tokens_per_step:.2f} tokens per step")


if __name__ == "__main__":
    main(*sys.argv[1:2])
