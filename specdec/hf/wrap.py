"""A model whose `generate()` is ours: an object of a subclass of its class, over the very same attributes.

What calls come to is decided by the handle at its `specdec` (see `specdec.calls`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial, wraps
from types import MemberDescriptorType
from typing import Any, Protocol

from torch import nn

from specdec.errors import Unsupported
from specdec.hf.names import PreTrainedModel


class Calls(Protocol):
    """What a wrapping asks what to do."""

    def count(self, call: Callable[[], Any]) -> Any:
        """Of what the user has called, which may come to a loop."""

    def sample(self, loop: partial[Any]) -> Any:
        """Of transformers' sampling loop, with its arguments."""

    def assisted(self, loop: partial[Any]) -> Any:
        """Of the loop that drafts, likewise."""

    def beams(self, loop: partial[Any]) -> Any:
        """Of the loop that searches with beams, likewise."""

    def fall_back(self, why: Unsupported, loop: Callable[[], Any]) -> Any:
        """Of a loop that is never ours."""


class Handle(Protocol):
    """What hangs at `model.specdec`."""

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def _calls(self) -> Calls: ...


def wrap(handle: Handle) -> PreTrainedModel:
    """The user's model as an object of a subclass, with this handle. All else it holds is one and the same: what is set
    on one of the two, a mode or a configuration, is set on both."""
    kind: Any = type(handle.model)
    wrapped = object.__new__(_subclass(kind))
    wrapped.__dict__ = handle.model.__dict__
    object.__setattr__(wrapped, "specdec", handle)
    return wrapped


def within_adapters(model: Any) -> Any:
    """The transformers model in a PEFT model, whose layers hold the adapters; any other model itself."""
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def unwrapped(draft: Any) -> Any:
    """What drafts: the model in a PEFT model or in a wrapping of ours, or whatever else this is."""
    draft = within_adapters(draft)
    return draft.specdec.model if any(map(_is_wrapping, type(draft).__mro__)) else draft


def with_replaced(module: Any, old: nn.Module, new: nn.Module) -> Any:
    """A module with another one in place of one in it: a copy, as of all that hold it, and of nothing else."""
    if module is old:
        return new
    if old not in module.modules():
        return module
    twin = copy.copy(module)
    twin._modules = {name: with_replaced(child, old, new) for name, child in module._modules.items()}
    return twin


def _is_wrapping(kind: type) -> bool:
    return isinstance(vars(kind).get("specdec"), MemberDescriptorType)


def _subclass(parent: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of a model class whose decoding loops are ours; `generate()` looks loops up on the class. Python knows
    those that live: there is one for as long as a model is wrapped in it."""
    return next(filter(_is_wrapping, parent.__subclasses__()), None) or _made(parent)


def _made(parent: type[PreTrainedModel]) -> type[PreTrainedModel]:
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.specdec._calls.sample(partial(parent._sample, self, *args, **kwargs))

    def _assisted_decoding(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.specdec._calls.assisted(partial(parent._assisted_decoding, self, *args, **kwargs))

    def _beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.specdec._calls.beams(partial(parent._beam_search, self, *args, **kwargs))

    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        loop = partial(parent.init_continuous_batching, self, *args, **kwargs)
        return self.specdec._calls.fall_back(Unsupported("continuous batching"), loop)

    def counted(name: str) -> Any:
        method = getattr(parent, name)

        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.specdec._calls.count(partial(method, self, *args, **kwargs))

        return call

    def __reduce__(self: Any) -> Any:
        return wrap, (self.specdec,)

    methods = {
        "_sample": _sample, "_assisted_decoding": _assisted_decoding, "_beam_search": _beam_search,
        "init_continuous_batching": init_continuous_batching, "__reduce__": __reduce__,
        **{name: counted(name) for name in ("generate", "generate_batch") if hasattr(parent, name)},
    }  # fmt: skip
    loaders = {"from_pretrained": parent.from_pretrained}  # what is loaded is nobody's wrapping yet
    slots = {"__slots__": ("specdec",)}  # what the model holds is the model's own
    labels = {"__module__": parent.__module__, "__qualname__": parent.__qualname__, "__doc__": parent.__doc__}
    return type(parent.__name__, (parent,), {**slots, **methods, **loaders, **labels})
