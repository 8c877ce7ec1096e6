#include "race.h"

static inline float sum(const float* p, int64_t n) {
  vec lanes[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int j = 0; j < 4; j++) lanes[j] += load(p + i + j * LANES);
  float rest = 0;
  for (; i < n; i++) rest += p[i];
  return total((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + rest;
}

extern "C" void draw(
    const float* probs, const int64_t* seed, const int64_t* position, const int64_t* node, int64_t* out, int64_t rows,
    int64_t size, int64_t stride, int64_t stream, int64_t width) {
  const int64_t n_blocks = (size + width - 1) / width;
  std::vector<float> mass(n_blocks);
  for (int64_t r = 0; r < rows; r++) {
    const float* p = probs + r * stride;
    float best = -1;
    int64_t winner = 0;
    const auto use = [&](int64_t i, float score) {
      if (score > best) best = score, winner = i;
    };
    if (n_blocks > 1) {
      for (int64_t b = 0; b < n_blocks; b++) mass[b] = sum(p + b * width, std::min(width, size - b * width));
      race(mass.data(), 0, n_blocks, seed[r], position[r], node[r], stream + BLOCK_STREAM, use);
    }
    const int64_t begin = winner * width;
    best = -1;
    winner = begin;
    race(p, begin, std::min(begin + width, size), seed[r], position[r], node[r], stream, use);
    out[r] = winner;
  }
}
