"""Models that specdec can't follow: transformers' own loop runs, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from side_by_side import Prompts, Tiny, wrap
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import specdec
from specdec.calls import Task
from specdec.config import Config
from specdec.decoders import Decoders
from specdec.engine.loop import Decoder, Emitted
from specdec.engine.text import Text
from specdec.hf import names
from specdec.hf import support as suited

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def _on_meta(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.to("meta")


def _on_two_devices(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.get_output_embeddings().to("meta")


def _with_an_offload_hook(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[1].mlp._hf_hook = object()


def _on_cuda_without_triton(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _claim(torch.device("cuda", 1), monkeypatch)
    monkeypatch.setattr(suited, "triton", None)


def _claim(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """All models say that they are on a device that need not exist."""
    monkeypatch.setattr(PreTrainedModel, "device", property(lambda model: device))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_on_meta, "models on meta"),
        (_on_two_devices, "weights on several devices: cpu, meta"),
        (_with_an_offload_hook, "accelerate's hooks"),
        (_on_cuda_without_triton, "CUDA without Triton"),
    ],
)
def test_models_that_are_somewhere_else_run_transformers_own_loop(
    change: Callable[..., None], reason: str, fresh: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the call nothing but the model is looked at, and the parent's loop is run in its place."""
    model = fresh("llama")
    wrapped = wrap(model)
    change(model, monkeypatch)
    call = names.LoopCall(
        wrapped, IDS, LogitsProcessorList(), StoppingCriteriaList(), GenerationConfig(), False, None, {}
    )
    with pytest.warns(UserWarning, match=f"transformers' own loop: .*{reason}"):
        out = wrapped.specdec._calls.decode(Task(call, None, Config(), lambda: "theirs"))
    assert out == "theirs"
    assert list(wrapped.specdec.stats.fallbacks.values()) == [1]


def test_attention_that_ignores_the_softcap(fresh: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sdpa does for Gemma 2 in some versions of transformers; in others it refuses."""

    def uncapped(*arguments: Any, dropout: float = 0.0, **options: Any) -> Any:
        options.pop("softcap")
        return sdpa_attention_forward(*arguments, dropout=dropout, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "uncapped", uncapped)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "uncapped", sdpa_mask)
    model, inputs = fresh("gemma2"), prompts([6, 2, 9])
    wrapped = wrap(model)
    capped = wrapped.generate(**inputs, max_new_tokens=8)
    assert not wrapped.specdec.stats.fallbacks
    model.set_attn_implementation("uncapped")
    expected = model.generate(**inputs, max_new_tokens=8)
    assert not torch.equal(expected, capped)
    with pytest.warns(UserWarning, match="transformers' own loop: uncapped attention"):
        assert torch.equal(wrapped.generate(**inputs, max_new_tokens=8), expected)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Models claim to be on a second GPU; the devices made current, the innermost last."""
    devices = [torch.device("cuda", 0)]

    @contextmanager
    def device(device: torch.device) -> Iterator[None]:
        devices.append(device)
        yield
        devices.pop()

    _claim(torch.device("cuda", 1), monkeypatch)
    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


def test_the_models_gpu_is_the_current_one(
    current: list[torch.device], model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran_on = []

    def run(_: Decoder, texts: list[Text], *rest: Any) -> Iterator[list[Emitted]]:
        for token in (7, 8):
            ran_on.append(current[-1].index)
            texts[0].take([token], token == 8)
            yield [Emitted(texts[0], [token])]

    monkeypatch.setattr(Decoder, "run", run)
    decoder = object.__new__(Decoder)
    decoder.target = SimpleNamespace(cache=None)  # type: ignore[assignment]
    monkeypatch.setattr(Decoders, "get", lambda *_: decoder)
    law = specdec.engine.laws.SamplingLaw(True)
    monkeypatch.setattr(specdec.hf.call, "law_of", lambda *_: law)
    assert wrap(model).generate(IDS[:1], max_new_tokens=2).tolist() == [[5, 6, 7, 8, 7, 8]]
    assert ran_on == [1, 1]
    assert [device.index for device in current] == [0]


def test_a_replaced_forward_is_not_copied(fresh: Callable[..., PreTrainedModel]) -> None:
    """A copy of the modules would keep the user's own forward, and with it the user's own cache and attention."""
    model = fresh("llama")
    expected = model.generate(IDS, max_new_tokens=6)
    with pytest.raises(ValueError, match="the draft has a forward of its own"):
        draft = fresh("llama", seed=1)
        draft.model.forward = torch.compile(draft.model.forward, backend="eager")
        specdec.compile(model, draft)
    model.forward = torch.compile(model.forward, backend="eager")
    wrapped = wrap(model)
    with pytest.warns(UserWarning, match="a forward of its own"):
        assert torch.equal(wrapped.generate(IDS, max_new_tokens=6), expected)
