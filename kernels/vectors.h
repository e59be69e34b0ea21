/* Sixteen numbers at once, written once: the compiler takes whatever registers the instruction set has. */

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

