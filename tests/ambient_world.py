"""Texts under other settings of torch's own, told line by line: a process of its own, since kernels that read numbers
as something else than they are may end it.

PYTHONPATH=. python tests/ambient_world.py        # prints [what, what is wrong with it or null]
"""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from families import make_tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import specdec
from specdec import TokenTree


@contextmanager
def _set(change: Callable[[Any], None], value: Any, before: Any) -> Generator[None]:
    change(value)
    try:
        yield
    finally:
        change(before)


_dtype = partial(_set, torch.set_default_dtype, before=torch.float32)
_device = partial(_set, torch.set_default_device, before=None)

SETTINGS: dict[str, Callable[[], Any]] = {
    "float64": lambda: _dtype(torch.float64),
    "meta": lambda: _device("meta"),
    "with meta": lambda: torch.device("meta"),
    "with cpu": lambda: torch.device("cpu"),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "threads": lambda: _set(torch.set_num_threads, 3, 1),
    "precision": lambda: _set(torch.set_float32_matmul_precision, "high", "highest"),
    "inference mode": torch.inference_mode,
    "grad mode": torch.enable_grad,
    "bfloat16": lambda: _dtype(torch.bfloat16),
    "float16": lambda: _dtype(torch.float16),
}
DRAFTS: dict[str, dict[str, Any]] = {
    "model": {"depth": 3},
    "tree": {"tree": TokenTree.from_widths(2, 2)},
    "coupled": {"depth": 2, "verifier": "coupled"},
    "ngram": {},
}
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.01},
    "typical": {"do_sample": True, "typical_p": 0.9},
    "processors": {"do_sample": True, "repetition_penalty": 1.3},
}
ALONE = "steps make no tensor of torch's default dtype"
COMPILED = "a compiled step is of the settings it is run under"


class Moody(nn.Linear):
    """A head whose law depends on torch's default dtype."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).roll(1 if torch.get_default_dtype() == torch.bfloat16 else 0, -1)


class Made(TorchDispatchMode):
    """Notes who makes a tensor of a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.found = dtype, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.dtype == self.dtype for x in (out if isinstance(out, tuple) else (out,))):
            where = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename][-1]
            self.found.add(f"{where.filename}:{where.lineno} {where.line}")
        return out


def tell(what: str, wrong: Callable[[], str | None]) -> None:
    try:
        said = wrong()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([what, said]), flush=True)


def texts(model: PreTrainedModel, ids: Tensor, asks_all: bool = True) -> dict[str, Any]:
    """What it writes, by what is asked of it: everything, or the first two of `ASKED`."""
    settings = {"attention_mask": torch.ones_like(ids), "eos_token_id": 3, "pad_token_id": 0}
    found = {}
    for name, asked in list(ASKED.items())[: None if asks_all else 2]:
        if asked:
            model.specdec.seeds = [3, 4]
        found[name] = model.generate(ids, max_new_tokens=8, **settings, **asked).tolist()
    if asks_all:
        many = specdec.generate_many(model, ids.tolist(), max_new_tokens=6, progress=False)
        found["many"] = [result.tokens.tolist() for result in many]
    return found


def differing(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    return ", ".join(name for name, texts in expected.items() if found[name] != texts) or None


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", specdec.SpecdecWarning)
    model, other = make_tiny("llama"), make_tiny("llama", seed=7, num_hidden_layers=1)
    ids = torch.randint(4, 97, (2, 5), generator=torch.Generator("cpu").manual_seed(0))

    def wrap(name: str) -> PreTrainedModel:
        draft = "ngram" if name == "ngram" else other
        return specdec.compile(model, draft, compile=False, adapt=False, **DRAFTS[name])

    wrapped = {name: wrap(name) for name in DRAFTS}
    plain = {name: texts(wrapped[name], ids, name == "model") for name in DRAFTS}
    mask = torch.ones_like(ids)

    def under_a_setting(under: Callable[[], Any], name: str) -> str | None:
        with under():
            wrong = differing(texts(wrapped[name], ids, name == "model"), plain[name])
            theirs = model.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=3, pad_token_id=0)
        return wrong or (None if theirs.tolist() == plain[name]["greedy"] else "transformers writes another text")

    for setting, under in SETTINGS.items():
        for name in DRAFTS:
            tell(f"{setting}, {name}", partial(under_a_setting, under, name))
        tell(f"{setting}, afterwards", lambda: differing(texts(wrapped["ngram"], ids, False), plain["ngram"]))

    moody = make_tiny("llama", num_hidden_layers=1)
    moody.lm_head = Moody(moody.config.hidden_size, moody.config.vocab_size, bias=False)
    compiled, eager = (specdec.compile(moody, draft=None, compile=how) for how in (True, False))
    asked = {"attention_mask": mask[:1], "max_new_tokens": 6, "do_sample": True, "top_p": 0.9}

    def compiled_under(dtype: torch.dtype) -> str | None:
        for one in (compiled, eager):
            one.specdec.seeds = [5]
        with _dtype(dtype):
            same = torch.equal(*(one.generate(ids[:1], **asked) for one in (compiled, eager)))
        return None if same else "another text than uncompiled"

    for dtype in (torch.float32, torch.bfloat16):
        tell(f"{COMPILED}: {dtype}", partial(compiled_under, dtype))

    def made_under(dtype: torch.dtype) -> str | None:
        with _dtype(dtype), patch("specdec.hf.ambient.check"), Made(dtype) as made:
            for name in DRAFTS:
                texts(wrap(name), ids)
        return "\n".join(made.found) or None

    tell(ALONE, partial(made_under, torch.float16))


if __name__ == "__main__":
    main()
