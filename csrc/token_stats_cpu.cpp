// The two row kernels on the CPU: one read of the logits -> partials of the softmax; one read, one write -> their gradient.
// The mathematics is in kernels/README.md, the contract in kernels/eager.py, the caller is kernels/cpu.py.
//
// A plain C interface without torch's headers: it compiles in seconds and does not depend on torch's ABI.
// The same source is compiled for several instruction sets and chosen from at run time, so the object runs on any CPU of its architecture.
// T rows, V columns; a row is cut into parts of fixed width, so that its result depends neither on T nor on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline)) inline
#define INLINE_LAMBDA __attribute__((always_inline))
#define PREFETCH(address) __builtin_prefetch(address)
#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define TARGET_BEGIN(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_END PRAGMA(clang attribute pop)
#else
#define TARGET_BEGIN(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define TARGET_END PRAGMA(GCC pop_options)
#endif

namespace {

struct bf16 { uint16_t bits; };
struct half { uint16_t bits; };
template <class T> T minus_infinity();
template <> float minus_infinity() { return -INFINITY; }
template <> bf16 minus_infinity() { return {0xff80}; }
template <> half minus_infinity() { return {0xfc00}; }

// The lowest reference: finite where all columns are -inf, so that differences with it are, and no lower where they are masks of -1e10, say:
// a reference is rounded to 24 bits, and at -2^32 a half is a factor of 2^128
constexpr float EMPTY = -0x1p31f;
constexpr float FLOOR = -1000.f;  // 2^-1000 is exactly 0 in fp32: -inf columns then contribute 0 instead of 0 * inf
constexpr double LN2 = 0.6931471805599453;
constexpr int AHEAD = 4096;       // bytes to prefetch ahead: bf16 statistics take 5.3 ms without, 4.6 at 1024, 4.1 here (512 x 151936)

// Of some columns: m2, the reference subtracted from their base-2 exponents y; s = sum 2^y; t = sum y 2^y
struct Partial {
  float m2;
  double s, t;
};

// The same sums around another reference
Partial moved(Partial p, float m2) {
  double shift = (double)p.m2 - m2;
  if (shift < -1e4) shift = -1e4;
  const double factor = std::exp2(shift);
  return {m2, p.s * factor, (p.t + shift * p.s) * factor};
}

// What an instruction set provides, by dtype: 0 fp32, 1 bf16, 2 fp16
struct Kernels {
  Partial (*stats_part[3])(const void* row, int64_t begin, int64_t n, float scale2);
  void (*grad_part[3][3])(const void* row, void* out, int64_t begin, int64_t n, float scale2, double m2, float A, float B);
  float (*read_one[3])(const void* row, int64_t column);
  void (*write_one[3])(void* row, int64_t column, float value);
};

namespace portable {
#include "simd_portable.h"
#include "row_kernels.h"
}

#if defined(__x86_64__)
TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
#include "simd_avx2.h"
#include "row_kernels.h"
}
TARGET_END

TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl")
namespace avx512 {
#define NATIVE_BF16 0
#include "simd_avx512.h"
#include "row_kernels.h"
#undef NATIVE_BF16
}
TARGET_END

TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16")
namespace avx512_bf16 {
#define NATIVE_BF16 1
#include "simd_avx512.h"
#include "row_kernels.h"
#undef NATIVE_BF16
}
TARGET_END

const Kernels* const SETS[] = {&portable::kernels, &avx2::kernels, &avx512::kernels, &avx512_bf16::kernels};
#else
const Kernels* const SETS[] = {&portable::kernels};
#endif

constexpr int ITEM_SIZE[] = {4, 2, 2};

}  // namespace

