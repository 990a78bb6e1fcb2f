// 4 fp32 lanes in the vector extension of GCC and Clang: any CPU (SSE2, NEON, ...).  Included inside a namespace.
typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));   // what a comparison gives: -1 or 0 per lane
typedef uint16_t Words __attribute__((vector_size(8)));
typedef double Wide __attribute__((vector_size(32)));
constexpr int WIDTH = 4;

INLINE Vec fill(float x) { return Vec{x, x, x, x}; }
INLINE Bits fill_bits(uint32_t x) { return Bits{x, x, x, x}; }
INLINE Vec choose(Mask which, Vec yes, Vec no) { return (Vec)((which & (Mask)yes) | (~which & (Mask)no)); }
INLINE Bits choose(Mask which, Bits yes, Bits no) { return ((Bits)which & yes) | (~(Bits)which & no); }
template <class V, class T> INLINE V raw(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE Vec load(const float* p) { return raw<Vec>(p); }
INLINE Vec load(const bf16* p) { return (Vec)(__builtin_convertvector(raw<Words>(p), Bits) << 16); }
INLINE Vec load(const half* p) {
  const Bits bits = __builtin_convertvector(raw<Words>(p), Bits), magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  const Vec finite = (Vec)magnitude * fill(0x1p112f);  // exponent bias 127 - 15; half's denormals come out right too
  return (Vec)(choose((bits & 0x7c00) == 0x7c00, magnitude | 0x7f800000, (Bits)finite) | sign);
}
template <class T> INLINE void load_pair(const T* p, Vec& v, Vec& w) { v = load(p), w = load(p + WIDTH); }

INLINE void put(uint16_t* p, Bits words) {
  const Words w = __builtin_convertvector(words, Words);
  memcpy(p, &w, sizeof w);
}
INLINE void store(float* p, Vec x) { memcpy(p, &x, sizeof x); }
INLINE void store(bf16* p, Vec x) {
  const Bits bits = (Bits)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  put(&p->bits, choose(x != x, fill_bits(0x7fc0), rounded));  // the carry of a NaN's payload could reach its sign
}
INLINE void store(half* p, Vec x) {
  const Bits bits = (Bits)x, sign = bits & 0x80000000, size = bits ^ sign;
  const Bits normal = (size - 0x37fff001 + ((size >> 13) & 1)) >> 13;        // exponent bias 15 - 127, and half an ulp less one bit
  const Bits denormal = (Bits)((Vec)size + fill(0.5f)) - (Bits)fill(0.5f);  // the adder rounds at 2^-24, half's smallest step
  Bits word = choose((Mask)(size < 0x38800000), denormal, normal);
  word = choose((Mask)(size >= 0x477ff000), fill_bits(0x7c00), word);       // 65520 and more round to infinity
  put(&p->bits, choose(x != x, fill_bits(0x7e00), word) | (sign >> 16));
}

INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
INLINE Vec top(Vec x, Vec known) { return choose(x > known, x, known); }               // a NaN in x is dropped
INLINE Vec at_least(float low, Vec x) { return choose(x < fill(low), fill(low), x); }  // a NaN in x stays
INLINE float highest(Vec x) {
  float best = x[0];
  for (int i = 1; i < WIDTH; ++i) best = x[i] > best ? x[i] : best;
  return best;
}
INLINE bool any_above(Vec x, float limit) { return highest(x) > limit; }

INLINE Vec shifted(Vec y) { return (y - fill(0.5f)) + fill(0x1.8p23f); }  // rounds to a whole number and leaves it in the low bits
INLINE Vec fraction(Vec y) { return y - (shifted(y) - fill(0x1.8p23f)); }
INLINE Vec scale(Vec p, Vec y) {  // the power is put together from bits; below 2^-126 it would leave the exponent field: 0 there
  const Vec power = (Vec)(((Bits)shifted(y) << 23) + 0x3f800000);
  return choose(y < fill(-126.f), fill(0.f), p * power);
}

// x * scale2 - m2 without a fused multiply-add: the subtraction comes first, where it is exact; what rounding the reference moved comes last
struct Exponent {
  Vec reference, scale2, moved;
  INLINE Exponent(float scale2, double m2) : scale2(fill(scale2)) {
    const float r = (float)(m2 / scale2);
    reference = fill(r);
    moved = fill((float)((double)r * scale2 - m2));
  }
  INLINE Vec operator()(Vec x) const { return at_least(FLOOR, (x - reference) * scale2 + moved); }
};

// fp64 running sum of fp32 vectors
struct Sum {
  Wide sum = {0, 0, 0, 0};
  INLINE void add(Vec x) { sum += __builtin_convertvector(x, Wide); }
  INLINE double total() const { return (sum[0] + sum[1]) + (sum[2] + sum[3]); }
};
