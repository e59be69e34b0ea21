/* What nf4.c and decode.c share: instruction sets, the threads, and the 16-bit numbers.

One binary holds every instruction set; a function's `level` chooses among them at run time. A function of a job and a range
does the work of one thread; `parallel` hands out the ranges. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 14 : __GNUC__ >= 11)  // older ones lack AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define X86 1
#define TARGET(isa) __attribute__((target(isa)))
#else
#define X86 0
#endif
#define INLINE static inline __attribute__((always_inline))

enum { PORTABLE, AVX2, AVX512, AVX512_BF16, AMX };  // levels; each includes the ones before it
enum { FP32, FP16, BF16 };                          // dtypes

#define AVX2_TARGET TARGET("avx2,fma,f16c")
#define AVX512_TARGET TARGET("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#define BF16_TARGET TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")
#define BF16_INLINE static inline BF16_TARGET __attribute__((always_inline))

typedef struct Job Job;  // what a file's functions work on
typedef void (*Work)(const Job *, int64_t begin, int64_t end);

typedef struct {  // a piece of work, to be handed out
  Work work;
  const Job *job;
  int64_t count;
  int threads;
  int is_apart;  // the next one does not need what this one writes: no thread waits for the others
} Step;

typedef struct Block {  // scratch memory of a tape
  void *memory;
  size_t size;
  int is_lent;
  struct Block *next;
} Block;

typedef struct {  // the steps of many calls, to be run again by one; see tape.py
  Step *steps;
  int64_t length, room;
  int threads, failed;
  Block *blocks;
} Tape;

static __thread Tape *tape;  // NULL: nothing is recorded

/* Called of each library that is to write its steps to one tape. */
void record(Tape *to) { tape = to; }

/* Called of each library before a tape is freed. */
void forget(const Tape *t) {
  if (tape == t) tape = NULL;
}

static void run(const Step *steps, int64_t length, int threads) {
  if (threads == 1) {
    for (int64_t i = 0; i < length; i++) steps[i].work(steps[i].job, 0, steps[i].count);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), all = omp_get_num_threads();
    for (int64_t i = 0; i < length; i++) {
      const Step s = steps[i];
      const int parts = s.threads < all ? s.threads : all;
      if (thread < parts) s.work(s.job, s.count * thread / parts, s.count * (thread + 1) / parts);
      const int is_alone = parts == 1 && i + 1 < length && steps[i + 1].threads == 1;  // the same thread goes on
      if (!s.is_apart && !is_alone) {
#pragma omp barrier
      }
    }
  }
}

/* Runs the steps, and writes them to the tape that records, with jobs of `job_size` bytes. */
static void perform(const Step *steps, int64_t length, size_t job_size) {
  int threads = 1;
  for (int64_t i = 0; i < length; i++) threads = steps[i].threads > threads ? steps[i].threads : threads;
  run(steps, length, threads);
  if (!tape) return;
  if (tape->length + length > tape->room) {
    const int64_t room = 2 * tape->room + length;
    Step *more = realloc(tape->steps, (size_t)room * sizeof *more);
    if (!more) {
      tape->failed = 1;
      return;
    }
    tape->steps = more, tape->room = room;
  }
  for (int64_t i = 0; i < length; i++) {
    void *job = malloc(job_size);
    if (!job) {
      tape->failed = 1;
      return;
    }
    memcpy(job, steps[i].job, job_size);
    tape->steps[tape->length] = steps[i];
    tape->steps[tape->length++].job = job;
  }
  if (threads > tape->threads) tape->threads = threads;
}

#define parallel(work, job, count, threads) perform(&(const Step){work, job, count, threads, 0}, 1, sizeof *(job))

/* Memory at a multiple of 64 bytes until give_back(): a tape's own where one records. NULL where there is none. */
static void *borrow(size_t size) {
  size = (size + 63) / 64 * 64;
  if (!tape) return aligned_alloc(64, size);
  for (Block *b = tape->blocks; b; b = b->next)
    if (!b->is_lent && b->size >= size) return b->is_lent = 1, b->memory;
  Block *block = malloc(sizeof *block);
  void *memory = aligned_alloc(64, size);
  if (!block || !memory) {
    free(block), free(memory);
    return NULL;
  }
  *block = (Block){memory, size, 1, tape->blocks};
  tape->blocks = block;
  return memory;
}

static void give_back(void *memory) {
  if (!tape) free(memory);
  else for (Block *b = tape->blocks; b; b = b->next) b->is_lent &= b->memory != memory;
}

static int highest_level(void) {
#if X86
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return PORTABLE;
  if (!(__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))) return AVX2;
  if (!__builtin_cpu_supports("avx512bf16")) return AVX512;
  unsigned a, b, c, d;  // leaf 7: AMX-BF16 is bit 22 of edx; Linux lends the tiles on request only
  __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
  return (d >> 22 & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? AMX : AVX512_BF16;
#else
  return PORTABLE;
#endif
}

// --- numbers ---------------------------------------------------------------------------------------------------

INLINE uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

INLINE float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

INLINE uint16_t to_bf16(float f) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t u = bits_of(f);
  return (u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

INLINE float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }

INLINE uint16_t to_fp16(float f) {  // the same, by adding: the sum rounds at the place where the fp16 ends
  uint32_t u = bits_of(f), sign = u >> 16 & 0x8000, rest = u & 0x7FFFFFFF;
  if (rest > 0x7F800000) return sign | 0x7E00;
  if (rest >= 0x477FF000) return sign | 0x7C00;                                          // rounds to 65536 or more
  if (rest < 0x38800000) return sign | (bits_of(float_of(rest) + 0.5f) - 0x3F000000u);   // a subnormal fp16
  return sign | ((rest + 0xFFF + (rest >> 13 & 1)) - 0x38000000u) >> 13;
}

INLINE float from_fp16(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7FFF;
  if (rest >= 0x7C00) return float_of(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

INLINE float load(const void *x, int dtype, int64_t i) {
  if (dtype == FP32) return ((const float *)x)[i];
  uint16_t h = ((const uint16_t *)x)[i];
  return dtype == FP16 ? from_fp16(h) : from_bf16(h);
}

INLINE void store(void *out, int dtype, int64_t i, float f) {
  if (dtype == FP32) ((float *)out)[i] = f;
  else ((uint16_t *)out)[i] = dtype == FP16 ? to_fp16(f) : to_bf16(f);
}

#if X86
/* The sums of the 16 elements of each of four vectors. */
BF16_INLINE __m128 sum_of_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));  // a, b, a, b in each 128 bits
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));  // a, b, c, d in each 128 bits
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#endif
