// What the attention kernels share: the two products, and what lies between.
//
// Keys are taken sixteen at a time and values in blocks that stay in the cache, each block by all rows in turn: a long
// text is read from memory once. Rows go through in tiles whose sums stay in registers.
#pragma once

#include "common.h"

constexpr int64_t ENOUGH = 1 << 17;  // multiplications that are worth waking other threads for

static inline int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Room for n floats, this thread's own until it asks again. Never cleared.
static float* scratch(int64_t n) {
  static thread_local std::vector<float> room;
  if (int64_t(room.size()) < n + LANES) room.resize(n + LANES);
  const uintptr_t unit = sizeof(vec), address = reinterpret_cast<uintptr_t>(room.data());
  return reinterpret_cast<float*>((address + unit - 1) / unit * unit);
}

// What a task keeps of its rows, over n keys.
struct Rows {
  const int64_t stride, X;  // of scores, of queries
  float *turns, *p, *x, *y, *sums;  // [LANES, X]; [rows, stride]; [rows, X] and [rows, DV], zeros; [rows]

  Rows(int64_t rows, int64_t n, int64_t D, int64_t DV) : stride(whole(n, LANES) + LANES), X(whole(D, 4)) {
    turns = scratch(LANES * X + rows * (stride + X + DV + 1));
    p = turns + LANES * X;
    x = p + rows * stride;
    y = x + rows * X;
    sums = y + rows * DV;
    std::memset(x, 0, rows * (X + DV) * sizeof(float));
  }
};

// out = factor * x over n values.
static inline void scaled(const float* x, float* out, float factor, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(out + i, factor * load(x + i));
  for (; i < n; i++) out[i] = factor * x[i];
}

static inline vec repeated(const float* p) {  // four floats, over and over
#if defined(__AVX512F__)
  return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif defined(__AVX2__)
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#else
  return load(p);
#endif
}

// The dot products of ROWS rows with LANES keys, laid out in turns of four floats of each: a vector holds four partial
// sums of some of the keys, and four vectors those of all.
template <int ROWS>
static inline void tile(const float* x, const float* keys, float* out, int64_t stride, int64_t D) {
  vec acc[ROWS][4];
  for (auto& row : acc)
    for (vec& sums : row) sums = vec{};
  for (int64_t d = 0; d < D; d += 4) {
    vec b[4];
    for (int c = 0; c < 4; c++) b[c] = load(keys + d * LANES + c * LANES);
    for (int r = 0; r < ROWS; r++) {
      const vec a = repeated(x + r * D + d);
      for (int c = 0; c < 4; c++) acc[r][c] += a * b[c];
    }
  }
  for (int r = 0; r < ROWS; r++)
    store(out + r * stride, halved<1>(halved<2>(acc[r][0], acc[r][1]), halved<2>(acc[r][2], acc[r][3])));
}

// out[r, s] = x[r] . keys[s] for s < n, and anything from there to the next whole vector. The rows of x are padded with
// zeros to whole(D, 4); `turns` has room for LANES keys as long.
static void products(
    const float* x, const float* keys, float* out, float* turns, int64_t rows, int64_t stride, int64_t n, int64_t D) {
  const int64_t X = whole(D, 4);
  std::memset(turns, 0, LANES * X * sizeof(float));
  for (int64_t s = 0; s < n; s += LANES, keys += LANES * D, out += LANES) {
    for (int64_t c = 0; c < LANES && s + c < n; c++) {
      int64_t d = 0;
      for (; d + 4 <= D; d += 4) std::memcpy(turns + d * LANES + c * 4, keys + c * D + d, 4 * sizeof(float));
      for (; d < D; d++) turns[d / 4 * 4 * LANES + c * 4 + d % 4] = keys[c * D + d];
    }
    int64_t r = 0;
    for (; r + TALL <= rows; r += TALL) tile<TALL>(x + r * X, turns, out + r * stride, stride, X);
    for (; r + 2 <= rows; r += 2) tile<2>(x + r * X, turns, out + r * stride, stride, X);
    if (r < rows) tile<1>(x + r * X, turns, out + r * stride, stride, X);
  }
}

