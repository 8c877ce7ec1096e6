"""The `specdec` operator library: one `register` call per op, and which implementation a call takes.

An op has a hand-written schema, a fake (shapes only), a CPU implementation and a Triton implementation:

- CUDA tensors take the Triton kernel, always.
- CPU tensors take the CPU implementation. Under `torch.compile` one made of PyTorch operations is inlined, so that
  Inductor can fuse through it; everywhere else the call goes through the dispatcher, which is what `opcheck` and fake
  tensors see.
- With `TRITON_INTERPRET=1` in the environment CPU tensors take the Triton kernel too, run by Triton's interpreter:
  slow, and how the kernels are tested without a GPU.

Where a C++ kernel can't be built its reference runs, and steps are not compiled. Otherwise none of these ever stands
in for another. Kernel files take `triton` and `tl` from here, because Triton exists for Linux only, and elsewhere the
CPU implementations are all there is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from specdec.kernels.cpu import has_compiler

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

_library = torch.library.Library("specdec", "FRAGMENT")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton kernels run on CPU tensors. Triton decides when a kernel is defined, so it can't change later."""
if INTERPRETED and triton is None:
    raise ImportError("TRITON_INTERPRET=1 asks for the Triton kernels, and triton is not installed")


@dataclass(frozen=True)
class Op:
    """What is registered: for `specdec info --verbose` and the tests.

    Attributes:
        schema: as given to `register`. call: what the library calls; `call.op` is the dispatcher's overload.
        cpu: the implementation for CPU tensors. kernel: builds what it calls in C++, or is None for one made of PyTorch
            operations.
        launcher: starts the Triton kernel, or None where there is none or no Triton.
    """

    schema: str
    call: Callable[..., Any]
    cpu: Callable[..., Any]
    kernel: Callable[[], Callable[..., None] | None] | None
    launcher: Callable[..., Any] | None

    def path(self, device_type: str) -> str:
        """What runs for tensors of this device, in words."""
        if self.launcher is not None and (device_type == "cuda" or INTERPRETED):
            return "Triton kernel" if device_type == "cuda" else "Triton kernel, interpreted"
        if device_type == "cuda":
            return "none"
        if not has_compiler():
            return "PyTorch"
        return "PyTorch, fused by Inductor" if self.kernel is None else "C++ kernel"


OPS: dict[str, Op] = {}


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` where there is a Triton."""
    return function if triton is None else triton.jit(function)


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether ops take their Triton kernels for tensors like this one."""
    return tensor.is_cuda or INTERPRETED


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    launcher: Callable[..., Any] | None,
    fake: Callable[..., Any],
    kernel: Callable[[], Callable[..., None] | None] | None = None,
) -> Callable[..., Any]:
    """Define the op `specdec::<schema>` and return the function the rest of the library calls.

    Args:
        schema: for example `"draw(Tensor probs, Tensor seed) -> Tensor"`; mutated arguments are marked `Tensor(a!)`.
        cpu: implementation for CPU tensors; its docstring becomes the op's.
        launcher: starts the Triton kernel; None for an op that exists on a CPU only. Without Triton it is left out.
        fake: shapes and dtypes of the result, given fake tensors.
        kernel: where `cpu` is C++, builds it or finds it built; None where it can't be. Such an op is opaque to
            Inductor. Without it `cpu` is made of traceable PyTorch operations.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    if triton is None:
        launcher = None
    _library.impl(name, launcher if launcher is not None and INTERPRETED else cpu, "CPU")
    if launcher is not None:
        _library.impl(name, launcher, "CUDA")
    torch.library.register_fake(f"specdec::{name}", fake, lib=_library)
    op = getattr(torch.ops.specdec, name).default
    inlined = kernel is None and (launcher is None or not INTERPRETED)

    def call(*args: Any) -> Any:
        return cpu(*args) if inlined and torch.compiler.is_compiling() and args[0].is_cpu else op(*args)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = cpu.__doc__
    call.op = op  # type: ignore[attr-defined]
    OPS[name] = Op(schema, call, cpu, kernel, launcher)
    return call
