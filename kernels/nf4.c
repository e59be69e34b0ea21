/* NF4 on a CPU: quantise, dequantise, and multiply by a 4-bit weight. Bits as in nf4_reference.py, the specification.

Called by nf4_cpu.py, which defines the structs Weight, Quantize, Dequantize and Matmul again for ctypes. The format: 64 elements
form a block and share an absmax; two elements share a byte, the first in its high half. */

#include "common.h"
#if LEVEL >= AVX512_BF16
#include "bf16.h"
#elif LEVEL >= AVX2
#include <immintrin.h>
#endif

enum { BLOCK = 64, NESTED = 256 };

static const float CODE[16] __attribute__((aligned(64))) = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

typedef struct {          // a quantised weight of n elements
  const uint8_t *packed;  // (n / 2), rounded up
  const float *absmax;    // (n / 64), rounded up. NULL with double quantisation, which sets the others instead:
  const uint8_t *q;       // (n / 64), rounded up
  const float *absmax2;   // (n / 64 / 256), rounded up
  const float *code2;     // (256)
  const float *offset;    // (1)
} Weight;

typedef struct {
  int dtype;           // of weight
  const void *weight;  // (n)
  uint8_t *packed;     // (n / 2), rounded up
  float *absmax;       // (n / 64), rounded up
  int64_t n;
} Quantize;

typedef struct {
  int dtype;  // of out
  Weight weight;
  void *out;  // (n)
  int64_t n;
  int stream;  // write past the caches
} Dequantize;

typedef struct {    // out (M, N) = x (M, K) times the transposed weight (N, K)
  int dtype;        // of x and out, and the weight is rounded to it
  const void *x;    // for the functions below nf4_matmul(): as a function of Layout has written it
  Weight weight;
  void *out;
  int64_t M, N, K;  // M <= MAX_ROWS, K a multiple of 64
} Matmul;

typedef struct {      // x (M, K), to be written in the layout that a product reads
  int dtype;          // of x
  const void *x;
  void *out, *spare;  // spare: for x between two steps of the layout of AMX
  int64_t M, K, chunk;  // chunk: elements of a row of x that stay together
} Layout;

/* The absmax of a block. */
INLINE float scale_of(const Weight *w, int64_t block) {
  if (w->absmax) return w->absmax[block];
  float product = w->code2[w->q[block]] * w->absmax2[(uint64_t)block / NESTED];
#ifdef __x86_64__
  __asm__("" : "+x"(product));  // the compiler must round the product: it may not contract it with the sum into an FMA
#else
  volatile float rounded = product;
  product = rounded;
#endif
  return product + *w->offset;
}

/* The address of element i of `out`. */
INLINE void *element(void *out, int dtype, int64_t i) { return (char *)out + i * (dtype == FP32 ? 4 : 2); }

// --- quantise: blocks begin .. end, vectorised by the compiler ------------------------------------------------------

static void quantize_blocks(const Quantize *j, int64_t begin, int64_t end) {
  float midpoints[15];
  for (int i = 0; i < 15; i++) midpoints[i] = (CODE[i] + CODE[i + 1]) / 2;
  for (int64_t b = begin; b < end; b++) {
    float v[BLOCK];
    int32_t index[BLOCK];
    int count = j->n - b * BLOCK < BLOCK ? (int)(j->n - b * BLOCK) : BLOCK;
    for (int i = 0; i < BLOCK; i++) v[i] = 0;
    if (j->dtype == FP32) memcpy(v, (const float *)j->weight + b * BLOCK, 4 * count);
    else if (j->dtype == BF16) for (int i = 0; i < count; i++) v[i] = load(j->weight, BF16, b * BLOCK + i);
    else for (int i = 0; i < count; i++) v[i] = load(j->weight, FP16, b * BLOCK + i);
    uint32_t highest = 0;  // the bits of |v| as an integer are in the order of |v|, with NaN above infinity
    for (int i = 0; i < BLOCK; i++) highest = (bits_of(v[i]) & 0x7FFFFFFF) > highest ? bits_of(v[i]) & 0x7FFFFFFF : highest;
    float absmax = float_of(highest), floor = absmax < 1e-38f ? 1e-38f : absmax;
    int is_short = count < BLOCK;  // there bitsandbytes divides, and the stored absmax is never 0
    float inverse = 1 / floor;
    if (is_short) for (int i = 0; i < BLOCK; i++) v[i] = v[i] / floor;
    else for (int i = 0; i < BLOCK; i++) v[i] = v[i] * inverse;
    for (int i = 0; i < BLOCK; i++) index[i] = 0;
    for (int m = 0; m < 15; m++)
      for (int i = 0; i < BLOCK; i++) index[i] += !(v[i] <= midpoints[m]);  // a tie goes to the lower code, NaN to the highest
    if (is_short && count % 2) index[count] = 7;
    for (int i = 0; i < (count + 1) / 2; i++) j->packed[b * BLOCK / 2 + i] = index[2 * i] << 4 | index[2 * i + 1];
    j->absmax[b] = is_short ? floor : absmax;
  }
}
WORK(quantize_blocks, Quantize)

