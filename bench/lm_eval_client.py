"""The LM evaluation harness (`pip install lm_eval`) with a wrapped model: whether its answers are the same.

    python -m bench.lm_eval_client                  # 8 texts to complete and 8 to score

What it pulls in, pandas, pyarrow and scikit-learn among it, is more than all of this library's tests need, so it is not
among them. Exits with 1 where an answer differs, nothing was speculated, or a request ran transformers' own loop.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import specdec
from specdec import zoo
from specdec.cli import measure

PROMPT_TOKENS = 48
STOP = ["\ndef ", "\nclass "]


def requests(tokenizer: PreTrainedTokenizerBase, n: int, new_tokens: int) -> dict[str, list[Any]]:
    """By method of the harness's models, `n` requests of held-out text each."""
    from lm_eval.api.instance import Instance

    texts = tokenizer.batch_decode(zoo.held_out_prompts(tokenizer, n, 2 * PROMPT_TOKENS))
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    settings = {"until": STOP, "max_gen_toks": new_tokens, "do_sample": False}
    asked = {
        "generate_until": [(prompt, settings) for prompt, _ in halves],
        "loglikelihood": halves,
        "loglikelihood_rolling": [(text,) for text in texts],
    }
    return {
        kind: [Instance(kind, {}, arguments, i) for i, arguments in enumerate(each)] for kind, each in asked.items()
    }


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: dict[str, list[Any]], batch_size: int
) -> tuple[dict[str, list[Any]], dict[str, float]]:
    """What the harness gets from a model, and the seconds that it took."""
    from lm_eval.models.huggingface import HFLM

    found, seconds = {}, {}
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
    for kind, instances in asked.items():
        start = time.perf_counter()
        found[kind] = getattr(harness, kind)(instances, disable_tqdm=True)
        seconds[kind] = time.perf_counter() - start
    return found, seconds


def main(
    n: Annotated[int, typer.Option("--texts", help="requests of each kind")] = 8,
    new_tokens: Annotated[int, typer.Option(help="at most, of each answer")] = 64,
    batch_size: Annotated[int, typer.Option(help="of the harness; stop strings of several run transformers' loop")] = 1,
    compiled: Annotated[bool, typer.Option("--compile/--eager")] = True,
) -> None:
    measure.quiet()
    faults = measure.Faults()
    target, draft, tokenizer = zoo.load_pair()
    wrapped = specdec.compile(target, draft, compile=compiled)
    wrapped.specdec.warmup(batch_sizes=(1,))
    asked = requests(tokenizer, n, new_tokens)
    theirs, their_seconds = answers(target, tokenizer, asked, batch_size)
    ours, our_seconds = answers(wrapped, tokenizer, asked, batch_size)
    table = Table("requests", "answers", "transformers", "specdec")
    for kind in asked:
        faults.same(kind, ours[kind] == theirs[kind])
        verdict = "the same" if ours[kind] == theirs[kind] else "DIFFER"
        table.add_row(kind, verdict, f"{their_seconds[kind]:.2f} s", f"{our_seconds[kind]:.2f} s")
    Console().print(table)
    print(wrapped.specdec.stats)
    with faults.of("the harness"):
        measure.check("specdec", wrapped.specdec.stats)
        if not sum(wrapped.specdec.stats.proposed):
            raise measure.NotMeasured("nothing was drafted")
    faults.exit()


if __name__ == "__main__":
    typer.run(main)
