/* The operations of a decoding step on a CPU, where torch's calls cost more than their arithmetic: norms, RoPE, SwiGLU,
 * GELU, attention over the key-value cache, LoRA, products of few rows with a weight, and the most likely tokens; and the tape
 * that runs many of them by one call.
 *
 * Built and called by decode.py, whose docstrings say what each computes. Everything sums in fp32. dtype: FP32 or BF16; a value
 * that torch would round to bf16 on its way is rounded here too. */

#include "common.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors of 64 bytes pass between inlined functions only

typedef struct {          // of an attention; the fields of decode.py's Shape
  const int64_t *lengths; // (B) tokens of each prompt
  const int64_t *stored;  // (B) of them in the cache: the last ones
  const int32_t *writers; // (R, capacity) the sequence whose token stands in a slot, NULL: the own one
  int64_t B, n, H, H_kv, T, D, P, capacity, new_tokens, window;  // window 0: none
} Shape;

struct Job {
  int dtype;
  const void *x, *y, *z;  // inputs, in the order of each function's arguments
  void *out;
  int64_t M, N, K;
  const void *weight, *bias;  // (N, K) and (N); or a norm's (K)
  float eps;
  const void *cos, *sin;  // (rows or 1, T, turned / 2)
  int64_t H, T, D, turned, row_stride, head_stride, token_stride, table_stride;
  const Shape *shape;
  void *prompt_k, *prompt_v, *new_k, *new_v;  // (B, H_kv, P, D) and (R, H_kv, capacity, D)
  int *failed;
  int64_t *ids;           // (M, K) of the most likely tokens
  const float *A, *B;     // of LoRA: (rank, K) and (N, rank)
  float *low, scaling;    // (M, rank)
  int64_t rank;
};

enum { BATCH = 256 };  // logits that are looked at together
enum { SERIAL = 1 << 13 };  // values below which a second thread costs more than it saves

INLINE float rounded(float f, int dtype) { return dtype == BF16 ? from_bf16(to_bf16(f)) : f; }

/* exp, to 2 units in the last place; what would overflow or vanish ends at 2e38 and 1e-38. NaN stays NaN. */
INLINE float exp_of(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1) * float_of((bits_of(shifted) - 0x4B400000u + 127u) << 23);
}

/* A function written once, with the dtype as a constant, and vectorised by the compiler for each instruction set. */
#define EACH_DTYPE(name) \
  if (j->dtype == BF16) name(j, begin, end, BF16); \
  else name(j, begin, end, FP32);
#if X86
#define EACH_LEVEL(name) \
  static void name##_portable(const Job *j, int64_t begin, int64_t end) { EACH_DTYPE(name) } \
  AVX2_TARGET static void name##_avx2(const Job *j, int64_t begin, int64_t end) { EACH_DTYPE(name) } \
  AVX512_TARGET __attribute__((target("prefer-vector-width=512"))) \
  static void name##_avx512(const Job *j, int64_t begin, int64_t end) { EACH_DTYPE(name) } \
  static Work name##_for(int level) { \
    return level >= AVX512 ? name##_avx512 : level >= AVX2 ? name##_avx2 : name##_portable; \
  }
#else
#define EACH_LEVEL(name) \
  static void name##_portable(const Job *j, int64_t begin, int64_t end) { EACH_DTYPE(name) } \
  static Work name##_for(int level) { return (void)level, name##_portable; }
#endif

int decode_level(void) { return highest_level(); }

// --- RMSNorm: rows begin .. end of x (M, K) ---------------------------------------------------------------------

INLINE void norm(const Job *j, int64_t begin, int64_t end, int dtype) {
  const void *const x = j->x, *const weight = j->weight;
  void *const out = j->out;
  const int64_t K = j->K;
  for (int64_t m = begin; m < end; m++) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < K; k++) sum += load(x, dtype, m * K + k) * load(x, dtype, m * K + k);
    const float scale = 1 / sqrtf(sum / K + j->eps);
#pragma omp simd
    for (int64_t k = 0; k < K; k++)
      store(out, dtype, m * K + k, load(weight, dtype, k) * rounded(load(x, dtype, m * K + k) * scale, dtype));
  }
}
EACH_LEVEL(norm)

void decode_norm(int level, int threads, int dtype, const void *x, const void *weight, void *out, int64_t M, int64_t K,
                 float eps) {
  Job job = {.dtype = dtype, .x = x, .weight = weight, .out = out, .M = M, .K = K, .eps = eps};
  parallel(norm_for(level), &job, M, M * K < SERIAL ? 1 : threads);
}

// --- LayerNorm: (x - mean) / sqrt(variance + eps) * weight + bias, rows begin .. end of x (M, K) -----------------------------

INLINE void center(const Job *j, int64_t begin, int64_t end, int dtype) {
  const void *const x = j->x, *const weight = j->weight, *const bias = j->bias;
  void *const out = j->out;
  const int64_t K = j->K;
  for (int64_t m = begin; m < end; m++) {
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < K; k++) sum += load(x, dtype, m * K + k);
    const float mean = sum / K;
#pragma omp simd reduction(+ : squares)
    for (int64_t k = 0; k < K; k++) {
      const float value = load(x, dtype, m * K + k) - mean;
      squares += value * value;
    }
    const float scale = 1 / sqrtf(squares / K + j->eps);
#pragma omp simd
    for (int64_t k = 0; k < K; k++)
      store(out, dtype, m * K + k, (load(x, dtype, m * K + k) - mean) * scale * load(weight, dtype, k) + load(bias, dtype, k));
  }
}
EACH_LEVEL(center)

void decode_layer_norm(int level, int threads, int dtype, const void *x, const void *weight, const void *bias, void *out,
                       int64_t M, int64_t K, float eps) {
  Job job = {.dtype = dtype, .x = x, .weight = weight, .bias = bias, .out = out, .M = M, .K = K, .eps = eps};
  parallel(center_for(level), &job, M, M * K < SERIAL ? 1 : threads);
}