// --- dequantise: code * absmax, rounded to `dtype` -----------------------------------------------------------------------

/* The first `count` elements of a block, rounded to `dtype`, to `out` in the dtype `as`: a product in fp32 takes weights that are
 * rounded to bf16. */
INLINE void expand_portable(const uint8_t *packed, float absmax, int dtype, int as, void *out, int count) {
  float table[16];
  for (int i = 0; i < 16; i++) {
    float value = CODE[i] * absmax;
    table[i] = dtype == BF16 ? from_bf16(to_bf16(value)) : dtype == FP16 ? from_fp16(to_fp16(value)) : value;
  }
  for (int i = 0; i < count; i++) store(out, as, i, table[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4]);
}

/* expand(): the same for a whole block. stream: write past the caches, where the instruction set can. */
#if LEVEL == AVX2

/* Eight fp32 rounded to 16 bits, as eight uint16. */
INLINE __m128i round_avx2(__m256 v, int dtype) {
  if (dtype == FP16) return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i h = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  h = _mm256_blendv_epi8(h, _mm256_set1_epi32(0x7FC0), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  h = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
  return _mm256_castsi256_si128(h);
}

INLINE __m256 widen_avx2(__m128i h, int dtype) {
  return dtype == FP16 ? _mm256_cvtph_ps(h) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

INLINE void expand(const uint8_t *packed, float absmax, int dtype, int as, void *out, int stream) {
  (void)stream;
  __m256 low = _mm256_mul_ps(_mm256_load_ps(CODE), _mm256_set1_ps(absmax));
  __m256 high = _mm256_mul_ps(_mm256_load_ps(CODE + 8), _mm256_set1_ps(absmax));
  if (as == FP32) {
    if (dtype != FP32) low = widen_avx2(round_avx2(low, dtype), dtype), high = widen_avx2(round_avx2(high, dtype), dtype);
    for (int i = 0; i < BLOCK; i += 8) {  // 4 bytes: each byte twice, the high nibble first
      int32_t four;
      memcpy(&four, packed + i / 2, 4);
      __m256i index = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_cvtsi32_si128(four), _mm_cvtsi32_si128(four)));
      index = _mm256_srlv_epi32(index, _mm256_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0));
      __m256 v = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                                  _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
      _mm256_storeu_ps((float *)out + i, v);
    }
    return;
  }
  // The 16-bit table as two tables of bytes: a shuffle looks up 32 low or high bytes at once.
  uint16_t table[16];
  _mm_storeu_si128((__m128i *)table, round_avx2(low, dtype));
  _mm_storeu_si128((__m128i *)(table + 8), round_avx2(high, dtype));
  __m256i t = _mm256_loadu_si256((const __m256i *)table), mask = _mm256_set1_epi16(0xFF);
  __m256i lows = _mm256_permute4x64_epi64(_mm256_packus_epi16(_mm256_and_si256(t, mask), _mm256_srli_epi16(t, 8)), 0xD8);
  __m256i highs = _mm256_permute2x128_si256(lows, lows, 0x11);
  lows = _mm256_permute2x128_si256(lows, lows, 0x00);
  for (int i = 0; i < BLOCK; i += 32) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)(packed + i / 2)), nibble = _mm_set1_epi8(15);
    __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), second = _mm_and_si128(bytes, nibble);
    __m256i index = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
    __m256i a = _mm256_shuffle_epi8(lows, index), b = _mm256_shuffle_epi8(highs, index);
    __m256i x = _mm256_unpacklo_epi8(a, b), y = _mm256_unpackhi_epi8(a, b);
    _mm256_storeu_si256((__m256i *)((uint16_t *)out + i), _mm256_permute2x128_si256(x, y, 0x20));
    _mm256_storeu_si256((__m256i *)((uint16_t *)out + i + 16), _mm256_permute2x128_si256(x, y, 0x31));
  }
}

