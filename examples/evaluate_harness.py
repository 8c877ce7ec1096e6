"""The LM evaluation harness (`pip install lm_eval`) with a wrapped model: the same scores in less time.

    python examples/evaluate_harness.py                           # the bundled pair, and a task that needs no network
    python examples/evaluate_harness.py --model Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B --tasks gsm8k --limit 50

Tasks that generate text become faster. Tasks that score given texts do not call `generate()`, and stay as they are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import make_table
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec import zoo


def next_lines(**_: Any) -> dict[str, Dataset]:
    """20 lines of Python source each, and the 8 lines that follow."""
    lines = "\n".join(zoo.held_out_texts()).splitlines(keepends=True)
    starts = range(0, len(lines) - 28, 97)
    return {
        "test": Dataset.from_list(
            [{"code": "".join(lines[i : i + 20]), "next": "".join(lines[i + 20 : i + 28])} for i in starts]
        )
    }


NEXT_LINES = {
    "task": "next_lines", "custom_dataset": next_lines, "test_split": "test", "output_type": "generate_until",
    "doc_to_text": "{{code}}", "doc_to_target": "{{next}}", "metric_list": [{"metric": "chrf"}],
    "generation_kwargs": {"until": ["\nclass ", "\ndef "], "max_gen_toks": 96, "do_sample": False},
}  # fmt: skip


def main(argv: Sequence[str] | None = None, compile: bool = True) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the bundled pair)")
    parser.add_argument("--draft", help='folder or hub id of a smaller model (default with --model: "ngram")')
    parser.add_argument(
        "--tasks", help="of the harness, separated by commas (default: the next lines of Python source)"
    )
    parser.add_argument("--limit", type=int, default=20, help="requests of each task (default: %(default)s)")
    args = parser.parse_args(argv)

    dtype, device = ("auto", "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")

    if args.model is None:
        target, draft, tokenizer = zoo.load_pair(device=device)
    else:
        target, draft = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device), "ngram"
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = specdec.compile(target, args.draft or draft, compile=compile)
    model.specdec.warmup()

    tasks = args.tasks.split(",") if args.tasks else [NEXT_LINES]
    found = {}
    for name, decoder in (("transformers", target), ("specdec", model)):
        harness = HFLM(pretrained=decoder, tokenizer=tokenizer, batch_size=1)
        start = time.perf_counter()
        found[name] = simple_evaluate(harness, tasks=tasks, limit=args.limit, bootstrap_iters=0)
        print(f"{name}: {time.perf_counter() - start:.1f} s")
        print(make_table(found[name]))
    answers = [[sample["resps"] for task in result["samples"].values() for sample in task] for result in found.values()]
    n_same = sum(ours == theirs for theirs, ours in zip(*answers, strict=True))
    print(f"{n_same} of {len(answers[0])} answers are the same")
    print(model.specdec.stats)


if __name__ == "__main__":
    main()
