"""Many prompts from one JSONL file, their texts to another; after an interruption the same command goes on.

    python examples/many_prompts.py prompts.jsonl texts.jsonl
    python examples/many_prompts.py prompts.jsonl texts.jsonl --model Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B

A line of the input is {"prompt": "...", ...}. Its line of the output is the same object with "index", its place in the
input, counted from 0, and either "text", what the model adds, or "error", why there is none. Lines are written as their
texts are complete, not in the order of the input. After Ctrl-C, kill -9 or a crash only the texts that were under way
are computed again. Use the same options then: the file does not hold them. To try an error again, delete its line.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec import zoo


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The objects of the input file.

    Raises:
        OSError, ValueError: the file cannot be read, or a line is not a prompt.
    """
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ValueError(f'{path}, line {number} is not an object with a string "prompt"')
        if taken := record.keys() & {"index", "text", "error"}:
            raise ValueError(f"{path}, line {number} has a field {taken.pop()!r}, which the output needs for itself")
        records.append(record)
    return records


def read_results(path: Path, records: list[dict[str, Any]]) -> set[int]:
    """The indices that the output file has results of. A last line that was not written to its end is removed.

    Raises:
        OSError, ValueError: the file cannot be written, or holds something else than results of these prompts.
    """
    path.touch()
    *lines, rest = path.read_bytes().split(b"\n")
    there = set()
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            is_ours = records[result["index"]].items() <= result.items()
        except (ValueError, LookupError, TypeError, AttributeError):
            is_ours = False
        if not is_ours:
            raise ValueError(f"{path}, line {number} is not a result of these prompts")
        there.add(result["index"])
    if not b'{"index": '.startswith(rest[:10]):
        raise ValueError(f"{path} does not end with a result of these prompts")
    os.truncate(path, path.stat().st_size - len(rest))
    return there


def main(argv: Sequence[str] | None = None, compile: bool = True) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--model", help="folder or hub id (default: the bundled pair)")
    parser.add_argument("--draft", help='folder or hub id of a smaller model (default with --model: "ngram")')
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of one text (default: %(default)s)")
    parser.add_argument("--max-batch-size", type=int, default=8, help="texts decoded at once (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy decoding")
    args = parser.parse_args(argv)
    if min(args.max_new_tokens, args.max_batch_size) < 1 or args.temperature < 0:
        parser.error("--max-new-tokens and --max-batch-size must be positive, and --temperature must not be negative")
    try:
        records = read_prompts(args.prompts)
        there = read_results(args.texts, records)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{len(there)} of {len(records)} results are in {args.texts}")
    todo = [index for index in range(len(records)) if index not in there]
    if not todo:
        return

    dtype, device = ("auto", "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")

    if args.model is None:
        target, draft, tokenizer = zoo.load_pair(device=device)
    else:
        target, draft = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device), "ngram"
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = specdec.compile(target, args.draft or draft, compile=compile)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    settings = {"max_batch_size": args.max_batch_size, "max_new_tokens": args.max_new_tokens, **sampling}

    ids = [tokenizer(records[index]["prompt"])["input_ids"] for index in todo]
    model.specdec.seeds = todo  # a sampled text depends on its index alone
    with args.texts.open("a", encoding="utf-8") as file:
        for result in specdec.generate_many(model, ids, in_order=False, **settings):
            index = todo[result.index]
            if result.error is None:
                new = {"text": tokenizer.decode(result.tokens[len(ids[result.index]) :], skip_special_tokens=True)}
            elif isinstance(result.error, Exception):
                new = {"error": f"{type(result.error).__name__}: {result.error}"}
            else:  # under way when Ctrl-C was pressed, which is raised after the last result
                continue
            file.write(json.dumps({"index": index, **records[index], **new}) + "\n")
            file.flush()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Stopped; the same command goes on from here") from None
