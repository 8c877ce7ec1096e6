// out[t, n] = x[t] . w[n] for T rows of x and N rows of w, K numbers each.
//
// A few rows of w are a panel. All rows of x go over it in tiles, whose sums stay in registers, while the next panel
// comes from memory: w is read once. Every sum adds its products in one order, by one instruction, whatever the tile: a
// row's result does not depend on how many rows there are.
#include "common.h"

// The largest tile: its sums, a vector of each row of w, and one of x fill the registers.
#if defined(__AVX512F__)
constexpr int TALLEST = 6, WIDEST = 4;
#else
constexpr int TALLEST = 4, WIDEST = 3;
#endif

// x * y + sum, rounded once. Left to itself, a compiler fuses in one tile and not in another.
static inline vec fused(const vec& x, const vec& y, const vec& sum) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(x, y, sum);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(x, y, sum);
#else
  return x * y + sum;
#endif
}

// Has v loaded once: GCC would load it again for each product, more than a core can.
static inline void in_register(vec& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__AVX__)
  asm("" : "+x"(v));
#endif
}

// What a tile fetches of the next panel, each line once by the first tile and the last: from memory into L2, since L1
// has too few places to wait in; and from there into L1. The numbers are the compiler's.
enum Fetch { NOTHING = 0, INTO_L2 = 2, INTO_L1 = 3 };

// out[r, c] = x[r] . w[c] for ROWS rows of x and COLS rows of w.
template <int ROWS, int COLS, Fetch FETCH>
static inline void tile(const float* x, const float* w, float* out, int64_t N, int64_t K) {
  vec acc[ROWS][COLS] = {};
  const auto add = [&](int64_t k, const auto& read) __attribute__((always_inline)) {
    vec b[COLS];
    for (int c = 0; c < COLS; c++) {
      b[c] = read(w + c * K + k);
      if constexpr (FETCH != NOTHING) __builtin_prefetch(w + (COLS + c) * K + k, 0, FETCH);
    }
    for (int r = 0; r < ROWS; r++) {
      vec a = read(x + r * K + k);
      in_register(a);
      for (int c = 0; c < COLS; c++) acc[r][c] = fused(a, b[c], acc[r][c]);
    }
  };
  int64_t k = 0;
  for (; k + LANES <= K; k += LANES) add(k, load);
  if (k < K)
    add(k, [=](const float* p) {  // what is left, and zeros
      vec v = {};
      std::memcpy(&v, p, (K - k) * sizeof(float));
      return v;
    });
  for (int r = 0; r < ROWS; r++) totals<COLS>(acc[r], out + r * N);
}

// The tile of `rows` rows, of ROWS at most.
template <int ROWS, int COLS, Fetch FETCH>
static inline void tile_of(int64_t rows, const float* x, const float* w, float* out, int64_t N, int64_t K) {
  if (rows == ROWS) tile<ROWS, COLS, FETCH>(x, w, out, N, K);
  else if constexpr (ROWS > 1) tile_of<ROWS - 1, COLS, FETCH>(rows, x, w, out, N, K);
}

// out[:, c] for COLS rows of w. Tiles are as equal as they can be: a short one takes little less time than a full one.
template <int COLS>
static void panel(const float* x, const float* w, float* out, int64_t T, int64_t N, int64_t K) {
  const int64_t tiles = (T + TALLEST - 1) / TALLEST;
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t t = T * i / tiles, rows = T * (i + 1) / tiles - t;
    const auto run = i == 0          ? tile_of<TALLEST, COLS, INTO_L2>
                     : i + 1 < tiles ? tile_of<TALLEST, COLS, NOTHING>
                                     : tile_of<TALLEST, COLS, INTO_L1>;
    run(rows, x + t * K, w, out + t * N, N, K);
  }
}

extern "C" void kernel(const float* x, const float* w, float* out, int64_t T, int64_t N, int64_t K, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < N; n += WIDEST) {
    if (n + WIDEST <= N) panel<WIDEST>(x, w + n * K, out + n, T, N, K);
    else
      for (int64_t i = n; i < N; i++) panel<1>(x, w + i * K, out + i, T, N, K);
  }
}
