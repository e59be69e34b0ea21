// CUDA on a CPU, as much as nf4.cu needs: a thread of a block is a fiber, so that barriers and shuffles work. It finds wrong
// values, reads out of bounds (under a sanitizer) and a barrier or shuffle that not all reach, but no race between warps.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __device__
#define __global__
#define __constant__ static const
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)

struct dim3 { unsigned x, y, z; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class To, class From>
static inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline uint32_t __float_as_uint(float value) { return same_bits<uint32_t>(value); }
static inline float __uint_as_float(uint32_t bits) { return same_bits<float>(bits); }
static inline float f16_value(uint16_t bits) { return same_bits<_Float16>(bits); }
static inline uint16_t f16_bits(float value) { return same_bits<uint16_t>((_Float16)value); }
static inline float __fmul_rn(float a, float b) { return a * b; }  // built with -ffp-contract=off
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
template <class T> static inline T min(T a, T b) { return a < b ? a : b; }
template <class T> static inline T max(T a, T b) { return a > b ? a : b; }

static dim3 threadIdx, blockIdx, blockDim;

namespace fibers {
enum State { READY, AT_BARRIER, AT_SHUFFLE, DONE };
struct Fiber {
    ucontext_t context;
    State state;
    uint32_t word, partner;  // what it brings to a shuffle, then what it gets; the lane that it gets it from
};
constexpr size_t STACK = 64 << 10;
static std::vector<Fiber> all;
static char* stacks;
static ucontext_t scheduler;
static std::function<void()> body;

static void wait(State state) {
    Fiber& self = all[threadIdx.x];
    self.state = state;
    swapcontext(&self.context, &scheduler);
}
static void run() {
    body();
    wait(DONE);
}
static bool every(size_t begin, size_t end, bool (*claim)(State)) {
    for (size_t i = begin; i < end; i++)
        if (!claim(all[i].state)) return false;
    return true;
}

// Both let on those who wait, and return whether there were any: the 32 lanes of a warp at a shuffle, and all threads of a
// block at a barrier, those aside that have returned.
static bool pass_shuffle(size_t warp) {
    if (!every(warp, warp + 32, [](State s) { return s == AT_SHUFFLE; })) return false;
    uint32_t words[32];
    for (int lane = 0; lane < 32; lane++) words[lane] = all[warp + lane].word;
    for (int lane = 0; lane < 32; lane++) {
        all[warp + lane].word = words[all[warp + lane].partner];
        all[warp + lane].state = READY;
    }
    return true;
}
static bool pass_barrier() {
    if (!every(0, all.size(), [](State s) { return s == AT_BARRIER || s == DONE; })) return false;
    bool waited = false;
    for (Fiber& fiber : all)
        if (fiber.state == AT_BARRIER) fiber.state = READY, waited = true;
    return waited;
}

static void run_block() {
    for (size_t i = 0; i < all.size(); i++) {
        Fiber& fiber = all[i];
        getcontext(&fiber.context);
        fiber.context.uc_stack = {};
        fiber.context.uc_stack.ss_sp = stacks + i * STACK;
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, run, 0);
        fiber.state = READY;
    }
    do {
        // The last warp goes first, as far as it gets: who reads shared memory without a barrier reads too early.
        for (size_t warp = all.size(); warp > 0;) {
            warp -= 32;
            do
                for (size_t i = warp; i < warp + 32; i++) {
                    if (all[i].state != READY) continue;
                    threadIdx = {(unsigned)i, 0, 0};
                    swapcontext(&scheduler, &all[i].context);
                }
            while (pass_shuffle(warp));
        }
    } while (pass_barrier());
    if (!every(0, all.size(), [](State s) { return s == DONE; })) {
        fprintf(stderr, "a barrier or shuffle is not reached by all threads of block %u\n", blockIdx.x);
        abort();
    }
}

static void launch(unsigned blocks, unsigned threads, std::function<void()> kernel) {
    body = kernel;
    all.resize(threads);  // a multiple of 32
    blockDim = {threads, 1, 1};
    void* memory = mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    stacks = (char*)memory;
    for (unsigned block = 0; block < blocks; block++) {
        blockIdx = {block, 0, 0};
        run_block();
    }
    munmap(memory, threads * STACK);
}
}  // namespace fibers

static inline void __syncthreads() { fibers::wait(fibers::AT_BARRIER); }
template <class T>
static inline T __shfl_xor_sync(unsigned, T value, int lanes) {
    fibers::Fiber& self = fibers::all[threadIdx.x];
    self.word = same_bits<uint32_t>(value);
    self.partner = threadIdx.x % 32 ^ lanes;
    fibers::wait(fibers::AT_SHUFFLE);
    return same_bits<T>(self.word);
}
