"""Streamers and pipelines get from a wrapped model what they get from the model."""

from __future__ import annotations

import threading

import pytest
import torch
from side_by_side import Prompts, Tiny, wrap
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer, pipeline


class _Recorder:
    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.puts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")


@pytest.mark.parametrize("draft", [None, "ngram", "self"])
def test_streamers_get_each_token_once(draft: str | None, model: PreTrainedModel, prompts: Prompts) -> None:
    wrapped = wrap(model, model if draft == "self" else draft)
    ours, theirs = _Recorder(), _Recorder()
    out = wrapped.generate(**prompts([7]), max_new_tokens=12, streamer=ours)
    model.generate(**prompts([7]), max_new_tokens=12, streamer=theirs)
    assert ours.puts == theirs.puts
    assert ours.ended == 1
    assert [t for put in ours.puts for t in put] == out[0].tolist()


def test_streamers_stop_at_the_end_of_text(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    eos = model.generate(**prompts([7]), max_new_tokens=12)[0, 12].item()
    recorder = _Recorder()
    out = wrapped.generate(**prompts([7]), max_new_tokens=12, streamer=recorder, eos_token_id=eos)
    assert recorder.puts[-1] == [eos]
    assert [t for put in recorder.puts for t in put] == out[0].tolist()


def test_one_generate_inside_another(tiny: Tiny, prompts: Prompts) -> None:
    """A streamer that uses a second wrapping of the same model between two tokens of the first."""
    model = tiny("llama")
    outer, inner = wrap(model, model), wrap(model, model)
    expected = model.generate(**prompts([5], seed=1), max_new_tokens=6)

    class Nested(_Recorder):
        def put(self, value: Tensor) -> None:
            super().put(value)
            assert torch.equal(inner.generate(**prompts([5], seed=1), max_new_tokens=6), expected)

    out = outer.generate(**prompts([7]), max_new_tokens=8, streamer=Nested())
    assert torch.equal(out, model.generate(**prompts([7]), max_new_tokens=8))


def test_memory_given_back_while_a_call_runs(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts
) -> None:
    class Freeing(_Recorder):
        def put(self, value: Tensor) -> None:
            wrapped.specdec.free()

    settings = {**prompts([7]), "max_new_tokens": 8, "return_dict_in_generate": True}
    out = wrapped.generate(**settings, streamer=Freeing())
    assert torch.equal(out.sequences, model.generate(**settings).sequences)
    assert not wrapped.specdec.stats.fallbacks


def test_a_streamer_with_a_batch_fails_as_it_does_in_transformers(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts, tokenizer: PreTrainedTokenizerFast
) -> None:
    for each in (model, wrapped):
        with pytest.raises(ValueError, match="batch size 1"):
            each.generate(**prompts([3, 3]), max_new_tokens=3, streamer=TextStreamer(tokenizer))


def test_text_streamers(
    wrapped: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tokenizer(["w5 w6 w7"], return_tensors="pt", return_token_type_ids=False)
    out = wrapped.generate(**inputs, max_new_tokens=8, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.split() == tokenizer.decode(out[0]).split()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    arguments = {**inputs, "max_new_tokens": 8, "streamer": streamer}
    thread = threading.Thread(target=wrapped.generate, kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == tokenizer.decode(out[0, 3:]).split()


def test_pipeline(wrapped: PreTrainedModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["w5 w6 w7", "w9"]
    out, expected = (
        pipeline("text-generation", model=m, tokenizer=tokenizer)(texts, max_new_tokens=8, batch_size=2)
        for m in (wrapped, model)
    )
    assert out == expected
    assert wrapped.specdec.stats.steps > 0
