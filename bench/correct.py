"""Whether a device decodes right at all: what has to hold before anything is timed.

The bundled pair in float32, which no rounding makes ambiguous: greedy texts are transformers' own, equal seeds give
equal texts, coupled ones the same with a draft or none, and a decoding step never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import specdec
from specdec import zoo
from specdec.cli import measure
from specdec.drafters.model import ModelDrafter
from specdec.engine.laws import SamplingLaw
from specdec.engine.loop import Decoder
from specdec.engine.roles import Steps
from specdec.engine.stats import Stats
from specdec.engine.text import Text
from specdec.engine.tree import TokenTree
from specdec.graphs.captured import CapturedSteps
from specdec.graphs.compiled import CompiledSteps
from specdec.hf import laws as hf_laws
from specdec.hf.view import ModelView

PROMPT_TOKENS, NEW_TOKENS, SAMPLES = 24, 32, 3
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
SETTLED, WATCHED = 6, 6
"""Steps after which prompts are written and steps compiled and recorded, and steps that must not wait then."""


class Wrong(Exception):
    """This device must not be measured: what it decodes is not right. The message says how."""


@contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """What waits for a GPU here fails; other devices are not waited for."""
    watches = device.type == "cuda"
    if watches:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if watches:
            torch.cuda.set_sync_debug_mode("default")


def law_of(device: torch.device, do_sample: bool, warps: bool = True) -> SamplingLaw:
    """The greedy law, or one that samples, with warpers or without."""
    warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.9)] if do_sample and warps else []
    return hf_laws.law_of(LogitsProcessorList(warpers), do_sample, device)


@torch.no_grad()
def run_without_waiting(decoder: Decoder, law: SamplingLaw, prompts: Sequence[Tensor], new_tokens: int) -> list[Text]:
    """Decode prompts, [length] int64 each, where no step in the middle may wait for the device but for reports, on an
    event, once they are there: that holds nobody up. Seeds are 0, 1, ....

    Raises:
        RuntimeError: one did. AssertionError: texts were too short to see it.
    """
    texts, longest = [Text(prompt, new_tokens, seed) for seed, prompt in enumerate(prompts)], max(map(len, prompts))
    run = decoder.run(texts, len(texts), longest + new_tokens, longest, law, torch.empty(0, dtype=torch.int64))
    for _ in range(SETTLED):
        next(run)
    with no_synchronisation(decoder.target.device):
        for _ in range(WATCHED):
            next(run)
    assert not any(text.finished for text in texts), "all texts ended before the watched steps did"
    for _ in run:
        pass
    return texts


class Checks:
    """What has to hold on a device.

    Args:
        compiled: also decode with steps that are compiled, and recorded where a device records.
    """

    def __init__(self, device: torch.device, compiled: bool) -> None:
        self._device, self._compiled = device, compiled
        self._target, self._draft, tokenizer = zoo.load_pair(device=device)
        for model in (self._target, self._draft):
            model.generation_config.eos_token_id = None
        self._ids = zoo.held_out_prompts(tokenizer, SAMPLES, PROMPT_TOKENS).to(device)

    def __iter__(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """A name and a call that raises; those that compile come last."""
        yield "greedy, no draft", partial(self._is_transformers_text, None)
        yield "greedy, a chain", partial(self._is_transformers_text, self._draft, depth=3)
        yield "greedy, a tree", partial(self._is_transformers_text, self._draft, tree=TokenTree.from_widths(3, 2, 1))
        yield "greedy, n-grams", partial(self._is_transformers_text, "ngram")
        yield "equal seeds, equal texts", self._is_seeded
        yield "coupled texts, drafted or not", self._is_coupled
        steps: dict[str, Callable[[], Steps]] = {"kernel by kernel": partial(CompiledSteps, False)}
        if self._compiled and self._device.type == "cuda":
            steps["recorded"] = lambda: CapturedSteps(CompiledSteps(True))
        elif self._compiled:
            steps["compiled"] = partial(CompiledSteps, True)
        for how, make in steps.items():
            for do_sample in (False, True):
                name = f"no step waits, {'sampled' if do_sample else 'greedy'}, {how}"
                yield name, partial(self._never_waits, make, do_sample)

    def _generate(self, model: PreTrainedModel, **settings: Any) -> Tensor:
        """[B, NEW_TOKENS] new ids."""
        mask = torch.ones_like(self._ids)
        text = model.generate(self._ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, **settings)
        if hasattr(model, "specdec"):
            measure.check("specdec", model.specdec.stats)
        return text[:, self._ids.shape[1] :]

    @cached_property
    def _greedy(self) -> Tensor:
        return self._generate(self._target, do_sample=False)

    def _is_transformers_text(self, draft: Any, **options: Any) -> None:
        model = specdec.compile(self._target, draft, compile=False, **options)
        _same(self._generate(model, do_sample=False), self._greedy, "transformers' text")

    def _is_seeded(self) -> None:
        model = specdec.compile(self._target, self._draft, compile=False, depth=3)
        _same(self._sampled(model), self._sampled(model), "the text of the same seed")

    def _is_coupled(self) -> None:
        drafted, undrafted = (
            specdec.compile(self._target, draft, compile=False, verifier="coupled") for draft in (self._draft, None)
        )
        _same(self._sampled(drafted), self._sampled(undrafted), "the undrafted text")

    def _sampled(self, model: PreTrainedModel) -> Tensor:
        model.specdec.seeds = list(range(SAMPLES))
        return self._generate(model, **SAMPLING)

    def _never_waits(self, make: Callable[[], Steps], do_sample: bool) -> None:
        drafter, stats = ModelDrafter(ModelView(self._draft), TokenTree.chain(2)), Stats()
        decoder = Decoder(ModelView(self._target), drafter, make(), stats, adapt=False)
        steps = SETTLED + WATCHED + 1  # and more tokens than these can write
        texts = run_without_waiting(decoder, law_of(self._device, do_sample), list(self._ids), steps * 4)
        measure.check("specdec", stats)
        if not do_sample:
            found = torch.tensor([text.tokens[:NEW_TOKENS] for text in texts], device=self._device)
            _same(found, self._greedy, "transformers' text")


def _same(found: Tensor, expected: Tensor, whose: str) -> None:
    """Whether texts [B, n] are equal.

    Raises:
        Wrong: with the first token that differs.
    """
    if not torch.equal(found, expected):
        sample, place = (found != expected).nonzero()[0].tolist()
        raise Wrong(
            f"not {whose}: token {place + 1} of sample {sample + 1} is {found[sample, place]}, "
            f"not {expected[sample, place]}"
        )