#elif LEVEL >= AVX512

/* Sixteen fp32 rounded to 16 bits. Integer arithmetic for bf16: the instruction would flush subnormal numbers to 0. */
INLINE __m256i round_avx512(__m512 v, int dtype) {
  if (dtype == FP16) return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i h = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  h = _mm512_mask_mov_epi32(h, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
  return _mm512_cvtepi32_epi16(h);
}

/* The indices of 32 elements as words, from 16 bytes. Bits above the low 4 are left in: the table repeats. */
INLINE __m512i words_avx512(const uint8_t *packed) {
  __m512i d = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)packed));
  return _mm512_or_si512(_mm512_srli_epi32(d, 4), _mm512_slli_epi32(d, 16));
}

INLINE void put_avx512(void *out, __m512i v, int stream) {
  if (stream) _mm512_stream_si512((__m512i *)out, v);
  else _mm512_storeu_si512(out, v);
}

INLINE void expand(const uint8_t *packed, float absmax, int dtype, int as, void *out, int stream) {
  __m512 table = _mm512_mul_ps(_mm512_load_ps(CODE), _mm512_set1_ps(absmax));
  if (as == FP32) {
    if (dtype == FP16) table = _mm512_cvtph_ps(round_avx512(table, FP16));
    if (dtype == BF16)
      table = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(round_avx512(table, BF16)), 16));
    const __m512i shift = _mm512_set1_epi64(4);  // even elements are high nibbles: lanes 4, 0, 4, 0 ...
    for (int i = 0; i < BLOCK; i += 16) {
      __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(packed + i / 2)));
      __m512i index = _mm512_or_si512(_mm512_srlv_epi64(pairs, shift), _mm512_slli_epi64(pairs, 32));
      put_avx512((float *)out + i, _mm512_castps_si512(_mm512_permutexvar_ps(index, table)), stream);
    }
    return;
  }
  __m512i words = _mm512_broadcast_i64x4(round_avx512(table, dtype));
  for (int i = 0; i < BLOCK; i += 32)
    put_avx512((uint16_t *)out + i, _mm512_permutexvar_epi16(words_avx512(packed + i / 2), words), stream);
}

#else

INLINE void expand(const uint8_t *packed, float absmax, int dtype, int as, void *out, int stream) {
  (void)stream;
  expand_portable(packed, absmax, dtype, as, out, BLOCK);
}

#endif

/* Whole blocks. dtype and stream are compile-time constants. */
INLINE void dequantize_whole(const Dequantize *j, int64_t begin, int64_t end, const int dtype, const int stream) {
  for (int64_t b = begin; b < end; b++)
    expand(j->weight.packed + b * BLOCK / 2, scale_of(&j->weight, b), dtype, dtype, element(j->out, dtype, b * BLOCK), stream);
}

