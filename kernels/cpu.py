"""What the hand-written C++ kernels share: vectors, a register tile of dot products, and how they are built.

The kernels serve decoding on a CPU, where a step has a few rows against large weights or long caches: everything is
read once, sums stay in registers, and every result is its own dot product in one fixed order, so that a row's value
does not depend on the rows beside it. Plain C++ with vector extensions: any instruction set, GCC or Clang.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from functools import cache

_PRELUDE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

constexpr int LANES = 16;
typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int ivec __attribute__((vector_size(LANES * sizeof(int))));

static inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof(v)); return v; }
static inline void store(float* p, const vec& v) { std::memcpy(p, &v, sizeof(v)); }

static inline float total(const vec& v) {
  typedef float half __attribute__((vector_size(LANES / 2 * sizeof(float))));
  typedef float quarter __attribute__((vector_size(LANES / 4 * sizeof(float))));
  half h[2];
  quarter q[2];
  std::memcpy(h, &v, sizeof(v));
  h[0] += h[1];
  std::memcpy(q, h, sizeof(h[0]));
  q[0] += q[1];
  return (q[0][0] + q[0][1]) + (q[0][2] + q[0][3]);
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
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < COLS; c++) {
      float sum = total(acc[r][c]);
      for (int64_t j = k; j < K; j++) sum += x[r * K + j] * w[c * K + j];
      out[r * stride + c] = sum;
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


@cache
def has_compiler() -> bool:
    """Whether a C++ compiler is at hand: Inductor needs one on a CPU, and so do these kernels."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name)


@cache
def build(source: str) -> ctypes.CDLL:
    """The library made of the shared prelude and `source`, by Inductor's own toolchain and disk cache."""
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(_PRELUDE + source)
