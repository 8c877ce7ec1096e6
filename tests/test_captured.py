"""Recorded steps: what a recording relies on holds from call to call. Recordings here are replayed by running the
step again on what was recorded, which sees the same memory as a CUDA graph would."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from side_by_side import tokens_of
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper

from specdec.config import Config
from specdec.drafters import adaptive
from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.engine.control import Adaptive, Plan, Track
from specdec.engine.laws import SamplingLaw
from specdec.engine.loop import Decoder
from specdec.engine.roles import Drafter
from specdec.engine.stats import Stats
from specdec.engine.text import Text
from specdec.engine.tree import TokenTree
from specdec.errors import SpecdecWarning
from specdec.graphs import compiled
from specdec.graphs.captured import CapturedSteps, Recording, Upload
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.laws import law_of
from specdec.hf.view import RECORDED, ModelView
from specdec.verifiers import AUTO

NO_EOS = torch.empty(0, dtype=torch.int64)
Tiny = Callable[..., PreTrainedModel]


class Rerun(Recording):
    """A recording without a GPU."""

    made = 0

    def _record(self, step: Callable[..., Any], pool: Any) -> Callable[[], Any]:
        type(self).made += 1
        owner: Any = step.__self__  # type: ignore[attr-defined]
        views = [owner] if isinstance(owner, ModelView) else [owner.target, getattr(owner.drafter, "view", None)]
        caches = [view.cache for view in views if view is not None]
        recorded = [cache.layers for cache in caches]

        def replay() -> Any:
            """On the caches of the recording, wherever they are now."""
            now = [cache.layers for cache in caches]
            for cache, layers in zip(caches, recorded, strict=True):
                cache.layers = layers
            try:
                return step(*self.arguments)
            finally:
                for cache, layers in zip(caches, now, strict=True):
                    cache.layers = layers

        return replay


@pytest.fixture
def decoders(tiny: Tiny) -> Callable[..., tuple[Decoder, Decoder]]:
    def make(kind: str, adapt: bool | None = False) -> tuple[Decoder, Decoder]:
        def drafter(view: ModelView) -> Drafter:
            tree = TokenTree.from_widths(2, 1)
            if kind == "adaptive":
                return adaptive.Adaptive(tokens_of(target)).drafter(view, Config(depth=3), AUTO)
            return ModelDrafter(ModelView(tiny("llama", seed=1)), tree) if kind == "model" else NgramDrafter(3)

        target = tiny("llama")
        steps = CapturedSteps(CompiledSteps(False), Rerun), CompiledSteps(False)
        recorded, plain = (
            Decoder(view, drafter(view), s, Stats(), adapt=adapt) for s in steps for view in [ModelView(target)]
        )
        return recorded, plain

    return make


def _law(temperature: float | None) -> SamplingLaw:
    warpers = [] if temperature is None else [TemperatureLogitsWarper(temperature), TopKLogitsWarper(40)]
    return law_of(LogitsProcessorList(warpers), temperature is not None, torch.device("cpu"))


def _texts(decoder: Decoder, lengths: list[int], law: SamplingLaw, new: int, eos: Tensor, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, 97, (n,), generator=generator) for n in lengths]
    texts = [Text(prompt, new, seed + i) for i, prompt in enumerate(prompts)]
    with torch.no_grad():
        for _ in decoder.run(texts, len(texts), max(lengths) + new, max(lengths), law, eos):
            pass
    return [text.tokens for text in texts]


@pytest.mark.parametrize("adapt", [False, None])
@pytest.mark.parametrize("kind", ["model", "ngram", "adaptive"])
def test_recorded_steps_write_the_same_texts(
    kind: str, adapt: bool | None, decoders: Callable[..., tuple[Decoder, Decoder]]
) -> None:
    """Batches that shrink, grow, end at different times, change their law and outgrow their buffers."""
    recorded, plain = decoders(kind, adapt)
    calls = [
        ([5, 3], None, 12, NO_EOS), ([5, 3], 0.7, 12, NO_EOS), ([2], 1.3, 9, NO_EOS), ([1, 1], 0.7, 9, NO_EOS),
        ([4, 9, 2], None, 30, torch.tensor([3, 7, 20])), ([4, 9, 2], 0.9, 30, torch.tensor([3, 7, 20])),
        ([300, 2, 5], None, 40, torch.arange(5, 25)), ([3, 3], 0.8, 20, torch.arange(5, 25)),
    ]  # fmt: skip
    for seed, (lengths, temperature, new, eos) in enumerate(calls):
        law = _law(temperature)
        expected = _texts(plain, lengths, law, new, eos, seed)
        assert _texts(recorded, lengths, law, new, eos, seed) == expected
        assert max(len(text) for text in expected) <= new
    if adapt is None:
        assert recorded.stats.undrafted > 0
    else:
        assert (recorded.stats.proposed, recorded.stats.accepted) == (plain.stats.proposed, plain.stats.accepted)


@pytest.mark.parametrize("kind", ["recorded", "compiled"])
def test_another_depth_at_each_step_makes_nothing_anew(kind: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each depth is compiled and recorded once, and masks are made with the tree, of which a step takes its part."""
    made, depths = Counter[str](), itertools.cycle([3, 0, 2, 1, 0, 3, 1, 2, 3])

    def counted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made[what] += 1
            return function(*args, **kwargs)

        return call

    def plan(self: Adaptive, samples: Sequence[Track]) -> Plan:
        return self.shape.uniform(len(samples), next(depths))

    monkeypatch.setattr(Adaptive, "plan", plan)
    monkeypatch.setattr(TokenTree, "tensors", counted("masks", TokenTree.tensors))
    monkeypatch.setattr(compiled._Step, "_compile", counted("compiled", compiled._Step._compile))
    monkeypatch.setattr(Rerun, "_record", counted("recorded", Rerun._record))
    target, draft = (tiny("llama", seed=seed, num_hidden_layers=1) for seed in (0, 1))
    steps = CapturedSteps(CompiledSteps(False), Rerun) if kind == "recorded" else CompiledSteps(True)
    decoder = Decoder(ModelView(target), ModelDrafter(ModelView(draft), TokenTree.chain(3)), steps, Stats(), adapt=None)
    prompt = torch.tensor([[5, 3, 9, 8, 2]])
    expected = target.generate(prompt, max_new_tokens=60)[0, 5:].tolist()

    def decode() -> dict[str, int]:
        text = Text(prompt[0], 60)
        with torch.no_grad():
            for _ in decoder.run([text], 1, 65, 65, _law(None), NO_EOS):
                pass
        assert text.tokens == expected
        return dict(made)

    decode()
    first = decode()  # a shape is recorded when it comes again
    assert first[kind] >= 3 + 2  # three depths, and judgements: of a root alone, and of a draft
    with torch.compiler.set_stance("fail_on_recompile"):
        assert decode() == decode() == first
    assert not decoder.stats.eager
    assert 0 < decoder.stats.undrafted < decoder.stats.steps