extern "C" {

// The best instruction set this CPU has, an index into cpu.ISAS
int megatron_plugin_isa() {
#if defined(__x86_64__)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? (__builtin_cpu_supports("avx512bf16") ? 3 : 2) : v3 ? 1 : 0;
#else
  return 0;
#endif
}

// out[row] = (m2, s, t, z_y), t in nats, z_y = -inf where the label is not among the V columns; (0, 1, 0, 0) for a masked row, which is
// not read.  stride in elements; scratch [T * parts of V].
void megatron_plugin_stats(int isa, int threads, const char* logits, int dtype, int64_t T, int64_t V, int64_t stride, int64_t part,
                           const int64_t* labels, int64_t vocab_start, int64_t ignore_index, float scale2, void* scratch, float* out) {
  const Kernels& kernels = *SETS[isa];
  const int64_t parts = (V + part - 1) / part, row_bytes = stride * ITEM_SIZE[dtype];
  Partial* partials = (Partial*)scratch;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < T * parts; ++item) {
      const int64_t row = item / parts, begin = item % parts * part, n = V - begin < part ? V - begin : part;
      if (labels[row] != ignore_index) partials[item] = kernels.stats_part[dtype](logits + row * row_bytes, begin, n, scale2);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < T; ++row) {
      float* o = out + row * 4;
      if (labels[row] == ignore_index) {
        o[0] = 0, o[1] = 1, o[2] = 0, o[3] = 0;
        continue;
      }
      Partial sum = {EMPTY, 0, 0};
      for (int64_t i = row * parts; i < (row + 1) * parts; ++i)
        if (partials[i].m2 > sum.m2) sum.m2 = partials[i].m2;
      for (int64_t i = row * parts; i < (row + 1) * parts; ++i) {
        const Partial p = moved(partials[i], sum.m2);
        sum.s += p.s, sum.t += p.t;
      }
      const int64_t y = labels[row] - vocab_start;
      o[0] = sum.m2, o[1] = (float)sum.s, o[2] = (float)(sum.t * LN2);
      o[3] = y >= 0 && y < V ? kernels.read_one[dtype](logits + row * row_bytes, y) : -INFINITY;
    }
  }
}

// out[row, v] = dF/dlogits from rows (m2, s, logp, H) [T, 4] and grads (a, b, c) [T, 3]; 0 in a masked row, in a row whose a, b, c are 0
// (neither is read) and from column `valid` on.  out may be the logits.
void megatron_plugin_grad(int isa, int threads, const char* logits, int dtype, int64_t stride, char* out, int out_dtype, int64_t out_stride,
                          int64_t T, int64_t V, int64_t valid, int64_t part, const int64_t* labels, const double* rows, const double* grads,
                          int64_t vocab_start, int64_t ignore_index, float scale2, double inv_temperature) {
  const Kernels& kernels = *SETS[isa];
  const int64_t parts = (V + part - 1) / part;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t item = 0; item < T * parts; ++item) {
    const int64_t row = item / parts, begin = item % parts * part, n = V - begin < part ? V - begin : part;
    const char* x = logits + row * stride * ITEM_SIZE[dtype];
    char* dx = out + row * out_stride * ITEM_SIZE[out_dtype];
    const double m2 = rows[row * 4], s = rows[row * 4 + 1], logp = rows[row * 4 + 2], entropy = rows[row * 4 + 3];
    const double b = grads[row * 3 + 1], c = grads[row * 3 + 2];
    double a = grads[row * 3];
    const bool live = labels[row] != ignore_index && (a != 0 || b != 0 || c != 0);
    int64_t computed = live ? valid - begin : 0;
    computed = computed < 0 ? 0 : computed > n ? n : computed;
    memset(dx + (begin + computed) * ITEM_SIZE[out_dtype], 0, (n - computed) * ITEM_SIZE[out_dtype]);
    if (!computed) continue;

    if (std::isnan(logp)) a = logp;  // a stray label must not turn into a finite push against the whole vocabulary
    const double p_scale = inv_temperature / s;
    const float A = (float)(-(a - c + b * (entropy - LN2 * std::log2(s))) * p_scale), B = (float)(-b * LN2 * p_scale);
    kernels.grad_part[dtype][out_dtype](x, dx, begin, computed, scale2, m2, A, B);
    const int64_t y = labels[row] - vocab_start;
    if (y < begin || y >= begin + computed) continue;
    const double p = std::exp(logp), spread = p == 0 ? 0 : p * (c - b * (logp + entropy));
    kernels.write_one[out_dtype](dx, y, (float)((a * -std::expm1(logp) + spread) * inv_temperature));
  }
}
}
