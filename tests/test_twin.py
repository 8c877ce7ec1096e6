"""What hangs on a model and is neither module nor weight: shared, looked at, and never silently out of date."""

from __future__ import annotations

import enum
import functools
import socket
import sys
import threading
import tracemalloc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel

import specdec
from specdec.hf import proof, twin
from specdec.hf.twin import Look
from specdec.hf.view import ModelView


class Strength(enum.Enum):
    LITTLE, MUCH = 0.5, 3.0


@dataclass
class Steering:
    """As activation steering has it: how much, and along what."""

    scale: float
    along: Any = None
    is_last = False


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


SCALE = 0.5
STEERING = {"scale": [0.5]}


def steer(x: Tensor, by: Any) -> Tensor:
    """Anything that may be on a module says by how much."""
    if isinstance(by, Steering):
        return steer(x, by.scale if by.along is None else by.along)
    if isinstance(by, SimpleNamespace | Slotted):
        return steer(x, by.scale)
    if isinstance(by, Strength):
        return x * by.value
    if isinstance(by, dict | list):
        return steer(x, by["scale"] if isinstance(by, dict) else by[-1])
    return by(x) if callable(by) else x * torch.as_tensor(by, dtype=x.dtype)


class Steered(nn.Module):
    """Does to an activation what it has been told."""

    def __init__(self, by: Any, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.by = inner, by

    def forward(self, x: Tensor) -> Tensor:
        return steer(self.inner(x), self.by)


def _steered(model: PreTrainedModel, by: Any) -> list[Steered]:
    steered = []
    for layer in model.model.layers:
        layer.mlp = Steered(by, layer.mlp)
        steered.append(layer.mlp)
    return steered


def _closure() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    scale = 0.5

    def by(x: Tensor) -> Tensor:
        return x * scale

    def change() -> None:
        nonlocal scale
        scale = 3.0

    return by, change


class _Scaled(nn.Module):
    """As quantised code hangs scales on weights."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor
        tensor.scale = 0.5  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.tensor * self.tensor.scale)  # type: ignore[attr-defined]


def _scale_the_tensor(by: _Scaled) -> None:
    by.tensor.scale = 3.0  # type: ignore[attr-defined]


class _Pointing:
    def __init__(self, held: Any) -> None:
        self.pointer, ALIVE[:] = weakref.ref(held), [held]

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.pointer().scale


class Making(type):
    scale = 0.5


class Made(metaclass=Making):
    def __new__(cls, x: Tensor) -> Tensor:  # type: ignore[misc]
        return x * cls.scale


ALIVE: list[Any] = []


def _fill(tensor: Tensor) -> None:
    tensor.fill_(3.0)


BY_FUNCTION, CHANGE_FUNCTION = _closure()
# What is on the modules, and how it changes: put in the place of it, or in place.
REPLACED = {
    "tensor": lambda: (torch.tensor(0.5), torch.tensor(3.0)),
    "dataclass": lambda: (Steering(0.5), Steering(3.0)),
    "namespace": lambda: (SimpleNamespace(scale=0.5), SimpleNamespace(scale=3.0)),
    "enum": lambda: (Strength.LITTLE, Strength.MUCH),
    "NumPy number": lambda: (np.float32(0.5), np.float32(3.0)),
    "NumPy array": lambda: (np.full(1, 0.5), np.full(1, 3.0)),
}
IN_PLACE: dict[str, Callable[[], tuple[Any, Callable[[Any], Any]]]] = {
    "tensor": lambda: (torch.tensor(0.5), _fill),
    "tensor in a dataclass": lambda: (Steering(1.0, torch.tensor(0.5)), lambda by: _fill(by.along)),
    "dataclass": lambda: (Steering(0.5), lambda by: setattr(by, "scale", 3.0)),
    "namespace": lambda: (SimpleNamespace(scale=0.5), lambda by: setattr(by, "scale", 3.0)),
    "slots": lambda: (Slotted(0.5), lambda by: setattr(by, "scale", 3.0)),
    "NumPy array": lambda: (np.full(1, 0.5), lambda by: by.fill(3.0)),
    "list in a dict": lambda: ({"scale": [0.5]}, lambda by: by["scale"].append(3.0)),
    "closure": lambda: (BY_FUNCTION, lambda by: CHANGE_FUNCTION()),
    "attribute of a tensor": lambda: (_Scaled(torch.ones(())), _scale_the_tensor),
    "attribute of a weight": lambda: (
        _Scaled(nn.Parameter(torch.ones(()))),
        lambda by: setattr(by.tensor, "scale", 3.0),
    ),
    "behind a weak reference": lambda: (_Pointing(Steering(0.5)), lambda by: setattr(by.pointer(), "scale", 3.0)),
    "attribute of a metaclass": lambda: (Made, lambda by: setattr(Making, "scale", 3.0)),
}


def _changes(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts, change: Callable[[], Any]) -> None:
    """A change is seen by the next call, and nothing else makes the decoder anew."""
    inputs = prompts(RAGGED)
    before = same(wrapped, model, **inputs, max_new_tokens=8)
    decoder = wrapped.specdec._decoders.get("ngram")
    same(wrapped, model, **inputs, max_new_tokens=8)
    assert wrapped.specdec._decoders.get("ngram") is decoder
    change()
    assert not torch.equal(same(wrapped, model, **inputs, max_new_tokens=8), before)
    assert wrapped.specdec._decoders.get("ngram") is not decoder  # so it has been proved again


@pytest.mark.parametrize("what", REPLACED)
def test_what_hangs_on_a_module_is_replaced(what: str, fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama")
    old, new = REPLACED[what]()
    modules = _steered(model, old)
    _changes(wrap(model), model, prompts, lambda: [setattr(module, "by", new) for module in modules])


@pytest.mark.parametrize("what", IN_PLACE)
def test_what_hangs_on_a_module_changes_in_place(what: str, fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama")
    by, change = IN_PLACE[what]()
    _steered(model, by)
    _changes(wrap(model), model, prompts, lambda: change(by))


def _by_the_last(x: Tensor, by: Any) -> Tensor:
    """Right for one text; in a ragged batch the last token is one text's only."""
    out = x.clone()
    out[..., -1, :] *= by
    return out


@pytest.mark.parametrize("what", ["tensor", "dataclass", "global", "class"])
def test_what_no_longer_runs_raggedly_is_found_out(
    what: str, fresh: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steering of the last token alone, which does nothing until it is turned on."""
    model, inputs = fresh("llama"), prompts(RAGGED)
    tensor, steering = torch.tensor(1.0), Steering(1.0)
    monkeypatch.setattr(Steering, "along", 1.0)
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    by = {
        "tensor": lambda x: _by_the_last(x, tensor),
        "dataclass": lambda x: _by_the_last(x, steering.scale),
        "global": lambda x: _by_the_last(x, SCALE),
        "class": lambda x: _by_the_last(x, Steering.along),
    }[what]
    _steered(model, by)
    wrapped = wrap(model)
    before = same(wrapped, model, **inputs, max_new_tokens=8)
    tensor.fill_(3.0)
    steering.scale = 3.0
    monkeypatch.setattr(Steering, "along", 3.0)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    expected = model.generate(**inputs, max_new_tokens=8)
    assert not torch.equal(expected, before)
    with pytest.warns(UserWarning, match="not the model's own"):
        assert torch.equal(wrapped.generate(**inputs, max_new_tokens=8), expected)


class Strong:
    factor = 1.0


class Read(nn.Module):
    """Multiplies by numbers that it finds in a global, in a global dictionary's list, on a class and in a table."""

    def __init__(self, inner: nn.Module, table: list[float]) -> None:
        super().__init__()
        self.inner, self.table = inner, table

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (SCALE * STEERING["scale"][0] * Strong.factor * self.table[-1])


def test_what_compiled_steps_have_read(fresh: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager code reads it each time, compiled code has read it once."""
    model, inputs = fresh("llama", num_hidden_layers=1), {**prompts([6]), "max_new_tokens": 5}
    table = [1.0] * (twin.LARGE + 1)
    model.model.layers[0].mlp = Read(model.model.layers[0].mlp, table)
    wrapped = specdec.compile(model, draft=None)
    before = same(wrapped, model, **inputs)
    decoder = wrapped.specdec._decoders.get(None)
    same(wrapped, model, **inputs)
    assert wrapped.specdec._decoders.get(None) is decoder
    holders: list[tuple[Any, Any]] = [(table, -1), (STEERING["scale"], 0), (globals(), "SCALE")]
    for holder, key in holders:
        value, holder[key] = holder[key], 3.0
        assert not decoder.steps.is_current
        holder[key] = value
        assert decoder.steps.is_current
    with monkeypatch.context() as patch:
        patch.setattr(Strong, "factor", 3.0)  # which older Dynamos do not guard, and a look sees
        assert not decoder.target.is_current
    table[-1] = -9.0  # too large to be looked into: nobody but the steps knows
    assert not torch.equal(same(wrapped, model, **inputs), before)


def test_what_is_set_on_the_wrapped_model_or_the_original(fresh: Tiny, prompts: Prompts) -> None:
    """Their attributes are one and the same, as their modules are."""

    class Louder(LlamaForCausalLM):
        loud = 1.0

        def forward(self, input_ids: Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
            out = super().forward(input_ids, position_ids=position_ids, **kwargs)
            out.logits = out.logits * self.loud
            return out

    model, inputs = fresh("llama"), prompts(RAGGED)
    model.__class__ = Louder
    wrapped = wrap(model)
    wrapped.note = "mine"
    before = same(wrapped, model, **inputs, max_new_tokens=8)
    wrapped.loud = -1.0
    assert not torch.equal(same(wrapped, model, **inputs, max_new_tokens=8), before)
    del model.loud
    assert torch.equal(same(wrapped, model, **inputs, max_new_tokens=8), before)


@pytest.mark.parametrize("where", ["list", "attribute", "tensor", "global"])
def test_a_forward_that_writes_beside_its_modules(
    where: str, fresh: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy would write there what it makes of drafts."""
    model, inputs, written = fresh("llama"), prompts(RAGGED), Steering(0.0, torch.zeros(()))
    monkeypatch.setattr(Strong, "factor", 0)
    log: list[int] = []

    def record(x: Tensor) -> Tensor:
        if where == "list":
            log.append(x.shape[0])
        elif where == "attribute":
            written.scale += 1
        elif where == "tensor":
            written.along.add_(1)
        else:
            Strong.factor += 1
        return x

    _steered(model, record)
    wrapped = wrap(model)
    expected = model.generate(**inputs, max_new_tokens=8)
    with pytest.warns(UserWarning, match="transformers' own loop: a forward that writes to"):
        assert torch.equal(wrapped.generate(**inputs, max_new_tokens=8), expected)
    assert set(log) <= {1, len(RAGGED)}  # no forward of flat rows


# Methods of transformers' loop.

HOOKS = [
    "prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prepare_cache_for_generation", "_sample",
    "_prefill", "_has_unfinished_sequences",
]  # fmt: skip


@pytest.mark.parametrize(
    ("where", "name"),
    [
        *product(["subclass", "transformers' class"], HOOKS),
        *(("instance", name) for name in HOOKS if name != "_sample"),  # which transformers takes from the class
    ],
)
def test_methods_of_transformers_loop_are_called(
    where: str, name: str, fresh: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that look like transformers' own."""
    calls: list[str] = []
    original = getattr(GenerationMixin, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(self, *args, **kwargs)

    model, inputs = fresh("llama"), {**prompts(RAGGED), "max_new_tokens": 4}
    if where == "subclass":
        model.__class__ = type("Mine", (LlamaForCausalLM,), {name: method})
    elif where == "instance":
        vars(model)[name] = MethodType(method, model)
    else:
        monkeypatch.setattr(GenerationMixin, name, method)
    wrapped, expected = wrap(model), model.generate(**inputs)
    n_calls = len(calls)
    with pytest.warns(UserWarning, match=f"transformers' own loop: a model with a {name} of its own"):
        assert torch.equal(wrapped.generate(**inputs), expected)
    assert len(calls) == 2 * n_calls > 0


def test_transformers_own_families_may_have_theirs(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("phi3")
    assert "prepare_inputs_for_generation" in vars(type(model))
    same(wrap(model), model, **prompts(RAGGED), max_new_tokens=4)


def test_hooks_of_all_modules_fall_back(fresh: Tiny, prompts: Prompts) -> None:
    model, inputs = fresh("llama"), {**prompts(RAGGED), "max_new_tokens": 4}
    wrapped = wrap(model)
    plain = same(wrapped, model, **inputs)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: -out if isinstance(module, nn.SiLU | nn.Linear) else None
    )
    try:
        with pytest.warns(UserWarning, match="a forward hook"):
            assert not torch.equal(wrapped.generate(**inputs), plain)
    finally:
        hook.remove()


# What cannot be copied, or should not be.


@pytest.mark.parametrize("where", ["model", "layer", "config", "draft", "draft's config"])
def test_what_cannot_be_copied_is_shared(where: str, fresh: Tiny, prompts: Prompts, tmp_path: Path) -> None:
    model, draft = fresh("llama"), fresh("llama", seed=7)
    holder = {"model": model, "layer": model.model.layers[1].mlp, "draft": draft}.get(where)
    config = {"config": model.config, "draft's config": draft.config}.get(where)
    wrapped, inputs = wrap(model, draft), {**prompts(RAGGED), "max_new_tokens": 6}
    expected = model.generate(**inputs)
    with (tmp_path / "log").open("w") as file, socket.socket() as sock:
        things = [threading.Lock(), threading.Thread(), torch.Generator(), file, sock, iter([1]), Holder(file)]
        for i, thing in enumerate(things):
            setattr(holder or config, f"thing_{i}", thing)
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="specdec")
                # transformers copies configurations for what it writes down
                assert torch.equal(wrapped.generate(**inputs), expected)
        assert sum(wrapped.specdec.stats.proposed) > 0
        view = wrapped.specdec._decoders.get(draft).target
        if where == "model":
            assert [getattr(view.module, f"thing_{i}") is thing for i, thing in enumerate(things)] == [True] * 7


class Holder:
    """Of something, and not to be copied."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a Holder is not to be copied")


def test_what_is_large_is_not_duplicated(fresh: Tiny) -> None:
    model = fresh("llama")
    model.notes = [0] * 2**22
    model.model.layers[0].table = {"rows": [bytearray(2**22) for _ in range(4)]}
    tracemalloc.start()
    try:
        view = ModelView(model)
        assert view.is_current
        assert tracemalloc.get_traced_memory()[1] < 2**24  # half of it, with all that is imported meanwhile
    finally:
        tracemalloc.stop()
    assert view.module.notes is model.notes


def test_what_leads_back_to_the_model_is_private(fresh: Tiny) -> None:
    model, notes = fresh("llama"), ["a note"]
    model.helper = Steering(1.0, {"to": [model.model.layers[0], notes]})
    model.model.layers[1].settings = SimpleNamespace(config=model.config)
    model.beside = [nn.Linear(2, 2)]
    copied = Look(model).twin(model)
    assert copied.helper is not model.helper
    assert copied.helper.along["to"][0] is copied.model.layers[0] is not model.model.layers[0]
    assert copied.helper.along["to"][1] is notes
    assert copied.model.layers[1].settings.config is copied.config is not model.config
    assert copied.beside[0] is not model.beside[0]
    assert copied.beside[0].weight is model.beside[0].weight
    assert all(a is b for a, b in zip(copied.parameters(), model.parameters(), strict=True))


def test_a_model_that_cannot_be_copied_falls_back(fresh: Tiny, prompts: Prompts) -> None:
    model, inputs = fresh("llama"), {**prompts(RAGGED), "max_new_tokens": 4}
    model.holder = Holder(model.model)
    with pytest.warns(UserWarning, match="modules that cannot be copied: a Holder is not to be copied"):
        assert torch.equal(wrap(model).generate(**inputs), model.generate(**inputs))


@pytest.mark.parametrize("how", ["generate", "generate_many", "assistant_model"])
def test_a_draft_that_cannot_be_prepared_is_done_without(how: str, fresh: Tiny, prompts: Prompts) -> None:
    """Until it can be."""
    model, draft, inputs = fresh("llama"), fresh("llama", seed=7), {**prompts([6]), "max_new_tokens": 6}
    draft.holder = Holder(draft.model)
    wrapped = wrap(model, None if how == "assistant_model" else draft)
    expected = model.generate(**inputs)

    def run() -> Tensor:
        if how == "generate_many":
            (result,) = specdec.generate_many(wrapped, [inputs["input_ids"][0]], max_new_tokens=6)
            return result.tokens[None]
        return wrapped.generate(**inputs, **({"assistant_model": draft} if how == "assistant_model" else {}))

    with pytest.warns(UserWarning, match="specdec decodes without the draft: modules that cannot be copied"):
        assert torch.equal(run(), expected)
    stats = wrapped.specdec.stats
    assert (stats.tokens, sum(stats.proposed), dict(stats.fallbacks)) == (6, 0, {})
    assert [*stats.dropped_drafts] == [*stats.to_dict()["dropped_drafts"]] == ["modules that cannot be copied"]
    assert "decoded without the draft" in str(stats)
    del draft.holder
    assert torch.equal(run(), expected)
    assert sum(stats.proposed) > 0


def test_a_draft_whose_preparation_breaks(fresh: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = fresh("llama"), {**prompts([6]), "max_new_tokens": 6}
    wrapped, expected = wrap(model, fresh("llama", seed=7)), model.generate(**inputs)

    def breaks(error: Exception) -> Callable[..., None]:
        def view(*_: Any) -> None:
            raise error

        return view

    monkeypatch.setattr("specdec.drafters.registry.ModelView", breaks(RuntimeError("no draft today")))
    with pytest.warns(UserWarning, match="without the draft: RuntimeError: no draft today"):
        assert torch.equal(wrapped.generate(**inputs), expected)
    assert dict(wrapped.specdec.stats.dropped_drafts) == {"RuntimeError": 1}
    monkeypatch.setattr("specdec.drafters.registry.ModelView", breaks(torch.OutOfMemoryError()))
    with pytest.warns(UserWarning, match="transformers' own loop: out of memory"):
        assert torch.equal(wrapped.generate(**inputs), expected)


def test_settings_of_torch_are_looked_at(model: PreTrainedModel) -> None:
    look = Look(model)
    assert Look(model).seen == look.seen
    torch.set_default_dtype(torch.float64)
    try:
        assert Look(model).seen != look.seen
    finally:
        torch.set_default_dtype(torch.float32)


def test_tensors_that_nobody_counts_changes_of_fall_back(fresh: Tiny, prompts: Prompts) -> None:
    model, inputs = fresh("llama"), {**prompts(RAGGED), "max_new_tokens": 4}
    with torch.inference_mode():
        _steered(model, torch.tensor(0.5))[0].by = torch.tensor(0.5)
    with pytest.warns(UserWarning, match="made in inference mode"):
        assert torch.equal(wrap(model).generate(**inputs), model.generate(**inputs))


class Asking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if "a_module" in sys.modules else nn.functional.silu(x)


def test_what_the_interpreter_holds_is_not_the_models(fresh: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    model.model.layers[0].mlp.act_fn = Asking()
    before = Look(model)
    monkeypatch.setitem(sys.modules, "a_module", sys)
    assert Look(model).seen == before.seen


# What libraries' functions read.


def test_torchs_functions_are_replaced(fresh: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    silu = nn.functional.silu
    _changes(wrap(model), model, prompts, lambda: monkeypatch.setattr(nn.functional, "silu", lambda x: -silu(x)))


def test_attention_in_torchs_place_is_not_ours(fresh: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = fresh("llama"), {**prompts(RAGGED), "max_new_tokens": 8}
    wrapped, attend = wrap(model), nn.functional.scaled_dot_product_attention
    before = same(wrapped, model, **inputs)

    def own(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attend(-q, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", own)
        expected = model.generate(**inputs)
        assert not torch.equal(expected, before)
        with pytest.warns(UserWarning, match=r"attention by a function that is not transformers' own.*own"):
            assert torch.equal(wrapped.generate(**inputs), expected)
    same(wrapped, model, **inputs)  # and decodes again


# What a forward writes.


class Observer(nn.Module):
    """As quantisation calibrates itself: the largest activation decides the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("most", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.most.copy_(torch.maximum(self.most, x.abs().max()))
        return (x / (self.most / 7)).round() * (self.most / 7)


def test_what_observes_activations_sees_no_random_texts(fresh: Tiny, prompts: Prompts) -> None:
    observing = [fresh("llama") for _ in "ab"]
    for model in observing:
        _steered(model, Observer())
    plain, model = observing
    wrapped, inputs = wrap(model), {**prompts(RAGGED), "max_new_tokens": 8}
    with pytest.warns(UserWarning, match="a forward that writes to Observer.most"):
        out = wrapped.generate(**inputs)
    assert torch.equal(out, plain.generate(**inputs))
    assert torch.equal(model.model.layers[0].mlp.by.most, plain.model.layers[0].mlp.by.most)


TABLES: dict[int, Tensor] = {}


@pytest.mark.parametrize("by", ["nothing", "length"])
def test_a_table_that_is_filled_in_a_forward(
    by: str, fresh: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once and for all, which is no reason to refuse; or for each length, which is, once and for all."""
    TABLES.clear()

    def fill(x: Tensor) -> Tensor:
        key = x.shape[1] if by == "length" else 0
        if key not in TABLES:
            TABLES[key] = torch.full((), 0.5)
        return x * TABLES[key]

    model, runs = fresh("llama"), []
    run = proof.run_plainly
    monkeypatch.setattr(proof, "run_plainly", lambda *given: (runs.append(1), run(*given))[1])
    _steered(model, fill)
    wrapped, inputs = wrap(model), {**prompts(RAGGED), "max_new_tokens": 8}
    if by == "nothing":
        same(wrapped, model, **inputs)
        same(wrapped, model, **inputs)
    else:
        with pytest.warns(UserWarning, match="a forward that writes to test_twin.TABLES"):
            wrapped.generate(**inputs)
        n_runs = len(runs)
        wrapped.generate(**prompts([17]), max_new_tokens=8)  # writes again
        assert len(runs) == n_runs == 2


@pytest.mark.parametrize("what", ["sparse", "a user's class"])
def test_what_cannot_be_looked_at_is_named(what: str, fresh: Tiny, prompts: Prompts) -> None:
    class Refusing(list):
        def __len__(self) -> int:
            raise RuntimeError("do not ask")

    model, inputs = fresh("llama"), {**prompts(RAGGED), "max_new_tokens": 4}
    model.note = torch.eye(4).to_sparse() if what == "sparse" else Refusing()
    with pytest.warns(UserWarning, match="on the model that cannot be looked at"):
        assert torch.equal(wrap(model).generate(**inputs), model.generate(**inputs))


def test_copying_is_no_writing(fresh: Tiny, prompts: Prompts) -> None:
    """Python notes on a class what to copy of its objects."""

    class Controller:
        def __init__(self, module: nn.Module) -> None:
            self.module = module

    model = fresh("llama")
    model.controller = Controller(model.model.layers[0])
    same(wrap(model), model, **prompts(RAGGED), max_new_tokens=4)