// --- x (M, K) + y, which repeats after N elements: elements begin .. end; out may be x -------------------------------------

INLINE void add(const Job *j, int64_t begin, int64_t end, int dtype) {
  const void *const x = j->x, *const y = j->y;
  void *const out = j->out;
  for (int64_t i = begin, stop; i < end; i = stop) {
    const int64_t at = i % j->N, back = i - at;
    stop = end < back + j->N ? end : back + j->N;
#pragma omp simd
    for (int64_t k = i; k < stop; k++) store(out, dtype, k, load(x, dtype, k) + load(y, dtype, k - back));
  }
}
EACH_LEVEL(add)

void decode_add(int level, int threads, int dtype, const void *x, const void *y, void *out, int64_t count, int64_t N) {
  Job job = {.dtype = dtype, .x = x, .y = y, .out = out, .N = N};
  parallel(add_for(level), &job, count, count < SERIAL ? 1 : threads);
}

// --- RoPE of the first `turned` of D dims: tokens begin .. end of x (rows, H, T, D), by strides; out lies as (rows, T, H, D)

INLINE void turn(const Job *j, int64_t begin, int64_t end, int dtype) {
  const int64_t half = j->turned / 2, size = dtype == BF16 ? 2 : 4;
  for (int64_t token = begin; token < end; token++) {
    const int64_t row = token / j->T, t = token % j->T, table = (row * j->table_stride + t * half) * size;
    const char *const cos = (const char *)j->cos + table, *const sin = (const char *)j->sin + table;
    for (int64_t h = 0; h < j->H; h++) {
      const char *x = (const char *)j->x + (row * j->row_stride + h * j->head_stride + t * j->token_stride) * size;
      char *out = (char *)j->out + (token * j->H + h) * j->D * size;
#pragma omp simd
      for (int64_t d = 0; d < half; d++) {
        const float c = load(cos, dtype, d), s = load(sin, dtype, d);
        const float low = load(x, dtype, d), high = load(x, dtype, half + d);
        store(out, dtype, d, rounded(low * c, dtype) - rounded(high * s, dtype));
        store(out, dtype, half + d, rounded(high * c, dtype) + rounded(low * s, dtype));
      }
      memcpy(out + 2 * half * size, x + 2 * half * size, (j->D - 2 * half) * size);
    }
  }
}
EACH_LEVEL(turn)

void decode_turn(int level, int threads, int dtype, const void *x, const void *cos, const void *sin, void *out, int64_t rows,
                 int64_t H, int64_t T, int64_t D, int64_t turned, int64_t row_stride, int64_t head_stride,
                 int64_t token_stride, int64_t table_stride) {
  Job job = {.dtype = dtype, .x = x, .cos = cos, .sin = sin, .out = out, .H = H, .T = T, .D = D, .turned = turned,
             .row_stride = row_stride, .head_stride = head_stride, .token_stride = token_stride,
             .table_stride = table_stride};
  parallel(turn_for(level), &job, rows * T, rows * T * H * D < SERIAL ? 1 : threads);
}

// --- SwiGLU: silu(x) * y, elements begin .. end -------------------------------------------------------------------

INLINE void gate(const Job *j, int64_t begin, int64_t end, int dtype) {
  const void *const x = j->x, *const y = j->y;
  void *const out = j->out;
#pragma omp simd
  for (int64_t i = begin; i < end; i++) {
    const float value = load(x, dtype, i);
    store(out, dtype, i, rounded(value / (1 + exp_of(-value)), dtype) * load(y, dtype, i));
  }
}
EACH_LEVEL(gate)

void decode_gate(int level, int threads, int dtype, const void *x, const void *y, void *out, int64_t count) {
  Job job = {.dtype = dtype, .x = x, .y = y, .out = out};
  parallel(gate_for(level), &job, count, count < SERIAL ? 1 : threads);
}

// --- GELU with tanh: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), elements begin .. end ------------------------

INLINE void gelu(const Job *j, int64_t begin, int64_t end, int dtype) {
#pragma omp simd
  for (int64_t i = begin; i < end; i++) {
    const float x = load(j->x, dtype, i), inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    store(j->out, dtype, i, x - x / (1 + exp_of(2 * inner)));  // (1 + tanh(y)) / 2 is 1 - 1 / (1 + exp(2 y))
  }
}
EACH_LEVEL(gelu)

void decode_gelu(int level, int threads, int dtype, const void *x, void *out, int64_t count) {
  Job job = {.dtype = dtype, .x = x, .out = out};
  parallel(gelu_for(level), &job, count, count < SERIAL ? 1 : threads);
}

// --- attention: pairs of a prompt and a key-value head -------------------------------------------------------------

/* Sixteen numbers, in whatever registers the instruction set has. */
typedef float Float16 __attribute__((vector_size(64)));
typedef float Float8 __attribute__((vector_size(32)));
typedef float Float4 __attribute__((vector_size(16)));
typedef uint32_t Bits16 __attribute__((vector_size(64)));
typedef uint16_t Half16 __attribute__((vector_size(32)));

INLINE Float16 load_16(const void *x, int dtype, int64_t i) {
  Float16 v;
  if (dtype == BF16) {
    Half16 h;
    memcpy(&h, (const uint16_t *)x + i, sizeof h);
    const Bits16 bits = __builtin_convertvector(h, Bits16) << 16;
    memcpy(&v, &bits, sizeof v);
  } else memcpy(&v, (const float *)x + i, sizeof v);
  return v;
}

