// NF4 on NVIDIA chips from compute capability 5.0: quantize, dequantize and matmul for 1 to 8 rows of x. The format and the
// bits are those of nf4_reference.py. No headers: NVRTC builds this file, and so does g++ with tests/cuda_shim.h before it.
//
// Every kernel parameter is 8 bytes wide, as nf4_cuda.py passes them. nf4.py checks the inputs; the kernels do not.

typedef unsigned char u8;
typedef unsigned short u16;
typedef long long i64;

#ifdef __CUDACC__
__device__ inline float f16_value(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ inline u16 f16_bits(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

__constant__ float CODE[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};
constexpr unsigned TINY = 0x006CE3EE;  // the bits of 1e-38f: keeps the reciprocal of an all-zero block finite
constexpr int WARP = 32;

// Element types. value() converts a stored element to float; bits() converts it back, rounded to nearest even.
struct F32 {
    typedef unsigned Bits;
    static __device__ inline float value(Bits bits) { return __uint_as_float(bits); }
    static __device__ inline Bits bits(float value) { return __float_as_uint(value); }
};
struct F16 {
    typedef u16 Bits;
    static __device__ inline float value(Bits bits) { return f16_value(bits); }
    static __device__ inline Bits bits(float value) { return f16_bits(value); }
};
struct BF16 {  // in integer arithmetic: chips before 8.0 have no instruction for it
    typedef u16 Bits;
    static __device__ inline float value(Bits bits) { return __uint_as_float((unsigned)bits << 16); }
    static __device__ inline Bits bits(float value) {
        unsigned u = __float_as_uint(value);
        if ((u & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;  // NaN: the sum below could carry it to 0
        return (Bits)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
    }
};

// Scales: the absmax of a block, stored as it is (Plain) or quantised (Double: rounded after the product and after the sum).
// load() and value() are two steps, so that the loads for several blocks are issued before the first one is waited for.
struct Plain {
    typedef float Stored;
    const float* absmax;
    __device__ inline Stored load(i64 block) const { return absmax[block]; }
    __device__ inline float value(Stored stored) const { return stored; }
};
struct Double {
    struct Stored { u8 q; float absmax2; };
    const u8* q;
    const float *absmax2, *code2;
    float offset;
    __device__ inline Stored load(i64 block) const { return {q[block], absmax2[block / 256]}; }
    __device__ inline float value(Stored stored) const {
        return __fadd_rn(__fmul_rn(code2[stored.q], stored.absmax2), offset);
    }
};

template <int BYTES>
__device__ inline bool aligned(const void* pointer) { return (unsigned long long)pointer % BYTES == 0; }

// 16 bytes hold 4 or 8 values.
template <class T> constexpr int PER_STORE = 16 / sizeof(typename T::Bits);

template <class T>
__device__ inline void unpack(uint4 from, float* values) {
    const unsigned words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < PER_STORE<T>; i++)
        if constexpr (sizeof(typename T::Bits) == 4) values[i] = T::value(words[i]);
        else values[i] = T::value((u16)(words[i / 2] >> (i % 2 * 16)));
}

template <class T>
__device__ inline uint4 pack(const float* values) {
    unsigned words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < PER_STORE<T>; i++)
        if constexpr (sizeof(typename T::Bits) == 4) words[i] = T::bits(values[i]);
        else words[i / 2] |= (unsigned)T::bits(values[i]) << (i % 2 * 16);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

template <class T>
__device__ inline void load_8(const typename T::Bits* from, float* values) {  // from: 16-byte aligned
#pragma unroll
    for (int i = 0; i < 8; i += PER_STORE<T>) unpack<T>(*(const uint4*)(from + i), values + i);
}

// The index of element i in a word of packed bytes. The first element of a byte is in its high half.
__device__ inline unsigned index_in(unsigned word, int i) { return word >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15; }

// Copies the 16 code values to shared memory. They lie in 16 banks, so a look-up by 32 lanes is one access for any indices;
// in __constant__ memory it would be one access for each different index.
__device__ inline void fill(float* code) {
    if (threadIdx.x < 16) code[threadIdx.x] = CODE[threadIdx.x];
    __syncthreads();
}

// The number of midpoints below `scaled`. A tie goes to the lower index, NaN to the highest.
__device__ inline unsigned nearest(const float* midpoints, float scaled) {
    unsigned index = scaled <= midpoints[7] ? 0 : 8;
    index += scaled <= midpoints[index + 3] ? 0 : 4;
    index += scaled <= midpoints[index + 1] ? 0 : 2;
    return index + (scaled <= midpoints[index] ? 0 : 1);
}

// A thread quantises 8 values; 8 threads share a block of 64.
template <class T>
__device__ inline void quantize(const typename T::Bits* weight, u8* packed, float* absmax, i64 n) {
    __shared__ float midpoints[15];
    if (threadIdx.x < 15) midpoints[threadIdx.x] = __fadd_rn(CODE[threadIdx.x], CODE[threadIdx.x + 1]) * 0.5f;
    __syncthreads();
    const i64 start = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    float values[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (start + 8 <= n && aligned<16>(weight)) load_8<T>(weight + start, values);
    else
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (start + i < n) values[i] = T::value(weight[start + i]);

    unsigned largest = 0;  // of the bits, which are in the order of |value|, with NaN above infinity
#pragma unroll
    for (int i = 0; i < 8; i++) largest = max(largest, __float_as_uint(values[i]) & 0x7FFFFFFF);
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) largest = max(largest, __shfl_xor_sync(0xFFFFFFFF, largest, lanes));
    if (start >= n) return;

    const bool whole = start / 64 * 64 + 64 <= n;  // a shorter last block: values are divided, and absmax is never 0
    const float scale = __uint_as_float(max(largest, TINY));
    const float reciprocal = __fdiv_rn(1.0f, scale);
    if (start % 64 == 0) absmax[start / 64] = whole ? __uint_as_float(largest) : scale;
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float scaled = whole ? __fmul_rn(values[i], reciprocal) : __fdiv_rn(values[i], scale);
        const unsigned index = start + i < n ? nearest(midpoints, scaled) : 7;
        word |= index << (i / 2 * 8 + (i % 2 ? 0 : 4));
    }
    if (start + 8 <= n) *(unsigned*)(packed + start / 2) = word;
    else
        for (int i = 0; start + 2 * i < n; i++) packed[start / 2 + i] = (u8)(word >> 8 * i);
}

// A thread writes 4 pieces of 16 bytes. A warp writes 512 bytes in a row. All loads are issued before the first store. The last
// block of threads, and every block if a pointer is not aligned, works value by value.
template <class T, class Scales>
__device__ inline void dequantize(const u8* packed, Scales scales, typename T::Bits* out, i64 n) {
    __shared__ float code[16];
    fill(code);
    constexpr int PIECE = PER_STORE<T>, PIECES = 4;
    const i64 begin = (i64)blockIdx.x * blockDim.x * (PIECE * PIECES), end = begin + blockDim.x * (PIECE * PIECES);
    if (end > n || !aligned<PIECE / 2>(packed) || !aligned<16>(out)) {
        for (i64 i = begin + threadIdx.x; i < min(end, n); i += blockDim.x)
            out[i] = T::bits(__fmul_rn(code[index_in(packed[i / 2], i % 2)], scales.value(scales.load(i / 64))));
        return;
    }
    unsigned words[PIECES];
    typename Scales::Stored stored[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const i64 start = begin + (p * blockDim.x + threadIdx.x) * PIECE;
        if constexpr (PIECE == 8) words[p] = *(const unsigned*)(packed + start / 2);
        else words[p] = *(const u16*)(packed + start / 2);
        stored[p] = scales.load(start / 64);
    }
    float scale[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++) scale[p] = scales.value(stored[p]);
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        float values[PIECE];
#pragma unroll
        for (int i = 0; i < PIECE; i++) values[i] = __fmul_rn(code[index_in(words[p], i)], scale[p]);
        *(uint4*)(out + begin + (p * blockDim.x + threadIdx.x) * PIECE) = pack<T>(values);
    }
}

// out (M, features) = x (M, in) times the weight (features, in) transposed, 1 <= M <= ROWS. The sums are fp32, over fp32
// products code * absmax that are not rounded to T. in % 64 == 0, in < 2^30; x is 16-byte aligned, packed 4-byte.
//
// A warp computes 2 rows of the weight, which share what is loaded of x. A lane takes 8 weights (4 bytes) at a time, so the warp
// reads 128 bytes of packed and 512 of x (of 16 bits) in a row. With 16 bytes of packed a lane, the reads of x would be 64 bytes
// apart, in a quarter of the banks. With one row of x the kernel waits for memory, so each lane has DEPTH loads in flight.
template <class T, int ROWS, class Scales>
__device__ inline void matmul(
    const typename T::Bits* x, const u8* packed, Scales scales, typename T::Bits* out, int M, int in, i64 features
) {
    __shared__ float code[16];
    fill(code);
    constexpr int PAIR = 2, DEPTH = ROWS == 1 ? 4 : 1, STEP = WARP * 8;
    const int lane = threadIdx.x % WARP;
    const i64 first = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / WARP * PAIR;
    if (first >= features) return;
    i64 row[PAIR];
#pragma unroll
    for (int r = 0; r < PAIR; r++) row[r] = min(first + r, features - 1) * in;  // an odd last row is computed twice
    float sum[PAIR][ROWS] = {};

#pragma unroll 1
    for (int base = lane * 8; base < in; base += STEP * DEPTH) {
        unsigned words[DEPTH][PAIR];
        typename Scales::Stored stored[DEPTH][PAIR];
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
#pragma unroll
            for (int r = 0; r < PAIR; r++)
                if (base + d * STEP < in) {
                    const i64 start = row[r] + base + d * STEP;
                    words[d][r] = *(const unsigned*)(packed + start / 2);
                    stored[d][r] = scales.load(start / 64);
                }
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const int k = base + d * STEP;
            if (k >= in) break;
            float weights[PAIR][8], scale[PAIR];
#pragma unroll
            for (int r = 0; r < PAIR; r++) {
                scale[r] = scales.value(stored[d][r]);
#pragma unroll
                for (int i = 0; i < 8; i++) weights[r][i] = code[index_in(words[d][r], i)];
            }
#pragma unroll
            for (int m = 0; m < ROWS; m++) {
                float values[8];
                load_8<T>(x + (i64)min(m, M - 1) * in + k, values);
#pragma unroll
                for (int r = 0; r < PAIR; r++) {
                    float product = 0;
#pragma unroll
                    for (int i = 0; i < 8; i++) product = fmaf(weights[r][i], values[i], product);
                    sum[r][m] = fmaf(product, scale[r], sum[r][m]);
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < ROWS; m++)
#pragma unroll
        for (int r = 0; r < PAIR; r++) {
#pragma unroll
            for (int lanes = WARP / 2; lanes; lanes /= 2) sum[r][m] += __shfl_xor_sync(0xFFFFFFFF, sum[r][m], lanes);
            if (lane == 0 && m < M && first + r < features) out[m * features + first + r] = T::bits(sum[r][m]);
        }
}

// BOUNDS: threads of a block, and the number of blocks that must fit on a multiprocessor, which limits the registers of a
// thread. Without this limit ptxas spills registers of matmul on sm_80.
#define KERNEL(name, BOUNDS...) extern "C" __global__ void __launch_bounds__(BOUNDS) name
#define SCALES_OF_Plain const float* absmax
#define SCALES_OF_Double const u8 *q, const float *absmax2, const float *code2, const float *offset
#define PACK_Plain Plain{absmax}
#define PACK_Double Double{q, absmax2, code2, *offset}

#define MATMUL(name, T, ROWS, SCALES, BLOCKS) \
    KERNEL(name, 128, BLOCKS)( \
        const T::Bits* x, const u8* packed, SCALES_OF_##SCALES, T::Bits* out, i64 M, i64 in, i64 features \
    ) { \
        matmul<T, ROWS>(x, packed, PACK_##SCALES, out, (int)M, (int)in, features); \
    }
#define DEQUANTIZE(name, T, SCALES) \
    KERNEL(name, 128)(const u8* packed, SCALES_OF_##SCALES, T::Bits* out, i64 n) { \
        dequantize<T>(packed, PACK_##SCALES, out, n); \
    }
#define KERNELS(T, dtype) \
    KERNEL(quantize_##dtype, 128)(const T::Bits* weight, u8* packed, float* absmax, i64 n) { \
        quantize<T>(weight, packed, absmax, n); \
    } \
    DEQUANTIZE(dequantize_##dtype, T, Plain) \
    DEQUANTIZE(dequantize_double_##dtype, T, Double) \
    MATMUL(matmul_1_##dtype, T, 1, Plain, 8) \
    MATMUL(matmul_4_##dtype, T, 4, Plain, 6) \
    MATMUL(matmul_8_##dtype, T, 8, Plain, 4) \
    MATMUL(matmul_double_1_##dtype, T, 1, Double, 8) \
    MATMUL(matmul_double_4_##dtype, T, 4, Double, 6) \
    MATMUL(matmul_double_8_##dtype, T, 8, Double, 4)

KERNELS(F32, float32)
KERNELS(F16, float16)
KERNELS(BF16, bfloat16)
