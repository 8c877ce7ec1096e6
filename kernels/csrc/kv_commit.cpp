#include "common.h"

extern "C" void kv_commit(
    const int64_t* table, const int64_t* lengths, const int64_t* path, const int64_t* n_path, int64_t L, int64_t B,
    int64_t P, int64_t G, int64_t k_bytes, int64_t v_bytes, int64_t threads) {
  const bool parallel = L * B * P * G * (k_bytes + v_bytes) > 1 << 20;
#pragma omp parallel for num_threads(threads) schedule(static) if (parallel)
  for (int64_t task = 0; task < L * B * 2; task++) {
    const int64_t l = task / (2 * B), b = task / 2 % B, S = table[3 * l + 2], bytes = task % 2 ? v_bytes : k_bytes;
    for (int64_t g = 0; g < G; g++) {
      char* const root = reinterpret_cast<char*>(table[3 * l + task % 2]) + ((g * B + b) * S + lengths[b]) * bytes;
      for (int64_t j = 0; j < n_path[b]; j++) {
        const int64_t node = path[b * P + j];
        if (node != j) std::memcpy(root + j * bytes, root + node * bytes, bytes);
      }
    }
  }
}
