"""The step's attention on a CPU: append keys and values, then attend over what is really there.

The same attention as `specdec.kernels.tree_attention`: a token sees the committed slots of its own sample and the
uncommitted ones of its ancestors and itself, as far back as the window reaches.
One task per (sample, key/value head) writes its own new entries and reads each key and value once for all query rows
of the group: no mask tensor, no unused capacity, no padding between samples.

The cache is handed over as a table of addresses, because a graph that owns a tensor copies it before a write it
cannot prove safe; addresses also let the cache grow without a new graph.

Source: EMS-SD, arXiv 2405.07542 (ragged lengths); SpecInfer, arXiv 2305.09781 (ancestor mask).
Letters: B samples, T tokens, H query heads, G key/value heads, D head dim, N nodes, W words.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from specdec.kernels.cpu import build
from specdec.kernels.library import register

_SOURCE = r"""
static inline vec exponential(vec x) {  // x <= 0; relative error below 2e-7
  const vec low = vec{} - 87.0f;
  x = x < low ? low : x;
  const vec magic = vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const vec t = x * 1.44269504088896341f + magic;
  const vec n = t - magic;
  const vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vec p = vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  ivec bits;
  std::memcpy(&bits, &t, sizeof(bits));
  bits = (bits + 127) << 23;
  vec scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

// In place: exp(x - max) over n values; returns their sum.
static float exponentials(float* x, int64_t n) {
  float top = -INFINITY, sum = 0;
  for (int64_t i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
  if (!(top > -INFINITY)) {
    std::memset(x, 0, n * sizeof(float));
    return 1;
  }
  vec sums = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vec e = exponential(load(x + i) - top);
    store(x + i, e);
    sums += e;
  }
  for (; i < n; i++) sum += (x[i] = std::exp(x[i] - top));
  return sum + total(sums);
}

// out[r, :] = sum_s p[r, s] v[s, :] for ROWS rows and CHUNKS * LANES columns. From `committed` on, weights of zero are
// other branches of the tree: their values stay out even if they are NaN.
template <int ROWS, int CHUNKS>
static inline void weigh(const float* p, const float* v, float* out, int64_t committed, int64_t n, int64_t D) {
  vec acc[ROWS][CHUNKS] = {};
  for (int64_t s = 0; s < committed; s++) {
    vec b[CHUNKS];
    for (int c = 0; c < CHUNKS; c++) b[c] = load(v + s * D + c * LANES);
    for (int r = 0; r < ROWS; r++) {
      const float weight = p[r * n + s];
      for (int c = 0; c < CHUNKS; c++) acc[r][c] += weight * b[c];
    }
  }
  for (int64_t s = committed; s < n; s++)
    for (int r = 0; r < ROWS; r++) {
      const float weight = p[r * n + s];
      if (weight == 0) continue;
      for (int c = 0; c < CHUNKS; c++) acc[r][c] += weight * load(v + s * D + c * LANES);
    }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < CHUNKS; c++) store(out + r * D + c * LANES, acc[r][c]);
}

template <int ROWS>
static inline void weigh_rows(const float* p, const float* v, float* out, int64_t committed, int64_t n, int64_t D) {
  int64_t d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES) weigh<ROWS, 4>(p, v + d, out + d, committed, n, D);
  for (; d + LANES <= D; d += LANES) weigh<ROWS, 1>(p, v + d, out + d, committed, n, D);
  for (; d < D; d++)
    for (int r = 0; r < ROWS; r++) {
      float sum = 0;
      for (int64_t s = 0; s < n; s++)
        if (s < committed || p[r * n + s] != 0) sum += p[r * n + s] * v[s * D + d];
      out[r * D + d] = sum;
    }
}

