"""Steps as compiled functions: one per shape family, kept for the life of the model."""

from __future__ import annotations

import logging
import os
import types
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import count
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import RecompileError, SkipFrame, TorchDynamoException
from torch.fx.experimental import _config

from specdec.errors import warn
from specdec.graphs import backend
from specdec.graphs.guards import Guards
from specdec.kernels.cpu import compiler_error, first_words
from specdec.kernels.library import OPS
from specdec.progress import compiling

log = logging.getLogger("specdec")


_has_regions = True
"""Whether layers compile as regions here: torch 2.14 refuses those that read a tensor which is not an argument. Then
every layer compiles by itself, which takes longer, once."""


def as_region(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward that compiles once for all layers alike; eager calls go straight through."""
    region = torch.compiler.nested_compile_region(forward)

    def layer_forward(*args: Any, **kwargs: Any) -> Any:
        return (region if torch.compiler.is_compiling() and _has_regions else forward)(*args, **kwargs)

    return layer_forward


_numbers = count()


def _own_code(method: Any) -> Any:
    """A method with a code object and a name of its own. Dynamo keeps what it compiled on the code object, and which
    sizes it saw vary by the function's name: two decoders must not see each other's, since the guards that would tell
    them apart are not kept, and the depth of one is not a varying size of the other. What was compiled knows the code
    again and would keep itself alive: it goes with the decoder."""
    function = method.__func__
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    weakref.finalize(method.__self__, torch._dynamo.reset_code, code).atexit = False
    return types.MethodType(own, method.__self__)


# Of the kernels around the matrix products none is worth a second thread until it is large: waking one costs more, and
# much more where other programs keep the cores busy. CUDA graphs are recorded around whole steps, not by Inductor.
_OPTIONS: dict[str, Any] = {
    "cpp.min_chunk_size": 16384,
    "triton.cudagraphs": False,
}


def _build_kernels(gm: fx.GraphModule) -> None:
    """Build what the graph's ops run in C++: none of them must find out later that it can't.

    Raises:
        RuntimeError: it can't be built.
    """
    kernels = {op.call.op: op.kernel for op in OPS.values() if op.kernel is not None}  # type: ignore[attr-defined]
    used = {node.target for m in gm.modules() if isinstance(m, fx.GraphModule) for node in m.graph.nodes}
    if any(kernels[op]() is None for op in used & kernels.keys()):
        raise RuntimeError(compiler_error())


class _Backend:
    """The backend, and whether a graph of it has begun to run. What it makes lives as long as torch likes, and so must
    not know the step."""

    def __init__(self) -> None:
        self.has_begun, self.n_graphs = False, 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **given: Any) -> Callable[..., Any]:
        self.n_graphs += 1
        try:
            graph = backend.specdec(gm, example_inputs, **given)
        except SkipFrame as error:  # as for bfloat16 on old GPUs; Dynamo would go on without a word, call by call
            raise RuntimeError(str(error)) from error
        _build_kernels(gm)

        def run(*arguments: Any) -> Any:
            self.has_begun = True
            return graph(*arguments)

        return run


class _Step:
    """A function that is compiled when it is first called; where that can't be, it runs as it is.

    A step changes state in place: it may be run another way only if nothing of it has run. What runs is a graph, and it
    says when it begins.
    """

    def __init__(self, function: Callable[..., Any], steps: CompiledSteps) -> None:
        self._function, self._steps = function, steps
        self._compiled: Callable[..., Any] | None = None
        self.guards: Guards | None = None
        self._why_eager: str | None = None
        self._backend = _Backend()
        if error := compiler_error():
            self._give_up(error, error)

    def __call__(self, *arguments: Any) -> Any:
        if self._why_eager is None:
            self._backend.has_begun, n_graphs = False, self._backend.n_graphs
            try:
                result = (self._compiled or self._first_call)(*arguments)
                self._steps.was_compiling |= self._backend.n_graphs > n_graphs  # also again: a guard did not hold
                return result
            except (RecompileError, torch.OutOfMemoryError):  # nothing may compile now; or memory can be made for it
                raise
            except Exception as error:
                if self._backend.has_begun:
                    raise
                log.info("a step could not be compiled", exc_info=error)
                name = type(getattr(error, "inner_exception", error)).__name__
                known = compiler_error()
                self._give_up(known or f"a step could not be compiled ({name})", known or first_words(error), error)
        self._steps.eager[str(self._why_eager)] += 1
        return self._function(*arguments)

    def _first_call(self, *arguments: Any) -> Any:
        with compiling(f"a step ({self._function.__name__})"):
            return self._with_or_without_regions(*arguments)

    def _with_or_without_regions(self, *arguments: Any) -> Any:
        """With layers as regions; where torch refuses these, without, from then on."""
        global _has_regions
        if _has_regions:
            try:
                return self._compile(*arguments)
            except (TorchDynamoException, AssertionError):  # Dynamo's own
                if self._backend.has_begun:
                    raise
        before, _has_regions = _has_regions, False
        try:
            return self._compile(*arguments)
        except BaseException:
            _has_regions = before  # it was not the regions
            raise

    def _compile(self, *arguments: Any) -> Any:
        own = _own_code(self._function)
        self.guards = Guards(own, self._steps.is_seen)
        options = {**_OPTIONS, "guard_filter_fn": self.guards.needed}
        compiled = torch.compile(own, fullgraph=True, backend=self._backend, options=options)
        # Sizes that are equal now need not stay so: as many samples as are unfinished, for one.
        with _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            result = compiled(*arguments)
        self._compiled = compiled
        return result

    def _give_up(self, reason: str, message: str, error: Exception | None = None) -> None:
        """From now on run eagerly.

        Args:
            reason: to be counted by. message: what to tell the user.
        """
        if os.environ.get("SPECDEC_STRICT") == "1":
            raise RuntimeError(f"specdec could not compile a step: {message}") from error
        if reason not in self._steps.eager:
            warn(f"specdec could not compile a step; it runs as it is, slower, with the same tokens: {message}")
        self._why_eager, self.guards = reason, None


class CompiledSteps:
    """Compiles functions once per key, as one full graph each.

    Args:
        enabled: False runs everything eagerly.
        eager: where calls are counted, by reason, that ran eagerly though they were to be compiled.
        is_seen: which values of a model need no guard: where they change, these steps are not called again (see
            `specdec.graphs.guards`). All by default.

    Attributes:
        was_compiling: whether what `get` gave last has compiled, or will when it is called; that is not decoding time.
        lag, keeps_buffers: see `specdec.graphs.captured`.
    """

    lag = 0
    keeps_buffers = False

    def __init__(
        self, enabled: bool, eager: Counter[str] | None = None, is_seen: Callable[[Any], bool] = lambda value: True
    ) -> None:
        self.enabled, self.is_seen = enabled, is_seen
        self.eager: Counter[str] = Counter() if eager is None else eager
        self.was_compiling = False
        self._steps: dict[Hashable, _Step] = {}

    @property
    def is_current(self) -> bool:
        """Whether what compiled functions have read is what it was."""
        return all(step.guards is None or step.guards.are_current for step in self._steps.values())

    def reset(self) -> None:
        """Nothing to forget: compiled functions know no addresses."""

    def has(self, key: Hashable) -> bool:
        """Whether `get` has it without compiling."""
        return not self.enabled or key in self._steps or compiler_error() is not None

    def get(self, function: Callable[..., Any], key: Hashable, size: Hashable) -> Callable[..., Any]:
        """`function`, compiled under `key`; one compiled function serves all sizes.

        Where it can't be compiled it runs as it is, with one warning; with SPECDEC_STRICT=1 in the environment that is
        a RuntimeError.
        """
        if not self.enabled:
            return function
        self.was_compiling = key not in self._steps
        if self.was_compiling:
            self._steps[key] = _Step(function, self)
        return self._steps[key]
