/* Shared by the C kernels: instruction sets, threads, and the conversion of 16-bit floats.

A library is built for one instruction set, LEVEL, for which built.py passes the compiler's options. A Work function computes the
part begin .. end of an operation in one thread; `parallel` splits the whole among the threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PORTABLE 0  // levels; each includes the ones before it
#define AVX2 1
#define AVX512 2
#define AVX512_BF16 3
#define AMX 4

#define INLINE static inline __attribute__((always_inline))
#define HIDDEN __attribute__((visibility("hidden")))  // visible to the files of the library only

enum { FP32, FP16, BF16 };  // dtypes
enum { SERIAL = 1 << 13 };  // with fewer values one thread is faster than two

typedef struct Job Job;  // the arguments of an operation: stands for the struct of that operation in its own file
typedef void (*Work)(const Job *, int64_t begin, int64_t end);

typedef struct {  // work(job, begin, end) over 0 to count, split among threads
  Work work;
  const Job *job;
  int64_t count;
  int threads;
  int no_barrier;  // the next step does not read this one's output, so threads need not wait
} Step;

/* name_work(): calls name(), which takes a `Type`. */
#define WORK(name, Type) \
  static void name##_work(const Job *job, int64_t begin, int64_t end) { name((const Type *)job, begin, end); }

/* The same, with the dtype as a compile-time constant. */
#define EACH_DTYPE(name, Type) \
  static void name##_work(const Job *job, int64_t begin, int64_t end) { \
    const Type *const j = (const Type *)job; \
    if (j->dtype == BF16) name(j, begin, end, BF16); \
    else name(j, begin, end, FP32); \
  }

// --- of tape.c ---------------------------------------------------------------------------------------------------

/* Runs the steps. While a tape records, it also gets a copy of them and of their jobs, `job_size` bytes each. */
HIDDEN void perform(const Step *steps, int64_t length, size_t job_size);
#define parallel(work, job, count, threads) perform(&(const Step){work, (const Job *)(job), count, threads, 0}, 1, sizeof *(job))

/* Memory aligned to 64 bytes, NULL without memory. give_back() returns it. While a tape records, the tape owns it. */
HIDDEN void *borrow(size_t size);
HIDDEN void give_back(void *memory);

/* Whether AMX tiles may be used: Linux grants them to a process on request. */
extern HIDDEN int has_amx;

/* Where a step stores that it failed: in the tape while one records, else at `own`. */
HIDDEN int *fault_of_step(int *own);

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

INLINE uint16_t to_fp16(float f) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t u = bits_of(f), sign = u >> 16 & 0x8000, rest = u & 0x7FFFFFFF;
  if (rest > 0x7F800000) return sign | 0x7E00;
  if (rest >= 0x477FF000) return sign | 0x7C00;                                          // rounds to infinity
  if (rest < 0x38800000) return sign | (bits_of(float_of(rest) + 0.5f) - 0x3F000000u);   // subnormal in fp16: the addition rounds
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

INLINE float rounded(float f, int dtype) { return dtype == BF16 ? from_bf16(to_bf16(f)) : f; }

/* exp(x), to 2 units in the last place, at least 1e-38 and at most 2e38. NaN stays NaN. */
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
