"""A model on a GPU, with specdec and without it: tokens per second, and whether the texts are equal.

    python examples/gpu.py                                               # the bundled pair, which is very small
    python examples/gpu.py --model Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B

Without a GPU it runs on the CPU, in float32. In bfloat16 two greedy texts can differ from the first token on whose two
best candidates are nearly equal: a forward of one token and a forward of several tokens round differently.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import specdec
from specdec import zoo

PROMPTS = [
    "def quicksort(items):\n",
    "class LRUCache:\n    def __init__(self, maxsize=128):\n",
    "import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
    "def parse_header(line):\n    name, _, value = line.partition(",
]


def main(argv: Sequence[str] | None = None, compile: bool = True) -> None:
    is_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the bundled pair)")
    parser.add_argument("--draft", help='folder or hub id of a smaller model (default with --model: "ngram")')
    parser.add_argument("--device", default="cuda" if is_cuda else "cpu", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="(default: bfloat16 on a GPU)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of one text (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be positive, got {args.max_new_tokens}")

    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))

    if args.model is None:
        target, draft, tokenizer = zoo.load_pair(dtype, args.device)
    else:
        target, draft = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device), "ngram"
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = specdec.compile(target, args.draft or draft, compile=compile)
    prompts = [tokenizer(prompt, return_tensors="pt").to(args.device) for prompt in PROMPTS]

    def decode(decoder: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> tuple[list[int], float]:
        """The new tokens, and the seconds they took."""
        start = time.perf_counter()
        text = decoder.generate(**prompt, max_new_tokens=args.max_new_tokens, do_sample=False)
        tokens = text[0, prompt["input_ids"].shape[1] :].tolist()  # which waits for the GPU
        return tokens, time.perf_counter() - start

    print("Compiling; after the first time this is faster")
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts) + args.max_new_tokens
    model.specdec.warmup(max_length=longest, do_sample=False)
    for decoder in (target, model):
        decode(decoder, prompts[0])
    model.specdec.stats.reset()

    print(f"{'transformers':>14}{'specdec':>14}{'ratio':>8}   tokens per second")
    for prompt in prompts:  # in turns, so that other work of the machine slows both alike
        theirs, their_seconds = decode(target, prompt)
        ours, our_seconds = decode(model, prompt)
        speeds = len(theirs) / their_seconds, len(ours) / our_seconds
        same = "the same text" if ours == theirs else "another text"
        print(f"{speeds[0]:14.1f}{speeds[1]:14.1f}{speeds[1] / speeds[0]:7.2f}x   {same}")
    print(model.specdec.stats)


if __name__ == "__main__":
    main()
