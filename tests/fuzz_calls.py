"""Calls of `generate()` for the fuzz test: drawn as plain data, which Hypothesis can print and make smaller, and made
into arguments anew for every run, because caches, streamers and assistants remember."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from families import VOCAB
from hypothesis import strategies as st
from side_by_side import PAST
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from specdec import TokenTree
from specdec.verifiers import VERIFIERS

FAMILIES = ["llama", "gpt2", "gemma2", "gptj"]  # full attention, learned positions, windows and softcap, none of ours


@dataclass(frozen=True)
class Call:
    """Attributes:
    prompts: token ids, one tuple a sample. settings: numbers for `generate()`; objects: what is made by `MAKE`, by
        argument. as_config: whether the settings come as a GenerationConfig.
    """

    prompts: tuple[tuple[int, ...], ...]
    settings: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    as_config: bool = False


@dataclass(frozen=True)
class Case:
    """Calls of one wrapped model; `draft` is None, "ngram", "small" or "self"."""

    family: str
    draft: str | None
    options: dict[str, Any]
    calls: tuple[Call, ...]


class Recorder:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.puts: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.puts.append(value.flatten().tolist())

    def end(self) -> None:
        self.puts.append([])


class Calm(LogitsProcessor):
    """Leans towards the token that a text begins with, and flattens the law: of the text and of the logits."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return (scores / 2).scatter_add(1, input_ids[:, :1], torch.ones_like(scores[:, :1]))