def test_buffers_stay_and_recordings_are_used_again(decoders: Callable[..., tuple[Decoder, Decoder]]) -> None:
    recorded, _ = decoders("model")

    def made() -> dict[Any, Recording]:
        """Of steps; prompts have lengths of their own."""
        return {shape: made for shape, made in recorded.steps.recordings.items() if shape[0][0] in ("draft", "judge")}

    _texts(recorded, [5, 3], _law(None), 20, NO_EOS, 0)
    state, keys = recorded.buffers.state, recorded.target.cache.layers[0].keys
    first = made()
    assert first
    for lengths in ([2, 7], [4], [60, 1]):
        _texts(recorded, lengths, _law(None), 20, NO_EOS, 1)
    assert recorded.buffers.state is state
    assert recorded.target.cache.layers[0].keys is keys
    again = made()
    assert len(again) <= len(first) + 1  # at most the shape of a last sample alone
    assert first.items() <= again.items()
    _texts(recorded, [5, 3, 1], _law(None), 20, NO_EOS, 0)  # another row: everything moves
    assert recorded.buffers.state is not state
    assert made() and not made().items() & again.items()


def test_short_prompts_are_written_by_recordings(decoders: Callable[..., tuple[Decoder, Decoder]]) -> None:
    """In few sizes, as they come or ahead, with no text of the recording left in later ones."""
    recorded, plain = decoders("model")

    def sizes() -> set[tuple[ModelView, int]]:
        found = recorded.steps.recordings
        return {(key[1], size) for key, size in found if key[0] == "write"}

    def same(lengths: list[int], seed: int) -> bool:
        expected = _texts(plain, lengths, _law(None), 12, NO_EOS, seed)
        return _texts(recorded, lengths, _law(None), 12, NO_EOS, seed) == expected

    views = recorded.target, recorded.drafter.view
    assert all(same(lengths, seed) for seed, lengths in enumerate(([9, 4, 20], [30, 9, 1], [2, 40, 20])))
    assert sizes() == {(view, 64) for view in views}
    recorded.buffers.record()
    ahead = set(recorded.steps.recordings)
    assert sizes() == {(view, size) for view in views for size in RECORDED}
    assert all(same(lengths, seed) for seed, lengths in enumerate(([3, 3, 8], [3, 90, 90], [90, 1, 2], [300, 70, 2])))
    assert {shape for shape in recorded.steps.recordings if shape[0][0] == "write"} <= ahead


