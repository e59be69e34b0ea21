/* Attention over the key-value cache: one job for each pair of a prompt and a key-value head. See ops_cpu.py's
 * attention_over_cache(). */

#include "common.h"
#include "vectors.h"

typedef struct {          // of an attention; the fields of ops_cpu.py's Shape
  const int64_t *lengths; // (B) tokens of each prompt
  const int64_t *stored;  // (B) of them in the cache: the last ones
  const int32_t *writers; // (R, capacity) the sequence whose token stands in a slot, NULL: the own one
  int64_t B, n, H, H_kv, T, D, P, capacity, new_tokens, window;  // window 0: none
} Shape;

typedef struct {  // ops_cpu.py's struct of this name
  int dtype;
  const void *q, *k, *v;  // (R, T, H, D), (R, T, H_kv, D)
  void *out;  // (R, T, H, D)
  const Shape *shape;
  void *prompt_k, *prompt_v, *new_k, *new_v;  // (B, H_kv, P, D) and (R, H_kv, capacity, D)
  int *failed;
} Attention;

/* Explicit FMA in the tail loops: otherwise the compiler contracts the 1-query and the 2-query loop differently, and their bits
 * differ. */
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

/* The same for all keys and queries. A query's result does not depend on how many queries there are. */
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

/* Both with dtype and head size as compile-time constants, which is twice as fast. Functions of their own, compiled once. */
typedef void AddScores(const float *q, int64_t queries, const void *cache, const int64_t *place, int64_t count, int64_t D,
                       float *scores, int64_t stride);
typedef void AddValues(const float *shares, int64_t stride, int64_t queries, const void *cache, const int64_t *place,
                       int64_t count, int64_t D, float *sums);
#define SIZED(dtype, name, size) \
  static __attribute__((noinline)) void scores_##dtype##name(const float *q, int64_t queries, const void *cache, \
      const int64_t *place, int64_t count, int64_t D, float *scores, int64_t stride) { \
    add_scores(q, queries, cache, dtype, place, count, size, scores, stride); \
  } \
  static __attribute__((noinline)) void values_##dtype##name(const float *shares, int64_t stride, int64_t queries, \
      const void *cache, const int64_t *place, int64_t count, int64_t D, float *sums) { \
    add_values(shares, stride, queries, cache, dtype, place, count, size, sums); \
  }
SIZED(FP32, _64, 64)
SIZED(FP32, _128, 128)
SIZED(FP32, _any, D)
SIZED(BF16, _64, 64)
SIZED(BF16, _128, 128)
SIZED(BF16, _any, D)
#define OF_SIZE(kind, dtype, D) (D == 64 ? kind##_##dtype##_64 : D == 128 ? kind##_##dtype##_128 : kind##_##dtype##_any)

enum { TOGETHER = 128 };  // a prompt's values are processed in groups that stay in the L1 cache for all sequences' queries

INLINE void attend(const Attention *j, int64_t begin, int64_t end, int dtype) {
  const Shape s = *j->shape;
  const int64_t D = s.D;
  AddScores *const add_scores = dtype == BF16 ? OF_SIZE(scores, BF16, D) : OF_SIZE(scores, FP32, D);
  AddValues *const add_values = dtype == BF16 ? OF_SIZE(values, BF16, D) : OF_SIZE(values, FP32, D);
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
      memcpy((char *)j->new_k + to, (const char *)j->k + from, D * size);
      memcpy((char *)j->new_v + to, (const char *)j->v + from, D * size);
      for (int64_t g = 0; g < G; g++) {
        const int64_t x = ((row * T + i % T) * s.H + h * G + g) * D;
        float *own = q + (i * G + g) * D;
        int64_t d = 0;
        for (; d + 32 <= D; d += 32) {
          Float16 two[2];
          load_32(j->q, dtype, x + d, two);
          two[0] *= root, two[1] *= root;
          memcpy(own + d, two, sizeof two);
        }
        for (; d < D; d++) own[d] = load(j->q, dtype, x + d) * root;
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
    add_scores(q, Q, prompt_k, place, stored, D, scores, keys);
    for (int64_t i = 0; i < n; i++)
      add_scores(q + i * each * D, each, new_k, place + stored + i * fresh, fresh, D,
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
      add_values(scores + k, keys, Q, prompt_v, place + k, stored - k < TOGETHER ? stored - k : TOGETHER, D, sums);
    for (int64_t i = 0; i < n; i++)
      add_values(scores + i * each * keys + stored, keys, each, new_v, place + stored + i * fresh, fresh, D,
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

EACH_DTYPE(attend, Attention)

/* Stores k and v, then attends with q. 0, or -1 without memory. */
int attention(int threads, const Attention *given) {
  int failed = 0;
  Attention job = *given;
  job.failed = fault_of_step(&failed);
  const int64_t pairs = job.shape->B * job.shape->H_kv;
  parallel(attend_work, &job, pairs, pairs < threads ? (int)pairs : threads);
  return *job.failed ? -1 : 0;
}
