"""A private copy of a model's modules, and a look at all that it was made from.

Copied are modules and configurations, and what leads to one of them. All else is shared, however large, and whether or
not it could be copied: a forward reads the user's own. That may change at any time, while compiled steps have read it
already, and a forward that was proved to run raggedly may do something else by now. So two looks are compared.
"""

from __future__ import annotations

import copy
import sys
import types
import weakref
from argparse import Namespace
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from enum import Enum
from functools import lru_cache, partial
from itertools import chain
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from specdec.errors import Unsupported
from specdec.hf import ambient, names

LARGE, LARGE_BYTES = 2**12, 2**20
"""Elements of a container, and bytes of an array, beyond which it is not looked into at every call."""

_ATOMS = {bool, int, str, bytes, complex, type(None), type(...), range, torch.dtype, torch.device, torch.Size}
_SEQUENCES = list, tuple, set, frozenset, deque
_ARRAYS = np.ndarray, np.generic, bytearray, array
_CODE = type, types.FunctionType, types.MethodType, types.ModuleType, property, staticmethod, classmethod, partial
_SETTINGS = types.SimpleNamespace, Namespace  # the standard library's holders of what is others'
_LIBRARIES = {
    *sys.stdlib_module_names, "torch", "numpy", "transformers", "specdec", "accelerate", "huggingface_hub",
    "safetensors", "tokenizers", "tqdm",
}  # fmt: skip
_COMPILERS = "_dynamo_"
"""What a compiler notes on a tensor, whoever compiles, begins like this."""
_OF_ANY_MODULE = vars(nn.Module()).keys() - {"training"} | names.NOT_OF_FORWARDS
_OF_ANY_CLASS = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "_abc_impl", "__slotnames__"}
_ROUTED = "transformers.models.", "transformers.integrations.", "transformers.activations", "torch.nn.modules."
"""Libraries' functions whose globals are looked at: users put their own in the place of `F.silu`, or of attention."""


def trait(tensor: Tensor) -> tuple[object, ...]:
    """What compiled and recorded steps rely on: they know a weight's shape, or even its address."""
    return tensor.dtype, tensor.device, tensor.shape, tensor.data_ptr()


class Look:
    """What a forward of a model can read, object by object.

    Values count, and which objects there are; of the weights shapes and addresses, of other tensors how often they were
    written to. A library's own objects, a lock or a file or a logger, count by which they are.

    Attributes:
        seen: what there is to see of each object, by its id. Compared with another look's while this one lives, which
            holds the objects.

    Raises:
        Unsupported: there is something whose changes cannot be seen.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        weights = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        self._writes = {key: 0 if tensor.is_inference() else tensor._version for key, tensor in weights.items()}
        self._objects: dict[int, Any] = {id(model): model}
        self.seen: dict[int, tuple[object, ...]] = {0: ambient.settings()}
        self._todo: list[Any] = [model]
        while self._todo:
            value = self._todo.pop()
            try:
                own = self._tensor(value) if isinstance(value, Tensor) else ()
                self.seen[id(value)] = *own, *self._tokens(_fields(value))
            except Unsupported:
                raise
            except Exception as error:  # a tensor without memory of its own, or a user's class
                kind = type(value).__qualname__
                raise Unsupported(f"a {kind} on the model that cannot be looked at", str(error)) from None

    def _tensor(self, tensor: Tensor) -> tuple[object, ...]:
        if id(tensor) in self._writes:
            return trait(tensor)
        if tensor.is_inference():
            raise Unsupported("a tensor on the model that was made in inference mode, where nobody counts changes")
        return *trait(tensor), tensor._version

    def _tokens(self, fields: Iterable[Any]) -> tuple[object, ...]:
        tokens: list[object] = []
        for value in fields:
            kind = type(value)
            if kind in _ATOMS:
                tokens += kind, value  # True is another setting than 1
            elif kind is float:
                tokens.append(value.hex())  # and 0.0 than -0.0
            else:
                tokens.append(id(value))
                if id(value) not in self._objects:
                    self._objects[id(value)] = value
                    self._todo.append(value)
        return tuple(tokens)

    def _private(self) -> set[int]:
        """The ids of modules, configurations, and all that leads to one of them."""
        parents: dict[int, list[int]] = {}
        for key, value in self._objects.items():
            if not isinstance(value, Tensor | type | types.FunctionType):  # which no copy goes into
                for part in map(id, _fields(value)):
                    parents.setdefault(part, []).append(key)
        todo = [key for key, value in self._objects.items() if isinstance(value, nn.Module | PreTrainedConfig)]
        private = set(todo)
        while todo:
            new = set(parents.get(todo.pop(), ())) - private
            private |= new
            todo += new
        return private

    def twin(self, model: PreTrainedModel) -> PreTrainedModel:
        """A private copy of the model that was looked at.

        Raises:
            Unsupported: something that leads to a module cannot be copied.
        """
        private = self._private()
        memo = {key: value for key, value in self._objects.items() if key not in private}
        for module in (value for value in self._objects.values() if isinstance(value, nn.Module)):
            held = (vars(module).get(name) for name in _OF_ANY_MODULE - {"_modules"})
            memo |= {id(value): copy.copy(value) for value in held if isinstance(value, dict | set)}
        try:
            return copy.deepcopy(model, memo)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise Unsupported("modules that cannot be copied", str(error)) from None

    def written(self, model: PreTrainedModel) -> set[int]:
        """The ids of what the forwards of a model since this look have written to beside its modules' attributes. A
        copy's forwards would write to it too."""
        now, private = Look(model), self._private()
        changed = {key for key, tokens in self.seen.items() if now.seen.get(key, tokens) != tokens}
        return changed - private | {key for key, n in self._writes.items() if now._writes.get(key, n) != n}

    def name_of(self, key: int, model: PreTrainedModel) -> str:
        """What a reader may know an object by: a module's attribute, a global, or what kind of thing it is."""
        value = self._objects[key]
        for module in model.modules():
            for name, own in chain(vars(module).items(), module._buffers.items(), module._parameters.items()):
                if own is value:
                    return f"{type(module).__name__}.{name}"
        for function in self._objects.values():
            if isinstance(function, types.FunctionType):
                for name in _names(function.__code__):
                    if function.__globals__.get(name) is value:
                        return f"{function.__module__}.{name}"
        return getattr(value, "__qualname__", type(value).__qualname__)


