/* out (M, N) = x (M, K) times the transposed weight (N, K), for few rows of x. See ops_cpu.py's linears(). Sums in fp32. */

#include "common.h"
#include "vectors.h"
#if LEVEL >= AVX512_BF16
#include "bf16.h"
#endif

struct Job {  // ops_cpu.py's struct Linear
  int dtype;
  const void *x, *weight, *bias;  // (M, K), (N, K), (N) or NULL
  void *out;
  int64_t M, N, K;
};

// --- out (M, N) = x (M, K) times the transposed weight (N, K): rows begin .. end of the weight ----------------------------

/* fp32: tiles of TALL rows of the weight (ALONE for a single row of x) and BROAD of x. K is a multiple of 16. Every row is summed in
 * the same order, 16 sums that are added at the end, so its result does not depend on M, on the tiles or on the registers' length.
 * The sums fill at most three quarters of the registers. Registers are named by their length, as gcc keeps longer vectors in memory,
 * which is six times slower. */
#if LEVEL >= AVX512
enum { LANES = 16, TALL = 4, BROAD = 4, ALONE = 4 };
#elif LEVEL >= AVX2
enum { LANES = 8, TALL = 2, BROAD = 3, ALONE = 4 };
#else
enum { LANES = 4, TALL = 1, BROAD = 3, ALONE = 2 };
#endif
enum { PARTS = 16 / LANES };
typedef float Lanes __attribute__((vector_size(4 * LANES)));

INLINE Lanes load_lanes(const float *from) {
  Lanes v;
  memcpy(&v, from, sizeof v);
  return v;
}

INLINE void multiply_tile_fp32(const Job *j, const int64_t *at, const int tall, int rows, int64_t m, const int columns) {
  const float *weight = j->weight, *x = (const float *)j->x + m * j->K, *bias = j->bias;
  Lanes sums[BROAD][ALONE][PARTS];
  for (int t = 0; t < columns; t++)
    for (int r = 0; r < tall; r++)
      for (int part = 0; part < PARTS; part++) sums[t][r][part] = (Lanes){0};
  for (int64_t k = 0; k < j->K; k += 16)
    for (int r = 0; r < tall; r++) {
      const float *w = weight + at[r] * j->K + k;
      __builtin_prefetch(w + 256, 0, 2);
      for (int part = 0; part < PARTS; part++) {
        const Lanes values = load_lanes(w + LANES * part);
        for (int t = 0; t < columns; t++) sums[t][r][part] += values * load_lanes(x + t * j->K + k + LANES * part);
      }
    }
  for (int t = 0; t < columns; t++)
    for (int r = 0; r < rows; r++) {
      Float16 all;
      memcpy(&all, sums[t][r], sizeof all);
      ((float *)j->out)[(m + t) * j->N + at[r]] = sum_16(all) + (bias ? bias[at[r]] : 0);
    }
}

/* `tall` distant rows of the weight at a time: memory delivers several long streams faster than one. */
INLINE void multiply_streams_fp32(const Job *j, int64_t begin, int64_t end, const int tall) {
  const int64_t stride = (end - begin) / tall;
  for (int64_t n = 0; n < stride + (end - begin) % tall; n++) {
    const int64_t first = n < stride ? begin + n : begin + tall * stride + n - stride, step = n < stride ? stride : 0;
    const int64_t at[4] = {first, first + step, first + 2 * step, first + 3 * step};
    const int rows = n < stride ? tall : 1;
    int64_t m = 0;
    for (; m + BROAD <= j->M; m += BROAD) multiply_tile_fp32(j, at, tall, rows, m, BROAD);
    switch (j->M - m) {
      case 3: multiply_tile_fp32(j, at, tall, rows, m, 3); break;
      case 2: multiply_tile_fp32(j, at, tall, rows, m, 2); break;
      case 1: multiply_tile_fp32(j, at, tall, rows, m, 1);
    }
  }
}

INLINE void multiply_fp32(const Job *j, int64_t begin, int64_t end, int dtype) {
  (void)dtype;
  if (j->M == 1) multiply_streams_fp32(j, begin, end, ALONE);
  else multiply_streams_fp32(j, begin, end, TALL);
}
EACH_DTYPE(multiply_fp32, Job)

#if LEVEL >= AVX512_BF16

/* Few rows of x: limited by reading the weight. STREAMS rows of it at once, `stride` rows apart: memory delivers four long streams
 * faster than one. All these functions sum a row in the same order, so that its result does not depend on M. */
enum { STREAMS = 4, FEW = 8 };

INLINE void put_four(const Job *j, int64_t m, const int64_t *rows, int count, __m512 a, __m512 b, __m512 c, __m512 d) {
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

INLINE void multiply_few(const Job *j, int64_t n, int rows, int64_t stride, int M) {
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

/* With the numbers of rows as compile-time constants the sums stay in registers. */
#define MULTIPLY(M) \
  static void multiply_##M(const Job *j, int64_t begin, int64_t end) { \
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

/* More rows of x: tiles of four rows of the weight and up to six of x, so that 24 products need 10 loads. The next
 * tiles' rows of the weight are prefetched meanwhile, so that arithmetic and memory overlap. */
enum { ROWS = 4, COLUMNS = 6 };

INLINE void multiply_tile(const Job *j, const int64_t *at, int rows, int64_t m, const int columns, int64_t n) {
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

static void multiply_many(const Job *j, int64_t begin, int64_t end) {
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

/* Up to three products of the same x, all of one dtype. K: a multiple of 32 in bf16, of 16 in fp32. 0, or -1 where this CPU has no
 * instruction for it. */
int linears(int threads, const Job *products, int count) {
  Work work = products->dtype == FP32 ? multiply_fp32_work : NULL;
#if LEVEL >= AVX512_BF16
  if (products->dtype == BF16) work = products->M <= FEW ? FEW_ROWS[products->M] : multiply_many;
#endif
  if (!work) return -1;
  Step steps[3];
  for (int i = 0; i < count; i++) steps[i] = (Step){work, &products[i], products[i].N, threads, i + 1 < count};
  perform(steps, count, sizeof products[0]);
  return 0;
}
