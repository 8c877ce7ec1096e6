"""Texts that join a running batch: every one is what it would have been alone, and no step compiles again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_captured import Rerun
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from specdec.decoder import Decoder
from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.graphs.captured import CapturedSteps, Readback
from specdec.graphs.compiled import CompiledSteps
from specdec.sampling import SamplingLaw
from specdec.stats import Stats
from specdec.tree import TokenTree
from specdec.view import ModelView

Tiny = Callable[..., PreTrainedModel]
SLOTS, LONGEST_PROMPT, MOST_NEW = 5, 90, 40
EOS = torch.tensor([5, 6, 7])


class Queue:
    """Random texts to decode: prompt, new tokens wanted, seed."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self.texts: list[tuple[Tensor, int, Tensor]] = []

    def draw(self, most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=self._generator))

    def next(self) -> tuple[Tensor, int, Tensor]:
        prompt = torch.randint(8, 96, (self.draw(LONGEST_PROMPT),), generator=self._generator)
        self.texts.append((prompt, self.draw(MOST_NEW), torch.tensor(len(self.texts))))
        return self.texts[-1]


def decode_joining(decoder: Decoder, law: SamplingLaw, queue: Queue, n_steps: int) -> dict[int, list[int]]:
    """New tokens of each text that ended, by its place in the queue; slots are left empty for a while now and then."""
    first = [queue.next() for _ in range(SLOTS)]
    room = LONGEST_PROMPT + MOST_NEW
    with torch.no_grad():
        state = decoder._begin([p for p, _, _ in first], room, torch.stack([s for _, _, s in first]), EOS)
        for row, text in enumerate(first):
            decoder.admit(state, row, *text)
        slots: list[int | None] = list(range(SLOTS))
        written: dict[int, list[int]] = {text: [] for text in range(SLOTS)}
        done = {}
        for _ in range(n_steps):
            for row in range(SLOTS):
                if slots[row] is None and (queue.draw(3) == 1 or not any(s is not None for s in slots)):
                    decoder.admit(state, row, *queue.next())
                    slots[row] = len(queue.texts) - 1
                    written[len(queue.texts) - 1] = []
            decoder._make_room(int(state.lengths.max()) + 1)
            live = decoder.live_for(sum(s is not None for s in slots), SLOTS)
            report = decoder._step_for(law, SLOTS, len(live))(state, law, live)
            for row, (*tokens, n_new, finished, _) in enumerate(Readback(report).wait()):
                text = slots[row]
                if text is not None:
                    written[text] += tokens[:n_new]
                    if finished:
                        done[text], slots[row] = written[text], None
    return done


def _decoder(tiny: Tiny, kind: str, steps: CompiledSteps | CapturedSteps) -> Decoder:
    drafter = ModelDrafter(tiny("llama", seed=1), TokenTree.from_widths(2, 1)) if kind == "model" else NgramDrafter(3)
    return Decoder(ModelView(tiny("llama")), drafter, steps, Stats())


def _alone(decoder: Decoder, law: SamplingLaw, text: tuple[Tensor, int, Tensor]) -> list[int]:
    prompt, new, seed = text
    with torch.no_grad():
        return [t for step in decoder.run([prompt], law, new, seed[None], EOS) for piece in step for t in piece.tokens]


@pytest.mark.parametrize(("kind", "do_sample"), [("ngram", False), ("model", True)])
def test_500_steps_of_joining_texts_compile_once(tiny: Tiny, kind: str, do_sample: bool) -> None:
    target, queue = tiny("llama"), Queue()
    law = SamplingLaw.from_processors(LogitsProcessorList(), do_sample, torch.device("cpu"))
    decoder = _decoder(tiny, kind, CompiledSteps(True))
    with torch._dynamo.config.patch(error_on_recompile=True):
        done = decode_joining(decoder, law, queue, 500)
    assert len(decoder.steps._functions) == 1
    assert len(done) > 50
    alone = _decoder(tiny, kind, CompiledSteps(False))
    for text, tokens in done.items():
        prompt, new, _ = queue.texts[text]
        assert tokens == _alone(alone, law, queue.texts[text])
        if not do_sample:
            out = target.generate(prompt[None], max_new_tokens=new, eos_token_id=EOS.tolist(), pad_token_id=0)
            assert tokens == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_joining_texts_move_no_buffer_of_a_recording(tiny: Tiny, kind: str) -> None:
    queue = Queue()
    law = SamplingLaw.from_processors(LogitsProcessorList(), False, torch.device("cpu"))
    decoder = _decoder(tiny, kind, CapturedSteps(CompiledSteps(False), Rerun))
    made = Rerun.made
    done = decode_joining(decoder, law, queue, 120)
    assert decoder.target.cache.generation == 1
    assert 0 < Rerun.made - made <= 3  # sizes 2, 4 and 5 of at most 5 texts
    alone = _decoder(tiny, kind, CompiledSteps(False))
    for text, tokens in done.items():
        assert tokens == _alone(alone, law, queue.texts[text])


def test_a_text_that_does_not_fit_is_refused(tiny: Tiny) -> None:
    decoder = _decoder(tiny, "ngram", CompiledSteps(False))
    state = decoder._begin([torch.ones(4, dtype=torch.int64)], 6, torch.zeros(1, dtype=torch.int64), EOS)
    with pytest.raises(ValueError, match="4 tokens and 7 new ones do not fit into 11 columns"):
        decoder.admit(state, 0, torch.ones(4, dtype=torch.int64), 7, torch.tensor(0))


@pytest.mark.parametrize("prompt", [0, 4])
def test_nothing_to_begin_with_or_to_write_is_refused(tiny: Tiny, prompt: int) -> None:
    decoder = _decoder(tiny, "ngram", CompiledSteps(False))
    state = decoder._begin([torch.ones(4, dtype=torch.int64)], 6, torch.zeros(1, dtype=torch.int64), EOS)
    with pytest.raises(ValueError, match="both must be at least 1"):
        decoder.admit(state, 0, torch.ones(prompt, dtype=torch.int64), 0 if prompt else 3, torch.tensor(0))


@pytest.mark.parametrize("fused", [True, False])
def test_what_a_broken_text_left_behind_does_not_spread(tiny: Tiny, fused: bool) -> None:
    """NaN keys of the row's last text; the dense attention multiplies even hidden values, by zero."""
    decoder = _decoder(tiny, "model", CompiledSteps(False))
    views = [decoder.target, decoder.drafter.view]
    for view in views:
        view.cache.can_fuse = fused
    law = SamplingLaw.from_processors(LogitsProcessorList(), False, torch.device("cpu"))
    text = torch.randint(8, 96, (7,), generator=torch.Generator().manual_seed(3)), 8, torch.tensor(0)
    expected = _alone(decoder, law, text)
    with torch.no_grad():
        state = decoder._begin([text[0]] * 2, 20, torch.zeros(2, dtype=torch.int64), EOS)
        for view in views:
            for layer in view.cache.layers:
                layer.keys[:, 1], layer.values[:, 1] = torch.nan, torch.nan
        decoder.admit(state, 1, *text)
        written: list[int] = []
        while not state.finished[1]:
            live = decoder.live_for(2, 2)
            *tokens, n_new, _, broken = Readback(decoder.step(state, law, live)).wait()[1]
            assert not broken
            written += tokens[:n_new]
    assert written == expected