class EndsAfterMultiples(StoppingCriteria):
    """Each text ends after a token that is a multiple of a number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids[:, -1] % self.number == 0


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")


def arguments(
    call: Call, model: PreTrainedModel, small: PreTrainedModel, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """For one `generate()` of this model or its wrapping; `small` is the assistant, if there is one."""
    width = max(map(len, call.prompts))
    ids = torch.tensor([(*[0] * (width - len(p)), *p) for p in call.prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in call.prompts])
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    settings = {name: value for name, value in call.settings.items() if name not in without}
    if "max_length" in settings:
        settings["max_length"] += width
    for name, value in call.objects.items():
        if name == "eos":  # a token that the greedy text has
            greedy = model.generate(ids, attention_mask=mask, max_new_tokens=6)
            settings["eos_token_id"] = int(greedy[value % len(ids), width + value % 6])
        else:
            MAKE[name](given, value, model, small)
    for name in without:
        given.pop(name, None)
    return {**given, "generation_config": GenerationConfig(**settings)} if call.as_config else {**given, **settings}


def _drop_mask(given: dict[str, Any], value: str, *_: Any) -> None:
    if value == "none":
        del given["attention_mask"]
    else:
        given["attention_mask"][:, -2:-1] = 0


def _positions(given: dict[str, Any], shift: int, *_: Any) -> None:
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0) + shift


def _cache(given: dict[str, Any], share: float, model: PreTrainedModel, *_: Any) -> None:
    cache = DynamicCache(config=model.config)
    n_known = int(share * given["input_ids"].shape[1])
    if n_known:
        mask = given["attention_mask"][:, :n_known]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        ids = given["input_ids"][:, :n_known]
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=positions, **{PAST: cache}, use_cache=True)
    given[PAST] = cache


def _embeds(given: dict[str, Any], keeps_ids: bool, model: PreTrainedModel, *_: Any) -> None:
    given["inputs_embeds"] = model.get_input_embeddings()(given["input_ids"]).detach()
    if not keeps_ids:
        del given["input_ids"]


def _stop_strings(given: dict[str, Any], words: list[str], *_: Any) -> None:
    given |= {"stop_strings": words, "tokenizer": _tokenizer()}


def _assistant(given: dict[str, Any], kind: str, model: PreTrainedModel, small: PreTrainedModel) -> None:
    given["assistant_model"] = copy.deepcopy(model if kind == "self" else small)  # transformers writes to its settings


def _prefix(given: dict[str, Any], number: int, *_: Any) -> None:
    def allowed(row: int, ids: Tensor) -> list[int]:
        return [t for t in range(VOCAB) if (t + int(ids[-1]) + row) % number]

    given["prefix_allowed_tokens_fn"] = allowed


MAKE: dict[str, Callable[..., None]] = {
    "mask": _drop_mask,
    "positions": _positions,
    "cache": _cache,
    "embeds": _embeds,
    "stop_strings": _stop_strings,
    "assistant": _assistant,
    "prefix": _prefix,
    "streamer": lambda given, *_: given.update(streamer=Recorder()),
    "processor": lambda given, *_: given.update(logits_processor=LogitsProcessorList([Calm()])),
    "criterion": lambda given, n, *_: given.update(stopping_criteria=StoppingCriteriaList([EndsAfterMultiples(n)])),
}
"""What puts an object among the arguments."""

_tokens = st.integers(0, VOCAB - 1)
_some_tokens = st.lists(_tokens, min_size=1, max_size=20, unique=True)
_yes = st.just(True)
ENDS = st.one_of(_tokens, st.lists(_tokens, min_size=8, max_size=25, unique=True))  # many: some occur
_share = st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.0])

SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "min_new_tokens": st.integers(0, 12),
    "min_length": st.integers(0, 20),
    "repetition_penalty": st.sampled_from([0.7, 1.3, 2.0]),
    "no_repeat_ngram_size": st.integers(1, 3),
    "bad_words_ids": st.lists(st.lists(_tokens, min_size=1, max_size=3), min_size=1, max_size=4),
    "sequence_bias": st.lists(
        st.tuples(st.lists(_tokens, min_size=1, max_size=2), st.sampled_from([-10.0, 3.0])), min_size=1, max_size=4
    ).map(lambda pairs: [[ids, bias] for ids, bias in pairs]),
    "suppress_tokens": _some_tokens,
    "begin_suppress_tokens": _some_tokens,
    "forced_bos_token_id": _tokens,
    "forced_eos_token_id": ENDS,
    "exponential_decay_length_penalty": st.sampled_from([(2, 1.5), (0, 1.1)]),
    "renormalize_logits": _yes,
    "remove_invalid_values": _yes,
    "guidance_scale": st.just(1.5),
    "max_time": st.just(1e6),
    "num_beams": st.integers(2, 3),
    "use_cache": st.booleans(),
    "return_dict_in_generate": _yes,
    "output_scores": _yes,
    "output_logits": _yes,
    "output_hidden_states": _yes,
    "cache_implementation": st.sampled_from(["static", "dynamic", "quantized", "hybrid", "no such cache"]),
    "prompt_lookup_num_tokens": st.integers(1, 5),
    "pad_token_id": st.sampled_from([0, 5]),
}
OBJECTS: dict[str, st.SearchStrategy[Any]] = {
    "eos": st.integers(0, 29),
    "mask": st.sampled_from(["none", "holes"]),
    "positions": st.sampled_from([0, 0, 1]),
    "cache": st.sampled_from([0.0, 0.5]),
    "embeds": st.booleans(),
    "stop_strings": st.lists(_tokens.map("w{}".format), min_size=1, max_size=8),
    "assistant": st.sampled_from(["small", "self"]),
    "prefix": st.integers(2, 3),
    "streamer": st.none(),
    "processor": st.none(),
    "criterion": st.integers(2, 20),
}
LAWS: dict[str, st.SearchStrategy[Any]] = {
    "num_return_sequences": st.integers(1, 3),
    "temperature": st.sampled_from([0.01, 0.3, 0.5, 1.0, 2.0, 3.0, 0.0]),
    "top_k": st.sampled_from([0, 1, 5, 50, 200]),
    "top_p": _share,
    "min_p": _share,
    "typical_p": _share,
    "epsilon_cutoff": st.sampled_from([0.0003, 0.02]),
    "eta_cutoff": st.sampled_from([0.0003, 0.02]),
    "top_h": st.sampled_from([0.3, 0.8]),
}
LIMITS: list[dict[str, int]] = [
    *({"max_new_tokens": n} for n in range(1, 15)),
    *({"max_length": n} for n in range(1, 9)),  # beyond the longest prompt
    *({}, {"max_new_tokens": 0}, {"max_length": 0}, {"max_new_tokens": 3, "max_length": 9}),
]


def _some(choices: dict[str, st.SearchStrategy[Any]], most: int) -> st.SearchStrategy[dict[str, Any]]:
    names = st.lists(st.sampled_from(list(choices)), max_size=most, unique=True)
    order = list(choices)
    return names.flatmap(lambda some: st.fixed_dictionaries({n: choices[n] for n in sorted(some, key=order.index)}))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Mostly valid; how often specdec decodes them is what the fuzz test reports."""
    few = draw(st.sampled_from([3, VOCAB - 1]))  # texts of few words repeat themselves
    lengths = st.one_of(st.just(1), st.integers(1, 10))
    n_prompts = draw(st.sampled_from([1, 1, 2, 3, 4, 5]))
    prompts = tuple(
        tuple(draw(st.lists(st.integers(1, few), min_size=n, max_size=n)))
        for n in draw(st.lists(lengths, min_size=n_prompts, max_size=n_prompts))
    )
    settings = draw(st.sampled_from(LIMITS))
    if draw(st.booleans()):
        settings = {**settings, "do_sample": True, **draw(_some(LAWS, 2))}
    settings = {**settings, **draw(_some(SETTINGS, 2))}
    if draw(st.booleans()):
        settings["eos_token_id"] = draw(ENDS)
    if any(name.startswith("output_") for name in settings):
        settings["return_dict_in_generate"] = True
    return Call(prompts, settings, draw(_some(OBJECTS, 1)), draw(st.sampled_from([False, False, True])))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A wrapping and one to three calls of it."""
    draft = draw(st.sampled_from([None, "ngram", "small", "self"]))
    options: dict[str, Any] = {"adapt": draw(st.sampled_from([None, False, True]))}
    if draft == "ngram":
        options |= {"depth": draw(st.integers(1, 8)), "max_ngram": draw(st.integers(1, 4))}
    elif draft is not None:
        tree = draw(st.sampled_from([None, TokenTree.from_widths(3, 2, 1), TokenTree.fork(2, 2)]))
        options |= {"depth": draw(st.integers(1, 6))} if tree is None else {"tree": tree}
        if tree is None:
            options["stop_below"] = draw(st.sampled_from([None, 0.05, 0.5]))
        names = [name for name in VERIFIERS if tree is None or name != "block"]
        options["verifier"] = draw(st.sampled_from(names))
    some = tuple(draw(st.lists(calls(), min_size=1, max_size=3)))
    return Case(draw(st.sampled_from(FAMILIES)), draft, options, some)
