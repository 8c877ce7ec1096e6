"""What `specdec bench` and `specdec info` are given: models, tokenizers and prompts, checked before any work.

Whatever is wrong with them is a ValueError whose message is one line that names the option.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from specdec import zoo
from specdec.cli import measure
from specdec.cli.texts import Batch

PROMPTS = (
    'def merge_sort(items):\n    """Return a sorted copy of a list."""\n',
    "The lighthouse had been dark for eleven years when, on a night in late October,",
    "Question: Why is the sky blue during the day and red at sunset?\nAnswer:",
    "Summarize in two sentences: A cache keeps copies of data that is slow to fetch. When the data changes, the copies "
    "are wrong, and a cache must find that out: by asking, by being told, or by forgetting copies that are old.\n"
    "Summary:",
)
"""For models that are not the bundled ones: code, prose, a question, a request for a summary."""
N_HELD_OUT, HELD_OUT_TOKENS = 4, 64
"""Prompts for the bundled ones, and how long they are."""


@dataclass(frozen=True)
class Pair:
    """A target model, what drafts for it, and their tokenizers.

    Attributes:
        draft: None where there is no draft model.
        draft_tokenizer: None where there is no draft model, or none was saved with it.
    """

    target: PreTrainedModel
    draft: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    draft_tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def vocabularies(self) -> set[int]:
        """How many tokens the models have, padding of their tables included."""
        models = (self.target, self.draft)
        return {model.config.get_text_config().vocab_size for model in models if model is not None}

    @cached_property
    def tokenizers(self) -> Mapping[str, PreTrainedTokenizerBase]:
        """What `specdec.compile` must be told: both tokenizers, where the models' tokens or their tables differ."""
        if self.draft is None or self.draft_tokenizer is None:
            return {}
        if len(self.vocabularies) == 1 and self.tokenizer.get_vocab() == self.draft_tokenizer.get_vocab():
            return {}
        return {"tokenizer": self.tokenizer, "draft_tokenizer": self.draft_tokenizer}


def default_device() -> str:
    """A GPU, where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Sources:
    """Where a pair comes from.

    Attributes:
        model: a folder or a hub id; None is the bundled target, at the cost of `size`.
        draft: a folder or a hub id, "ngram", or None: no draft model, or the bundled one for the bundled target.
        dtype: "auto", or a name of torch's. device: for `torch.device`.
    """

    model: str | None = None
    draft: str | None = None
    size: str = "bundled"
    dtype: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.model is not None and self.size != "bundled":
            raise ValueError(f"--size {self.size} is of the bundled target, and --model is {self.model}")
        try:
            torch.zeros(1, dtype=torch.float32, device=self.device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"--device {self.device}: {in_a_line(error)}") from None

    @property
    def draft_model(self) -> str | None:
        """Where the draft model is loaded from, if it is."""
        return None if self.draft == "ngram" else self.draft

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's."""
        if self.model is None:
            return zoo.load_pair()[2]
        with _named("--model", self.model, "its tokenizer cannot be loaded: "):
            return AutoTokenizer.from_pretrained(self.model)

    @cached_property
    def room(self) -> int | None:
        """The longest text that the target has positions for, if there is a limit."""
        if self.model is None:
            return int(zoo.load_pair()[0].config.max_position_embeddings)
        with _named("--model", self.model):
            config = AutoConfig.from_pretrained(self.model).get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def load(self) -> Pair:
        """The models, in `eval` mode on the device."""
        if self.model is None:
            dtype = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
            target, bundled, tokenizer = measure.load_pair(self.size, dtype, self.device)
            if self.draft is None:
                return Pair(target, bundled, tokenizer, tokenizer)
        else:
            target, tokenizer = self._model("--model", self.model), self.tokenizer
        if self.draft_model is None:
            return Pair(target, None, tokenizer)
        draft = self._model("--draft", self.draft_model)
        try:
            return Pair(target, draft, tokenizer, AutoTokenizer.from_pretrained(self.draft_model))
        except Exception:  # of any kind where there is none: then its tokens are taken for the target's
            return Pair(target, draft, tokenizer)

    def check(self) -> None:
        """Look at all there is to load, without loading weights."""
        for option, where in (("--model", self.model), ("--draft", self.draft_model)):
            if where is not None:
                with _named(option, where):
                    AutoConfig.from_pretrained(where)

    def _model(self, option: str, where: str) -> PreTrainedModel:
        with _named(option, where):
            return AutoModelForCausalLM.from_pretrained(where, dtype=self.dtype).to(self.device).eval()


def in_a_line(error: BaseException) -> str:
    """What an error says, or the first of it."""
    return textwrap.shorten(str(error), 240, placeholder=" ...") or type(error).__name__


@contextmanager
def _named(option: str, where: str, what: str = "") -> Generator[None]:
    """What cannot be loaded is one line that says what was asked for.

    Raises:
        ValueError: it cannot.
    """
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", where) and not where.startswith(".")
    if not is_id and not Path(where).is_dir():
        raise ValueError(f"{option} {where}: there is no such folder, and it is no hub id (name or owner/name)")
    try:
        yield
    except Exception as error:  # whatever a library, or code that comes with a model, says
        raise ValueError(f"{option} {where}: {what}{in_a_line(error)}") from None


def read_text(option: str, path: Path) -> str:
    """What is in a text file.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option} {path}: not UTF-8 text, byte {error.start} is {error.object[error.start]:#x}"
        ) from None


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Prompts of a file, and where each stands in it: a line each of text, or of JSON with a "prompt" if the file's
    name ends in .jsonl."""
    lines = read_text("--prompts", path).split("\n")
    read = _json_prompt if path.suffix == ".jsonl" else str
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"--prompts {path}, line {number}"
            try:
                found.append((where, read(line)))
            except ValueError as error:
                raise ValueError(f"{where}: {in_a_line(error)}") from None
    if not found:
        raise ValueError(f"--prompts {path}: there is no prompt in it")
    return found


def _json_prompt(line: str) -> str:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f'no object with a text as its "prompt": {line.strip()[:60]}')
    return prompt


def prompts(sources: Sources, texts: Iterable[tuple[str, str]] | None, new_tokens: int) -> list[list[int]]:
    """Token ids of every prompt; without texts those that are built in.

    Raises:
        ValueError: a prompt has no tokens, or is too long for the model.
    """
    if texts is None and sources.model is None:
        ids = zoo.held_out_prompts(sources.tokenizer, N_HELD_OUT, HELD_OUT_TOKENS).tolist()
        found = [(f"built-in prompt {i}", prompt) for i, prompt in enumerate(ids, 1)]
    else:
        texts = [(f"built-in prompt {i}", text) for i, text in enumerate(PROMPTS, 1)] if texts is None else texts
        found = [(where, sources.tokenizer(text)["input_ids"]) for where, text in texts]
    for where, prompt in found:
        if not prompt:
            raise ValueError(f"{where}: it has no tokens")
        if sources.room is not None and len(prompt) + new_tokens > sources.room:
            raise ValueError(
                f"{where}: its {len(prompt)} tokens and {new_tokens} new ones (--new-tokens) are more than the "
                f"{sources.room} positions of the model"
            )
    return [prompt for _, prompt in found]


def batches(prompts: list[list[int]], size: int, device: str) -> list[Batch]:
    """Ids and attention masks [size, length], padded on the left; the first prompts come again to fill the last."""
    rows = [prompts[i % len(prompts)] for i in range(-(-len(prompts) // size) * size)]
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in part], dtype=torch.int64, device=device)
        mask = torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in part], dtype=torch.int64, device=device
        )
        found.append((ids, mask))
    return found
