#include "attention.h"

// Widens [first, end) to all slots that any of the rows sees.
template <typename M, typename Seen>
static void find_range(
    const M* mask, int64_t rows, int64_t stride, int64_t S, Seen seen, int64_t& first, int64_t& end) {
  for (int64_t r = 0; r < rows; r++) {
    const M* const m = mask + r * stride;
    int64_t s = 0;
    while (s < first && !seen(m[s])) s++;
    first = s;
    s = S;
    while (s > end && !seen(m[s - 1])) s--;
    end = s;
  }
}

template <typename M>
static void attend(
    const float* q, const float* k, const float* v, const M* mask, float* out, int64_t B, int64_t H, int64_t G,
    int64_t Q, int64_t S, int64_t D, int64_t DV, int64_t k_sample, int64_t k_head, int64_t v_sample, int64_t v_head,
    int64_t m_sample, int64_t m_head, int64_t m_query, float scale, int64_t threads) {
  const int64_t group = H / G, rows = group * Q;
  const auto seen = [](M m) { return sizeof(M) == 1 ? m != 0 : m > -INFINITY; };
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (B * G > 1 && B * H * Q * S * D > ENOUGH)
  for (int64_t task = 0; task < B * G; task++) {
    const int64_t b = task / G, g = task % G;
    const M* const own = mask + b * m_sample + g * group * m_head;
    int64_t first = S, end = 0;
    for (int64_t h = 0; h < (m_head ? group : 1); h++)
      find_range(own + h * m_head, m_query ? Q : 1, m_query, S, seen, first, end);
    const int64_t n = end > first ? end - first : 0;
    const float* const keys = k + b * k_sample + g * k_head + first * D;
    const float* const values = v + b * v_sample + g * v_head + first * DV;
    const auto [stride, X, turns, p, x, y, sums] = Rows(rows, n, D, DV);  // row = head * Q + query
    for (int64_t row = 0; row < rows; row++) scaled(q + ((b * H + g * group) * Q + row) * D, x + row * X, scale, D);
    products(x, keys, p, turns, rows, stride, n, D);
    for (int64_t row = 0; row < rows; row++) {
      float* const score = p + row * stride;
      const M* const m = own + (row / Q) * m_head + (row % Q) * m_query + first;
      for (int64_t i = 0; i < n; i++)
        score[i] = sizeof(M) == 1 ? (m[i] ? score[i] : -INFINITY) : score[i] + float(m[i]);
      sums[row] = exponentials(score, n);
    }
    weigh_values<false>(p, values, y, rows, stride, n, DV);
    for (int64_t row = 0; row < rows; row++)
      scaled(y + row * DV, out + ((b * Q + row % Q) * H + g * group + row / Q) * DV, 1 / sums[row], DV);
  }
}

extern "C" void kernel(
    const float* q, const void* k, const void* v, const void* mask, float* out, int64_t is_bool, int64_t B, int64_t H,
    int64_t G, int64_t Q, int64_t S, int64_t D, int64_t DV, int64_t k_sample, int64_t k_head, int64_t v_sample,
    int64_t v_head, int64_t m_sample, int64_t m_head, int64_t m_query, float scale, int64_t threads) {
  const auto call = [&](const auto* own) {
    attend(
        q, static_cast<const float*>(k), static_cast<const float*>(v), own, out, B, H, G, Q, S, D, DV, k_sample, k_head,
        v_sample, v_head, m_sample, m_head, m_query, scale, threads);
  };
  if (is_bool) call(static_cast<const uint8_t*>(mask));
  else call(static_cast<const float*>(mask));
}
