/* Vectors of 16 floats, by extensions of gcc and clang: the compiler maps them to the registers of the instruction set. */

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

/* a and b as groups of 8, 4, 2 or 1 neighbours: the groups at even places of a and of b in turn (LOW), or at odd places (HIGH). */
#define LOW_8(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define HIGH_8(a, b) SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define LOW_4(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#define HIGH_4(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define LOW_2(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH_2(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define LOW_1(a, b) SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#define HIGH_1(a, b) SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)

/* The sum of each of four vectors of 16. All four are added in the same order. */
INLINE Float4 sums_16(const Float16 *v) {
  const Float16 ab = LOW_1(v[0], v[1]) + HIGH_1(v[0], v[1]), cd = LOW_1(v[2], v[3]) + HIGH_1(v[2], v[3]);
  const Float16 all = LOW_2(ab, cd) + HIGH_2(ab, cd);  // each 128 bits: a part of each of the four sums
  Float8 half[2];
  memcpy(half, &all, sizeof half);
  half[0] += half[1];
  Float4 quarter[2];
  memcpy(quarter, half, sizeof quarter);
  return quarter[0] + quarter[1];
}

/* Elements i .. i + 31 as fp32. fp32: in order. bf16: first the 16 at even places, then the 16 at odd places, which takes one shift
 * and one mask. What they are multiplied with or added to must be in the same order. */
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

/* Rounded to bf16 as to_bf16() does, in the upper halves. */
INLINE Bits16 rounded_16(Float16 v) {
  Bits16 bits;
  memcpy(&bits, &v, sizeof bits);
  const Bits16 is_nan = (Bits16)(v != v);  // all ones for NaN, whose bits the sum below could carry to 0
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

