"""specdec: lossless speculative decoding for Hugging Face causal language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.api import compile as compile
    from specdec.tree import TokenTree as TokenTree

__version__ = "0.1.0"
__all__ = ["TokenTree", "__version__", "compile"]


def __getattr__(name: str) -> Any:
    # Public names load on first use, so that importing specdec costs nothing.
    import importlib

    homes = {"compile": "specdec.api", "TokenTree": "specdec.tree"}
    if name not in homes:
        raise AttributeError(f"module 'specdec' has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)
