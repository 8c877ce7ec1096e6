"""The decoders of one model: made for a draft and options, kept while they are current, dropped for memory."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from specdec.config import Config
from specdec.drafters.registry import DraftSource, check_draft, make_drafter
from specdec.drafters.vocabulary import ForeignDraft
from specdec.engine.decoder import Decoder
from specdec.engine.laws import SamplingLaw
from specdec.engine.stats import Stats
from specdec.errors import Unsupported, warn
from specdec.graphs.captured import CapturedSteps
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.ambient import decoding
from specdec.hf.names import PreTrainedModel
from specdec.hf.view import ModelView
from specdec.verifiers.base import VERIFIERS

N_NAMED = 4
"""Decoders kept of those that calls have named the draft of, `assistant_model=` or a number of words to look up: each
holds a model, and the memory of its last batch."""


class _Misfit(Exception):
    """A draft did fit when it was given, and does not now."""


class Decoders:
    """What a model is decoded with.

    Attributes:
        draft, config: those given to `compile`, or chosen since: what drafts, and the options.
        kept: the decoders that there are, by the draft's name and the options; the last used comes last.
    """

    def __init__(self, model: PreTrainedModel, draft: DraftSource, config: Config, stats: Stats) -> None:
        self.draft, self.config = draft, config
        self.kept: dict[tuple[object, Config], Decoder] = {}
        self._model, self._stats = model, stats
        self._target: ModelView | None = None

    def get(self, draft: DraftSource, config: Config, law: SamplingLaw | None = None) -> Decoder:
        """The decoder for this draft and these options, and for laws like this one; made anew when the user's model is
        not what it was. A draft that cannot be prepared is said, counted, and done without.

        Raises:
            Unsupported: the model cannot be decoded with.
        """
        with decoding(self._model.device):  # models are run to prove that they can be
            target = self._current_target()
            if law is not None and law.by_text and not law.greedy:  # drafts are drawn with the target's noise
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

    def free(self) -> None:
        """Give back the memory of all batches."""
        self.kept, self._target = {}, None
        gc.collect()  # copies of models and compiled steps know themselves

    def _current_target(self) -> ModelView:
        """A view of the user's model as it is now."""
        is_current = self._target is not None and self._target.is_current
        if self._target is None or not (is_current and all(made.steps.is_current for made in self.kept.values())):
            if self._target is not None:
                self.free()
            self._target = ModelView(self._model)
        return self._target

    def _with(self, target: ModelView, draft: DraftSource, config: Config) -> Decoder:
        """The decoder for this draft; raises whatever keeps it from being prepared."""
        key = _name(draft), config
        decoder = self.kept.pop(key, None)
        if decoder is None or not decoder.drafter.is_current:
            decoder = None  # its memory may be needed
            decoder = self._made(target, draft, config)
        self.kept[key] = decoder
        named = [key for key in self.kept if not self._is_own(key)]
        if len(named) > N_NAMED:
            del self.kept[named[0]]
            gc.collect()  # its memory is wanted now
        return decoder

    def _made(self, target: ModelView, draft: DraftSource, config: Config) -> Decoder:
        try:
            check_draft(draft, self._model, config)
        except (TypeError, ValueError) as error:
            raise _Misfit(str(error)) from None
        compiled = CompiledSteps(config.compile, self._stats)
        records = config.compile and target.device.type == "cuda"
        return Decoder(
            target, make_drafter(draft, self._model, config), CapturedSteps(compiled) if records else compiled,
            self._stats, VERIFIERS[config.verifier], config.adapt,
        )  # fmt: skip

    def _is_own(self, key: tuple[object, Config]) -> bool:
        """Whether a decoder is of the draft and the options given to `compile`, or chosen since."""
        draft, config = key
        return draft == _name(self.draft) and replace(config, verifier=self.config.verifier) == self.config


def _name(draft: DraftSource) -> object:
    """What tells a draft from others for as long as it lives: who holds this must hold that."""
    return draft if isinstance(draft, str | ForeignDraft) else id(draft)
