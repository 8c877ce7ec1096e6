"""A chat in the terminal that keeps its KV cache between turns, so that each turn computes only what is new.

    python examples/chat.py                                           # the bundled pair continues Python code
    python examples/chat.py --model Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B --temperature 0.7

A model without a chat template continues the text. Ctrl-C stops the current answer; /quit or Ctrl-D ends the chat.
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
    """Stops an answer at its next token when Ctrl-C is pressed. Unlike an exception, which can come at any moment, this
    leaves a cache that fits the text."""

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


def keep_shared(cache: DynamicCache, known: Tensor, prompt: Tensor) -> None:
    """Remove from the cache, which holds `known`, what `prompt` does not begin with. A template may rewrite earlier
    turns, and a tokenizer may split the text of an answer into other tokens than the model's."""
    length = min(known.shape[1], prompt.shape[1])
    n_shared = int((known[0, :length] == prompt[0, :length]).long().cumprod(0).sum())
    if (n_wrong := cache.get_seq_length() - min(n_shared, prompt.shape[1] - 1)) > 0:
        cache.crop(-n_wrong)


def main(argv: Sequence[str] | None = None, compile: bool = True) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the bundled pair)")
    parser.add_argument("--draft", help='folder or hub id of a smaller model (default with --model: "ngram")')
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of one answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy decoding")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or args.temperature < 0:
        parser.error("--max-new-tokens must be positive, and --temperature must not be negative")

    dtype, device = ("auto", "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")

    if args.model is None:
        target, draft, tokenizer = zoo.load_pair(device=device)
    else:
        target, draft = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device), "ngram"
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = specdec.compile(target, args.draft or draft, compile=compile)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    print("Compiling; after the first time this is faster")
    model.specdec.warmup(**sampling)

    # Releases of transformers differ in what they call a cache.
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache, known = DynamicCache(), torch.empty(1, 0, dtype=torch.long, device=device)
    longest = model.config.get_text_config().max_position_embeddings
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    while True:
        try:
            words = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            break
        if words == "/quit":
            break
        if not words:
            continue
        messages.append({"role": "user", "content": words})
        prompt = prompt_of(messages, tokenizer).to(device)
        if prompt.shape[1] >= longest:
            print(f"The conversation has {prompt.shape[1]} tokens, and the model has room for {longest}")
            break
        keep_shared(cache, known, prompt)
        ctrl_c = CtrlC()
        before = signal.signal(signal.SIGINT, ctrl_c.press)
        try:
            known = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=min(args.max_new_tokens, longest - prompt.shape[1]),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([ctrl_c]),
                **{cache_name: cache},
                **sampling,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        answer = tokenizer.decode(known[0, prompt.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    print(f"{model.specdec.stats.tokens_per_step:.2f} tokens per step")


if __name__ == "__main__":
    main()