INLINE float sum_16(Float16 v) {
  Float8 a, b;
  memcpy(&a, &v, sizeof a);
  memcpy(&b, (const char *)&v + sizeof a, sizeof b);
  a += b;
  Float4 c, d;
  memcpy(&c, &a, sizeof c);
  memcpy(&d, (const char *)&a + sizeof c, sizeof d);
  c += d;
  return (c[0] + c[2]) + (c[1] + c[3]);
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Bits16){__VA_ARGS__})
#endif

/* Groups of eight, four, two or one neighbours: the even ones of a and of b in turn (LOW), or the odd ones (HIGH). */
#define LOW_8(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define HIGH_8(a, b) SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define LOW_4(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#define HIGH_4(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define LOW_2(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH_2(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define LOW_1(a, b) SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#define HIGH_1(a, b) SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)

/* The sums of the 16 elements of each of four vectors, each in the order of the others. */
INLINE Float4 sums_16(const Float16 *v) {
  const Float16 ab = LOW_1(v[0], v[1]) + HIGH_1(v[0], v[1]), cd = LOW_1(v[2], v[3]) + HIGH_1(v[2], v[3]);
  const Float16 all = LOW_2(ab, cd) + HIGH_2(ab, cd);  // parts of the four sums, four times
  Float8 half[2];
  memcpy(half, &all, sizeof half);
  half[0] += half[1];
  Float4 quarter[2];
  memcpy(quarter, half, sizeof quarter);
  return quarter[0] + quarter[1];
}

/* Thirty-two numbers, of bf16 those at even places and those at odd ones: that takes a shift and a mask. Queries and sums have
 * them so, too. */
INLINE void load_32(const void *x, int dtype, int64_t i, Float16 two[2]) {
  if (dtype == FP32) {
    memcpy(two, (const float *)x + i, 2 * sizeof *two);
    return;
  }
  Bits16 bits[2];
  memcpy(bits, (const uint16_t *)x + i, sizeof *bits);
  bits[1] = bits[0] & 0xFFFF0000;
  bits[0] <<= 16;
  memcpy(two, bits, sizeof bits);
}

/* As to_bf16 rounds, in the upper halves. */
INLINE Bits16 rounded_16(Float16 v) {
  Bits16 bits;
  memcpy(&bits, &v, sizeof bits);
  const Bits16 is_nan = (Bits16)(v != v);  // all ones where it is: must not wrap around
  return (is_nan & 0x7FC00000) | (~is_nan & ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000));
}

INLINE void store_32(void *out, int dtype, int64_t i, const Float16 two[2]) {
  if (dtype == FP32) {
    memcpy((float *)out + i, two, 2 * sizeof *two);
    return;
  }
  const Bits16 bits = rounded_16(two[0]) >> 16 | rounded_16(two[1]);
  memcpy((uint16_t *)out + i, &bits, sizeof bits);
}

/* In tails, fused where the code says it: a loop for one query and the same for two would be rounded in two ways. */
#define fused __builtin_fmaf

/* scores[i * stride + k] = query i of q (queries, D) times the key at place[k] of `cache`: up to four keys. */
INLINE void score_four(const float *q, const int queries, const void *cache, int dtype, const int64_t *place, int count,
                       int64_t D, float *scores, int64_t stride) {
  int64_t at[4], d = 0;
  for (int k = 0; k < 4; k++) at[k] = place[k < count ? k : count - 1];
  Float16 sums[2][4] = {0}, keys[4][2];
  float rest[2][4] = {0};
  for (; d + 32 <= D; d += 32) {
    for (int k = 0; k < 4; k++) load_32(cache, dtype, at[k] + d, keys[k]);
    for (int i = 0; i < queries; i++)
      for (int half = 0; half < 2; half++) {
        const Float16 own = load_16(q, FP32, i * D + d + 16 * half);
        for (int k = 0; k < 4; k++) sums[i][k] += own * keys[k][half];
      }
  }
  for (; d + 16 <= D; d += 16)
    for (int i = 0; i < queries; i++)
      for (int k = 0; k < 4; k++) sums[i][k] += load_16(q, FP32, i * D + d) * load_16(cache, dtype, at[k] + d);
  for (; d < D; d++)
    for (int i = 0; i < queries; i++)
      for (int k = 0; k < 4; k++) rest[i][k] = fused(q[i * D + d], load(cache, dtype, at[k] + d), rest[i][k]);
  for (int i = 0; i < queries; i++) {
    const Float4 four = sums_16(sums[i]);
    for (int k = 0; k < count; k++) scores[i * stride + k] = four[k] + rest[i][k];
  }
}

/* The same for all keys and queries; what a query gets does not depend on how many there are. */
INLINE void add_scores(const float *q, int64_t queries, const void *cache, int dtype, const int64_t *place, int64_t count,
                       int64_t D, float *scores, int64_t stride) {
  for (int64_t k = 0; k < count; k += 4) {
    const int keys = count - k < 4 ? (int)(count - k) : 4;
    int64_t i = 0;
    for (; i + 2 <= queries; i += 2)
      score_four(q + i * D, 2, cache, dtype, place + k, keys, D, scores + i * stride + k, stride);
    if (i < queries) score_four(q + i * D, 1, cache, dtype, place + k, keys, D, scores + i * stride + k, stride);
  }
}

