"""Texts that join a running batch: every one is what it would have been alone, and no step compiles again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from test_captured import Rerun
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

import specdec
import specdec.engine.loop
from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.engine.laws import SamplingLaw
from specdec.engine.loop import Decoder
from specdec.engine.stats import Stats
from specdec.engine.text import Text
from specdec.engine.tree import TokenTree
from specdec.graphs.captured import CapturedSteps
from specdec.graphs.compiled import CompiledSteps
from specdec.hf import laws
from specdec.hf.cache import Way
from specdec.hf.view import ModelView

Tiny = Callable[..., PreTrainedModel]
SLOTS, LONGEST_PROMPT, MOST_NEW = 5, 90, 40
EOS = torch.tensor([5, 6, 7])


def random_texts(n: int) -> list[Text]:
    generator = torch.Generator().manual_seed(0)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    return [
        Text(torch.randint(8, 96, (draw(LONGEST_PROMPT),), generator=generator), draw(MOST_NEW), seed)
        for seed in range(n)
    ]


def law_of(do_sample: bool) -> SamplingLaw:
    return laws.law_of(LogitsProcessorList(), do_sample, torch.device("cpu"))


def decode(decoder: Decoder, texts: list[Text], n_rows: int, law: SamplingLaw) -> None:
    room = LONGEST_PROMPT + MOST_NEW
    with torch.no_grad():
        for emitted in decoder.run(texts, n_rows, room, room, law, EOS):
            assert all(piece.text.error is None for piece in emitted)


def alone(decoder: Decoder, text: Text, law: SamplingLaw) -> list[int]:
    again = Text(text.prompt, text.max_new_tokens, text.seed)
    decode(decoder, [again], 1, law)
    return again.tokens


def decoder_of(tiny: Tiny, kind: str, steps: CompiledSteps | CapturedSteps, **options: bool) -> Decoder:
    view, tree = ModelView(tiny("llama", seed=1)), TokenTree.from_widths(2, 1)
    drafter = ModelDrafter(view, tree) if kind == "model" else NgramDrafter(3)
    return Decoder(ModelView(tiny("llama")), drafter, steps, Stats(), **options)


@pytest.mark.parametrize(("kind", "do_sample"), [("model", False), ("ngram", True)])
def test_joining_texts_compile_nothing_again(
    tiny: Tiny, kind: str, do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of steps; prompts are written in pieces between them, and greedily the controller changes its mind."""
    monkeypatch.setattr(specdec.engine.slots, "CHUNK", 32)
    target, texts, law = tiny("llama"), random_texts(110), law_of(do_sample)
    decoder = decoder_of(tiny, kind, CompiledSteps(True))
    with torch._dynamo.config.patch(error_on_recompile=True):
        decode(decoder, texts, SLOTS, law)
    assert decoder.stats.steps > 300
    n_drafts = len(decoder.drafter.depths) if not do_sample else 1
    assert 2 <= len(decoder.steps._steps) <= 1 + n_drafts
    assert (decoder.stats.undrafted > 0) == (not do_sample)
    single = decoder_of(tiny, kind, CompiledSteps(False))
    for text in texts:
        assert text.finished
        assert text.tokens == alone(single, text, law)
        if not do_sample:
            out = target.generate(
                text.prompt[None], max_new_tokens=text.max_new_tokens, eos_token_id=EOS.tolist(), pad_token_id=0
            )
            assert text.tokens == out[0, len(text.prompt) :].tolist()


