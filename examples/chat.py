"""A chat in the terminal that keeps its KV cache from turn to turn: each turn computes only what is new.

    python examples/chat.py                                           # the bundled pair continues your Python code
    python examples/chat.py --model Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B --temperature 0.7

A model without a chat template continues the text. Ctrl-C ends the answer under way; /quit or Ctrl-D ends the chat.
"""

from __future__ import annotations

import argparse
import inspect
import signal
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import specdec
from specdec import zoo


class CtrlC(StoppingCriteria):
    """Ends an answer after the next token, so that the cache holds all of it; an exception could come at any point."""

    is_pressed = False

    def press(self, *_: Any) -> None:
        self.is_pressed = True

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.is_pressed, device=input_ids.device)


def prompt_of(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids of the whole conversation, [1, length]."""
    if tokenizer.chat_template:
        asked = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        return tokenizer.apply_chat_template(messages, **asked)["input_ids"]
    return tokenizer("\n".join(message["content"] for message in messages), return_tensors="pt")["input_ids"]


def forget_from(cache: DynamicCache, known: Tensor, prompt: Tensor) -> None:
    """Remove from the cache of `known` what `prompt` does not begin with: a template may rewrite earlier turns, and a
    tokenizer may split an answer's text differently than the model wrote it."""
    length = min(known.shape[1], prompt.shape[1])
    n_shared = int((known[0, :length] == prompt[0, :length]).long().cumprod(0).sum())
    if (n_wrong := cache.get_seq_length() - min(n_shared, prompt.shape[1] - 1)) > 0:
        cache.crop(-n_wrong)


def main(argv: Sequence[str] | None = None, compile: bool = True) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the bundled pair)")
    parser.add_argument("--draft", help='folder or hub id of a smaller model, or "ngram" (default with --model)')
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of one answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) always takes the best token")
    args = parser.parse_args(argv)

    dtype, device = ("auto", "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")
    if args.model is None:
        target, draft, tokenizer = zoo.load_pair(device=device)
    else:
        target, draft = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device), "ngram"
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.draft == "ngram":
        draft = "ngram"
    elif args.draft is not None:
        draft = AutoModelForCausalLM.from_pretrained(args.draft, dtype=dtype).to(device)
    model = specdec.compile(target, draft, compile=compile)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    model.specdec.warmup(**sampling)

    # Releases of transformers differ in what they call a cache.
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache, known = DynamicCache(), torch.empty(1, 0, dtype=torch.long, device=device)
    longest = model.config.get_text_config().max_position_embeddings
    messages: list[dict[str, str]] = []
    while True:
        try:
            words = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            break
        if words == "/quit":
            break
        messages.append({"role": "user", "content": words})
        prompt = prompt_of(messages, tokenizer).to(device)
        if prompt.shape[1] >= longest:
            print(f"The conversation is {prompt.shape[1]} tokens long, and the model reads {longest}.")
            break
        forget_from(cache, known, prompt)
        ctrl_c = CtrlC()
        before = signal.signal(signal.SIGINT, ctrl_c.press)
        try:
            known = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                stopping_criteria=StoppingCriteriaList([ctrl_c]), max_new_tokens=min(args.max_new_tokens, longest - prompt.shape[1]),
                **{cache_name: cache}, **sampling,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        answer = tokenizer.decode(known[0, prompt.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    print(f"{model.specdec.stats.tokens_per_step:.2f} tokens per step")


if __name__ == "__main__":
    main()
