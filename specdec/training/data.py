"""Text of the pair: Python's standard library, split by module, and its byte-level tokenizer."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
# Test suites and fixtures, third-party code, character tables, and bundled manual pages.
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
HELD_OUT_PERCENT = 8


@dataclass(frozen=True)
class Corpus:
    """Source text of modules by dotted name, e.g. ``{"email.header": "..."}``."""

    train: dict[str, str]
    held_out: dict[str, str]


def is_held_out(module: str) -> bool:
    """Whether a module belongs to the held-out text: a stable hash of its name, the same on every machine."""
    return int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def read_corpus(folder: Path | None = None) -> Corpus:
    """Every ``.py`` file below ``folder`` (default: the running Python's standard library).

    Raises:
        FileNotFoundError: no module found below the folder.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    corpus = Corpus({}, {})
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        # _sysconfigdata holds one machine's build settings, not code.
        if SKIPPED_FOLDERS & set(parts) or parts[-1].startswith("_sysconfigdata"):
            continue
        name = ".".join(parts).removesuffix(".__init__")
        text = path.read_text(encoding="utf-8", errors="ignore")
        (corpus.held_out if is_held_out(name) else corpus.train)[name] = text
    if not corpus.train:
        raise FileNotFoundError(f"no Python module found below {folder}")
    return corpus


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocab_size`` tokens; id 0 ends a document and pads on the left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one int64 vector, each closed by the end token."""
    ids = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids += [*encoding.ids, tokenizer.eos_token_id]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def random_windows(tokens: torch.Tensor, count: int, length: int, seed: int) -> torch.Tensor:
    """``[count, length]`` windows of a token vector at places given by ``seed`` alone.

    Raises:
        ValueError: the vector is shorter than one window.
    """
    if len(tokens) < length:
        raise ValueError(f"{len(tokens)} tokens are less than one window of {length}")
    generator = torch.Generator("cpu").manual_seed(seed)
    starts = torch.randint(
        0, len(tokens) - length + 1, (count, 1), generator=generator, dtype=torch.int64, device="cpu"
    )
    return tokens[starts + torch.arange(length, dtype=torch.int64, device="cpu")]