def test_a_batch_begins_together(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is taken for a few while the others' prompts wait; only newcomers are written between steps."""
    monkeypatch.setattr(specdec.engine.slots, "FIRST_CHUNK", 16)
    monkeypatch.setattr(specdec.engine.slots, "CHUNK", 4)
    texts = [Text(torch.arange(8, 38), new) for new in (3, 3, 9, 9)]
    decoder = decoder_of(tiny, "ngram", CompiledSteps(False))
    with torch.no_grad():
        first, *rest = decoder.run(texts, 3, 50, 50, law_of(False), torch.empty(0, dtype=torch.int64))
    assert [piece.text for piece in first] == texts[:3]
    newcomers = [i for i, emitted in enumerate(rest) if any(piece.text is texts[3] for piece in emitted)]
    assert newcomers[0] > 1
    assert all(text.finished for text in texts)


@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_joining_texts_move_no_buffer_of_a_recording(tiny: Tiny, kind: str) -> None:
    texts, law = random_texts(40), law_of(False)
    decoder = decoder_of(tiny, kind, CapturedSteps(CompiledSteps(False), Rerun), adapt=False)
    decode(decoder, texts, SLOTS, law)
    assert decoder.target.cache.generation == 1
    made = Counter(key[0] for key, _ in decoder.steps.recordings)
    assert 0 < made["draft"] + made["judge"] <= 7  # drafts of 2, 4 and 5 texts, judgements of few sizes
    assert 0 < made["write"] <= (6 if kind == "model" else 3)
    single = decoder_of(tiny, kind, CompiledSteps(False))
    for text in texts:
        assert text.tokens == alone(single, text, law)


@pytest.mark.parametrize(("length", "new", "message"), [
    (4, 127, "do not fit into a batch of texts of 130 tokens, 256 columns"), (0, 3, "both must be at least 1"),
    (4, 0, "both must be at least 1"),
])  # fmt: skip
def test_a_text_that_cannot_be_decoded_loses_no_other(tiny: Tiny, length: int, new: int, message: str) -> None:
    texts, law = random_texts(9), law_of(False)
    bad = texts[4] = Text(torch.ones(length, dtype=torch.int64), new)
    decoder = decoder_of(tiny, "ngram", CompiledSteps(False))
    room, ended = LONGEST_PROMPT + MOST_NEW, []
    with torch.no_grad():
        for emitted in decoder.run(texts, 2, room, room, law, EOS):
            ended += [piece.text for piece in emitted if piece.text.finished]
    assert set(ended) == set(texts)
    assert str(bad.error).endswith(message)
    for text in texts:
        assert text is bad or (text.error is None and text.tokens == alone(decoder, text, law))


def test_a_prompt_that_cannot_be_written_loses_no_other(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out in one prompt's forward, when several newcomers are written together."""
    texts, law = random_texts(9), law_of(False)
    write = ModelView._write

    def fails(self: ModelView, pieces: dict[int, tuple[int, Tensor]]) -> None:
        if any(len(piece) and piece[-1] == texts[4].prompt[-2] for _, piece in pieces.values()):
            raise torch.OutOfMemoryError("no memory")
        write(self, pieces)

    decoder = decoder_of(tiny, "ngram", CompiledSteps(False))
    monkeypatch.setattr(ModelView, "_write", fails)
    texts[4].prompt[-2] = 4  # no other prompt holds it
    decode_all: Iterator[list[specdec.engine.loop.Emitted]] = decoder.run(texts, 8, 130, 130, law, EOS)
    with torch.no_grad():
        for _ in decode_all:
            pass
    monkeypatch.undo()
    assert isinstance(texts[4].error, torch.OutOfMemoryError)
    for text in texts:
        assert text is texts[4] or (text.error is None and text.tokens == alone(decoder, text, law))


def test_a_text_that_is_stopped_makes_room_for_the_next(tiny: Tiny) -> None:
    texts, law = random_texts(12), law_of(False)
    decoder = decoder_of(tiny, "model", CompiledSteps(False))
    longest = max(texts, key=lambda text: len(alone(decoder, text, law)))
    with torch.no_grad():
        for _ in decoder.run(texts, 3, 130, 130, law, EOS):
            if len(longest.tokens) > 3:
                longest.finished = True
    expected = {text: alone(decoder, text, law) for text in texts}
    assert 3 < len(longest.tokens) < len(expected[longest])
    assert longest.tokens == expected[longest][: len(longest.tokens)]
    for text in texts:
        assert text is longest or text.tokens == expected[text]


@pytest.mark.parametrize("fused", [True, False])
def test_what_a_broken_text_left_behind_does_not_spread(tiny: Tiny, fused: bool) -> None:
    """NaN keys of the row's last text, which the dense attention hides."""
    decoder, law = decoder_of(tiny, "model", CompiledSteps(False)), law_of(False)
    views = [decoder.target, decoder.drafter.view]
    for view in views:
        view.cache.way = Way.FUSED if fused else Way.MASKED
    text, first = random_texts(2)
    expected = alone(decoder, text, law)

    def poison_then(*texts: Text) -> Iterator[Text]:
        yield first
        for view in views:
            for index, layer in enumerate(view.cache.layers):
                view.cache.put(index, 0, 0, *(torch.full_like(x[:, 0], torch.nan) for x in (layer.keys, layer.values)))
        yield from texts

    with torch.no_grad():
        for _ in decoder.run(poison_then(text), 1, 130, 130, law, EOS):
            pass
    assert text.tokens == expected


def test_a_law_that_is_none_past_the_end_of_a_text_harms_nobody(fresh: Tiny) -> None:
    """A draft may reach past a text's limit, to a token after which the target's law holds a NaN."""
    ids, settings = torch.tensor([[5, 6, 7, 8]]), {"do_sample": True, "pad_token_id": 0}

    def sample(new: int, lawless: list[int]) -> list[int]:
        target = fresh("llama")
        wrapped = specdec.compile(target, fresh("llama"), compile=False, depth=5)
        wrapped.specdec._decoders.get(wrapped.specdec.draft)  # proved while it is whole
        with torch.no_grad():
            target.get_input_embeddings().weight[lawless] = torch.nan
        wrapped.specdec.seeds = [3]
        out = wrapped.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **settings)
        return out[0, 4:].tolist()

    text = sample(24, [])
    tried = 0
    for new in range(1, 20):
        if text[new] not in (*text[:new], *ids[0].tolist()):
            tried += 1
            assert sample(new, [text[new]]) == text[:new]
    assert tried > 5
