// 8 fp32 lanes (AVX2, FMA, F16C).  Included inside a namespace, under a target pragma.
typedef __m256 Vec;
constexpr int WIDTH = 8;

INLINE Vec fill(float x) { return _mm256_set1_ps(x); }
INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE Vec load(const bf16* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16)); }
INLINE Vec load(const half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
template <class T> INLINE void load_pair(const T* p, Vec& v, Vec& w) { v = load(p), w = load(p + WIDTH); }
INLINE void load_pair(const bf16* p, Vec& v, Vec& w) {  // as in AVX-512
  const __m256i words = _mm256_loadu_si256((const __m256i*)p);
  v = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)), w = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xffff0000)));
}

INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
INLINE void store(half* p, Vec x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
INLINE void store(bf16* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));  // the carry of a NaN's payload could reach its sign
  const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Vec top(Vec x, Vec known) { return _mm256_max_ps(x, known); }       // a NaN in x is dropped: the second operand wins
INLINE Vec at_least(float low, Vec x) { return _mm256_max_ps(fill(low), x); }  // a NaN in x stays, for the same reason
INLINE bool any_above(Vec x, float limit) { return _mm256_movemask_ps(_mm256_cmp_ps(x, fill(limit), _CMP_GT_OQ)); }
INLINE float highest(Vec x) {
  float best = x[0];
  for (int i = 1; i < WIDTH; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

INLINE Vec fraction(Vec y) { return y - _mm256_floor_ps(y); }
INLINE Vec scale(Vec p, Vec y) {  // the power is put together from bits; below 2^-126 it would leave the exponent field: 0 there
  const __m256i whole = _mm256_cvtps_epi32(_mm256_floor_ps(y));
  const Vec power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(127)), 23));
  return _mm256_andnot_ps(_mm256_cmp_ps(y, fill(-126.f), _CMP_LT_OQ), p * power);
}

// x * scale2 - m2 in one rounding
struct Exponent {
  Vec scale2, minus_m2;
  INLINE Exponent(float scale2, double m2) : scale2(fill(scale2)), minus_m2(fill((float)-m2)) {}
  INLINE Vec operator()(Vec x) const { return at_least(FLOOR, fma(x, scale2, minus_m2)); }
};

// fp64 running sum of fp32 vectors
struct Sum {
  __m256d low, high;
  INLINE Sum() : low(_mm256_setzero_pd()), high(_mm256_setzero_pd()) {}  // an implicit constructor would not be compiled for the target
  INLINE void add(Vec x) {
    low += _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    high += _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
  }
  INLINE double total() const {
    const __m256d sum = low + high;
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
};
