"""What Dynamo, Inductor and Triton make of a function for an H100 that is not there.

Tensors are fake: they say that they are on `cuda:0`, and have no memory. Everything up to the code that Inductor
generates runs as it does on the device, and there it stops; the kernels in that code are compiled, and not loaded.
The device's properties are stood in for, and what Inductor would ask of it while compiling is asked of the CPU.
"""

from __future__ import annotations

import ast
import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aot
import pytest
import torch
import torch._inductor.scheduler
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.codecache import CppCodeCache, PyCodeCache
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from specdec.kernels.cpu import compiler_error

DEVICE = torch.device("cuda", 0)
ARCHITECTURE = 90
_H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32, max_threads_per_block=1024,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, shared_memory_per_block_optin=232448,
    total_memory=80 << 30,
)  # fmt: skip
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


@cache
def _let_cuda_be_named() -> None:
    """A build without CUDA indexes no tensor that says it is there: switching to its device must do nothing instead."""
    assert compiler_error() is None  # also: nothing is to find out under fake tensors, which C++ can't read
    if not torch.cuda._is_compiled():
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"), mode=ctypes.RTLD_GLOBAL)
        CppCodeCache.load(_GUARD)


class _OnCpu(TorchFunctionMode):
    """Makes on the CPU what is to be made elsewhere."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs or {}))
        return function(*args, **kwargs)


class _Generated(BaseException):
    """The code is there. No `Exception`, so that nobody takes it for a failure to compile."""


@contextmanager
def fake_h100() -> Iterator[None]:
    """Tensors made here are fake, and may be on `DEVICE`; what is compiled for it is compiled for an H100."""
    _let_cuda_be_named()

    def on_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _OnCpu():
                return method(*args, **kwargs)

        return run

    def stop(graph: GraphLowering) -> None:
        raise _Generated(graph.codegen()[0].value)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        for place in (CudaInterface, CudaInterface.Worker):
            patch.setattr(place, "get_device_properties", staticmethod(lambda *_: _H100))
        patch.setattr(CudaInterface, "is_bf16_supported", staticmethod(lambda **_: True))
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: _H100)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (_H100.major, _H100.minor))
        patch.setattr(torch._inductor.scheduler, "has_triton", lambda *_: True)
        patch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
        for name in ("__init__", "run"):  # constants are made, and looked at
            patch.setattr(UniformValueConstantFolder, name, on_cpu(getattr(UniformValueConstantFolder, name)))
        patch.setattr(GraphLowering, "compile_to_module", stop)
        patch.setattr(torch._inductor.config, "use_static_cuda_launcher", False)  # it keeps no binary to look at
        DeviceProperties.create.cache_clear()
        try:
            with aot.targeting(ARCHITECTURE), FakeTensorMode():
                yield
        finally:
            DeviceProperties.create.cache_clear()


def generate(function: Callable[..., Any], *arguments: Any) -> Code:
    """What Inductor generates for the first graph of a compiled function; to be called within `fake_h100`."""
    torch._dynamo.reset()
    with pytest.raises(_Generated) as generated:
        function(*arguments)
    return Code(str(generated.value))


@dataclass(frozen=True)
class Code:
    """A module that Inductor has generated: Triton kernels, and Python that launches them."""

    text: str

    @property
    def launches(self) -> dict[str, list[str]]:
        """By function, what it launches once it is called: Triton kernels, matrix products, operators. An operator
        counts once, though it may launch several kernels. Layers that are alike share a function."""
        functions = [x for x in ast.walk(ast.parse(self.text)) if isinstance(x, ast.FunctionDef)]
        called = {
            f.name: [name for x in ast.walk(f) if isinstance(x, ast.Call) and (name := _launched(ast.unparse(x.func)))]
            for f in functions
        }
        return {name: found for name, found in called.items() if found and name != "benchmark_compiled_module"}

    @property
    def on_host(self) -> list[str]:
        """What is called that computes on the host or waits for the device."""
        called = [ast.unparse(x.func) for x in ast.walk(ast.parse(self.text)) if isinstance(x, ast.Call)]
        ends = (".item", ".tolist", ".cpu", ".cpp", ".cpp_pybinding", "empty_strided_cpu", "synchronize")
        return [name for name in called if name.endswith(ends)]

    @property
    def kernels(self) -> dict[str, str]:
        """The source of each Triton kernel."""
        calls = [x for x in ast.walk(ast.parse(self.text)) if isinstance(x, ast.Call)]
        given = [x.args for x in calls if ast.unparse(x.func) == "async_compile.triton"]
        return {ast.literal_eval(name): ast.literal_eval(source) for name, source, *_ in given}


def _launched(function: str) -> str | None:
    """What a call of this function launches, if anything."""
    if function.startswith(("extern_kernels.", "torch.ops.", "aten.")):
        return function
    return function.removesuffix(".run") if function.endswith(".run") else None


def compile_kernel(name: str, source: str) -> list[aot.Compiled]:
    """A kernel that Inductor has generated, compiled with each of the configurations it would choose from; within
    `fake_h100`."""
    kernel = getattr(PyCodeCache.load(source), name)
    return [aot.inspect(kernel._precompile_config(config).kernel) for config in kernel.configs]
