"""Steps as compiled functions: one per shape family, kept for the life of the model."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from specdec.errors import warn
from specdec.graphs import backend
from specdec.kernels.cpu import has_compiler
from specdec.twin import is_seen


@dataclass(frozen=True)
class Read:
    """What compiled code has read outside of its arguments.

    Args:
        name: a Python expression. scope: what it is evaluated in. value: what it stood for.
    """

    name: types.CodeType
    scope: dict[str, Any]
    value: Any
    size: int | None

    @property
    def is_current(self) -> bool:
        """Whether it is what it was: the very object, of the same size, or a number alike."""
        try:
            now = eval(self.name, self.scope)
        except Exception:  # it is gone
            return False
        is_same = now is self.value or (type(now) is type(self.value) in (int, float, str) and now == self.value)
        return is_same and _size(now) == self.size


def _size(value: Any) -> int | None:
    return len(value) if isinstance(value, dict | list | set) else None


class Guards:
    """What Dynamo would look at before each call of what it has compiled, for one function.

    Modules and settings of a private view never change, or it is made anew (see `specdec.twin`). Shapes of tensors do,
    and are looked at each time. Globals, and what is too large for that or a library's own, are looked at once a
    `generate()` call: what has read them is compiled anew, or else each change would be, and recorded steps would not
    look at all.

    Attributes:
        reads: these.
    """

    def __init__(self, method: Any) -> None:
        parameters = inspect.signature(method.__func__).parameters
        self._scope = {"G": method.__func__.__globals__, next(iter(parameters)): method.__self__}
        self.reads: list[Read] = []

    def needed(self, guards: Any) -> list[bool]:
        """Which of Dynamo's guards are to be kept."""
        models = tuple(f"{g.name}." for g in guards if isinstance(g.value, torch.nn.Module))
        unseen = tuple(g.name for g in guards if g.name.startswith(models) and not is_seen(g.value))
        return [
            self._is_tensors(g) or ((g.is_global or g.name.startswith(unseen)) and not self._can_look_at(g))
            for g in guards
        ]

    def _is_tensors(self, guard: Any) -> bool:
        return guard.guard_type in ("TENSOR_MATCH", "SHAPE_ENV") and not isinstance(guard.value, torch.nn.Parameter)

    def _can_look_at(self, guard: Any) -> bool:
        """Whether to look at it from time to time is enough, and possible."""
        if isinstance(guard.value, torch.Tensor):  # they are arguments each time
            return True
        try:
            name = compile(guard.name, "<guard>", "eval")
        except SyntaxError:
            return False
        read = Read(name, self._scope, guard.value, _size(guard.value))
        if read.is_current:
            self.reads.append(read)
        return read.is_current


_numbers = count()


def _own_code(method: Any) -> Any:
    """A method with a code object and a name of its own. Dynamo keeps what it compiled on the code object, and which
    sizes it saw vary by the function's name: two decoders must not see each other's, since the guards that would tell
    them apart are not kept, and the depth of one is not a varying size of the other."""
    function = method.__func__
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return types.MethodType(own, method.__self__)


# Of the kernels around the matrix products none is worth a second thread until it is large: waking one costs more, and
# much more where other programs keep the cores busy. CUDA graphs are recorded around whole steps, not by Inductor.
_OPTIONS: dict[str, Any] = {
    "cpp.min_chunk_size": 16384,
    "triton.cudagraphs": False,
}


class CompiledSteps:
    """Compiles functions once per key, as one full graph each.

    Args:
        enabled: False runs everything eagerly.

    Attributes:
        was_compiling: whether the latest call compiled; its time is not decoding time.
        lag, keeps_buffers: see `specdec.graphs.captured`.
    """

    lag = 0
    keeps_buffers = False

    def __init__(self, enabled: bool) -> None:
        if enabled and not has_compiler():
            warn("specdec found no C++ compiler and runs eagerly: slower, same tokens")
            enabled = False
        self.enabled = enabled
        self.was_compiling = False
        self._functions: dict[Hashable, Callable] = {}
        self._guards: list[Guards] = []

    @property
    def is_current(self) -> bool:
        """Whether what compiled functions have read is what it was."""
        return all(read.is_current for guards in self._guards for read in guards.reads)

    def reset(self) -> None:
        """Nothing to forget: compiled functions know no addresses."""

    def has(self, key: Hashable) -> bool:
        """Whether `get` has it without compiling."""
        return not self.enabled or key in self._functions

    def get(self, function: Callable[..., Any], key: Hashable, size: int) -> Callable[..., Any]:
        """`function`, compiled under `key`; one compiled function serves all sizes."""
        if not self.enabled:
            return function
        self.was_compiling = key not in self._functions
        if not self.was_compiling:
            return self._functions[key]
        own = _own_code(function)
        self._guards.append(guards := Guards(own))
        options = {**_OPTIONS, "guard_filter_fn": guards.needed}
        compiled = torch.compile(own, fullgraph=True, backend=backend.specdec, options=options)
        self._functions[key] = compiled

        def first_call(*arguments: Any) -> Any:
            try:
                # Sizes that are equal now need not stay so: as many samples as are unfinished, for one.
                with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                    return compiled(*arguments)
            except TorchDynamoException as error:  # nothing has run yet
                warn(f"specdec could not compile a step; it runs as it is, slower, with the same tokens: {error}")
                self._functions[key] = function
                return function(*arguments)

        return first_call
