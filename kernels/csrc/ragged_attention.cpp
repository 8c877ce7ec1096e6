#include "attention.h"

extern "C" void kernel(
    const float* q, const float* k, const float* v, float* out, const int64_t* table, const int64_t* slot,
    const int64_t* starts, const int64_t* lengths, const int64_t* node, const int64_t* bits, const int64_t* depths,
    int64_t B, int64_t T, int64_t H, int64_t G, int64_t D, int64_t N, int64_t W, int64_t per_sample, int64_t S,
    int64_t window, float scale, float softcap, int64_t threads) {
  float* const k_cache = reinterpret_cast<float*>(table[0]);
  float* const v_cache = reinterpret_cast<float*>(table[1]);
  const int64_t group = H / G;
  int64_t work = 0;
  for (int64_t b = 0; b < B; b++) work += (starts[b + 1] - starts[b]) * H * D * lengths[b];
  std::memset(out + starts[B] * H * D, 0, (T - starts[B]) * H * D * sizeof(float));  // tokens of no sample
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (B * G > 1 && work > ENOUGH)
  for (int64_t task = 0; task < B * G; task++) {
    const int64_t b = task / G, g = task % G, length = lengths[b], from = starts[b];
    const int64_t R = starts[b + 1] - from, rows = group * R;
    const int64_t committed = length > 0 ? length : 0;
    const int64_t* const words = bits + per_sample * b * N * W;  // of this sample's tree, or of all samples'
    const int64_t* const depth = depths + per_sample * b * N;
    float* const keys = k_cache + (g * B + b) * S * D;
    float* const values = v_cache + (g * B + b) * S * D;
    int64_t n = committed;
    for (int64_t r = 0; r < R; r++) {
      const int64_t t = from + r, end = length + node[t] + 1;
      std::memcpy(k_cache + (g * B * S + slot[t]) * D, k + (t * G + g) * D, D * sizeof(float));
      std::memcpy(v_cache + (g * B * S + slot[t]) * D, v + (t * G + g) * D, D * sizeof(float));
      n = end > n ? end : n;
    }
    const auto [stride, X, turns, p, x, y, sums] = Rows(rows, n, D, D);  // row = r * group + head
    for (int64_t row = 0; row < rows; row++)
      scaled(q + ((from + row / group) * H + g * group + row % group) * D, x + row * X, scale, D);
    products(x, keys, p, turns, rows, stride, n, D);
    int64_t some = committed, all = 0;  // keys before `some` no row sees, those from `all` to `committed` all rows do
    for (int64_t row = 0; row < rows; row++) {
      float* const score = p + row * stride;
      const int64_t own = node[from + row / group], position = length + depth[own];
      if (softcap > 0)
        for (int64_t i = 0; i < n; i++) score[i] = softcap * std::tanh(score[i] / softcap);
      int64_t first = window > 0 && position - window + 1 > 0 ? position - window + 1 : 0;
      first = first < committed ? first : committed;
      for (int64_t i = 0; i < first; i++) score[i] = 0;
      some = first < some ? first : some;
      all = first > all ? first : all;
      for (int64_t i = committed; i < n; i++) {
        const int64_t other = i - length;
        const bool seen = (words[own * W + other / 64] >> (other % 64)) & 1;
        if (!seen || (window > 0 && position - (length + depth[other]) >= window)) score[i] = -INFINITY;
      }
      sums[row] = exponentials(score + first, n - first);
    }
    weigh_values<true>(p + some, values + some * D, y, rows, stride, all - some, D);  // edges of windows
    weigh_values<false>(p + all, values + all * D, y, rows, stride, committed - all, D);
    weigh_values<true>(p + committed, values + committed * D, y, rows, stride, n - committed, D);  // of own ancestors
    for (int64_t row = 0; row < rows; row++)
      scaled(y + row * D, out + ((from + row / group) * H + g * group + row % group) * D, 1 / sums[row], D);
  }
}
