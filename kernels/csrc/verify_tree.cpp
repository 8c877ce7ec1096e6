#include "noise.h"
#include "weigh_children.h"

struct Walk {
  const float *logits, *log_total, *threshold, *support_probs;
  const int64_t *first, *parents, *depths, *first_child, *n_children, *inner, *places, *ids, *n_hubs;
  const float inverse_temperature;
  const int64_t n_nodes, N, C, V, root, last, seed, position;
  const bool sequence;
  int64_t* exit_ids;
  float *exit_weights, *room;

  bool accepts(int64_t node, float probability) const {
    const uint32_t at = uint32_t(position + depths[node] - 1);
    return unit(philox(seed, 0, at, uint32_t(node), ACCEPT).x[0]) < probability;
  }

  // The node below or at this one where the path ends, or -1.
  int64_t ends_at(int64_t node, float weight) const {
    const int64_t begin = first_child[node], K = std::min(n_children[node], n_nodes - begin), m = inner[node];
    if (K <= 0 || m < 0) return !sequence || node == 0 || accepts(node, weight) ? node : -1;
    const int64_t row = std::min(root + node, last), hubs = std::min(std::max<int64_t>(n_hubs[m], 0), K);
    float* const measure = room + depths[node] * (2 * C + N);
    float *const law = measure + C, *const weights = law + C;
    float outside = 1, exit_weight, scale;
    for (int64_t c = 0; c < C; c++) {
      const int64_t id = ids[m * C + c];
      const float q = support_probs[m * C + c], logit = logits[row * V + id], edge = threshold[row];
      const bool kept = q > 0 && (logit > edge || (logit == edge && id >= first[row]));
      measure[c] = kept ? std::exp(logit * inverse_temperature - log_total[row]) : 0;
      law[c] = q > 0 ? q : 0;
      outside -= measure[c];
    }
    weigh_children(
        n_hubs[m], weight, std::max(outside, 0.0f), places + begin - 1, K, C, law, measure, weights, &exit_weight,
        &scale);
    for (int64_t k = 0; k < K; k++) {
      const int64_t turn = (hubs + k) % K;
      if (!(sequence ? weights[turn] > 0 : accepts(begin + turn, weights[turn]))) continue;
      const int64_t end = ends_at(begin + turn, sequence ? weights[turn] : 1);
      if (end >= 0) return end;
    }
    if (sequence && node > 0 && !accepts(node, exit_weight)) return -1;
    for (int64_t c = 0; c < C; c++) {
      exit_ids[c] = support_probs[m * C + c] > 0 ? ids[m * C + c] : -1;
      exit_weights[c] = measure[c] / scale;
    }
    return node;
  }
};

extern "C" void kernel(
    const float* logits, const float* knobs, const float* log_total, const float* threshold, const int64_t* first,
    const int64_t* topology, const int64_t* places, const int64_t* n_nodes, const int64_t* support_ids,
    const float* support_probs, const int64_t* n_hubs, const int64_t* seed, const int64_t* position,
    const int64_t* starts, int64_t* path, int64_t* n_accepted, int64_t* row, int64_t* exit_ids, float* exit_weights,
    int64_t B, int64_t T, int64_t V, int64_t N, int64_t M, int64_t C, int64_t P, int64_t sequence, int64_t threads) {
  const int64_t *const parents = topology, *const depths = topology + N;
#pragma omp parallel for num_threads(threads) if (B > 8)
  for (int64_t b = 0; b < B; b++) {
    std::vector<float> room(P * (2 * C + N));
    std::fill(exit_ids + b * C, exit_ids + (b + 1) * C, -1);
    std::fill(exit_weights + b * C, exit_weights + (b + 1) * C, 0.0f);
    const Walk walk{logits, log_total, threshold, support_probs + b * M * C, first, parents, depths, topology + 2 * N,
        topology + 3 * N, topology + 4 * N, places + b * (N - 1), support_ids + b * M * C, n_hubs + b * M, knobs[0],
        n_nodes[b], N, C, V, starts[b], T - 1, seed[b], position[b], sequence != 0, exit_ids + b * C,
        exit_weights + b * C, room.data()};
    const int64_t end = walk.ends_at(0, 1);
    n_accepted[b] = depths[end];
    row[b] = std::min(starts[b] + end, T - 1);
    std::fill(path + b * P, path + (b + 1) * P, end);
    for (int64_t node = end; node >= 0; node = parents[node]) path[b * P + depths[node]] = node;
  }
}
