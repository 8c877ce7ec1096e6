"""What the hand-written C++ kernels share: vectors, a register tile of dot products, and how they are built.

The kernels serve decoding on a CPU, where a step has a few rows against large weights or long caches: everything is
read once, sums stay in registers, and every result is its own dot product in one fixed order, so that a row's value
does not depend on the rows beside it. Plain C++ with vector extensions: any instruction set, GCC or Clang.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

_PRELUDE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

// A vector is one register of the machine, EACH its lanes; TALL rows by four vectors of sums leave room in them all.
#if defined(__AVX512F__)
constexpr int LANES = 16, TALL = 6;
#define EACH(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#elif defined(__AVX2__)
constexpr int LANES = 8, TALL = 2;
#define EACH(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)
#else
constexpr int LANES = 4, TALL = 2;
#define EACH(f) f(0), f(1), f(2), f(3)
#endif
#if defined(__clang__)
#define SHUFFLE(x, y, f) __builtin_shufflevector(x, y, EACH(f))
#else
#define SHUFFLE(x, y, f) __builtin_shuffle(x, y, ivec{EACH(f)})
#endif

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int ivec __attribute__((vector_size(LANES * sizeof(int))));

static inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof(v)); return v; }
static inline void store(float* p, const vec& v) { std::memcpy(p, &v, sizeof(v)); }

// x and y are runs of 2 * W lanes: the sums of the two halves of each, those of x before those of y.
template <int W>
static inline vec halved(const vec& x, const vec& y) {
#define FIRST(i) ((i) & -W) + (i)
#define SECOND(i) FIRST(i) + W
  return SHUFFLE(x, y, FIRST) + SHUFFLE(x, y, SECOND);
}

template <int W>
static inline vec folded(const vec& v) {
  if constexpr (W > 0) return folded<W / 2>(halved<W>(v, v));
  return v;
}

static inline float total(const vec& v) { return folded<LANES / 2>(v)[0]; }

// out[c] = total(v[c]) of four vectors.
static inline void totals(const vec* v, float* out) {
  const vec pairs = halved<LANES / 4>(halved<LANES / 2>(v[0], v[1]), halved<LANES / 2>(v[2], v[3]));
  const vec sums = folded<LANES / 8>(pairs);
  std::memcpy(out, &sums, 4 * sizeof(float));
}

// out[r, c] = x[r] . w[c] for ROWS rows of x and COLS rows of w: ROWS * COLS accumulators in registers.
template <int ROWS, int COLS>
static inline void tile(const float* x, const float* w, float* out, int64_t stride, int64_t K) {
  vec acc[ROWS][COLS] = {};
  int64_t k = 0;
  for (; k + LANES <= K; k += LANES) {
    vec b[COLS];
    for (int c = 0; c < COLS; c++) {
      b[c] = load(w + c * K + k);
      __builtin_prefetch(w + (c + COLS) * K + k);
    }
    for (int r = 0; r < ROWS; r++) {
      const vec a = load(x + r * K + k);
      for (int c = 0; c < COLS; c++) acc[r][c] += a * b[c];
    }
  }
  for (int r = 0; r < ROWS; r++) {
    float* const sums = out + r * stride;
    if constexpr (COLS == 4) totals(acc[r], sums);
    else for (int c = 0; c < COLS; c++) sums[c] = total(acc[r][c]);
    for (int c = 0; c < COLS; c++)
      for (int64_t j = k; j < K; j++) sums[c] += x[r * K + j] * w[c * K + j];
  }
}

// out[r, c] for any number of rows of x and COLS rows of w.
template <int COLS>
static inline void columns(const float* x, const float* w, float* out, int64_t rows, int64_t stride, int64_t K) {
  int64_t t = 0;
  for (; t + 8 <= rows; t += 8) tile<8, COLS>(x + t * K, w, out + t * stride, stride, K);
  x += t * K;
  out += t * stride;
  switch (rows - t) {
    case 1: tile<1, COLS>(x, w, out, stride, K); break;
    case 2: tile<2, COLS>(x, w, out, stride, K); break;
    case 3: tile<3, COLS>(x, w, out, stride, K); break;
    case 4: tile<4, COLS>(x, w, out, stride, K); break;
    case 5: tile<5, COLS>(x, w, out, stride, K); break;
    case 6: tile<6, COLS>(x, w, out, stride, K); break;
    case 7: tile<7, COLS>(x, w, out, stride, K); break;
  }
}
"""


_TRIAL = r"""
extern "C" void kernel(const float* x, float* out, int64_t n, int64_t threads) {
  #pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; i++) out[i] = 2 * x[i];
}
"""


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


@cache
def build(source: str, name: str, types: tuple[Any, ...]) -> Callable[..., None] | None:
    """A function of the library made of the shared prelude and `source`, by Inductor's own toolchain and disk cache.

    Args:
        name: the function's. types: of its arguments, for `ctypes`.

    Returns:
        None where it can't be built.
    """

    def load() -> ctypes.CDLL:
        from torch._inductor.codecache import CppCodeCache

        return CppCodeCache.load(_PRELUDE + source)

    if (library := _built(load)) is None:
        return None
    function = library[name]
    function.argtypes, function.restype = types, None
    return function


@cache
def bind(source: str, types: str) -> Callable[..., None] | None:
    """The function `kernel` of `source` with arguments of these types, pointers as tensors, as Inductor calls its own.

    A call by `ctypes` costs five times as much, and knows addresses only: it can't tell a tensor from a number.
    What a pointer leads to is checked at every call; behind a `void*`, by the caller: the kernel is told its strides.

    Returns:
        None where it can't be built.
    """

    def load() -> Callable[..., None]:
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        return CppPythonBindingsCodeCache.load_pybinding(types.split(", "), _PRELUDE + source)

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
