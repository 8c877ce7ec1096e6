"""Compiling Triton kernels for GPUs that are not there.

A stand-in driver names the target, and every launch compiles and stops: what is compiled is exactly what a launch with
these arguments would run, alignment and divisibility hints included.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel: registers a thread, bytes of stack a thread (spills), bytes of shared memory a program."""

    name: str
    registers: int
    stack: int
    shared: int


class _Driver:
    """Looks like a CUDA device of one architecture; the device number keeps Triton's caches apart."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def targeting(arch: int) -> Iterator[None]:
    """Triton compiles for `arch`, and looks for no device."""
    before = driver._active  # `driver.active` would look for a real device
    driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        driver.set_active(before)


@contextmanager
def _compiling(arch: int) -> Iterator[list[Any]]:
    """Launches compile for `arch` and do not run; what they compile is collected."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, **{**kwargs, "warmup": True}))
        return kernels[-1]

    JITFunction.run = compile_only
    try:
        with targeting(arch):
            yield kernels
    finally:
        JITFunction.run = run


def compile_launches(launch: Callable[[], Any], arch: int) -> list[Compiled]:
    """Every kernel that `launch` would start on a GPU of compute capability `arch / 10`, compiled.

    Args:
        launch: calls a launcher, with CPU or meta tensors.
    """
    with _compiling(arch) as kernels:
        launch()
    return [inspect(kernel) for kernel in kernels]


def compiles_without_spilling(
    launches: dict[str, Callable[[], object]], slow: Collection[str] = ()
) -> Callable[..., None]:
    """A test that all kernels of these launches compile for every architecture, without a byte of stack.

    Args:
        launches: by case; each calls a launcher. slow: cases that take long to compile, and do so for one architecture.
    """
    cases = [(case, arch) for case in launches for arch in ((90,) if case in slow else ARCHITECTURES)]

    @pytest.mark.aot
    @pytest.mark.parametrize(("case", "arch"), cases)
    def test(case: str, arch: int, compiled_table: list[tuple[str, int, Compiled]]) -> None:
        for kernel in compile_launches(launches[case], arch):
            compiled_table.append((case, arch, kernel))
            assert kernel.stack == 0

    return test


def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """A launcher's argument: a shape and strides, without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def inspect(kernel: Any) -> Compiled:
    """What one of Triton's compiled kernels takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", text)}
    return Compiled(kernel.metadata.name, found["REG"], found["STACK"], kernel.metadata.shared)
