#include "race.h"

#include <utility>

extern "C" void draw_children(
    const int64_t* ids, const float* probs, const int64_t* n_hubs, const int64_t* counts, const int64_t* seed,
    const int64_t* position, const int64_t* node, int64_t* out, int64_t rows, int64_t C, int64_t K, int64_t stream,
    int64_t shared) {
  std::vector<std::pair<float, int64_t>> entries;
  for (int64_t r = 0; r < rows; r++) {
    int64_t* const own = out + r * K;
    const int64_t count = std::min(counts[r], K), hubs = std::min(std::max<int64_t>(n_hubs[r], 0), count);
    const float* const p = probs + r * C;
    // The winners of a race of the entries from `begin` on, whose noise starts at index `offset`, into own[at ...].
    const auto winners = [&](int64_t begin, int64_t offset, int64_t at, int64_t n) {
      entries.clear();
      const auto use = [&](int64_t i, float score) {
        if (i - offset >= begin) entries.emplace_back(-score, i - offset);
      };
      if (shared)
        for (int64_t c = begin; c < C; c++) {
          if (!(p[c] > 0)) continue;
          const int64_t id = ids[r * C + c];
          const Words w = philox(seed[r], uint32_t(id / 4), uint32_t(position[r]), uint32_t(node[r]), uint32_t(stream));
          entries.emplace_back(-p[c] / exponential(w, id % 4), c);
        }
      else race(p - offset, offset, offset + C, seed[r], position[r], node[r], stream, use);
      const int64_t found = std::min<int64_t>(n, entries.size());
      std::partial_sort(entries.begin(), entries.begin() + found, entries.end());
      for (int64_t k = 0; k < found; k++) own[at + k] = entries[k].second;
    };
    std::fill(own, own + K, -1);
    for (int64_t k = 0; k < std::min(hubs, C); k++) own[k] = p[k] > 0 ? k : -1;
    if (n_hubs[r] >= 0) winners(hubs, 0, hubs, count - hubs);
    else
      for (int64_t k = 0; k < count; k++) winners(0, shared ? 0 : k * ((C + 3) / 4 * 4), k, 1);
  }
}
