"""The class of a wrapped model: its own, with decoding loops that ask `specdec.handle` first."""

from __future__ import annotations

from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any

from specdec.drafters.registry import check_draft
from specdec.errors import Unsupported
from specdec.hf import names
from specdec.hf.assisted import draft_of_call
from specdec.hf.names import PreTrainedModel

if TYPE_CHECKING:
    from specdec.handle import Handle


def wrapping(handle: Handle) -> PreTrainedModel:
    """The handle's model as an object of a subclass of its own class, with this handle. All else it holds is one and
    the same: what is set on one of the two, a mode or a configuration, is set on both."""
    kind: Any = type(handle.model)
    wrapped = object.__new__(_subclass(kind))
    wrapped.__dict__ = handle.model.__dict__
    object.__setattr__(wrapped, "specdec", handle)
    return wrapped


@cache
def _subclass(parent: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of a model class whose decoding loops are ours; `generate()` looks loops up on the class."""

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        parents_loop = partial(parent._sample, self, *args, **kwargs)
        try:
            names.check()
            call = names.LoopCall.read(parent._sample, self, *args, **kwargs)
        except Unsupported as why:
            return self.specdec.fall_back(why, parents_loop)
        return self.specdec.generate(parents_loop, call)

    def _assisted_decoding(self: Any, *args: Any, **kwargs: Any) -> Any:
        parents_loop = partial(parent._assisted_decoding, self, *args, **kwargs)
        try:
            names.check()
            call = names.LoopCall.read(parent._assisted_decoding, self, *args, **kwargs)
            draft, config = draft_of_call(call, self.specdec)
            check_draft(draft, self.specdec.model, config)
        except (Unsupported, TypeError, ValueError) as error:
            return self.specdec.fall_back(Unsupported.of(error, "a draft that does not fit"), parents_loop)
        return self.specdec.generate(parents_loop, call, draft, config)

    def _beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.specdec.fall_back(Unsupported("beams"), partial(parent._beam_search, self, *args, **kwargs))

    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        why = Unsupported("continuous batching")
        return self.specdec.fall_back(why, partial(parent.init_continuous_batching, self, *args, **kwargs))

    def counted(name: str) -> Any:
        method = getattr(parent, name)

        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            otherwise = Unsupported("a way to decode that is none of transformers' own loops")
            return self.specdec.count(partial(method, self, *args, **kwargs), otherwise)

        return call

    def __reduce__(self: Any) -> Any:
        return wrapping, (self.specdec,)

    methods = {
        "_sample": _sample, "_assisted_decoding": _assisted_decoding, "_beam_search": _beam_search,
        "init_continuous_batching": init_continuous_batching, "__reduce__": __reduce__,
        **{name: counted(name) for name in ("generate", "generate_batch") if hasattr(parent, name)},
    }  # fmt: skip
    loaders = {"from_pretrained": parent.from_pretrained}  # what is loaded is nobody's wrapping yet
    slots = {"__slots__": ("specdec",)}  # what the model holds is the model's own
    labels = {"__module__": parent.__module__, "__qualname__": parent.__qualname__, "__doc__": parent.__doc__}
    return type(parent.__name__, (parent,), {**slots, **methods, **loaders, **labels})
