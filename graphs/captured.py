"""Steps as CUDA graphs: a replay for its draft and one for its judgement, captured once per shape and kept for the life
of the buffers.

The first call of a shape runs the step, compiled by Inductor: that compiles what it needs and warms the libraries up.
The second call records it, and from then on it is replayed. A recording holds addresses, so everything a step reads or
writes stays where it was: state and caches are buffers that calls of `generate()` share, and a law's numbers are copied
into those of the law that was recorded.

Graphs share one memory pool and are replayed one after the other on one stream, so what one leaves in the pool the
next may overwrite: a step's report is copied out before the next step.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.errors import warn

if TYPE_CHECKING:
    from specdec.graphs.compiled import CompiledSteps


class Recording:
    """One step, recorded: replaying it is all a call does, once what it is given has been copied to where it reads.

    Args:
        step: takes tensors, laws, and what is the same in every call: a state, numbers.
        arguments: those to record. pool: memory pool handle shared by all recordings.
    """

    def __init__(self, step: Callable[..., Any], arguments: tuple[Any, ...], pool: Any) -> None:
        self._given = [(argument, _versions(argument)) for argument in arguments]
        # Kept: their memory must not be used for anything else. What varies is a copy: others' numbers go into it.
        self.arguments = tuple(copy.deepcopy(x) if tensors is not None else x for x, tensors in self._given)
        self._replay = self._record(step, pool)

    def _record(self, step: Callable[..., Any], pool: Any) -> Callable[[], Any]:
        """The step as a call without arguments."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile; only this thread's calls must be of the kind that can be recorded.
        # The outer context brings the stream back where recording fails. Nothing may compile while it records.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.compiler.set_stance("fail_on_recompile"),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            result = step(*self.arguments)

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def __call__(self, *arguments: Any) -> Any:
        for i, (mine, given) in enumerate(zip(self.arguments, arguments, strict=True)):
            last, last_versions = self._given[i]
            if given is last and (last_versions is None or last_versions == _versions(given)):
                continue
            if last_versions is None:
                if given != mine:
                    raise RuntimeError(f"a step recorded with {mine!r} was called with {given!r}")
                continue
            for to, source in zip(_tensors(mine), _tensors(given), strict=True):
                to.copy_(source)
            self._given[i] = given, _versions(given)
        return self._replay()


def _tensors(argument: Any) -> tuple[Tensor, ...]:
    """The tensors of an argument that differs from call to call: a tensor, or a law."""
    return (argument,) if isinstance(argument, Tensor) else argument.tensors()


def _versions(argument: Any) -> list[int] | None:
    """How often each of its tensors has been written to; None for what is the same in every call."""
    varies = isinstance(argument, Tensor) or hasattr(argument, "tensors")
    return [tensor._version for tensor in _tensors(argument)] if varies else None


class CapturedSteps:
    """Runs steps as CUDA graphs, one per key and size.

    Args:
        compiled: compiles the steps that are recorded.

    Attributes:
        was_compiling: as of compiled steps; also where a shape is new, or recorded.
        recordings: what has been recorded, by key and size.
        lag: reports are read this many steps late, so that the device never waits for the host.
        keeps_buffers: state and caches must stay where they are from call to call; `reset` when they move.
    """

    lag = 1
    keeps_buffers = True

    def __init__(self, compiled: CompiledSteps, recording: type[Recording] = Recording) -> None:
        self._is_new = False
        self._compiled = compiled
        self._recording = recording
        self.reset()

    def reset(self) -> None:
        """Forget all recordings: the buffers they know are gone."""
        self._pool: Any = None
        self._seen: set[Hashable] = set()
        self.recordings: dict[Hashable, Recording] = {}
        self._is_full = False

    @property
    def is_current(self) -> bool:
        """Whether what was compiled and recorded has read is what it was."""
        return self._compiled.is_current

    @property
    def was_compiling(self) -> bool:
        return self._is_new or self._compiled.was_compiling

    def has(self, key: Hashable) -> bool:
        """Whether it is compiled; recording takes little."""
        return self._compiled.has(key)

    def get(self, step: Callable[..., Any], key: Hashable, size: Hashable, compiles: bool = True) -> Callable[..., Any]:
        """`step` under `key`, for tensors of this size; where it is not to compile, recorded as it is or as it was
        compiled before."""
        shape = key, size
        run = self._compiled.get(step, key, size) if compiles or self._compiled.has(key) else step
        if shape in self._seen and shape not in self.recordings and not self._is_full:
            self._is_new = True
            return partial(self._record, run, shape)
        self._is_new = shape not in self._seen
        self._seen.add(shape)
        if self._is_full and shape not in self.recordings:
            self._compiled.eager["a step could not be recorded as a CUDA graph"] += 1
        return self.recordings.get(shape, run)

    def _record(self, step: Callable[..., Any], shape: Hashable, *arguments: Any) -> Any:
        """Record, then run what was recorded; where that can't be, just run: recording changes nothing by itself."""
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        try:
            recording = self.recordings[shape] = self._recording(step, arguments, self._pool)
        except RuntimeError as error:  # no memory, or something in the step that can't be recorded
            self._is_full = True
            warn(
                f"specdec could not record another CUDA graph after {len(self.recordings)}; steps of further shapes "
                f"run kernel by kernel, slower, with the same tokens: {error}"
            )
            return step(*arguments)
        return recording(*arguments)


class Readback:
    """A report on its way to the host.

    Args:
        report: [B, D + 7] int64. On a GPU it is copied without waiting, into memory the device can write by itself.
    """

    def __init__(self, report: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = report
        if report.is_cuda:
            self._host = torch.empty(report.shape, dtype=report.dtype, device="cpu", pin_memory=True)
            self._host.copy_(report, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[list[int]]:
        """The report's rows; waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        # The host must know which samples have ended and hand out what came; on a GPU the next step runs meanwhile.
        return self._host.tolist()


class Upload:
    """Whole numbers on their way to a tensor of the device, which they are sent to only where they have changed.

    The device may read them long after they were sent, so what is sent is never written to again: each time it has
    memory of its own, which the allocator of pinned memory gives to nobody before the device has read it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._sent: list[int] | None = None

    def send(self, numbers: list[int]) -> None:
        """Write these; does not wait for the device."""
        if numbers == self._sent:
            return
        dtype, is_cuda = self._tensor.dtype, self._tensor.is_cuda
        self._tensor.copy_(torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=is_cuda), non_blocking=True)
        self._sent = list(numbers)


class Mark:
    """A moment in the work of a device."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()
        self._time = time.perf_counter()

    def until(self, later: Mark) -> float:
        """Seconds; both must have passed."""
        if self._event is not None and later._event is not None:
            return self._event.elapsed_time(later._event) / 1000
        return later._time - self._time
