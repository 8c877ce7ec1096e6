"""compile(): wrap a Hugging Face causal LM so that its `generate()` decodes speculatively."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from specdec.config import Config
from specdec.decoder import Decoder
from specdec.drafters.base import Drafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.graphs.captured import CapturedSteps
from specdec.graphs.compiled import CompiledSteps
from specdec.request import Request, Unsupported, check_model, moving_rope
from specdec.sampling import SamplingLaw
from specdec.stats import Stats
from specdec.view import SUPPORTED_MODEL_TYPES, ModelView


def compile(  # the name is the point: specdec.compile
    model: PreTrainedModel, draft: PreTrainedModel | Drafter | str | None = None, **options: Any
) -> PreTrainedModel:
    """Wrap a causal LM: same class, same weights, same `generate()`, same output law, fewer steps.

    Args:
        model: a decoder-only transformers model. It is not changed, and shares its weights with the result.
        draft: a smaller transformers model with the same vocabulary, `"ngram"` (look the text's last words up in the
            text), a `Drafter`, or None to decode without drafting.
        options: fields of `specdec.config.Config`.

    Returns:
        A model whose `specdec` attribute holds the statistics, the seeds and `warmup()`. Calls it cannot speed up run
        transformers' own loop and warn once with the reason.

    Raises:
        TypeError: `model` or `draft` is none of the above, or an option is unknown.
        ValueError: draft and target do not fit together (vocabulary, device).
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if hasattr(model, "specdec"):
        raise ValueError("this model is already compiled with specdec; compile the original instead")
    handle = Handle(model, draft, Config(**options))
    wrapped = object.__new__(_subclass(type(model)))  # type: ignore[arg-type]
    wrapped.__dict__ = dict(model.__dict__, specdec=handle)
    return wrapped