static inline vec exponential(vec x) {  // x <= 0; relative error below 2e-7; 0 below -87
  const ivec is_normal = !(x < -87.0f);
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
  return is_normal ? p * scale : vec{};
}

// In place: exp(x - max) over n values, which are padded with zeros to a whole vector; returns their sum, or 1 if all
// are zero, because x is -inf throughout.
static float exponentials(float* x, int64_t n) {
  for (int64_t i = n; i < whole(n, LANES); i++) x[i] = -INFINITY;
  vec tops = vec{} - INFINITY, sums = {};
  for (int64_t i = 0; i < n; i += LANES) {
    const vec v = load(x + i);
    tops = v > tops ? v : tops;
  }
  float top = -INFINITY;
  for (int i = 0; i < LANES; i++) top = tops[i] > top ? tops[i] : top;
  if (top == -INFINITY) top = 0;
  for (int64_t i = 0; i < n; i += LANES) {
    const vec e = exponential(load(x + i) - top);
    store(x + i, e);
    sums += e;
  }
  const float sum = total(sums);
  return sum == 0 ? 1 : sum;
}

// out[r, :] += sum_s p[r, s] v[s, :] for ROWS rows and CHUNKS * LANES columns. SPARSE: a value with weight zero stays
// out even if it is NaN.
template <int ROWS, int CHUNKS, bool SPARSE>
static inline void weigh(const float* p, const float* v, float* out, int64_t stride, int64_t n, int64_t D) {
  vec acc[ROWS][CHUNKS];
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < CHUNKS; c++) acc[r][c] = load(out + r * D + c * LANES);
  for (int64_t s = 0; s < n; s++) {
    vec b[CHUNKS];
    for (int c = 0; c < CHUNKS; c++) b[c] = load(v + s * D + c * LANES);
    for (int r = 0; r < ROWS; r++) {
      const float weight = p[r * stride + s];
      if (SPARSE && weight == 0) continue;
      for (int c = 0; c < CHUNKS; c++) acc[r][c] += weight * b[c];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < CHUNKS; c++) store(out + r * D + c * LANES, acc[r][c]);
}

template <int ROWS, bool SPARSE>
static inline void weigh_rows(const float* p, const float* v, float* out, int64_t stride, int64_t n, int64_t D) {
  int64_t d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES) weigh<ROWS, 4, SPARSE>(p, v + d, out + d, stride, n, D);
  for (; d + 2 * LANES <= D; d += 2 * LANES) weigh<ROWS, 2, SPARSE>(p, v + d, out + d, stride, n, D);
  for (; d + LANES <= D; d += LANES) weigh<ROWS, 1, SPARSE>(p, v + d, out + d, stride, n, D);
  for (; d < D; d++)
    for (int r = 0; r < ROWS; r++)
      for (int64_t s = 0; s < n; s++)
        if (!SPARSE || p[r * stride + s] != 0) out[r * D + d] += p[r * stride + s] * v[s * D + d];
}

// out[r, :] += sum_s p[r, s] values[s, :].
template <bool SPARSE>
static void weigh_values(
    const float* p, const float* values, float* out, int64_t rows, int64_t stride, int64_t n, int64_t D) {
  constexpr int64_t BLOCK = 64;
  for (int64_t s = 0; s < n; s += BLOCK) {
    const int64_t m = n - s < BLOCK ? n - s : BLOCK;
    const float *weights = p + s, *v = values + s * D;
    int64_t r = 0;
    for (; r + TALL <= rows; r += TALL) weigh_rows<TALL, SPARSE>(weights + r * stride, v, out + r * D, stride, m, D);
    for (; r + 2 <= rows; r += 2) weigh_rows<2, SPARSE>(weights + r * stride, v, out + r * D, stride, m, D);
    if (r < rows) weigh_rows<1, SPARSE>(weights + r * stride, v, out + r * D, stride, m, D);
  }
}
