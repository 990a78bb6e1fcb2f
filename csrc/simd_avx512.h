// 16 fp32 lanes.  Included inside a namespace, under a target pragma; NATIVE_BF16 is 1 where the CPU rounds to bf16 itself.
typedef __m512 Vec;
constexpr int WIDTH = 16;

INLINE Vec fill(float x) { return _mm512_set1_ps(x); }
INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE Vec load(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)); }
INLINE Vec load(const half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// 2 WIDTH elements in any order: of two neighbours in a 32-bit word, one is already where fp32 wants it
template <class T> INLINE void load_pair(const T* p, Vec& v, Vec& w) { v = load(p), w = load(p + WIDTH); }
INLINE void load_pair(const bf16* p, Vec& v, Vec& w) {
  const __m512i words = _mm512_loadu_si512(p);
  v = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), w = _mm512_castsi512_ps(_mm512_and_epi32(words, _mm512_set1_epi32(0xffff0000)));
}

INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
INLINE void store(half* p, Vec x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
INLINE void store(bf16* p, Vec x) {
#if NATIVE_BF16
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);  // the carry of a NaN's payload could reach its sign
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0))));
#endif
}

INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Vec top(Vec x, Vec known) { return _mm512_max_ps(x, known); }       // a NaN in x is dropped: the second operand wins
INLINE Vec at_least(float low, Vec x) { return _mm512_max_ps(fill(low), x); }  // a NaN in x stays, for the same reason
INLINE bool any_above(Vec x, float limit) { return _mm512_cmp_ps_mask(x, fill(limit), _CMP_GT_OQ); }
INLINE float highest(Vec x) { return _mm512_reduce_max_ps(x); }

INLINE Vec fraction(Vec y) { return _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INLINE Vec scale(Vec p, Vec y) { return _mm512_scalef_ps(p, y); }  // floors y itself; exactly 0 at FLOOR

// x * scale2 - m2 in one rounding
struct Exponent {
  Vec scale2, minus_m2;
  INLINE Exponent(float scale2, double m2) : scale2(fill(scale2)), minus_m2(fill((float)-m2)) {}
  INLINE Vec operator()(Vec x) const { return at_least(FLOOR, fma(x, scale2, minus_m2)); }
};

// fp64 running sum of fp32 vectors
struct Sum {
  __m512d low, high;
  INLINE Sum() : low(_mm512_setzero_pd()), high(_mm512_setzero_pd()) {}  // an implicit constructor would not be compiled for the target
  INLINE void add(Vec x) {
    low += _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    high += _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  }
  INLINE double total() const { return _mm512_reduce_add_pd(low + high); }
};