/* sums (queries, D) += shares[i * stride + k] * the value at place[k] of `cache`. */
INLINE void add_values_of(const float *shares, int64_t stride, const int queries, const void *cache, int dtype,
                          const int64_t *place, int64_t count, int64_t D, float *sums) {
  int64_t d = 0;
  for (; d + 64 <= D; d += 64) {
    Float16 sum[2][4], value[2];
    for (int i = 0; i < queries; i++) memcpy(sum[i], sums + i * D + d, sizeof sum[i]);
    for (int64_t k = 0; k < count; k++)
      for (int part = 0; part < 4; part++) {
        if (part % 2 == 0) load_32(cache, dtype, place[k] + d + 16 * part, value);
        for (int i = 0; i < queries; i++) sum[i][part] += shares[i * stride + k] * value[part % 2];
      }
    for (int i = 0; i < queries; i++) memcpy(sums + i * D + d, sum[i], sizeof sum[i]);
  }
  for (; d + 32 <= D; d += 32)
    for (int64_t k = 0; k < count; k++) {
      Float16 value[2];
      load_32(cache, dtype, place[k] + d, value);
      for (int i = 0; i < queries; i++)
        for (int half = 0; half < 2; half++) {
          const Float16 sum = load_16(sums, FP32, i * D + d + 16 * half) + shares[i * stride + k] * value[half];
          memcpy(sums + i * D + d + 16 * half, &sum, sizeof sum);
        }
    }
  for (int i = 0; i < queries; i++)
    for (int64_t k = 0; k < count; k++)
      for (int64_t e = d; e < D; e++)
        sums[i * D + e] = fused(shares[i * stride + k], load(cache, dtype, place[k] + e), sums[i * D + e]);
}

INLINE void add_values(const float *shares, int64_t stride, int64_t queries, const void *cache, int dtype,
                       const int64_t *place, int64_t count, int64_t D, float *sums) {
  int64_t i = 0;
  for (; i + 2 <= queries; i += 2)
    add_values_of(shares + i * stride, stride, 2, cache, dtype, place, count, D, sums + i * D);
  if (i < queries) add_values_of(shares + i * stride, stride, 1, cache, dtype, place, count, D, sums + i * D);
}

enum { TOGETHER = 128 };  // values of a prompt that stay in the L1 cache while each sequence's queries meet them

INLINE void attend_pairs(const Job *j, int64_t begin, int64_t end, int dtype, const int64_t D) {
  const Shape s = *j->shape;
  const int64_t n = s.n, T = s.T, G = s.H / s.H_kv, each = T * G, Q = n * each;
  const int64_t last = s.new_tokens + T, size = dtype == BF16 ? 2 : 4;
  const int64_t oldest = s.window && s.new_tokens - s.window + 1 > 0 ? s.new_tokens - s.window + 1 : 0;
  const int64_t keys = s.P + last - oldest, head = s.capacity * D * size;  // bytes of a head's new keys, or values
  int64_t *place = malloc((size_t)(s.P + n * (last - oldest)) * sizeof *place);  // of keys and values, from their head's first
  float *scratch = malloc((size_t)(Q * (2 * D + keys)) * sizeof *scratch);
  if (!place || !scratch) {
    free(place), free(scratch);
    *j->failed = 1;
    return;
  }
  float *q = scratch, *sums = q + Q * D, *scores = sums + Q * D;  // (Q, D), (Q, D), (Q, keys); Q is (n, T, G)
  const float root = 1 / sqrtf((float)D);
  for (int64_t pair = begin; pair < end; pair++) {
    const int64_t b = pair / s.H_kv, h = pair % s.H_kv, stored = s.stored[b], fresh = last - oldest;
    const char *const prompt_k = (char *)j->prompt_k + pair * s.P * D * size, *const new_k = (char *)j->new_k + h * head;
    const char *const prompt_v = (char *)j->prompt_v + pair * s.P * D * size, *const new_v = (char *)j->new_v + h * head;
    for (int64_t i = 0; i < n * T; i++) {  // store the new tokens, and read the queries
      const int64_t row = b * n + i / T, from = ((row * T + i % T) * s.H_kv + h) * D * size;
      const int64_t to = (row * s.H_kv + h) * head + (s.new_tokens + i % T) % s.capacity * D * size;
      memcpy((char *)j->new_k + to, (const char *)j->y + from, D * size);
      memcpy((char *)j->new_v + to, (const char *)j->z + from, D * size);
      for (int64_t g = 0; g < G; g++) {
        const int64_t x = ((row * T + i % T) * s.H + h * G + g) * D;
        float *own = q + (i * G + g) * D;
        int64_t d = 0;
        for (; d + 32 <= D; d += 32) {
          Float16 two[2];
          load_32(j->x, dtype, x + d, two);
          two[0] *= root, two[1] *= root;
          memcpy(own + d, two, sizeof two);
        }
        for (; d < D; d++) own[d] = load(j->x, dtype, x + d) * root;
      }
    }
    if (pair == begin || h == 0) {  // the same for all heads
      for (int64_t k = 0; k < stored; k++) place[k] = k * D;
      for (int64_t i = 0; i < n; i++) {
        const int64_t row = b * n + i;
        int64_t slot = oldest % s.capacity;
        for (int64_t k = oldest; k < last; k++) {
          const int64_t writer = s.writers && k < s.new_tokens ? s.writers[row * s.capacity + slot] : row;
          place[stored + i * fresh + k - oldest] = (writer * s.H_kv * s.capacity + slot) * D;
          slot = slot + 1 == s.capacity ? 0 : slot + 1;
        }
      }
    }
    add_scores(q, Q, prompt_k, dtype, place, stored, D, scores, keys);
    for (int64_t i = 0; i < n; i++)
      add_scores(q + i * each * D, each, new_k, dtype, place + stored + i * fresh, fresh, D,
                 scores + i * each * keys + stored, keys);
    for (int64_t i = 0; i < Q; i++) {
      float *score = scores + i * keys, highest = -INFINITY, total = 0;
      const int64_t position = s.new_tokens + i / G % T;  // among the new tokens; this query sees [first, after)
      const int64_t after = stored + position + 1 - oldest, back = position - s.window + 1;
      const int64_t first = !s.window || stored + back < 0 ? 0 : back < 0 ? stored + back : stored + back - oldest;
      for (int64_t k = 0; k < first; k++) score[k] = 0;
      for (int64_t k = after; k < stored + fresh; k++) score[k] = 0;
#pragma omp simd reduction(max : highest)
      for (int64_t k = first; k < after; k++) highest = score[k] > highest ? score[k] : highest;
#pragma omp simd reduction(+ : total)
      for (int64_t k = first; k < after; k++) {
        score[k] = exp_of(score[k] - highest);
        total += score[k];
      }
      const float share = 1 / total;
      for (int64_t k = first; k < after; k++) score[k] *= share;
    }
    memset(sums, 0, Q * D * sizeof *sums);
    for (int64_t k = 0; k < stored; k += TOGETHER)
      add_values(scores + k, keys, Q, prompt_v, dtype, place + k, stored - k < TOGETHER ? stored - k : TOGETHER, D, sums);
    for (int64_t i = 0; i < n; i++)
      add_values(scores + i * each * keys + stored, keys, each, new_v, dtype, place + stored + i * fresh, fresh, D,
                 sums + i * each * D);
    for (int64_t i = 0; i < Q; i++) {
      const int64_t out = ((b * n * T + i / G) * s.H + h * G + i % G) * D;
      int64_t d = 0;
      for (; d + 32 <= D; d += 32) {
        Float16 two[2];
        memcpy(two, sums + i * D + d, sizeof two);
        store_32(j->out, dtype, out + d, two);
      }
      for (; d < D; d++) store(j->out, dtype, out + d, sums[i * D + d]);
    }
  }
  free(place), free(scratch);
}

