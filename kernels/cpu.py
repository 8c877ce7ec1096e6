"""How the hand-written C++ kernels in `csrc` are built, and what they may be handed.

The kernels serve decoding on a CPU, where a step has a few rows against large weights or long caches: everything is
read once, sums stay in registers, and every result is its own dot product in one fixed order, so that a row's value
does not depend on the rows beside it. Plain C++ with vector extensions: any instruction set, GCC or Clang.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

_CSRC = Path(__file__).with_name("csrc")
_TRIAL = "trial.cpp"


class _Toolchain:
    """What is known of it in this process."""

    error: str | None = None  # of the first thing that could not be built: nothing more is tried after it


@cache
def _try() -> None:
    """Build and call a small function: a compiler's name says nothing of its headers, OpenMP, or the cache's folder."""
    x = torch.arange(3, dtype=torch.float32, device="cpu")
    out = torch.zeros_like(x)
    if (kernel := bind(_TRIAL, "float*, float*, int64_t, int64_t")) is not None:
        kernel(x, out, 3, 2)
        if out.tolist() != [0, 2, 4]:
            _Toolchain.error = f"{compiler_name()}: what it built computes {out.tolist()} for [0, 2, 4]"


def compiler_error() -> str | None:
    """Why C++ cannot be built here, in a line; None where it can.

    The first call builds a small library, which takes seconds, or a millisecond where it is in Inductor's disk cache.
    """
    _try()
    return _Toolchain.error


def has_compiler() -> bool:
    """Whether C++ can be built here: Inductor needs that on a CPU, and so do these kernels."""
    return compiler_error() is None


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether the C++ kernels are for tensors like this one."""
    return tensor.is_cpu and tensor.dtype == torch.float32 and has_compiler()


def compiler_name() -> str:
    """The compiler that Inductor calls."""
    from torch._inductor import config

    cxx = config.cpp.cxx
    return str(cxx if isinstance(cxx, str) else cxx[-1])  # what comes first may be conda's, and seldom is


def first_words(error: BaseException) -> str:
    """What went wrong, in a line: of a compiler's output the first error."""
    error = getattr(error, "inner_exception", error)  # Dynamo's and Inductor's own hold what was raised
    lines = [line.strip() for line in str(getattr(error, "output", "") or error).splitlines() if line.strip()]
    said = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
    return f"{type(error).__name__}: {said}"


def _built(load: Callable[[], Any]) -> Any:
    """What `load` builds, or None, now and ever after, where it can't be built: nothing of it has run."""
    if _Toolchain.error is None:
        try:
            return load()
        except Exception as error:
            _Toolchain.error = f"{compiler_name()}: {first_words(error)}"
    return None


def source_of(file: str) -> str:
    """A file of `csrc`, with those it includes in their place: Inductor's disk cache goes by the text it is given, so
    whoever edits a header has what includes it compiled again."""
    included: set[str] = set()

    def text(file: str) -> str:
        if file in included:
            return ""
        included.add(file)
        own = (_CSRC / file).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'^#include "(.+)"\n', lambda line: text(line[1]), own, flags=re.MULTILINE)

    return text(file)


@cache
def build(file: str, name: str, types: tuple[Any, ...]) -> Callable[..., None] | None:
    """A function of the library that a file of `csrc` makes, by Inductor's own toolchain and disk cache.

    Args:
        name: the function's. types: of its arguments, for `ctypes`.

    Returns:
        None where it can't be built.
    """
    source = source_of(file)

    def load() -> ctypes.CDLL:
        from torch._inductor.codecache import CppCodeCache

        return CppCodeCache.load(source)

    if (library := _built(load)) is None:
        return None
    function = library[name]
    function.argtypes, function.restype = types, None
    return function


@cache
def bind(file: str, types: str) -> Callable[..., None] | None:
    """The function `kernel` of a file of `csrc`, with arguments of these types, pointers as tensors.

    It is called as Inductor calls its own. A call by `ctypes` costs five times as much, and knows addresses only: it
    can't tell a tensor from a number. What a pointer leads to is checked at every call; behind a `void*`, by the
    caller: the kernel is told its strides.

    Returns:
        None where it can't be built.
    """
    source = source_of(file)

    def load() -> Callable[..., None]:
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        return CppPythonBindingsCodeCache.load_pybinding(types.split(", "), source)

    if (kernel := _built(load)) is None:
        return None
    read = [(i, _DTYPES[kind]) for i, kind in enumerate(types.split(", ")) if kind in _DTYPES]

    def call(*arguments: Any) -> None:
        for i, dtype in read:
            check(arguments[i], dtype)
        kernel(*arguments)

    return call


_DTYPES = {"float*": torch.float32, "int64_t*": torch.int64}


def check(tensor: torch.Tensor, dtype: torch.dtype, is_dense: bool = True) -> None:
    """Whether C++ may read a tensor's numbers: it knows no more of them than where the first one is.

    Args:
        is_dense: they are read one after the other; else those of a row are, and the kernel is told the other strides.

    Raises:
        TypeError: they are not of this dtype, not on the CPU, or not side by side.
    """
    is_laid_out = tensor.is_contiguous() if is_dense else tensor.stride(-1) == 1
    if tensor.dtype is not dtype or not tensor.is_cpu or not is_laid_out:
        raise TypeError(
            f"a kernel reads contiguous {dtype} on a CPU, got {tensor.dtype} on {tensor.device}, "
            f"strides {tensor.stride()}"
        )


def address(tensor: torch.Tensor, dtype: torch.dtype, is_dense: bool = True) -> int:
    """Where C++ finds a tensor's numbers; arguments and errors are those of `check`."""
    check(tensor, dtype, is_dense)
    return tensor.data_ptr()
