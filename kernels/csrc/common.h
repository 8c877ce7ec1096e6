// What the C++ kernels share: vectors, and a register tile of dot products. Every file of them begins with it.
#pragma once

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

static inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
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
    else
      for (int c = 0; c < COLS; c++) sums[c] = total(acc[r][c]);
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
