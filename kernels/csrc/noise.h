// Counter noise, number for number that of kernels/sampling/noise.py, where the constants are explained.
#pragma once

#include "common.h"

constexpr uint32_t ACCEPT = 1;
constexpr int64_t BLOCK_STREAM = 1 << 16;

struct Words { uint32_t x[4]; };

static inline Words philox(int64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(uint64_t(seed) >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

static inline float unit(uint32_t bits) {
  const float u = (float(bits) + 0.5f) * 0x1p-32f;
  return u < 1 - 0x1p-24f ? u : 1 - 0x1p-24f;
}

static inline float exponential(const Words& words, int i) { return -std::log1p(-unit(words.x[i])); }