static void dequantize_blocks(const Dequantize *j, int64_t begin, int64_t end) {
  const int64_t full = j->n / BLOCK < end ? j->n / BLOCK : end;
#if LEVEL >= AVX512
  if (j->stream) {
    if (j->dtype == BF16) dequantize_whole(j, begin, full, BF16, 1);
    else if (j->dtype == FP16) dequantize_whole(j, begin, full, FP16, 1);
    else dequantize_whole(j, begin, full, FP32, 1);
    _mm_sfence();
  } else
#endif
  if (j->dtype == BF16) dequantize_whole(j, begin, full, BF16, 0);
  else if (j->dtype == FP16) dequantize_whole(j, begin, full, FP16, 0);
  else dequantize_whole(j, begin, full, FP32, 0);
  for (int64_t b = full; b < end; b++)  // a last block that is not whole
    expand_portable(j->weight.packed + b * BLOCK / 2, scale_of(&j->weight, b), j->dtype, j->dtype,
                    element(j->out, j->dtype, b * BLOCK), (int)(j->n - b * BLOCK));
}
WORK(dequantize_blocks, Dequantize)

// --- multiply: out (M, N) = x (M, K) times the transposed weight (N, K), for few rows; K is a multiple of 64 --------

enum { CHUNK = 1024, MAX_ROWS = 128 };  // elements of a row of the weight that are expanded at a time; the largest M

/* In fp32, for every dtype: a chunk of a row of the weight is expanded into the L1 cache and multiplied with each row of x (fp32). */
static void multiply_blocks(const Matmul *j, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n++) {
    float w[CHUNK], sums[MAX_ROWS] = {0};
    for (int64_t k = 0; k < j->K; k += CHUNK) {
      int64_t size = j->K - k < CHUNK ? j->K - k : CHUNK;
      for (int64_t i = 0; i < size; i += BLOCK) {
        int64_t b = (n * j->K + k + i) / BLOCK;
        expand(j->weight.packed + b * BLOCK / 2, scale_of(&j->weight, b), j->dtype, FP32, w + i, 0);
      }
      for (int64_t m = 0; m < j->M; m++) {
        const float *x = (const float *)j->x + m * j->K + k;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++) sum += w[i] * x[i];
        sums[m] += sum;
      }
    }
    for (int64_t m = 0; m < j->M; m++) store(j->out, j->dtype, m * j->N + n, sums[m]);
  }
}
WORK(multiply_blocks, Matmul)

/* Its layout: fp32. */
static void widen_x(const Layout *j, int64_t begin, int64_t end) {
  for (int64_t i = begin * j->K; i < end * j->K; i++) ((float *)j->out)[i] = load(j->x, j->dtype, i);
}
WORK(widen_x, Layout)

#if LEVEL >= AVX512_BF16

/* bf16. 64 bytes hold 128 elements. Shifted right by 0, 4, 8 and 12 bits, the low nibble of the 16-bit word i is element 4i + 1,
 * 4i, 4i + 3 and 4i + 2. The nibbles are not put back in order; x is laid out like them: of each 128 elements first the 32 of shift
 * 0, then those of shift 4, 8 and 12. Zeros follow a row whose length is no multiple of 128. The layout goes chunk by chunk, with
 * M rows in each: whole rows, 8 KB apart, would compete for the same places in the cache. */
static void permute_to(uint16_t *out, const Layout *j) {
  static const int first[4] = {1, 0, 3, 2};
  const int64_t M = j->M, K = j->K, padded = (K + 127) / 128 * 128;
  const uint16_t *x = j->x;
  for (int64_t start = 0; start < padded; start += j->chunk)
    for (int64_t m = 0; m < M; m++)
      for (int64_t k = start; k < start + j->chunk && k < padded; k += 128, out += 128)
        for (int part = 0; part < 4; part++) {  // 32 elements: of each four, one goes to each shift
          const int64_t at = k + 32 * part;
          __m512i fours = at < K ? _mm512_loadu_si512(x + m * K + at) : _mm512_setzero_si512();
          for (int shift = 0; shift < 4; shift++) {
            __m128i words = _mm512_cvtepi64_epi16(_mm512_srli_epi64(fours, 16 * first[shift]));
            _mm_storeu_si128((__m128i *)(out + 32 * shift + 8 * part), words);
          }
        }
}

/* All of x at once: begin is 0 and end is 1. */
static void permute_x(const Layout *j, int64_t begin, int64_t end) {
  if (begin < end) permute_to(j->out, j);
}
WORK(permute_x, Layout)

