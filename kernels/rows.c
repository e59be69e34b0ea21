/* Operations on rows of numbers: norms, sums, RoPE, SwiGLU, GELU, the most likely tokens. ops_cpu.py says what each computes.
 *
 * Everything sums in fp32. dtype: FP32 or BF16; a value that torch would round to bf16 on its way is rounded here too. */

#include "common.h"

typedef struct {  // a norm of rows of x (M, K)
  int dtype;
  const void *x, *weight, *bias;  // weight, bias: (K); RMSNorm has no bias
  void *out;
  int64_t M, K;
  float eps;
} Norm;

typedef struct {  // an operation on elements of x, and of y, which repeats after N of them
  int dtype;
  const void *x, *y;
  void *out;
  int64_t N;
} Elements;

typedef struct {  // ops_cpu.py's struct of this name: RoPE of x (rows, H, T, D), by strides; out lies as (rows, T, H, D)
  int dtype;
  const void *x, *cos, *sin;  // cos, sin: (rows or 1, T, turned / 2)
  void *out;
  int64_t rows, H, T, D, turned, row_stride, head_stride, token_stride, table_stride;
} Rope;

typedef struct {  // the most likely of N tokens for each row of logits (M, N)
  int dtype;
  const void *logits;
  float *values;
  int64_t *ids;
  int64_t M, N, count;
} MostLikely;

enum { BATCH = 256 };  // logits that are looked at together

// --- RMSNorm: rows begin .. end of x (M, K) ---------------------------------------------------------------------

INLINE void rms_norm_rows(const Norm *j, int64_t begin, int64_t end, int dtype) {
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
EACH_DTYPE(rms_norm_rows, Norm)

void rms_norm(int threads, int dtype, const void *x, const void *weight, void *out, int64_t M, int64_t K,
                 float eps) {
  const Norm job = {.dtype = dtype, .x = x, .weight = weight, .out = out, .M = M, .K = K, .eps = eps};
  parallel(rms_norm_rows_work, &job, M, M * K < SERIAL ? 1 : threads);
}

// --- LayerNorm: (x - mean) / sqrt(variance + eps) * weight + bias, rows begin .. end of x (M, K) -----------------------------

INLINE void layer_norm_rows(const Norm *j, int64_t begin, int64_t end, int dtype) {
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
EACH_DTYPE(layer_norm_rows, Norm)

void layer_norm(int threads, int dtype, const void *x, const void *weight, const void *bias, void *out,
                       int64_t M, int64_t K, float eps) {
  const Norm job = {.dtype = dtype, .x = x, .weight = weight, .bias = bias, .out = out, .M = M, .K = K, .eps = eps};
  parallel(layer_norm_rows_work, &job, M, M * K < SERIAL ? 1 : threads);
}

// --- x (M, K) + y, which repeats after N elements: elements begin .. end; out may be x -------------------------------------

INLINE void add_elements(const Elements *j, int64_t begin, int64_t end, int dtype) {
  const void *const x = j->x, *const y = j->y;
  void *const out = j->out;
  for (int64_t i = begin, stop; i < end; i = stop) {
    const int64_t at = i % j->N, back = i - at;
    stop = end < back + j->N ? end : back + j->N;
#pragma omp simd
    for (int64_t k = i; k < stop; k++) store(out, dtype, k, load(x, dtype, k) + load(y, dtype, k - back));
  }
}
EACH_DTYPE(add_elements, Elements)

void add(int threads, int dtype, const void *x, const void *y, void *out, int64_t count, int64_t N) {
  const Elements job = {.dtype = dtype, .x = x, .y = y, .out = out, .N = N};
  parallel(add_elements_work, &job, count, count < SERIAL ? 1 : threads);
}

// --- RoPE of the first `turned` of D dims: tokens begin .. end ------------------------------------------------------

INLINE void rope_tokens(const Rope *j, int64_t begin, int64_t end, int dtype) {
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
EACH_DTYPE(rope_tokens, Rope)

void rope(int threads, const Rope *job) {
  const int64_t tokens = job->rows * job->T;
  parallel(rope_tokens_work, job, tokens, tokens * job->H * job->D < SERIAL ? 1 : threads);
}

// --- SwiGLU: silu(x) * y, elements begin .. end -------------------------------------------------------------------

INLINE void swiglu_elements(const Elements *j, int64_t begin, int64_t end, int dtype) {
  const void *const x = j->x, *const y = j->y;
  void *const out = j->out;
#pragma omp simd
  for (int64_t i = begin; i < end; i++) {
    const float value = load(x, dtype, i);
    store(out, dtype, i, rounded(value / (1 + exp_of(-value)), dtype) * load(y, dtype, i));
  }
}
EACH_DTYPE(swiglu_elements, Elements)

void swiglu(int threads, int dtype, const void *x, const void *y, void *out, int64_t count) {
  const Elements job = {.dtype = dtype, .x = x, .y = y, .out = out};
  parallel(swiglu_elements_work, &job, count, count < SERIAL ? 1 : threads);
}

// --- GELU with tanh: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), elements begin .. end ------------------------

INLINE void gelu_tanh_elements(const Elements *j, int64_t begin, int64_t end, int dtype) {
#pragma omp simd
  for (int64_t i = begin; i < end; i++) {
    const float x = load(j->x, dtype, i), inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    store(j->out, dtype, i, x - x / (1 + exp_of(2 * inner)));  // (1 + tanh(y)) / 2 is 1 - 1 / (1 + exp(2 y))
  }
}
EACH_DTYPE(gelu_tanh_elements, Elements)

void gelu_tanh(int threads, int dtype, const void *x, void *out, int64_t count) {
  const Elements job = {.dtype = dtype, .x = x, .out = out};
  parallel(gelu_tanh_elements_work, &job, count, count < SERIAL ? 1 : threads);
}

// --- the most likely tokens: rows begin .. end of logits x (M, N) ------------------------------------------------------

INLINE void likely_rows(const MostLikely *j, int64_t begin, int64_t end, int dtype) {
  const int64_t N = j->N, count = j->count;
  for (int64_t m = begin; m < end; m++) {
    const void *x = (const char *)j->logits + m * N * (dtype == BF16 ? 2 : 4);
    float *values = j->values + m * count, highest = -INFINITY, total = 0, worst = -INFINITY;
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
EACH_DTYPE(likely_rows, MostLikely)

/* values, ids (M, count): the logarithms of the probabilities of the `count` likeliest of N, the best first, ties by number;
 * NaN where a row has one. */
void most_likely(int threads, int dtype, const void *logits, float *values, int64_t *ids, int64_t M, int64_t N,
                 int64_t count) {
  const MostLikely job = {.dtype = dtype, .logits = logits, .values = values, .ids = ids, .M = M, .N = N, .count = count};
  parallel(likely_rows_work, &job, M, M < threads ? (int)M : threads);
}
