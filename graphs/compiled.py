"""Steps as compiled functions: one per shape family, kept for the life of the model."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable
from itertools import count
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from specdec.errors import warn
from specdec.graphs import backend
from specdec.kernels.cpu import has_compiler


def _needed_guards(guards: Any) -> list[bool]:
    """Which of Dynamo's guards can fail: modules and settings of a private view never change, shapes of tensors do."""
    return [
        g.guard_type in ("TENSOR_MATCH", "SHAPE_ENV") and not isinstance(g.value, torch.nn.Parameter) for g in guards
    ]


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
    "guard_filter_fn": _needed_guards,
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
        compiled = torch.compile(_own_code(function), fullgraph=True, backend=backend.specdec, options=dict(_OPTIONS))
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