def test_prompts_are_written_alike_compiled_and_not(tiny: Tiny) -> None:
    view = ModelView(tiny("llama"))
    view.allocate(3, 300)
    texts = {
        row: (0, torch.randint(1, 97, (n,), generator=torch.Generator().manual_seed(n))) for row, n in ((0, 9), (2, 40))
    }
    with torch.no_grad():
        view.prefill(texts)
        expected = [view.cache.take(1, row, 0, len(text)) for row, (_, text) in texts.items()]
        expected = [tuple(x.clone() for x in pair) for pair in expected]
        for layer in view.cache.layers:
            layer.keys.zero_(), layer.values.zero_()
        write = CompiledSteps(True).get(view.write_packed, "write", 64)
        tokens = torch.cat([text for _, text in texts.values()])
        write(F.pad(tokens, (0, 64 - len(tokens))), torch.zeros(3, dtype=torch.int64), torch.tensor([9, 0, 40]))
    for (row, (_, text)), pair in zip(texts.items(), expected, strict=True):
        for found, wanted in zip(view.cache.take(1, row, 0, len(text)), pair, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not view.cache.take(1, 1, 0, 299)[0].any()


def test_a_recording_takes_over_what_varies_and_refuses_what_does_not() -> None:
    class Again(Recording):
        def _record(self, step: Callable[..., Any], pool: Any) -> Callable[[], Any]:
            return lambda: step(*self.arguments)

    x = torch.tensor([1, 2])
    recording = Again(lambda state, x, depth: (x + depth).tolist(), ("a state", x, 3), None)
    assert recording("a state", x, 3) == [4, 5]
    assert recording("a state", torch.tensor([5, 6]), 3) == [8, 9]
    assert recording("a state", x, 3) == [4, 5]
    x.add_(1)
    assert recording("a state", x, 3) == [5, 6]
    for given in (("another", x, 3), ("a state", x, 4)):
        with pytest.raises(RuntimeError, match="recorded with"):
            recording(*given)


def test_no_step_is_started_for_texts_that_will_have_ended(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are read a step late, but a step adds a token at least."""
    steps = CapturedSteps(CompiledSteps(False), Rerun)
    decoder = Decoder(ModelView(tiny("llama")), NoDrafter(), steps, Stats(), adapt=False)
    events: list[str] = []
    start, land = decoder.launcher.start, decoder._take
    monkeypatch.setattr(decoder.launcher, "start", lambda *given: (events.append("start"), start(*given))[1])
    monkeypatch.setattr(decoder, "_take", lambda *given: (events.append("land"), land(*given))[1])
    for lengths, n_steps in (([5], 6), ([5, 3], 6), ([4, 9, 2], 6)):
        events.clear()
        assert [len(text) for text in _texts(decoder, lengths, _law(None), 6, NO_EOS, 0)] == [6] * len(lengths)
        assert events == ["start", *["start", "land"] * (n_steps - 1), "land"]


def test_two_decoders_of_one_target_do_not_trust_each_others_buffers(tiny: Tiny) -> None:
    """A larger batch of one moves the cache that the other's recordings know."""
    view = ModelView(tiny("llama"))
    one, other = (
        Decoder(view, NgramDrafter(3), CapturedSteps(CompiledSteps(False), Rerun), Stats(), adapt=False)
        for _ in range(2)
    )
    plain = Decoder(ModelView(tiny("llama")), NgramDrafter(3), CompiledSteps(False), Stats())
    expected = _texts(plain, [6], _law(None), 16, NO_EOS, 3)
    assert _texts(one, [6], _law(None), 16, NO_EOS, 3) == expected
    before = dict(one.steps.recordings)
    assert before
    _texts(other, [5, 5, 5], _law(None), 16, NO_EOS, 0)
    assert _texts(one, [6], _law(None), 16, NO_EOS, 3) == expected
    assert all(one.steps.recordings[key] is not recording for key, recording in before.items())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_what_can_not_be_recorded_runs_as_it_is(
    error: type[RuntimeError], tiny: Tiny, decoders: Callable[..., tuple[Decoder, Decoder]]
) -> None:
    class Full(Recording):
        def _record(self, step: Callable[..., Tensor], pool: Any) -> Callable[[], Tensor]:
            raise error("not this")

    _, plain = decoders("ngram")
    decoder = Decoder(ModelView(tiny("llama")), NgramDrafter(3), CapturedSteps(CompiledSteps(False), Full), Stats())
    with pytest.warns(UserWarning, match="could not record another CUDA graph"):
        texts = _texts(decoder, [5, 3], _law(None), 12, NO_EOS, 0)
    assert texts == _texts(plain, [5, 3], _law(None), 12, NO_EOS, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert _texts(decoder, [5, 3], _law(None), 12, NO_EOS, 0) == texts


def test_a_long_text_moves_no_buffer(decoders: Callable[..., tuple[Decoder, Decoder]]) -> None:
    """Drafts that are hardly ever accepted: what they might have come to is no reason to make room."""
    recorded, plain = decoders("model")
    text = _texts(recorded, [5], _law(None), 240, NO_EOS, 0)
    assert recorded.target.cache.generation == 1
    assert text == _texts(plain, [5], _law(None), 240, NO_EOS, 0)


def test_what_can_not_be_compiled_runs_as_it_is(tiny: Tiny, decoders: Callable[..., tuple[Decoder, Decoder]]) -> None:
    class Asking(NgramDrafter):
        """Reads a number on the host, so that its step does not trace."""

        def draft(self, state: Any, law: SamplingLaw, live: Tensor, depth: int) -> Any:
            assert state.lengths.sum().item() > 0
            return super().draft(state, law, live, depth)

    _, plain = decoders("ngram")
    decoder = Decoder(ModelView(tiny("llama")), Asking(3), CompiledSteps(True), Stats())
    with pytest.warns(UserWarning, match="could not compile a step"):
        texts = _texts(decoder, [5, 3], _law(None), 12, NO_EOS, 0)
    assert texts == _texts(plain, [5, 3], _law(None), 12, NO_EOS, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert _texts(decoder, [5, 3], _law(None), 12, NO_EOS, 0) == texts


def test_where_layers_cannot_be_regions_each_compiles_by_itself(
    tiny: Tiny, decoders: Callable[..., tuple[Decoder, Decoder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with torch 2.14, whose Dynamo fails with an AssertionError of its own; and later steps know it."""
    refused = []

    def refuse(forward: Callable[..., Any]) -> Callable[..., Any]:
        def region(*args: Any, **kwargs: Any) -> Any:
            refused.append(1)
            raise AssertionError("Freevar has no source")

        return torch._dynamo.disable(region)

    _, plain = decoders("ngram")
    monkeypatch.setattr(torch.compiler, "nested_compile_region", refuse)
    monkeypatch.setattr(compiled, "_has_regions", True)
    stats = Stats()
    decoder = Decoder(ModelView(tiny("llama")), NgramDrafter(3), CompiledSteps(True), stats, adapt=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpecdecWarning)
        texts = _texts(decoder, [5], _law(None), 12, NO_EOS, 0)
    assert texts == _texts(plain, [5], _law(None), 12, NO_EOS, 0)
    assert not compiled._has_regions
    assert not refused  # nothing ran before it was compiled


def test_a_law_given_again_is_still_itself(decoders: Callable[..., tuple[Decoder, Decoder]]) -> None:
    """A recording takes over the numbers of every law it is given, but not into the first law's own tensors."""
    recorded, plain = decoders("ngram")
    cold, hot = _law(0.2), _law(3.0)
    for law in (cold, hot, cold):
        expected = _texts(plain, [5, 3], law, 16, NO_EOS, 0)
        assert _texts(recorded, [5, 3], law, 16, NO_EOS, 0) == expected


class LateTensor:
    """A tensor of a device that reads what it is sent later."""

    dtype, is_cuda = torch.int64, False

    def __init__(self) -> None:
        self.on_the_way: list[Tensor] = []

    def copy_(self, source: Tensor, non_blocking: bool = False) -> None:
        assert non_blocking
        self.on_the_way.append(source)


def test_what_is_sent_is_what_arrives_however_late() -> None:
    tensor: Any = LateTensor()
    upload = Upload(tensor)
    given = [[1, 2], [3, 4], [3, 4], [1, 2]]
    numbers = [0, 0]
    for numbers[:] in given:  # one list, written to again
        upload.send(numbers)
    assert [source.tolist() for source in tensor.on_the_way] == [[1, 2], [3, 4], [1, 2]]


def test_what_has_not_changed_is_not_sent() -> None:
    tensor = torch.zeros(2, dtype=torch.int64)
    upload = Upload(tensor)
    upload.send([1, 2])
    assert tensor.tolist() == [1, 2]
    tensor.zero_()
    upload.send([1, 2])
    assert tensor.tolist() == [0, 0]
    upload.send([1, 3])
    assert tensor.tolist() == [1, 3]


def test_what_compiles_again_is_not_decoding() -> None:
    class Doubling:
        def run(self, x: Tensor) -> Tensor:
            return 2 * x

    steps, run = CompiledSteps(True), Doubling().run
    found = []
    for x in (torch.ones(3), torch.ones(3), torch.ones(3, dtype=torch.float64), torch.ones(3)):
        assert torch.equal(steps.get(run, "run", 3)(x), 2 * x)
        found.append(steps.was_compiling)
    assert found == [True, False, True, False]
