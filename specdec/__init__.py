"""Lossless speculative decoding for Hugging Face causal language models.

    model = specdec.compile(model, draft="ngram")  # or a smaller model, or its name
    model.generate(**inputs, max_new_tokens=256)  # as before, faster, with the same output distribution
    print(model.specdec.stats)

`compile` wraps one model; `generate_many` decodes any number of prompts with it, a batch at a time. `Drafter`, `Draft`
and `TokenTree` are what a drafter of your own is made of.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.api import compile as compile
    from specdec.batching import Result as Result
    from specdec.batching import generate_many as generate_many
    from specdec.drafters.base import Drafter as Drafter
    from specdec.engine.draft import Draft as Draft
    from specdec.engine.tree import TokenTree as TokenTree
    from specdec.errors import SpecdecWarning as SpecdecWarning

__version__ = "0.1.0"
__all__ = [
    "Draft", "Drafter", "Result", "SpecdecWarning", "TokenTree", "__version__", "compile", "generate_many",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Public names load on first use, so that importing specdec costs nothing.
    import importlib

    homes = {
        "compile": "specdec.api", "generate_many": "specdec.batching", "Result": "specdec.batching",
        "SpecdecWarning": "specdec.errors", "Drafter": "specdec.drafters.base", "Draft": "specdec.engine.draft",
        "TokenTree": "specdec.engine.tree",
    }  # fmt: skip
    if name not in homes:
        raise AttributeError(f"module 'specdec' has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)
