"""Draft models by name: a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from specdec.arguments import DRAFTS


def load_draft(name: str, target: PreTrainedModel) -> PreTrainedModel:
    """The causal LM of this name, in the target's dtype and on its device.

    Raises:
        ValueError: there is none.
    """
    return _loaded(AutoModelForCausalLM, name, dtype=target.dtype).to(target.device).eval()


def load_tokenizer(name: str) -> Any:
    """The tokenizer of this name.

    Raises:
        ValueError: there is none.
    """
    return _loaded(AutoTokenizer, name)


def _loaded(kind: Any, name: str, **options: Any) -> Any:
    wrong = f"draft must be {DRAFTS}, and {name!r}"
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():  # the hub need not be asked
        raise ValueError(f"{wrong} is no folder")
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{wrong} cannot be loaded: {why}") from error
