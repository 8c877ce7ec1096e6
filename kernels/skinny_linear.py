"""Linear layers of a few rows on a CPU, at the speed of reading the weights once.

    out[t, n] = sum_k x[t, k] * weight[n, k]          t < T, T small

A decoding step multiplies T = 2 .. 32 rows with every weight of the model. The time should be that of streaming the
weights from memory; library matrix products take about twice that for such shapes. Here each block of weight rows is
read once and multiplied with up to eight rows of x held in registers. Every output is its own dot product in one fixed
order, so a row's result does not depend on how many rows sit beside it.

CPU only: the matrix product of a GPU is left to its library.
Letters: T rows, N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from specdec.kernels.library import register

MAX_ROWS = 16
"""Above this the product is bound by arithmetic and the library is faster."""

_SOURCE = r"""
#include <cstdint>
#include <cstring>

constexpr int LANES = 16;
typedef float vec __attribute__((vector_size(LANES * sizeof(float))));

static inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof(v)); return v; }

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

// ROWS rows of x times COLS rows of weight: ROWS * COLS accumulators stay in registers.
template <int ROWS, int COLS>
static inline void tile(const float* x, const float* w, float* out, int64_t N, int64_t K) {
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
      out[r * N + c] = sum;
    }
}

template <int COLS>
static inline void columns(const float* x, const float* w, float* out, int64_t T, int64_t N, int64_t K) {
  int64_t t = 0;
  for (; t + 8 <= T; t += 8) tile<8, COLS>(x + t * K, w, out + t * N, N, K);
  x += t * K;
  out += t * N;
  switch (T - t) {
    case 1: tile<1, COLS>(x, w, out, N, K); break;
    case 2: tile<2, COLS>(x, w, out, N, K); break;
    case 3: tile<3, COLS>(x, w, out, N, K); break;
    case 4: tile<4, COLS>(x, w, out, N, K); break;
    case 5: tile<5, COLS>(x, w, out, N, K); break;
    case 6: tile<6, COLS>(x, w, out, N, K); break;
    case 7: tile<7, COLS>(x, w, out, N, K); break;
  }
}

extern "C" void skinny_linear(
    const float* x, const float* w, float* out, int64_t T, int64_t N, int64_t K, int64_t threads) {
  #pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < (N + 3) / 4; block++) {
    const int64_t n = block * 4;
    if (n + 4 <= N) columns<4>(x, w + n * K, out + n, T, N, K);
    else for (int64_t i = n; i < N; i++) columns<1>(x, w + i * K, out + i, T, N, K);
  }
}
"""


@cache
def _kernel() -> ctypes._NamedFuncPointer:
    """The compiled function; built by Inductor's own C++ toolchain and cached on disk with its other kernels."""
    from torch._inductor.codecache import CppCodeCache

    function = CppCodeCache.load(_SOURCE).skinny_linear
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4
    function.restype = None
    return function


def skinny_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` of x [T, K] and weight [N, K]."""
    return x @ weight.T


def skinny_linear_cpu(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, reading the weights once.

    Args:
        x: [T, K] float32, contiguous. weight: [N, K] float32, contiguous.

    Returns:
        [T, N] float32.
    """
    n_rows, n_in = x.shape
    out = x.new_empty(n_rows, weight.shape[0])
    _kernel()(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), n_rows, weight.shape[0], n_in, torch.get_num_threads()
    )
    return out


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


skinny_linear = register(
    "skinny_linear(Tensor x, Tensor weight) -> Tensor",
    cpu=skinny_linear_cpu,
    cuda=skinny_linear_reference,
    fake=_fake,
    inline=False,
)
