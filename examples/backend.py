"""A decoding loop of one's own over a static cache, compiled with specdec's backend instead of Inductor's.

    python examples/backend.py

specdec need not be imported for `backend="specdec"`; here it brings the model.
"""

from __future__ import annotations

import inspect

import torch
from transformers import StaticCache

from specdec import zoo

NEW_TOKENS = 64


@torch.no_grad()
def main() -> None:
    model, _, tokenizer = zoo.load_pair()
    # Releases of transformers differ in what they call a cache.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    text = tokenizer("class Reader:\n    def __init__(", return_tensors="pt")["input_ids"]
    cache = {name: StaticCache(config=model.config, max_cache_len=text.shape[1] + NEW_TOKENS)}
    token = model(text, **cache).logits[:, -1:].argmax(-1)  # the prompt runs uncompiled, once
    step = torch.compile(model.forward, backend="specdec")
    for _ in range(NEW_TOKENS - 1):
        text = torch.cat([text, token], 1)
        token = step(token, **cache).logits[:, -1:].argmax(-1)
    print(tokenizer.decode(torch.cat([text, token], 1)[0]))


if __name__ == "__main__":
    main()
