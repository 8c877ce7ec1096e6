"""What the C++ attention kernels share beyond `specdec.kernels.cpu`: exponentials, and sums of weighted values."""

from __future__ import annotations

SOURCE = r"""
static inline vec exponential(vec x) {  // x <= 0; relative error below 2e-7
  const vec low = vec{} - 87.0f;
  x = x < low ? low : x;
  const vec magic = vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const vec t = x * 1.44269504088896341f + magic;
  const vec n = t - magic;
  const vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vec p = vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  ivec bits;
  std::memcpy(&bits, &t, sizeof(bits));
  bits = (bits + 127) << 23;
  vec scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

// In place: exp(x - max) over n values; returns their sum.
static float exponentials(float* x, int64_t n) {
  float top = -INFINITY, sum = 0;
  for (int64_t i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
  if (!(top > -INFINITY)) {
    std::memset(x, 0, n * sizeof(float));
    return 1;
  }
  vec sums = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vec e = exponential(load(x + i) - top);
    store(x + i, e);
    sums += e;
  }
  for (; i < n; i++) sum += (x[i] = std::exp(x[i] - top));
  return sum + total(sums);
}

// out[r, :] = sum_s p[r, s] v[s, :] for ROWS rows and CHUNKS * LANES columns. From `committed` on, weights of zero are
// other branches of the tree: their values stay out even if they are NaN.
template <int ROWS, int CHUNKS>
static inline void weigh(const float* p, const float* v, float* out, int64_t committed, int64_t n, int64_t D) {
  vec acc[ROWS][CHUNKS] = {};
  for (int64_t s = 0; s < committed; s++) {
    vec b[CHUNKS];
    for (int c = 0; c < CHUNKS; c++) b[c] = load(v + s * D + c * LANES);
    for (int r = 0; r < ROWS; r++) {
      const float weight = p[r * n + s];
      for (int c = 0; c < CHUNKS; c++) acc[r][c] += weight * b[c];
    }
  }
  for (int64_t s = committed; s < n; s++)
    for (int r = 0; r < ROWS; r++) {
      const float weight = p[r * n + s];
      if (weight == 0) continue;
      for (int c = 0; c < CHUNKS; c++) acc[r][c] += weight * load(v + s * D + c * LANES);
    }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < CHUNKS; c++) store(out + r * D + c * LANES, acc[r][c]);
}

template <int ROWS>
static inline void weigh_rows(const float* p, const float* v, float* out, int64_t committed, int64_t n, int64_t D) {
  int64_t d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES) weigh<ROWS, 4>(p, v + d, out + d, committed, n, D);
  for (; d + LANES <= D; d += LANES) weigh<ROWS, 1>(p, v + d, out + d, committed, n, D);
  for (; d < D; d++)
    for (int r = 0; r < ROWS; r++) {
      float sum = 0;
      for (int64_t s = 0; s < n; s++)
        if (s < committed || p[r * n + s] != 0) sum += p[r * n + s] * v[s * D + d];
      out[r * D + d] = sum;
    }
}
"""
