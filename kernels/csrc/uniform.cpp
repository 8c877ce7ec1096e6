#include "noise.h"

extern "C" void uniform(
    const int64_t* seed, const int64_t* position, const int64_t* node, float* out, int64_t n, int64_t stream) {
  for (int64_t i = 0; i < n; i++)
    out[i] = unit(philox(seed[i], 0, uint32_t(position[i]), uint32_t(node[i]), uint32_t(stream)).x[0]);
}