INLINE void attend(const Job *j, int64_t begin, int64_t end, int dtype) {
  if (j->shape->D == 64) attend_pairs(j, begin, end, dtype, 64);  // a known size is twice as fast
  else if (j->shape->D == 128) attend_pairs(j, begin, end, dtype, 128);
  else attend_pairs(j, begin, end, dtype, j->shape->D);
}
EACH_LEVEL(attend)

/* x: queries (R, T, H, D); y, z: keys and values (R, T, H_kv, D), which are stored first. out (R, T, H, D). 0, or -1 without
 * memory. */
int decode_attend(int level, int threads, int dtype, const void *x, const void *y, const void *z, void *out,
                  const Shape *shape, void *prompt_k, void *prompt_v, void *new_k, void *new_v) {
  int failed = 0;
  Job job = {.dtype = dtype, .x = x, .y = y, .z = z, .out = out, .shape = shape, .prompt_k = prompt_k, .prompt_v = prompt_v,
             .new_k = new_k, .new_v = new_v, .failed = tape ? &tape->failed : &failed};
  const int64_t pairs = shape->B * shape->H_kv;
  parallel(attend_for(level), &job, pairs, pairs < threads ? (int)pairs : threads);
  return *job.failed ? -1 : 0;
}

// --- the most likely tokens: rows begin .. end of logits x (M, N) ------------------------------------------------------

INLINE void rank(const Job *j, int64_t begin, int64_t end, int dtype) {
  const int64_t N = j->N, count = j->K;
  for (int64_t m = begin; m < end; m++) {
    const void *x = (const char *)j->x + m * N * (dtype == BF16 ? 2 : 4);
    float *values = (float *)j->out + m * count, highest = -INFINITY, total = 0, worst = -INFINITY;
    int64_t *ids = j->ids + m * count, filled = 0;
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < N; i++) highest = load(x, dtype, i) > highest ? load(x, dtype, i) : highest;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < N; i++) total += exp_of(load(x, dtype, i) - highest);
    const float whole = highest + logf(total);
    for (int64_t start = 0; start < N; start += BATCH) {
      const int64_t stop = N - start < BATCH ? N : start + BATCH;
      int is_better = filled < count;
      if (!is_better)
        for (int64_t i = start; i < stop; i++) is_better |= load(x, dtype, i) > worst;
      for (int64_t i = start; is_better && i < stop; i++) {
        const float value = load(x, dtype, i);
        if (filled == count && !(value > worst)) continue;
        int64_t place = filled < count ? filled++ : count - 1;
        for (; place && values[place - 1] < value; place--) values[place] = values[place - 1], ids[place] = ids[place - 1];
        values[place] = value, ids[place] = i;
        worst = values[filled - 1];
      }
    }
    for (int64_t i = 0; i < count; i++) values[i] -= whole;
  }
}
EACH_LEVEL(rank)

/* values, ids (M, count): the logarithms of the probabilities of the `count` likeliest of N, the best first, ties by number;
 * NaN where a row has one. */
void decode_rank(int level, int threads, int dtype, const void *logits, float *values, int64_t *ids, int64_t M, int64_t N,
                 int64_t count) {
  Job job = {.dtype = dtype, .x = logits, .out = values, .ids = ids, .M = M, .N = N, .K = count};
  parallel(rank_for(level), &job, M, M < threads ? (int)M : threads);
}

// --- out (M, N) = x (M, K) times the transposed weight (N, K): rows begin .. end of the weight ----------------------------

/* fp32, in the same order for every M too: tiles of four rows of the weight and up to four of x, K a multiple of 16. */
INLINE void multiply_tile_fp32(const Job *j, const int64_t *at, int rows, int64_t m, const int columns) {
  const float *weight = j->weight, *x = (const float *)j->x + m * j->K, *bias = j->bias;
  Float16 sums[4][4];
  for (int t = 0; t < columns; t++)
    for (int r = 0; r < 4; r++) sums[t][r] = (Float16){0};
  for (int64_t k = 0; k < j->K; k += 16)
    for (int r = 0; r < 4; r++) {
      const Float16 values = load_16(weight, FP32, at[r] * j->K + k);
      __builtin_prefetch(weight + at[r] * j->K + k + 256, 0, 2);
      for (int t = 0; t < columns; t++) sums[t][r] += values * load_16(x, FP32, t * j->K + k);
    }
  for (int t = 0; t < columns; t++)
    for (int r = 0; r < rows; r++)
      ((float *)j->out)[(m + t) * j->N + at[r]] = sum_16(sums[t][r]) + (bias ? bias[at[r]] : 0);
}