class Handle:
    """What hangs at `model.specdec`.

    Attributes:
        stats: what happened so far (`specdec.stats.Stats`).
        config: the options given to `compile`.
    """

    def __init__(self, model: PreTrainedModel, draft: PreTrainedModel | Drafter | str | None, config: Config) -> None:
        self.config, self.stats = config, Stats()
        self._seeds: Tensor | None = None
        self._seeds_are_fixed = False
        self._model, self._draft = model, draft
        self._target: ModelView | None = None
        self._decoders: dict[object, Decoder] = {}
        self._running = threading.Lock()
        self._check_draft(draft)

    @property
    def seeds(self) -> Tensor | None:
        """[B] int64. After a call: the seeds it used. Set them to make the next call use these; one per sample,
        counting `num_return_sequences`. Equal seeds, prompts and settings give equal texts, in any batch."""
        return self._seeds

    @seeds.setter
    def seeds(self, value: Any) -> None:
        self._seeds = torch.as_tensor(value, dtype=torch.int64).flatten()
        self._seeds_are_fixed = True

    def warmup(self, batch_size: int = 1, do_sample: bool = False) -> None:
        """Compile the steps of a batch size before they are needed. Plain sampling; processors compile their own."""
        decoder = self._decoder(self._draft)
        law = SamplingLaw.from_processors(LogitsProcessorList(), do_sample, self._model.device)
        prompts = [torch.zeros(8, dtype=torch.int64)] * batch_size
        with _current(self._model.device), torch.inference_mode(False), torch.no_grad():
            steps = decoder.run(prompts, law, 64, torch.zeros(batch_size, dtype=torch.int64), _NO_EOS)
            for _ in zip(range(2), steps, strict=False):
                pass
            steps.close()  # it counts what it did when it ends
        self.stats.reset()

    def generate(
        self,
        parents_loop: Callable[[], Any],
        model: PreTrainedModel,
        input_ids: Tensor,
        processors: Any,
        criteria: Any,
        generation_config: Any,
        synced_gpus: bool,
        streamer: Any,
        model_kwargs: dict[str, Any],
        draft: PreTrainedModel | Drafter | str | None = None,
    ) -> Any:
        """Decode one `generate()` call, or run the parent's loop and say why."""
        if not self._running.acquire(blocking=False):
            return self._fall_back("another generate() of this model is running", parents_loop)
        try:
            try:
                check_model(model)
                if synced_gpus:
                    raise Unsupported("synced_gpus")
                if streamer is not None and input_ids.shape[0] > 1:
                    raise Unsupported("a streamer with a batch of several samples")
                request = Request.parse(model, input_ids, processors, criteria, generation_config, model_kwargs)
                decoder = self._decoder(self._draft if draft is None else draft)
            except Unsupported as reason:
                return self._fall_back(str(reason), parents_loop)
            with _current(model.device), torch.inference_mode(False), torch.no_grad():
                texts = self._run(decoder, request, streamer)
        finally:
            self._running.release()
        return _assemble(input_ids, texts, generation_config._pad_token_tensor)

    def _run(self, decoder: Decoder, request: Request, streamer: Any) -> list[list[int]]:
        n_batch = len(request.prompts)
        seeds = self._seeds if self._seeds_are_fixed and self._seeds is not None else torch.randint(2**62, (n_batch,))
        self._seeds, self._seeds_are_fixed = seeds, False
        if len(seeds) != n_batch:
            raise ValueError(f"{len(seeds)} seeds were set for a batch of {n_batch} samples")
        texts: list[list[int]] = [[] for _ in range(n_batch)]
        ended = [False] * n_batch
        prompts = [p.clone() for p in request.prompts]
        for emitted in decoder.run(prompts, request.law, request.max_new_tokens, seeds, request.eos_ids):
            for piece in emitted:
                texts[piece.row] += piece.tokens
                ended[piece.row] = piece.finished
                self.stats.tokens += len(piece.tokens)
                if streamer is not None:
                    for token in piece.tokens:
                        streamer.put(torch.tensor([token]))
            if request.deadline is not None and time.time() > request.deadline:
                shortest = min((len(t) for t, e in zip(texts, ended, strict=True) if not e), default=None)
                texts = [t if e else t[:shortest] for t, e in zip(texts, ended, strict=True)]
                break
        if streamer is not None:
            streamer.end()
        return texts

    def _fall_back(self, reason: str, parents_loop: Callable[[], Any]) -> Any:
        if reason not in self.stats.fallbacks:
            warnings.warn(f"specdec runs transformers' own loop: {reason}", stacklevel=5)
        self.stats.fallbacks[reason] += 1
        return parents_loop()

    def _check_draft(self, draft: PreTrainedModel | Drafter | str | None) -> None:
        if isinstance(draft, PreTrainedModel):
            ours, theirs = (m.config.get_text_config().vocab_size for m in (self._model, draft))
            if ours != theirs:
                raise ValueError(f"draft vocabulary {theirs} does not match target vocabulary {ours}")
            if draft.device != self._model.device:
                raise ValueError(f"draft is on {draft.device}, target is on {self._model.device}")
            if draft.config.model_type not in SUPPORTED_MODEL_TYPES:
                raise ValueError(f"drafts of type {draft.config.model_type} are not supported yet")
            if (rope := moving_rope(draft.config)) is not None:
                raise ValueError(f"drafts with {rope} rope are not supported")
        elif isinstance(draft, str) and draft != "ngram":
            raise ValueError(f'draft must be "ngram", a model, a Drafter or None, got {draft!r}')
        elif draft is not None and not isinstance(draft, str) and not callable(getattr(draft, "draft", None)):
            raise TypeError(f'draft must be "ngram", a model, a Drafter or None, got {type(draft).__name__}')

    def _decoder(self, draft: PreTrainedModel | Drafter | str | None) -> Decoder:
        """The decoder for this draft; made anew when the user's model has been given other weights."""
        if self._target is None or not self._target.is_current:
            self._target, self._decoders = ModelView(self._model), {}
        key = draft if isinstance(draft, str) else id(draft)
        decoder = self._decoders.get(key)
        if decoder is None or not decoder.drafter.is_current:
            self._check_draft(draft)
            compiled = CompiledSteps(self.config.compile)
            records = self.config.compile and self._target.device.type == "cuda"
            steps = CapturedSteps(compiled) if records else compiled
            decoder = self._decoders[key] = Decoder(self._target, self._drafter(draft), steps, self.stats)
        return decoder

    def _drafter(self, draft: PreTrainedModel | Drafter | str | None) -> Drafter:
        depth = self.config.depth
        if draft is None:
            return NoDrafter()
        if isinstance(draft, PreTrainedModel):
            return ModelDrafter(draft, depth or 5)
        if isinstance(draft, str):
            return NgramDrafter(depth or 8, self.config.max_ngram)
        return draft


