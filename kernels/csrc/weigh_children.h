// The rule of kernels/verify/tree_rules.py.
#pragma once

#include "common.h"

#include <algorithm>

static void renormalise(float* law, int64_t C) {
  float mass = 0;
  for (int64_t c = 0; c < C; c++) mass += law[c];
  for (int64_t c = 0; mass > 0 && c < C; c++) law[c] /= mass;
}

// As `weigh_children_reference` for one node. `measure` holds p of the support, 0 where q is 0, and becomes the
// residual; `law` holds q and is used up.
static void weigh_children(
    int64_t n_hubs, float weight, float outside, const int64_t* places, int64_t K, int64_t C, float* law,
    float* measure, float* weights, float* exit_weight, float* scale) {
  const int64_t hubs = std::min(std::max<int64_t>(n_hubs, 0), K);
  for (int64_t c = 0; c < C; c++) measure[c] *= weight;
  for (int64_t k = 0; k < hubs; k++)
    if (places[k] >= 0) law[places[k]] = 0;
  if (hubs > 0) renormalise(law, C);
  float total = *scale = weight;
  for (int64_t turn = 0; turn < K; turn++) {
    const int64_t k = (hubs + turn) % K, x = places[k];
    weights[k] = 0;
    if (x < 0) continue;
    const bool is_hub = k < hubs;
    const auto left = [&](int64_t c) { return std::max(measure[c] - (is_hub ? float(c == x) : law[c]), 0.0f); };
    const float proposed = is_hub ? 1 : law[x];
    if (measure[x] > 0 && proposed > 0) weights[k] = std::min(measure[x] / proposed, 1.0f);
    float mass = *scale * outside;
    for (int64_t c = 0; c < C; c++) mass += left(c);
    const float failed = mass + (1 - total);
    if (failed > 0) {
      for (int64_t c = 0; c < C; c++) measure[c] = left(c) / failed;
      *scale /= failed;
      total = mass / failed;
    }
    if (n_hubs >= 0 && !is_hub) {
      law[x] = 0;
      renormalise(law, C);
    }
  }
  *exit_weight = total;
}