/* 128 weights of a row in that order, from two blocks with the absmax `scale` and `next_scale`. is_half: the row ends after 64. */
INLINE void expand_blocks(const uint8_t *packed, int is_half, float scale, float next_scale, __m512bh w[4]) {
  const __m512 code = _mm512_load_ps(CODE);
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);  // bit 4 selects the second half of the table
  const __m512i bytes = is_half ? _mm512_maskz_loadu_epi64(0x0F, packed) : _mm512_loadu_si512(packed);
  const __m512 low = _mm512_mul_ps(code, _mm512_set1_ps(scale)), high = _mm512_mul_ps(code, _mm512_set1_ps(next_scale));
  const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  for (int shift = 0; shift < 4; shift++) {
    __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4 * shift), nibble, second, 0xEA);
    w[shift] = (__m512bh)_mm512_permutexvar_epi16(index, table);
  }
}

/* The same from `block` on. */
INLINE void expand_128(const Weight *w, int64_t block, int is_half, __m512bh parts[4]) {
  const float next_scale = is_half ? 0 : scale_of(w, block + 1);
  expand_blocks(w->packed + block * (BLOCK / 2), is_half, scale_of(w, block), next_scale, parts);
}

/* Few rows of x: the weight is expanded in registers and multiplied there. With one row of x, STREAMS rows of the weight are read at
 * once, `stride` rows apart: memory delivers four long streams faster than one or eight. With more rows of x only two rows of the
 * weight, so that their sums and the expanded weights fit into the registers. */
enum { STREAMS = 4, FEW = 8 };

typedef struct {  // what multiply_few() computes at once. All but stride are compile-time constants: loops unroll, branches vanish
  int rows;       // of the weight
  int M;          // of x
  int is_nested;  // whether the weight has double quantisation
  int64_t stride;
} Few;

/* Adds the products of 128 elements of each row to the sums, from `block` of the first row of the weight on. x: the same elements of
 * the first row of x. Two rows of the weight at a time share what is loaded of x. is_half: only 64 elements are left. */