extern "C" void ragged_attention(
    const float* q, const float* k, const float* v, float* out, const int64_t* table, const int64_t* slot,
    const int64_t* starts, const int64_t* lengths, const int64_t* node, const int64_t* bits, const int64_t* depths,
    int64_t B, int64_t T, int64_t H, int64_t G, int64_t D, int64_t W, int64_t window, float scale, float softcap,
    int64_t threads) {
  float* const k_cache = reinterpret_cast<float*>(table[0]);
  float* const v_cache = reinterpret_cast<float*>(table[1]);
  const int64_t S = table[2], group = H / G;
  int64_t work = 0;
  for (int64_t b = 0; b < B; b++) work += (starts[b + 1] - starts[b]) * group * D * lengths[b];
  const bool parallel = B * G > 1 && work > 65536 * B;
  std::memset(out + starts[B] * H * D, 0, (T - starts[B]) * H * D * sizeof(float));  // tokens of no sample
  #pragma omp parallel for num_threads(threads) schedule(dynamic) if (parallel)
  for (int64_t task = 0; task < B * G; task++) {
    const int64_t b = task / G, g = task % G, length = lengths[b], from = starts[b];
    const int64_t R = starts[b + 1] - from, rows = group * R;
    const int64_t committed = length > 0 ? length : 0;
    float* const keys = k_cache + (g * B + b) * S * D;
    float* const values = v_cache + (g * B + b) * S * D;
    int64_t n = committed;
    for (int64_t r = 0; r < R; r++) {
      const int64_t t = from + r, end = length + node[t] + 1;
      std::memcpy(k_cache + (g * B * S + slot[t]) * D, k + (t * G + g) * D, D * sizeof(float));
      std::memcpy(v_cache + (g * B * S + slot[t]) * D, v + (t * G + g) * D, D * sizeof(float));
      n = end > n ? end : n;
    }
    std::vector<float> buffer(rows * (2 * D + n));
    float* const x = buffer.data();      // [rows, D], row = r * group + head
    float* const y = x + rows * D;       // [rows, D]
    float* const p = y + rows * D;       // [rows, n]
    for (int64_t r = 0; r < R; r++)
      for (int64_t i = 0; i < group * D; i++) x[r * group * D + i] = scale * q[((from + r) * H + g * group) * D + i];
    int64_t s = 0;
    for (; s + 4 <= n; s += 4) columns<4>(x, keys + s * D, p + s, rows, n, D);
    for (; s < n; s++) columns<1>(x, keys + s * D, p + s, rows, n, D);
    for (int64_t row = 0; row < rows; row++) {
      float* const score = p + row * n;
      const int64_t own = node[from + row / group], position = length + depths[own];
      if (softcap > 0)
        for (int64_t i = 0; i < n; i++) score[i] = softcap * std::tanh(score[i] / softcap);
      int64_t first = window > 0 && position - window + 1 > 0 ? position - window + 1 : 0;
      first = first < committed ? first : committed;
      for (int64_t i = 0; i < first; i++) score[i] = 0;
      for (int64_t i = committed; i < n; i++) {
        const int64_t other = i - length;
        const bool seen = (bits[own * W + other / 64] >> (other % 64)) & 1;
        if (!seen || (window > 0 && position - (length + depths[other]) >= window)) score[i] = -INFINITY;
      }
      const float sum = exponentials(score + first, n - first);
      for (int64_t i = first; i < n; i++) score[i] /= sum;
    }
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) weigh_rows<4>(p + row * n, values, y + row * D, committed, n, D);
    for (; row < rows; row++) weigh_rows<1>(p + row * n, values, y + row * D, committed, n, D);
    for (int64_t r = 0; r < R; r++)
      std::memcpy(out + ((from + r) * H + g * group) * D, y + r * group * D, group * D * sizeof(float));
  }
}
"""


@cache
def _kernel() -> ctypes._NamedFuncPointer:
    function = build(_SOURCE).ragged_attention
    number, real = ctypes.c_int64, ctypes.c_float
    function.argtypes = [ctypes.c_void_p] * 11 + [number] * 7 + [real, real, number]
    function.restype = None
    return function


def ragged_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    slot: Tensor,
    starts: Tensor,
    lengths: Tensor,
    node: Tensor,
    bits: Tensor,
    depths: Tensor,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Write the new keys and values into the cache behind `table`, and attend.

    Args:
        q: [T, H, D]; k, v: [T, G, D]; float32, contiguous.
        table: [3] int64: addresses of the contiguous float32 [G, B, S, D] keys and values, and S.
        slot: [T] int64, flat slot of each new token. lengths: [B] int64, committed entries.
        starts: [B + 1] int64, tokens `starts[b] .. starts[b + 1] - 1` are sample b's; those past the last are nobody's.
        node: [T] int64, the node of each token. bits: [N, W], depths: [N] int64, of the tree.
        window: keys farther back than this are not seen; 0 for no limit. softcap: 0 for none.

    Returns:
        [T, H, D] float32; zeros for tokens of no sample.
    """
    out = torch.empty_like(q)
    tensors = (q, k, v, out, table, slot, starts, lengths, node, bits, depths)
    _kernel()(
        *(t.data_ptr() for t in tensors), len(lengths), *q.shape[:2], k.shape[1], q.shape[2], bits.shape[1], window,
        scale, softcap, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _fake(q: Tensor, *args: object) -> Tensor:
    return torch.empty_like(q)


ragged_attention = register(
    "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor table, Tensor slot, Tensor starts, Tensor lengths, "
    "Tensor node, Tensor bits, Tensor depths, int window, float scale, float softcap) -> Tensor",
    cpu=ragged_attention_cpu,
    launcher=None,
    fake=_fake,
    inline=False,
)
