// The exponential race of kernels/sampling/draw.py.
#pragma once

#include "noise.h"

#include <algorithm>

// `use(i, score)` for the entries begin ... end - 1 that can win, in order: their score is p[i] / E_i.
template <typename Use>
static inline void race(
    const float* p, int64_t begin, int64_t end, int64_t seed, int64_t position, int64_t node, int64_t stream, Use use) {
  for (int64_t i = begin; i < end; i += 4) {
    bool any = false;
    for (int64_t j = i; j < std::min(i + 4, end); j++) any |= p[j] > 0;
    if (!any) continue;  // truncated laws are mostly zeros
    const Words w = philox(seed, uint32_t(i / 4), uint32_t(position), uint32_t(node), uint32_t(stream));
    for (int64_t j = i; j < std::min(i + 4, end); j++)
      if (p[j] > 0) use(j, p[j] / exponential(w, j - i));
  }
}