def is_seen(value: Any) -> bool:
    """Whether two looks differ where this value has changed; so they need not where it is specdec's own."""
    if isinstance(value, (dict, *_SEQUENCES)):
        return len(value) <= LARGE
    is_plain = isinstance(value, (Tensor, Enum, *_ARRAYS, *_CODE)) or not hasattr(value, "__dict__")
    return is_plain or _has_fields(value) or type(value).__module__.startswith("specdec.")


def _has_fields(value: Any) -> bool:
    """Whether an object is a module, a holder of settings or a user's own, and no library's nor what runs by itself."""
    if isinstance(value, (nn.Module, PreTrainedConfig, *_SETTINGS)):
        return True
    return not _is_librarys(type(value).__module__) and not isinstance(value, Thread)


def _is_librarys(module: Any) -> bool:
    return str(module).partition(".")[0] in _LIBRARIES


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _fields(value: Any) -> Iterator[Any]:
    """All that there is to see of an object, of a tensor beside its numbers."""
    if isinstance(value, Tensor):
        own = vars(value) if hasattr(value, "__dict__") else {}
        yield from chain(*(item for item in own.items() if not item[0].startswith(_COMPILERS)))
        return
    if isinstance(value, nn.Module):
        yield type(value)
        yield from chain(*(item for item in vars(value).items() if item[0] not in _OF_ANY_MODULE))
        yield from chain(*value._modules.items(), *value._parameters.items(), *value._buffers.items())
        return
    if isinstance(value, type):
        yield from _of_class(value)
        return
    if isinstance(value, weakref.ref):
        yield value()
        return
    if isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, property):
        yield from (value.fget, value.fset, value.fdel)
    elif isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, (dict, types.MappingProxyType)):
        yield len(value)
        yield from chain(*value.items()) if len(value) <= LARGE else ()
    elif isinstance(value, _SEQUENCES):
        yield len(value)
        yield from value if len(value) <= LARGE else ()
    elif isinstance(value, _ARRAYS):
        held = np.asarray(value)
        yield from (str(held.dtype), str(held.shape), held.tobytes() if held.nbytes <= LARGE_BYTES else held.nbytes)
    if _has_fields(value):
        yield type(value)
        yield from _of_object(value)


def _of_object(value: Any) -> Iterator[Any]:
    """Its attributes and slots."""
    with suppress(AttributeError):
        yield from chain(*object.__getattribute__(value, "__dict__").items())
    for kind in type(value).__mro__:
        for name, slot in vars(kind).items() if "__slots__" in vars(kind) else ():
            if isinstance(slot, types.MemberDescriptorType):
                yield from (name, getattr(value, name, None))


def _of_class(kind: type) -> Iterator[Any]:
    """Attributes, and what methods read; also of what it derives from, and is made by."""
    yield from (type(kind), *kind.__bases__)
    # Dynamo patches the base of all modules when it likes.
    if (issubclass(kind, nn.Module) and kind is not nn.Module) or not _is_librarys(kind.__module__):
        yield from chain(*(item for item in vars(kind).items() if item[0] not in _OF_ANY_CLASS))


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    """Its code, and what that reads."""
    yield function.__code__
    if _is_librarys(function.__module__) and not str(function.__module__).startswith(_ROUTED):
        return
    yield from (function.__defaults__, function.__kwdefaults__)
    yield from chain(*(item for item in vars(function).items() if not item[0].startswith("__")))  # decorators' marks
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing is in it yet
            yield None
    yield from _read(_names(function.__code__), function.__globals__, set())


@lru_cache(maxsize=2**14)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Of globals and attributes, in a function and in those within it."""
    within = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return tuple(dict.fromkeys(chain(code.co_names, *within)))


def _read(names: Iterable[str], namespace: dict[str, Any], been: set[int]) -> Iterator[Any]:
    """What these names stand for in a namespace, and in the modules there: `F.silu` is two names. What the standard
    library's modules hold, as `sys.modules`, is the interpreter's."""
    for name in names:
        if name in namespace:
            yield from (name, value := namespace[name])
            if isinstance(value, types.ModuleType) and id(value) not in been and not _is_standard(value.__name__):
                been.add(id(value))
                yield from _read(names, vars(value), been)