INLINE void few_step(const Matmul *j, const Few few, int64_t block, const int is_half, const uint16_t *x,
                     __m512 sums[STREAMS][FEW]) {
  const int64_t padded = (j->K + 127) / 128 * 128, apart = few.stride * (j->K / BLOCK);
#pragma GCC unroll 4
  for (int first = 0; first < few.rows; first += 2) {
    const int pair = few.rows - first < 2 ? 1 : 2;
    __m512bh w[2][4];
#pragma GCC unroll 2
    for (int r = 0; r < pair; r++) {
      const int64_t at = block + (first + r) * apart;
      const uint8_t *packed = j->weight.packed + at * (BLOCK / 2);
      const float *absmax = j->weight.absmax;
      const float scale = few.is_nested ? scale_of(&j->weight, at) : absmax[at];
      _mm_prefetch(packed + 512, _MM_HINT_T0);
      expand_blocks(packed, is_half, scale,
                    is_half ? 0 : few.is_nested ? scale_of(&j->weight, at + 1) : absmax[at + 1], w[r]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 8
      for (int m = 0; m < few.M; m++) {
        const __m512bh values = (__m512bh)_mm512_load_si512(x + m * padded + 32 * i);
#pragma GCC unroll 2
        for (int r = 0; r < pair; r++) sums[first + r][m] = _mm512_dpbf16_ps(sums[first + r][m], w[r][i], values);
      }
  }
}

/* Rows n, n + stride ... of the weight. */
INLINE void multiply_few(const Matmul *j, const Few few, int64_t n) {
  const int64_t whole = j->K / 128 * 128;
  int64_t block = n * (j->K / BLOCK);
  const uint16_t *x = j->x;
  __m512 sums[STREAMS][FEW];
  for (int r = 0; r < STREAMS; r++)
    for (int m = 0; m < few.M; m++) sums[r][m] = _mm512_setzero_ps();
  for (int64_t k = 0; k < whole; k += 128, block += 2, x += 128) few_step(j, few, block, 0, x, sums);
  if (whole < j->K) few_step(j, few, block, 1, x, sums);
  for (int m = 0; m < few.M; m++) {  // in the order of multiply_many(), so that a row's bits do not depend on M
    float four[4];
    _mm_storeu_ps(four, sum_of_four(sums[0][m], sums[1][m], sums[2][m], sums[3][m]));
    for (int r = 0; r < few.rows; r++) store(j->out, BF16, m * j->N + n + r * few.stride, four[r]);
  }
}

INLINE void multiply_rows(const Matmul *j, int64_t begin, int64_t end, const int M, const int is_nested) {
  const int streams = M == 1 ? STREAMS : STREAMS / 2;
  const int64_t stride = (end - begin) / streams;
  for (int64_t n = begin; n < begin + stride; n++) multiply_few(j, (Few){streams, M, is_nested, stride}, n);
  for (int64_t n = begin + streams * stride; n < end; n++) multiply_few(j, (Few){1, M, is_nested, 0}, n);
}

#define MULTIPLY_FEW(M) \
  static void multiply_few_##M(const Matmul *j, int64_t begin, int64_t end) { \
    if (j->weight.absmax) multiply_rows(j, begin, end, M, 0); \
    else multiply_rows(j, begin, end, M, 1); \
  } \
  WORK(multiply_few_##M, Matmul)
MULTIPLY_FEW(1)
MULTIPLY_FEW(2)
MULTIPLY_FEW(3)
MULTIPLY_FEW(4)
MULTIPLY_FEW(5)
MULTIPLY_FEW(6)
MULTIPLY_FEW(7)
MULTIPLY_FEW(8)
static const Work FEW_ROWS[] = {NULL, multiply_few_1_work, multiply_few_2_work, multiply_few_3_work, multiply_few_4_work,
                                multiply_few_5_work, multiply_few_6_work, multiply_few_7_work, multiply_few_8_work};

/* More rows of x: a chunk of ROWS rows of the weight is expanded into the L1 cache and multiplied with COLUMNS rows of x at a time, so
 * that 24 products need 10 loads. */
enum { ROWS = 6, COLUMNS = 4 };

static void multiply_many(const Matmul *j, int64_t begin, int64_t end) {
  uint16_t w[ROWS][CHUNK] __attribute__((aligned(64)));
  float sums[MAX_ROWS][ROWS][16] __attribute__((aligned(64)));
  const int64_t M = j->M, K = j->K, padded = (K + 127) / 128 * 128;
  for (int64_t n = begin; n < end; n += ROWS) {
    const int rows = end - n < ROWS ? (int)(end - n) : ROWS;
    memset(sums, 0, (M + COLUMNS - 1) / COLUMNS * COLUMNS * sizeof sums[0]);
    for (int64_t k = 0; k < K; k += CHUNK) {
      const int64_t size = padded - k < CHUNK ? padded - k : CHUNK;
      for (int r = 0; r < ROWS; r++)  // after the last row the last row again, whose sums are not stored
        for (int64_t i = 0; i < size; i += 128) {
          __m512bh parts[4];
          const int64_t block = ((n + (r < rows ? r : rows - 1)) * K + k + i) / BLOCK;
          const int64_t next = block + (k + CHUNK < K ? CHUNK : ROWS * K - k) / BLOCK;  // read while the products run
          _mm_prefetch(j->weight.packed + next * (BLOCK / 2), _MM_HINT_T0);
          if (i == 0 && j->weight.absmax) _mm_prefetch(j->weight.absmax + next, _MM_HINT_T0);
          expand_128(&j->weight, block, k + i + BLOCK == K, parts);
          for (int part = 0; part < 4; part++) _mm512_store_si512(w[r] + i + 32 * part, (__m512i)parts[part]);
        }
      for (int64_t m = 0; m < M; m += COLUMNS) {
        const uint16_t *x[COLUMNS];
        __m512 s[COLUMNS][ROWS];
        for (int t = 0; t < COLUMNS; t++) {
          x[t] = (const uint16_t *)j->x + k * M + (m + t < M ? m + t : M - 1) * size;
          for (int r = 0; r < ROWS; r++) s[t][r] = _mm512_load_ps(sums[m + t][r]);
        }
        for (int64_t i = 0; i < size; i += 32) {
          __m512bh v[ROWS];
          for (int r = 0; r < ROWS; r++) v[r] = (__m512bh)_mm512_load_si512(w[r] + i);
          for (int t = 0; t < COLUMNS; t++) {
            __m512bh row = (__m512bh)_mm512_load_si512(x[t] + i);
            for (int r = 0; r < ROWS; r++) s[t][r] = _mm512_dpbf16_ps(s[t][r], v[r], row);
          }
        }
        for (int t = 0; t < COLUMNS; t++)
          for (int r = 0; r < ROWS; r++) _mm512_store_ps(sums[m + t][r], s[t][r]);
      }
    }
    for (int64_t m = 0; m < M; m += COLUMNS)
      for (int r = 0; r < rows; r++) {
        float four[4];
        _mm_storeu_ps(four, sum_of_four(_mm512_load_ps(sums[m][r]), _mm512_load_ps(sums[m + 1][r]),
                                        _mm512_load_ps(sums[m + 2][r]), _mm512_load_ps(sums[m + 3][r])));
        for (int64_t t = 0; t < COLUMNS && m + t < M; t++) store(j->out, BF16, (m + t) * j->N + n + r, four[t]);
      }
  }
}
WORK(multiply_many, Matmul)

#if LEVEL >= AMX

/* AMX, for tens of rows of x: 128 elements of 16 rows of the weight become four tiles of 16 x 32, in the order of expand_128(). Up to
 * 64 rows of x are multiplied at once, in four tiles of 16 x 32 each (see tile_x). A tile of sums is 16 x 16. */
#ifdef EMULATE_AMX  // for tests on a CPU without AMX: the five instructions in C, on eight tiles of each thread
static __thread uint8_t tiles[8][16][64];
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) (void)(config)
#define _tile_release() (void)0
#define _tile_zero(t) memset(tiles[t], 0, sizeof tiles[t])
#define _tile_loadd(t, from, stride) \
  for (int row_ = 0; row_ < 16; row_++) memcpy(tiles[t][row_], (const char *)(from) + row_ * (stride), 64)
#define _tile_stored(t, to, stride) \
  for (int row_ = 0; row_ < 16; row_++) memcpy((char *)(to) + row_ * (stride), tiles[t][row_], 64)
#define _tile_dpbf16ps(t, a, b) emulate_dpbf16ps(t, a, b)
static void emulate_dpbf16ps(int t, int a, int b) {
  const uint16_t(*x)[32] = (const uint16_t(*)[32])tiles[a], (*y)[32] = (const uint16_t(*)[32])tiles[b];
  float(*sums)[16] = (float(*)[16])tiles[t];
  for (int i = 0; i < 16; i++)
    for (int c = 0; c < 16; c++)
      for (int k = 0; k < 32; k++) sums[i][c] += from_bf16(x[i][k]) * from_bf16(y[k / 2][2 * c + k % 2]);
}
#endif

/* Its layout: x is permuted row by row, then ordered as [128 elements][16 rows of x: a tile][part of 32][pair][row][2]. Rows beyond
 * M are 0. All of x at once: begin is 0 and end is 1. */
static void tile_x(const Layout *j, int64_t begin, int64_t end) {
  if (begin == end) return;
  const uint16_t *x = j->spare;
  uint16_t *out = j->out;
  const int64_t M = j->M, padded = (j->K + 127) / 128 * 128;
  permute_to(j->spare, j);
  for (int64_t k = 0; k < padded; k += 128)
    for (int64_t m = 0; m < M; m += 16)
      for (int pair = 0; pair < 64; pair++)
        for (int row = 0; row < 16; row++, out += 2) {
          uint32_t both = 0;
          if (m + row < M) memcpy(&both, x + (m + row) * padded + k + 2 * pair, 4);
          memcpy(out, &both, 4);
        }
}
WORK(tile_x, Layout)

static void multiply_amx(const Matmul *j, int64_t begin, int64_t end) {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int t = 0; t < 8; t++) {
    config.bytes[t] = 64;
    config.rows[t] = 16;
  }
  _tile_loadconfig(&config);
  uint16_t w[4][16][32] __attribute__((aligned(64))) = {0};
  float sums[4][16][16] __attribute__((aligned(64)));
  const int64_t M = j->M, K = j->K, groups = (M + 15) / 16;
  for (int64_t n = begin; n < end; n += 16) {
    const int rows = end - n < 16 ? (int)(end - n) : 16;
    for (int64_t group = 0; group < groups; group += 4) {
      const int64_t count = groups - group < 4 ? groups - group : 4;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < K; k += 128) {
        for (int r = 0; r < rows; r++) {  // rows beyond the last keep old values; their sums are not stored
          __m512bh parts[4];
          const int64_t block = ((n + r) * K + k) / BLOCK;
          _mm_prefetch(j->weight.packed + block * (BLOCK / 2) + 512, _MM_HINT_T0);
          expand_128(&j->weight, block, k + BLOCK == K, parts);
          for (int part = 0; part < 4; part++) _mm512_store_si512(w[part][r], (__m512i)parts[part]);
        }
        const uint16_t *x = (const uint16_t *)j->x + (k / 128 * groups + group) * 2048;
        for (int part = 0; part < 4; part++, x += 512) {
          _tile_loadd(4, w[part], 64);
          _tile_loadd(5, x, 64);
          _tile_dpbf16ps(0, 4, 5);
          if (count > 1) {
            _tile_loadd(6, x + 2048, 64);
            _tile_dpbf16ps(1, 4, 6);
          }
          if (count > 2) {
            _tile_loadd(7, x + 4096, 64);
            _tile_dpbf16ps(2, 4, 7);
          }
          if (count > 3) {
            _tile_loadd(5, x + 6144, 64);
            _tile_dpbf16ps(3, 4, 5);
          }
        }
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
      for (int64_t m = group * 16; m < M && m < (group + count) * 16; m++)
        for (int r = 0; r < rows; r++) store(j->out, BF16, m * j->N + n + r, sums[m / 16 - group][r][m % 16]);
    }
  }
  _tile_release();
}
WORK(multiply_amx, Matmul)

