// Statistics and gradient of one part of a row, for one instruction set: included once per set, after its simd_*.h, in its namespace.

constexpr int UNROLL = 4;
constexpr int64_t STEP = UNROLL * WIDTH;
// An fp32 accumulator takes 8 additions, their sums 4 more, and the rest is fp64.  Equal logits all round the same way: of an entropy of 8
// nats at V = 262144, 32 additions leave an error of 4.3e-6, this 1.1e-6, for 3 % of the time in the cache
constexpr int64_t RUN = 8 * STEP, BLOCK = 4 * RUN;
constexpr float HEADROOM = 4;         // a maximum this little above the reference (base-2 exponents) does not move it

// 2^x on [0, 1]: minimax with 2^0 = 1 exact.  Relative error 8e-8, in fp32 arithmetic 1.4e-7 with a mean of 4e-9: long sums stay unbiased
INLINE Vec exp2_fraction(Vec x) {
  Vec p = fma(fill(0.001867130515165627f), x, fill(0.009017029777169228f));
  p = fma(p, x, fill(0.05579991266131401f));
  p = fma(p, x, fill(0.24016444385051727f));
  p = fma(p, x, fill(0.6931512951850891f));
  return fma(p, x, fill(1.f));
}
INLINE Vec exp2(Vec y) { return scale(exp2_fraction(fraction(y)), y); }

// The first n < WIDTH elements at p; the other lanes are -inf
template <class T> INLINE Vec load_some(const T* p, int64_t n) {
  T lanes[WIDTH];
  for (T& lane : lanes) lane = minus_infinity<T>();
  memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T> INLINE void store_some(T* p, Vec x, int64_t n) {
  T lanes[WIDTH];
  store(lanes, x);
  memcpy(p, lanes, n * sizeof(T));
}

// Sums of a block: s = sum 2^y, t = sum y 2^y, and the raw maximum
struct BlockSums {
  Vec s, t, top;
};

template <class T> INLINE BlockSums sum_block(const T* x, int64_t n, const Exponent exponent) {
  BlockSums sums = {fill(0), fill(0), fill(-INFINITY)};
  Vec s[UNROLL], t[UNROLL], best[UNROLL];
#pragma GCC unroll 4
  for (int k = 0; k < UNROLL; ++k) s[k] = t[k] = fill(0), best[k] = fill(-INFINITY);
  auto add = [&](Vec v, int k) INLINE_LAMBDA {
    const Vec y = exponent(v), e = exp2(y);
    best[k] = top(v, best[k]);
    s[k] = s[k] + e;
    t[k] = fma(y, e, t[k]);
  };
  auto end_run = [&]() INLINE_LAMBDA {
    sums.s = sums.s + ((s[0] + s[1]) + (s[2] + s[3]));
    sums.t = sums.t + ((t[0] + t[1]) + (t[2] + t[3]));
#pragma GCC unroll 4
    for (int k = 0; k < UNROLL; ++k) s[k] = t[k] = fill(0);
  };
  int64_t i = 0;
  for (int64_t run = RUN; i + STEP <= n; i += STEP) {
    for (size_t byte = 0; byte < STEP * sizeof(T); byte += 64) PREFETCH((const char*)(x + i) + AHEAD + byte);
#pragma GCC unroll 2
    for (int k = 0; k < UNROLL; k += 2) {
      Vec v, w;
      load_pair(x + i + k * WIDTH, v, w);
      add(v, k), add(w, k + 1);
    }
    if (i + STEP == run) end_run(), run += RUN;
  }
  for (; i + WIDTH <= n; i += WIDTH) add(load(x + i), 0);
  if (i < n) add(load_some(x + i, n - i), 1);
  end_run();
  sums.top = top(top(best[0], best[1]), top(best[2], best[3]));
  return sums;
}

template <class T> float top_of(const T* x, int64_t n) {
  Vec best = fill(-INFINITY);
  int64_t i = 0;
  for (Vec v, w; i + 2 * WIDTH <= n; i += 2 * WIDTH) load_pair(x + i, v, w), best = top(v, top(w, best));
  for (; i + WIDTH <= n; i += WIDTH) best = top(load(x + i), best);
  if (i < n) best = top(load_some(x + i, n - i), best);
  return highest(best);
}

// One read of n columns.  The reference is the first block's maximum; a block that exceeds it by more than HEADROOM moves it and is done
// again (while it is still in the cache), so the maximum costs no pass of its own and no second exponential.
template <class T> Partial stats_part(const void* row, int64_t begin, int64_t n, float scale2) {
  const T* x = (const T*)row + begin;
  float highest_known = top_of(x, n < BLOCK ? n : BLOCK);
  Partial done = {highest_known * scale2 > EMPTY ? highest_known * scale2 : EMPTY, 0, 0};
  Sum s, t;
  for (int64_t i = 0; i < n;) {
    const int64_t columns = n - i < BLOCK ? n - i : BLOCK;
    const BlockSums sums = sum_block(x + i, columns, Exponent(scale2, done.m2));
    const float limit = (done.m2 + HEADROOM) / scale2;
    if (any_above(sums.top, limit > highest_known ? limit : highest_known)) {
      highest_known = highest(sums.top);
      done.s += s.total(), done.t += t.total();
      s = t = Sum();
      done = moved(done, highest_known * scale2);
    } else {
      s.add(sums.s), t.add(sums.t);
      i += columns;
    }
  }
  return {done.m2, done.s + s.total(), done.t + t.total()};
}

// 2^y (A + B y) of n columns, read once and written once; out may be the logits
template <class In, class Out> void grad_part(const void* row, void* out_row, int64_t begin, int64_t n, float scale2, double m2, float A, float B) {
  const In* x = (const In*)row + begin;
  Out* out = (Out*)out_row + begin;
  const Exponent exponent(scale2, m2);
  auto gradient = [&](Vec v) INLINE_LAMBDA {
    const Vec y = exponent(v);
    return exp2(y) * fma(fill(B), y, fill(A));
  };
  int64_t i = -((intptr_t)out / (intptr_t)sizeof(Out)) & (WIDTH - 1);  // up to a vector's boundary: stores that cross cache lines cost double
  if (i > n) i = n;
  if (i) store_some(out, gradient(load_some(x, i)), i);
  for (; i + STEP <= n; i += STEP) {
    for (size_t byte = 0; byte < STEP * sizeof(In); byte += 64) PREFETCH((const char*)(x + i) + AHEAD + byte);
#pragma GCC unroll 4
    for (int k = 0; k < UNROLL; ++k) store(out + i + k * WIDTH, gradient(load(x + i + k * WIDTH)));
  }
  for (; i + WIDTH <= n; i += WIDTH) store(out + i, gradient(load(x + i)));
  if (i < n) store_some(out + i, gradient(load_some(x + i, n - i)), n - i);
}

template <class T> float read_one(const void* row, int64_t column) { return load_some((const T*)row + column, 1)[0]; }
template <class T> void write_one(void* row, int64_t column, float value) { store_some((T*)row + column, fill(value), 1); }

const Kernels kernels = {
    {stats_part<float>, stats_part<bf16>, stats_part<half>},
    {{grad_part<float, float>, grad_part<float, bf16>, grad_part<float, half>},
     {grad_part<bf16, float>, grad_part<bf16, bf16>, grad_part<bf16, half>},
     {grad_part<half, float>, grad_part<half, bf16>, grad_part<half, half>}},
    {read_one<float>, read_one<bf16>, read_one<half>},
    {write_one<float>, write_one<bf16>, write_one<half>},
};