INLINE void multiply_fp32(const Job *j, int64_t begin, int64_t end, int dtype) {
  (void)dtype;
  const int64_t stride = (end - begin) / 4;  // four long streams come faster than one
  for (int64_t n = 0; n < stride + (end - begin) % 4; n++) {
    const int64_t first = n < stride ? begin + n : begin + 4 * stride + n - stride, step = n < stride ? stride : 0;
    const int64_t at[4] = {first, first + step, first + 2 * step, first + 3 * step};
    const int rows = n < stride ? 4 : 1;
    int64_t m = 0;
    for (; m + 4 <= j->M; m += 4) multiply_tile_fp32(j, at, rows, m, 4);
    switch (j->M - m) {
      case 3: multiply_tile_fp32(j, at, rows, m, 3); break;
      case 2: multiply_tile_fp32(j, at, rows, m, 2); break;
      case 1: multiply_tile_fp32(j, at, rows, m, 1);
    }
  }
}
EACH_LEVEL(multiply_fp32)

#if X86

/* Few rows of x: as fast as the memory delivers the weight. STREAMS rows of it at once, `stride` rows apart: four long streams
 * come faster than one. A row's sum is taken in the same order in all these functions, so that it does not depend on M. */
enum { STREAMS = 4, FEW = 8 };

BF16_INLINE void put_four(const Job *j, int64_t m, const int64_t *rows, int count, __m512 a, __m512 b, __m512 c, __m512 d) {
  uint16_t *out = (uint16_t *)j->out + m * j->N;
  __m128 sums = sum_of_four(a, b, c, d);
  if (j->bias) {
    const uint16_t *bias = j->bias;
    sums = _mm_add_ps(sums, _mm_setr_ps(from_bf16(bias[rows[0]]), from_bf16(bias[rows[1]]), from_bf16(bias[rows[2]]),
                                        from_bf16(bias[rows[3]])));
  }
  // As to_bf16 rounds; the instruction for it would flush subnormal numbers to 0.
  __m128i u = _mm_castps_si128(sums), odd = _mm_and_si128(_mm_srli_epi32(u, 16), _mm_set1_epi32(1));
  __m128i h = _mm_srli_epi32(_mm_add_epi32(u, _mm_add_epi32(odd, _mm_set1_epi32(0x7FFF))), 16);
  h = _mm_mask_mov_epi32(h, _mm_cmp_ps_mask(sums, sums, _CMP_UNORD_Q), _mm_set1_epi32(0x7FC0));
  uint16_t four[4];
  _mm_storel_epi64((__m128i *)four, _mm_cvtepi32_epi16(h));
  if (count == 4 && rows[3] - rows[0] == 3) memcpy(out + rows[0], four, sizeof four);
  else for (int i = 0; i < count; i++) out[rows[i]] = four[i];
}

BF16_INLINE void multiply_few(const Job *j, int64_t n, int rows, int64_t stride, int M) {
  const uint16_t *weight = j->weight, *x = j->x;
  const int64_t at[STREAMS] = {n, n + stride, n + 2 * stride, n + 3 * stride};  // a single row: four times the same
  __m512 sums[STREAMS][FEW];
  for (int r = 0; r < STREAMS; r++)
    for (int m = 0; m < M; m++) sums[r][m] = _mm512_setzero_ps();
  for (int64_t k = 0; k < j->K; k += 32)
    for (int r = 0; r < rows; r++) {
      const uint16_t *w = weight + at[r] * j->K + k;
      _mm_prefetch((const char *)w + (M < 5 ? 1024 : 2048), _MM_HINT_T1);  // into L1 it would be up to a quarter slower
      const __m512bh values = (__m512bh)_mm512_loadu_si512(w);
      for (int m = 0; m < M; m++)
        sums[r][m] = _mm512_dpbf16_ps(sums[r][m], values, (__m512bh)_mm512_loadu_si512(x + m * j->K + k));
    }
  for (int m = 0; m < M; m++) put_four(j, m, at, rows, sums[0][m], sums[1][m], sums[2][m], sums[3][m]);
}

/* Numbers of rows as constants keep the sums in registers. */
#define MULTIPLY(M) \
  BF16_TARGET static void multiply_##M(const Job *j, int64_t begin, int64_t end) { \
    const int64_t stride = (end - begin) / STREAMS; \
    for (int64_t n = begin; n < begin + stride; n++) multiply_few(j, n, STREAMS, stride, M); \
    for (int64_t n = begin + STREAMS * stride; n < end; n++) multiply_few(j, n, 1, 0, M); \
  }
MULTIPLY(1)
MULTIPLY(2)
MULTIPLY(3)
MULTIPLY(4)
MULTIPLY(5)
MULTIPLY(6)
MULTIPLY(7)
MULTIPLY(8)
static const Work FEW_ROWS[] = {NULL, multiply_1, multiply_2, multiply_3, multiply_4,
                                multiply_5, multiply_6, multiply_7, multiply_8};

/* More rows of x: tiles of four rows of the weight and up to six of x, so that 24 products need 10 loads. The rows of the weight
 * that the next tiles need come meanwhile: the arithmetic of one and the memory of the other overlap. */
enum { ROWS = 4, COLUMNS = 6 };