#endif  // AMX
#endif  // AVX512_BF16

// --- entry points -----------------------------------------------------------------------------------------------------

void nf4_quantize(int threads, const Quantize *job) {
  parallel(quantize_blocks_work, job, (job->n + BLOCK - 1) / BLOCK, threads);
}

void nf4_dequantize(int threads, const Dequantize *given) {
  Dequantize job = *given;
  job.stream = job.stream && (uintptr_t)job.out % 64 == 0;  // the instruction takes aligned addresses only
  parallel(dequantize_blocks_work, &job, (job.n + BLOCK - 1) / BLOCK, threads);
}

/* 0, or -1 without memory. */
int nf4_matmul(int threads, const Matmul *given) {
  const int64_t M = given->M, K = given->K, padded = (K + 127) / 128 * 128;
  float *scratch = borrow((M > 4 ? M + 16 : M) * padded * 4);
  if (!scratch) return -1;
  Matmul job = *given;
  job.x = scratch;
  Layout layout = {.dtype = job.dtype, .x = given->x, .out = scratch, .M = M, .K = K};
  int64_t pieces = M;
  Work write_layout = widen_x_work, multiply = multiply_blocks_work;
#if LEVEL >= AVX512_BF16
  if (job.dtype == BF16) {
    const int is_few = M <= (has_amx ? 4 : FEW);
    layout.chunk = is_few || has_amx ? padded : CHUNK;
    pieces = 1;
    write_layout = permute_x_work;
    multiply = is_few ? FEW_ROWS[M] : multiply_many_work;
  }
#endif
#if LEVEL >= AMX
  if (job.dtype == BF16 && has_amx && M > 4) {
    layout.spare = (uint16_t *)scratch + (M + 15) / 16 * 16 * padded;
    write_layout = tile_x_work;
    multiply = multiply_amx_work;
  }
#endif
  parallel(write_layout, &layout, pieces, 1);
  parallel(multiply, &job, job.N, threads);
  give_back(scratch);
  return 0;
}
