"""The decoders of a wrapped model: one for each draft and each set of options, made when they are first needed."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from specdec.config import Config
from specdec.drafters.early_exit import EarlyExit
from specdec.drafters.registry import DraftSource, check_draft, make_drafter
from specdec.drafters.vocabulary import ForeignDraft
from specdec.engine.decide import agreed_memory
from specdec.engine.laws import SamplingLaw
from specdec.engine.loop import Decoder
from specdec.engine.stats import Stats
from specdec.errors import Unsupported, warn
from specdec.graphs.captured import CapturedSteps
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.names import PreTrainedModel
from specdec.hf.twin import is_seen
from specdec.hf.view import ModelView
from specdec.verifiers import VERIFIERS

N_NAMED = 4
"""Decoders kept of those that calls have named the draft of, `assistant_model=` or a number of words to look up: each
holds a model, and the memory of its last batch."""


class _Misfit(Exception):
    """A draft fitted when it was given, and does not now: something has changed since."""


class Decoders:
    """What decodes with a model.

    Args:
        model: the user's. draft, config: given to `compile`. stats: what happens is added here.

    Attributes:
        kept: by draft and options, the last used last. target: the model as it is decoded with, once it is proved.
    """

    def __init__(self, model: PreTrainedModel, draft: DraftSource, config: Config, stats: Stats) -> None:
        self.model, self.draft, self.config = model, draft, config
        self._stats = stats
        self.target: ModelView | None = None
        self.kept: dict[tuple[object, Config], Decoder] = {}

    @agreed_memory()
    def get(self, draft: DraftSource, law: SamplingLaw | None = None, config: Config | None = None) -> Decoder:
        """The decoder for this draft and these options, and for laws like this one; made anew when the user's model is
        not what it was. A draft that cannot be prepared is said, counted, and done without.

        Raises:
            Unsupported: the model cannot be decoded with.
        """
        with decoding(self.model):  # models are run to prove that they can be
            target = self.target
            if target is None or not (target.is_current and all(d.steps.is_current for d in self.kept.values())):
                if target is not None:
                    target = None  # its memory is wanted
                    self.free()
                target = self.target = ModelView(self.model)
            config = config or self.config
            if _goes_by_noise(draft, law, config):
                config = replace(config, verifier="coupled")
            try:
                return self._with(target, draft, config)
            except torch.OutOfMemoryError:
                raise
            except _Misfit as error:
                why = Unsupported("it does not fit", str(error))
            except Exception as error:  # the law is the same without it
                why = error if isinstance(error, Unsupported) else Unsupported(type(error).__name__, str(error))
            if why.reason not in self._stats.dropped_drafts:
                warn(f"specdec decodes without the draft: {why}")
            self._stats.dropped_drafts[why.reason] += 1
            return self._with(target, None, config)

    def _with(self, target: ModelView, draft: DraftSource, config: Config) -> Decoder:
        """The decoder for this draft; raises whatever keeps it from being prepared."""
        key = _name(draft), config
        decoder = self.kept.pop(key, None)
        if decoder is None or not decoder.drafter.is_current:
            decoder = None  # its memory may be needed
            try:
                check_draft(draft, self.model, config)
            except (TypeError, ValueError) as error:
                raise _Misfit(str(error)) from None
            compiled = CompiledSteps(config.compile, self._stats.eager, is_seen)
            records = config.compile and target.device.type == "cuda"
            decoder = Decoder(
                target, make_drafter(draft, target, config), CapturedSteps(compiled) if records else compiled,
                self._stats, VERIFIERS[config.verifier], config.adapt,
            )  # fmt: skip
        self.kept[key] = decoder
        named = [key for key in self.kept if not self._is_own(key)]
        if len(named) > N_NAMED:
            del self.kept[named[0]]
            gc.collect()  # its memory is wanted now
        return decoder

    def _is_own(self, key: tuple[object, Config]) -> bool:
        """Whether a decoder is of the draft and the options given to `compile`, or chosen since."""
        draft, config = key
        return draft == _name(self.draft) and replace(config, verifier=self.config.verifier) == self.config

    def free(self) -> None:
        """Give back the memory of all batches."""
        self.kept, self.target = {}, None
        gc.collect()  # copies of models and compiled steps know themselves


def _goes_by_noise(draft: DraftSource, law: SamplingLaw | None, config: Config) -> bool:
    """Whether drafts are verified by the target's noise, whatever the options say: where a law goes by the text, and
    where these leave it open and each place has one draft, which is accepted as often as by any other verifier. Then
    texts do not depend on what is drafted."""
    if isinstance(draft, str) and config.verifier == "auto":
        return True
    return law is not None and law.by_text and not law.greedy


def _name(draft: DraftSource) -> object:
    """What tells a draft from others for as long as it lives: who holds this must hold that."""
    if isinstance(draft, tuple):
        return tuple(map(_name, draft))
    return draft if isinstance(draft, str | ForeignDraft | EarlyExit) else id(draft)


@contextmanager
def decoding(model: PreTrainedModel) -> Generator[None]:
    """Where to decode: without gradients and autocast, and with a model's GPU the current one, on which kernels are
    started and graphs recorded."""
    kind = model.device.type
    current = torch.cuda.device(model.device) if kind == "cuda" else nullcontext()
    with current, torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
        yield
