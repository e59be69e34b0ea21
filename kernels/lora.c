/* LoRA: out (M, N) += x (M, K) A^T (scaling * B)^T, with A (r, K) and B (N, r) in fp32. See ops_cpu.py's add_lora(). */

#include "common.h"
#include "vectors.h"

typedef struct {  // ops_cpu.py's struct of this name
  int dtype;
  const void *x;  // (M, K)
  void *out;  // (M, N)
  const float *A, *B;  // (rank, K) and (N, rank)
  int64_t M, N, K, rank;
  float scaling, *low;  // low: (M, rank), set here
} LoRA;

INLINE Float16 rounded_vector(Float16 v, int dtype) {
  if (dtype == BF16) {
    const Bits16 bits = rounded_16(v);
    memcpy(&v, &bits, sizeof v);
  }
  return v;
}

/* Rows begin .. end of A, rounded to the dtype of the computation, to j->out (r, K): in the order of load_32. */
INLINE void round_rows(const LoRA *j, int64_t begin, int64_t end, int dtype) {
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
EACH_DTYPE(round_rows, LoRA)

/* Row m .. m + rows of x by four rows of A, from r on, to j->low (M, rank). */
INLINE void down_tile(const LoRA *j, int64_t m, const int rows, int64_t r, int dtype) {
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

/* Groups of four rows of A, begin .. end. */
INLINE void go_down(const LoRA *j, int64_t begin, int64_t end, int dtype) {
  for (int64_t r = 4 * begin; r < 4 * end && r < j->rank; r += 4) {
    int64_t m = 0;
    for (; m + 4 <= j->M; m += 4) down_tile(j, m, 4, r, dtype);
    for (; m < j->M; m++) down_tile(j, m, 1, r, dtype);
  }
}
EACH_DTYPE(go_down, LoRA)

/* Transposes 16 vectors of 16 numbers. Each pass exchanges blocks of half the size of the pass before. */
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

/* out (m .. m + tall, n .. n + rows) += `low` times rows of B. Each lane of a vector is a sum of its own, in the order of the ranks. */
INLINE void up_tile(const LoRA *j, int64_t m, const int tall, int64_t n, int rows, int dtype) {
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

/* Groups of sixteen rows of B, begin .. end. */
INLINE void go_up(const LoRA *j, int64_t begin, int64_t end, int dtype) {
  for (int64_t n = SIXTEEN * begin; n < SIXTEEN * end && n < j->N; n += SIXTEEN) {
    const int rows = j->N - n < SIXTEEN ? (int)(j->N - n) : SIXTEEN;
    int64_t m = 0;
    for (; m + 8 <= j->M; m += 8) up_tile(j, m, 8, n, rows, dtype);
    for (; m + 4 <= j->M; m += 4) up_tile(j, m, 4, n, rows, dtype);
    for (; m < j->M; m++) up_tile(j, m, 1, n, rows, dtype);
  }
}
EACH_DTYPE(go_up, LoRA)

/* 0, or -1 without memory. */
int lora(int threads, const LoRA *given) {
  const int64_t M = given->M, N = given->N, K = given->K, r = given->rank;
  float *scratch = borrow((size_t)(M * r + r * K) * sizeof *scratch);
  if (!scratch) return -1;
  LoRA first = *given, job = *given;
  first.out = scratch + M * r;  // A, rounded
  job.A = first.out, job.low = scratch;
  const Job *const rounding = (const Job *)&first, *const rest = (const Job *)&job;
  const Step steps[3] = {{round_rows_work, rounding, r, r * K < SERIAL ? 1 : threads, 0},
                         {go_down_work, rest, (r + 3) / 4, M * r * K < SERIAL ? 1 : threads, 0},
                         {go_up_work, rest, (N + SIXTEEN - 1) / SIXTEEN, M * r * N < SERIAL ? 1 : threads, 0}};
  perform(steps, 3, sizeof job);
  give_back(scratch);
  return 0;
}