BF16_INLINE void multiply_tile(const Job *j, const int64_t *at, int rows, int64_t m, const int columns, int64_t n) {
  const uint16_t *weight = j->weight, *x = (const uint16_t *)j->x + m * j->K, *next = weight + (n + ROWS) * j->K;
  const int tile = (int)(m / COLUMNS), tiles = (int)((j->M + COLUMNS - 1) / COLUMNS);
  __m512 sums[COLUMNS][ROWS];
  for (int t = 0; t < columns; t++)
    for (int r = 0; r < ROWS; r++) sums[t][r] = _mm512_setzero_ps();
  for (int64_t k = 0; k < j->K; k += 32) {
    __m512bh values[ROWS];
    for (int r = tile; r < ROWS; r += tiles) _mm_prefetch((const char *)(next + r * j->K + k), _MM_HINT_T1);
    for (int r = 0; r < ROWS; r++) values[r] = (__m512bh)_mm512_loadu_si512(weight + at[r] * j->K + k);
    for (int t = 0; t < columns; t++) {
      const __m512bh row = (__m512bh)_mm512_loadu_si512(x + t * j->K + k);
      for (int r = 0; r < ROWS; r++) sums[t][r] = _mm512_dpbf16_ps(sums[t][r], values[r], row);
    }
  }
  for (int t = 0; t < columns; t++) put_four(j, m + t, at, rows, sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
}

BF16_TARGET static void multiply_many(const Job *j, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += ROWS) {
    const int rows = end - n < ROWS ? (int)(end - n) : ROWS;
    int64_t at[ROWS], m = 0;
    for (int r = 0; r < ROWS; r++) at[r] = n + (r < rows ? r : 0);
    for (; m + COLUMNS <= j->M; m += COLUMNS) multiply_tile(j, at, rows, m, COLUMNS, n);
    switch (j->M - m) {
      case 5: multiply_tile(j, at, rows, m, 5, n); break;
      case 4: multiply_tile(j, at, rows, m, 4, n); break;
      case 3: multiply_tile(j, at, rows, m, 3, n); break;
      case 2: multiply_tile(j, at, rows, m, 2, n); break;
      case 1: multiply_tile(j, at, rows, m, 1, n);
    }
  }
}

#endif

// --- LoRA: out (M, N) += x (M, K) A^T (scaling * B)^T, with A (r, K) and B (N, r) in fp32 --------------------------------

INLINE Float16 rounded_vector(Float16 v, int dtype) {
  if (dtype == BF16) {
    const Bits16 bits = rounded_16(v);
    memcpy(&v, &bits, sizeof v);
  }
  return v;
}

