#include "common.h"

extern "C" void kernel(const float* x, const float* w, float* out, int64_t T, int64_t N, int64_t K, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < (N + 3) / 4; block++) {
    const int64_t n = block * 4;
    if (n + 4 <= N) columns<4>(x, w + n * K, out + n, T, N, K);
    else
      for (int64_t i = n; i < N; i++) columns<1>(x, w + i * K, out + i, T, N, K);
  }
}
