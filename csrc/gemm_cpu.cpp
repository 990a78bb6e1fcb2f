// out [M, N] fp32 (+)= a [M, K] b [K, N], bf16 factors, fp32 sums: the product that torch.mm rounds to bf16 on the CPU.
//
// vdpbf16ps multiplies pairs (k, k + 1) of 16 columns at once.  Both factors are therefore packed into panels [K / 2][PANEL] of pairs: the shorter
// side once for all threads, the longer one block by block, each by its thread.  The caller is kernels/cpu_gemm.py.

#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#define HAVE_KERNEL 1
#else
#define HAVE_KERNEL 0
#endif

namespace {

constexpr int64_t ROWS = 12, COLUMNS = 32;  // of a tile: 24 of the 32 registers, 14 loads for 24 products
constexpr int64_t DEPTH = 1024;             // of K at once: a tile's panels are 24 and 64 KiB.  512 and 2048 are as fast
constexpr int64_t BLOCK_ROWS = 20 * ROWS, BLOCK_COLUMNS = 8 * COLUMNS;  // of the longer side: half a MiB when packed, as fast as one MiB

int64_t ceil_to(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

struct Matrix {  // element (i, k) at data[i * item + k * depth]; fast where one of the strides is 1
  const uint16_t* data;
  int64_t item, depth;
};

#if HAVE_KERNEL
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

// Items [first, first + count) of m at depths [k, k + depth) -> panels [depth / 2][panel] of pairs.  Items that the last panel
// lacks stay as they are: they reach only sums that are not stored.  A last odd depth is filled up with zeros.
void pack(uint32_t* to, const Matrix& m, int64_t first, int64_t count, int64_t k, int64_t depth, int64_t panel) {
  const int64_t pairs = (depth + 1) / 2;
  for (int64_t p = 0; p < count; p += panel, to += pairs * panel) {
    const int64_t items = count - p < panel ? count - p : panel;
    const uint16_t* from = m.data + (first + p) * m.item + k * m.depth;
    for (int64_t pair = 0; pair < pairs; ++pair, from += 2 * m.depth) {
      const bool second = 2 * pair + 1 < depth;
      uint32_t* o = to + pair * panel;
      if (m.depth == 1) {
        for (int64_t i = 0; i < items; ++i) {
          uint16_t one;
          if (second) memcpy(o + i, from + i * m.item, 4);
          else memcpy(&one, from + i * m.item, 2), o[i] = one;
        }
      } else {
        for (int64_t i = 0; i < items; ++i) o[i] = from[i * m.item] | (second ? (uint32_t)from[i * m.item + m.depth] << 16 : 0);
      }
    }
  }
}

// One tile: out[rows, columns] (+)= panel a x panel b
void tile(float* out, int64_t stride, const uint32_t* a, const uint32_t* b, int64_t pairs, int64_t rows, int64_t columns, bool add) {
  const uint32_t real = columns >= 32 ? 0xffffffff : (1u << columns) - 1;
  const __mmask16 left = (__mmask16)real, right = (__mmask16)(real >> 16);
  __m512 sums[ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int r = 0; r < rows; ++r)
    for (int line = 0; line < 2; ++line) _mm_prefetch((const char*)(out + r * stride + 16 * line), _MM_HINT_T0);
  for (int64_t k = 0; k < pairs; ++k, a += ROWS, b += COLUMNS) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 16);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)a[r]);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], pair, b0);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], pair, b1);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    if (r >= rows) break;
    float* o = out + r * stride;
    if (add) {
      sums[r][0] = _mm512_add_ps(sums[r][0], _mm512_maskz_loadu_ps(left, o));
      sums[r][1] = _mm512_add_ps(sums[r][1], _mm512_maskz_loadu_ps(right, o + 16));
    }
    _mm512_mask_storeu_ps(o, left, sums[r][0]);
    _mm512_mask_storeu_ps(o + 16, right, sums[r][1]);
  }
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

}  // namespace

extern "C" {

int megatron_plugin_mm_fp32_runs() {
#if HAVE_KERNEL
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
#else
  return 0;
#endif
}

// Bytes of scratch, 64-aligned, for a product of this size
int64_t megatron_plugin_mm_fp32_scratch(int threads, int64_t M, int64_t N, int64_t K) {
  const int64_t depth = ceil_to(K < DEPTH ? K : DEPTH, 2), shorter = N <= M ? ceil_to(N, COLUMNS) : ceil_to(M, ROWS);
  return (shorter + threads * (N <= M ? BLOCK_ROWS : BLOCK_COLUMNS)) * depth * 2;
}

void megatron_plugin_mm_fp32(int threads, float* out, int64_t stride, const uint16_t* a, int64_t a_row, int64_t a_column, const uint16_t* b,
                             int64_t b_row, int64_t b_column, int64_t M, int64_t N, int64_t K, int add, uint32_t* scratch) {
#if HAVE_KERNEL
  const bool long_rows = N <= M;
  const Matrix rows = {a, a_row, a_column}, columns = {b, b_column, b_row};
  const Matrix &shorter = long_rows ? columns : rows, &longer = long_rows ? rows : columns;
  const int64_t short_size = long_rows ? N : M, long_size = long_rows ? M : N;
  const int64_t short_panel = long_rows ? COLUMNS : ROWS, long_panel = long_rows ? ROWS : COLUMNS;
  const int64_t block = long_rows ? BLOCK_ROWS : BLOCK_COLUMNS, most_pairs = (ceil_to(K < DEPTH ? K : DEPTH, 2)) / 2;
  uint32_t* own_blocks = scratch + ceil_to(short_size, short_panel) * most_pairs;
#pragma omp parallel num_threads(threads)
  for (int64_t k = 0; k < K; k += DEPTH) {
    const int64_t depth = K - k < DEPTH ? K - k : DEPTH, pairs = (depth + 1) / 2;
#pragma omp for schedule(static)
    for (int64_t s = 0; s < short_size; s += short_panel)
      pack(scratch + s * pairs, shorter, s, short_size - s < short_panel ? short_size - s : short_panel, k, depth, short_panel);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < long_size; first += block) {
#ifdef _OPENMP
      uint32_t* own = own_blocks + omp_get_thread_num() * block * most_pairs;
#else
      uint32_t* own = own_blocks;
#endif
      const int64_t count = long_size - first < block ? long_size - first : block;
      pack(own, longer, first, count, k, depth, long_panel);
      // the inner loop runs over the rows: one panel of b stays in the first-level cache
      const int64_t n0 = long_rows ? 0 : first, n1 = long_rows ? N : first + count, m0 = long_rows ? first : 0, m1 = long_rows ? first + count : M;
      const uint32_t *panels_a = long_rows ? own : scratch, *panels_b = long_rows ? scratch : own;
      for (int64_t n = n0; n < n1; n += COLUMNS)
        for (int64_t m = m0; m < m1; m += ROWS)
          tile(out + m * stride + n, stride, panels_a + (m - m0) * pairs, panels_b + (n - n0) * pairs, pairs, m1 - m < ROWS ? m1 - m : ROWS,
               n1 - n < COLUMNS ? n1 - n : COLUMNS, add || k > 0);
    }
  }
#endif
}
}