/* Rows begin .. end of A, rounded to the dtype of the computation, to j->out (r, K): in the order of load_32. */
INLINE void round_rows(const Job *j, int64_t begin, int64_t end, int dtype) {
  for (int64_t r = begin; r < end; r++) {
    const float *from = j->A + r * j->K;
    float *to = (float *)j->out + r * j->K;
    int64_t k = 0;
    for (; k + 32 <= j->K; k += 32) {
      Float16 two[2], apart[2];
      memcpy(two, from + k, sizeof two);
      apart[0] = two[0], apart[1] = two[1];
      if (dtype == BF16) {
        apart[0] = SHUFFLE(two[0], two[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        apart[1] = SHUFFLE(two[0], two[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
      }
      for (int half = 0; half < 2; half++) apart[half] = rounded_vector(apart[half], dtype);
      memcpy(to + k, apart, sizeof apart);
    }
    for (; k < j->K; k++) to[k] = rounded(from[k], dtype);
  }
}
EACH_LEVEL(round_rows)

/* Row m .. m + rows of x by four rows of A, from r on, to j->low (M, rank). */
INLINE void down_tile(const Job *j, int64_t m, const int rows, int64_t r, int dtype) {
  const int count = j->rank - r < 4 ? (int)(j->rank - r) : 4;
  const int64_t K = j->K;
  const float *A[4];
  for (int i = 0; i < 4; i++) A[i] = j->A + (r + (i < count ? i : 0)) * K;
  Float16 sums[4][4];
  float rest[4][4] = {0};
  for (int t = 0; t < rows; t++)
    for (int i = 0; i < 4; i++) sums[t][i] = (Float16){0};
  int64_t k = 0;
  for (; k + 32 <= K; k += 32) {
    Float16 x[4][2];
    for (int t = 0; t < rows; t++) load_32(j->x, dtype, (m + t) * K + k, x[t]);
    for (int i = 0; i < 4; i++)
      for (int half = 0; half < 2; half++) {
        const Float16 weight = load_16(A[i], FP32, k + 16 * half);
        for (int t = 0; t < rows; t++) sums[t][i] += weight * x[t][half];
      }
  }
  for (; k < K; k++)
    for (int t = 0; t < rows; t++)
      for (int i = 0; i < 4; i++) rest[t][i] += A[i][k] * load(j->x, dtype, (m + t) * K + k);
  for (int t = 0; t < rows; t++) {
    const Float4 four = sums_16(sums[t]);
    for (int i = 0; i < count; i++) j->low[(m + t) * j->rank + r + i] = rounded(four[i] + rest[t][i], dtype);
  }
}

/* Fours of rows of A, begin .. end. */
INLINE void go_down(const Job *j, int64_t begin, int64_t end, int dtype) {
  for (int64_t r = 4 * begin; r < 4 * end && r < j->rank; r += 4) {
    int64_t m = 0;
    for (; m + 4 <= j->M; m += 4) down_tile(j, m, 4, r, dtype);
    for (; m < j->M; m++) down_tile(j, m, 1, r, dtype);
  }
}
EACH_LEVEL(go_down)

/* Rows become columns: each pass takes half as many neighbours apart. */
INLINE void transpose_16(Float16 v[16]) {
  Float16 t[16];
#define PASS(from, to, apart, low, high) \
  for (int i = 0; i < 16; i++) \
    if (!(i & apart)) to[i] = low(from[i], from[i + apart]), to[i + apart] = high(from[i], from[i + apart]);
  PASS(v, t, 8, LOW_8, HIGH_8)
  PASS(t, v, 4, LOW_4, HIGH_4)
  PASS(v, t, 2, LOW_2, HIGH_2)
  PASS(t, v, 1, LOW_1, HIGH_1)
}

enum { SIXTEEN = 16 };

/* out (m .. m + tall, n .. n + rows) += `low` times rows of B: no sum goes across a vector, and each takes its ranks in order. */
INLINE void up_tile(const Job *j, int64_t m, const int tall, int64_t n, int rows, int dtype) {
  const int64_t rank = j->rank, N = j->N;
  Float16 sums[8] = {0};
  for (int64_t r = 0; r < rank; r += SIXTEEN) {
    const int wide = rank - r < SIXTEEN ? (int)(rank - r) : SIXTEEN;
    Float16 columns[SIXTEEN] = {0};
    for (int i = 0; i < SIXTEEN; i++) {
      if (i < rows && wide == SIXTEEN) columns[i] = load_16(j->B, FP32, (n + i) * rank + r);
      else if (i < rows) memcpy(&columns[i], j->B + (n + i) * rank + r, wide * sizeof(float));
      columns[i] = rounded_vector(columns[i] * j->scaling, dtype);
    }
    transpose_16(columns);
    const float *low = j->low + m * rank + r;
    if (wide == SIXTEEN)
      for (int i = 0; i < SIXTEEN; i++)
        for (int t = 0; t < tall; t++) sums[t] += columns[i] * low[t * rank + i];
    else
      for (int i = 0; i < wide; i++)
        for (int t = 0; t < tall; t++) sums[t] += columns[i] * low[t * rank + i];
  }
  for (int t = 0; t < tall; t++) {
    const int64_t at = (m + t) * N + n;
    float more[SIXTEEN];
    memcpy(more, &sums[t], sizeof more);
    if (rows == SIXTEEN) {
#pragma omp simd
      for (int i = 0; i < SIXTEEN; i++) store(j->out, dtype, at + i, load(j->out, dtype, at + i) + more[i]);
    } else for (int i = 0; i < rows; i++) store(j->out, dtype, at + i, load(j->out, dtype, at + i) + more[i]);
  }
}

/* Sixteens of rows of B, begin .. end. */
INLINE void go_up(const Job *j, int64_t begin, int64_t end, int dtype) {
  for (int64_t n = SIXTEEN * begin; n < SIXTEEN * end && n < j->N; n += SIXTEEN) {
    const int rows = j->N - n < SIXTEEN ? (int)(j->N - n) : SIXTEEN;
    int64_t m = 0;
    for (; m + 8 <= j->M; m += 8) up_tile(j, m, 8, n, rows, dtype);
    for (; m + 4 <= j->M; m += 4) up_tile(j, m, 4, n, rows, dtype);
    for (; m < j->M; m++) up_tile(j, m, 1, n, rows, dtype);
  }
}
EACH_LEVEL(go_up)

/* 0, or -1 without memory. */
int decode_lora(int level, int threads, int dtype, const void *x, const float *A, const float *B, float scaling, void *out,
                int64_t M, int64_t N, int64_t K, int64_t r) {
  float *scratch = borrow((size_t)(M * r + r * K) * sizeof *scratch);
  if (!scratch) return -1;
  const Job first = {.dtype = dtype, .A = A, .out = scratch + M * r, .K = K};
  const Job job = {.dtype = dtype, .x = x, .A = scratch + M * r, .B = B, .scaling = scaling, .low = scratch, .out = out, .M = M,
                   .N = N, .K = K, .rank = r};
  const Step steps[3] = {{round_rows_for(level), &first, r, r * K < SERIAL ? 1 : threads, 0},
                         {go_down_for(level), &job, (r + 3) / 4, M * r * K < SERIAL ? 1 : threads, 0},
                         {go_up_for(level), &job, (N + SIXTEEN - 1) / SIXTEEN, M * r * N < SERIAL ? 1 : threads, 0}};
  perform(steps, 3, sizeof job);
  give_back(scratch);
  return 0;
}

/* Up to three products of the same x, all of one dtype: N_i is 0 for those that there are not. bias: (N) or NULL; K a multiple of 32 in bf16, of 16 in
 * fp32. 0, or -1 where this CPU has no instruction for it. */
int decode_linears(int level, int threads, int dtype, const void *x, int64_t M, int64_t K, const void *weight_0,
                   const void *bias_0, void *out_0, int64_t N_0, const void *weight_1, const void *bias_1, void *out_1,
                   int64_t N_1, const void *weight_2, const void *bias_2, void *out_2, int64_t N_2) {
  const Job jobs[3] = {{.x = x, .weight = weight_0, .bias = bias_0, .out = out_0, .M = M, .N = N_0, .K = K},
                       {.x = x, .weight = weight_1, .bias = bias_1, .out = out_1, .M = M, .N = N_1, .K = K},
                       {.x = x, .weight = weight_2, .bias = bias_2, .out = out_2, .M = M, .N = N_2, .K = K}};
  Work work = dtype == FP32 ? multiply_fp32_for(level) : NULL;
#if X86
  if (dtype == BF16 && level >= AVX512_BF16) work = M <= FEW ? FEW_ROWS[M] : multiply_many;
#endif
  if (!work) return -1;
  Step steps[3];
  int64_t length = 0;
  for (int i = 0; i < 3; i++)
    if (jobs[i].N) steps[length++] = (Step){work, &jobs[i], jobs[i].N, threads, i < 2 && jobs[i + 1].N};
  perform(steps, length, sizeof jobs[0]);
  return 0;
}

// --- the tape ------------------------------------------------------------------------------------------------------

Tape *tape_new(void) { return calloc(1, sizeof(Tape)); }

/* 0, or -1 where there was no memory for a step, then or now. */
int tape_run(const Tape *t) {
  run(t->steps, t->length, t->threads ? t->threads : 1);
  return t->failed ? -1 : 0;
}

void tape_free(Tape *t) {
  for (int64_t i = 0; i < t->length; i++) free((void *)t->steps[i].job);
  for (Block *b = t->blocks, *next; b; b = next) {
    next = b->next;
    free(b->memory), free(b);
  }
  free(t->steps), free(t);
}