_NO_EOS = torch.empty(0, dtype=torch.int64)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a model's GPU the current one, which is where kernels are started and graphs recorded."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _assemble(input_ids: Tensor, texts: list[list[int]], pad: Tensor | None) -> Tensor:
    """The prompts followed by the new texts, padded on the right as transformers pads finished rows."""
    filler = 0 if pad is None else int(pad)
    out = input_ids.new_full((len(texts), max(len(t) for t in texts)), filler)
    for row, text in enumerate(texts):
        out[row, : len(text)] = torch.tensor(text, dtype=out.dtype)
    return torch.cat([input_ids, out], 1)


def _restore(model: PreTrainedModel, draft: Any, config: Config) -> PreTrainedModel:
    return compile(model, draft, **vars(config))


@cache
def _subclass(parent: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of a model class whose decoding loops are ours; `generate()` looks loops up on the class."""

    def _sample(  # type: ignore[no-untyped-def]
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None,
        **model_kwargs,
    ):  # fmt: skip
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)

        def parents_loop() -> Any:
            return parent._sample(self, *arguments, **model_kwargs)

        return self.specdec.generate(parents_loop, self, *arguments, model_kwargs)

    def _assisted_decoding(  # type: ignore[no-untyped-def]
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None,
        inputs_tensor=None, assistant_model=None, assistant_tokenizer=None, tokenizer=None, **model_kwargs,
    ):  # fmt: skip
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)

        def parents_loop() -> Any:
            return parent._assisted_decoding(
                self, *arguments, inputs_tensor=inputs_tensor, assistant_model=assistant_model,
                assistant_tokenizer=assistant_tokenizer, tokenizer=tokenizer, **model_kwargs,
            )  # fmt: skip

        try:
            draft = _draft_of_call(generation_config, assistant_model, assistant_tokenizer)
            self.specdec._check_draft(draft)
        except (Unsupported, ValueError) as reason:
            return self.specdec._fall_back(str(reason), parents_loop)
        return self.specdec.generate(parents_loop, self, *arguments, model_kwargs, draft)

    def __reduce__(self: Any) -> Any:
        plain = object.__new__(parent)
        plain.__dict__ = {name: value for name, value in self.__dict__.items() if name != "specdec"}
        return _restore, (plain, self.specdec._draft, self.specdec.config)

    methods = {"_sample": _sample, "_assisted_decoding": _assisted_decoding, "__reduce__": __reduce__}
    names = {"__module__": parent.__module__, "__qualname__": parent.__qualname__, "__doc__": parent.__doc__}
    return type(parent.__name__, (parent,), {**methods, **names})


@cache
def _ngrams(depth: int, max_ngram: int) -> NgramDrafter:
    return NgramDrafter(depth, max_ngram)


def _draft_of_call(generation_config: Any, assistant_model: Any, assistant_tokenizer: Any) -> PreTrainedModel | Drafter:
    """The drafter named by the arguments of a `generate()` call."""
    if assistant_tokenizer is not None:
        raise Unsupported("assistant_tokenizer")
    for name in ("use_mtp", "speculation_type", "assistant_early_exit", "assistant_ensemble_weight"):
        if getattr(generation_config, name, None):
            raise Unsupported(name)
    if assistant_model is not None:
        return assistant_model
    if generation_config.prompt_lookup_num_tokens is not None:
        return _ngrams(generation_config.prompt_lookup_num_tokens, generation_config.max_matching_ngram_size or 2)
    raise Unsupported("assisted generation without an assistant model or prompt lookup")
