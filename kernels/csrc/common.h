// What the C++ kernels share: vectors and their sums. Every file of them begins with it.
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

// out[c] = total(v[c]) of COUNT vectors, four at most.
template <int COUNT>
static inline void totals(const vec* v, float* out) {
  const vec pairs[] = {halved<LANES / 2>(v[0], v[1 % COUNT]), halved<LANES / 2>(v[2 % COUNT], v[3 % COUNT])};
  const vec sums = folded<LANES / 8>(halved<LANES / 4>(pairs[0], pairs[1]));
  std::memcpy(out, &sums, COUNT * sizeof(float));
}
