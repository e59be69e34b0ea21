"""Runs every C kernel on exact-sized buffers from malloc; tests/test_nf4_cpu.py starts it under sanitizers.
usage: sanitized.py LIBRARY LEVEL"""

import ctypes
import sys

from minitune_kernels import built, nf4_cpu, ops_cpu

BYTES = {0: 4, 1: 2, 2: 2}  # of a value, by the number of the dtype
lib = steps = ops_cpu.typed(nf4_cpu.typed(built.load(sys.argv[1])))
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


def buffer(size):
    """Allocates exactly `size` bytes, so that the sanitizer sees an access one byte after them. Filled with small numbers."""
    address = libc.malloc(size)
    ctypes.memset(address, 0x3C, size)
    return address


def run_nf4(operation, job):
    return getattr(lib, f"nf4_{operation}")(2, ctypes.addressof(job))


def run(dtype):
    for n in (1, 63, 64, 130, 640):
        weight, packed, absmax = buffer(n * BYTES[dtype]), buffer((n + 1) // 2), buffer(-(-n // 64) * 4)
        q, absmax2, code2, offset = buffer(-(-n // 64)), buffer(4), buffer(1024), buffer(4)
        out = buffer(n * BYTES[dtype])
        run_nf4("quantize", nf4_cpu.Quantize(dtype, weight, packed, absmax, n))
        for stream in (0, 1):
            for given in (nf4_cpu.Weight(packed, absmax), nf4_cpu.Weight(packed, None, q, absmax2, code2, offset)):
                run_nf4("dequantize", nf4_cpu.Dequantize(dtype, given, out, n, stream))
        for address in (weight, packed, absmax, q, absmax2, code2, offset, out):
            libc.free(address)
    for N, K in ((1, 64), (7, 192), (17, 1088)):
        packed, absmax = buffer(N * K // 2), buffer(N * K // 64 * 4)
        q, absmax2, code2, offset = buffer(N * K // 64), buffer(-(-N * K // 64 // 256) * 4), buffer(1024), buffer(4)
        for M in (1, 2, 3, 4, 5, 6, 7, 8, 33, 70, 128):
            x, out = buffer(M * K * BYTES[dtype]), buffer(M * N * BYTES[dtype])
            for given in (nf4_cpu.Weight(packed, absmax), nf4_cpu.Weight(packed, None, q, absmax2, code2, offset)):
                assert run_nf4("matmul", nf4_cpu.Matmul(dtype, x, given, out, M, N, K)) == 0
            for address in (x, out):
                libc.free(address)
        for address in (packed, absmax, q, absmax2, code2, offset):
            libc.free(address)


def run_linears(dtype):
    size = BYTES[dtype]
    for N, K in ((1, 32), (7, 96), (17, 1056)):
        weight, bias = buffer(N * K * size), buffer(N * size)
        for M in (*range(1, 20), 127, 128):
            x, first, second = buffer(M * K * size), buffer(M * N * size), buffer(M * N * size)
            layers = (dtype, x, weight, bias, first, M, N, K), (dtype, x, weight, None, second, M, N, K)
            products = (ops_cpu.Linear * 2)(*layers)
            assert steps.linears(2, ctypes.addressof(products), 2) == 0
            for address in (x, first, second):
                libc.free(address)
        for address in (weight, bias):
            libc.free(address)


def run_lora(dtype):
    size = BYTES[dtype]
    for M, N, K, r in ((1, 1, 1, 1), (3, 70, 50, 17), (2, 700, 512, 16), (13, 33, 63, 70), (128, 15, 32, 3)):
        x, A, B, out = buffer(M * K * size), buffer(r * K * 4), buffer(N * r * 4), buffer(M * N * size)
        job = ops_cpu.LoRA(dtype, x, out, A, B, M, N, K, r, 0.5)
        assert steps.lora(2, ctypes.addressof(job)) == 0
        for address in (x, A, B, out):
            libc.free(address)


def run_steps(dtype):
    size = BYTES[dtype]
    for M, K in ((1, 1), (3, 70), (128, 31), (2, 8192)):
        x, y, weight, out = buffer(M * K * size), buffer(M * K * size), buffer(K * size), buffer(M * K * size)
        steps.rms_norm(2, dtype, x, weight, out, M, K, 1e-5)
        steps.layer_norm(2, dtype, x, weight, weight, out, M, K, 1e-5)
        steps.add(2, dtype, x, weight, out, M * K, K)
        steps.add(2, dtype, x, y, x, M * K, M * K)
        steps.gelu_tanh(2, dtype, x, out, M * K)
        steps.swiglu(2, dtype, x, y, out, M * K)
        values, ids = buffer(M * 4), buffer(M * 8)
        steps.most_likely(2, dtype, x, values, ids, M, K, 1)
        for address in (x, y, weight, out, values, ids):
            libc.free(address)
    for rows, H, T, D in ((1, 1, 1, 2), (3, 5, 2, 20), (40, 12, 1, 64)):
        x, cos, sin = (
            buffer(rows * H * T * D * size),
            buffer(rows * T * D // 2 * size),
            buffer(rows * T * D // 2 * size),
        )
        out = buffer(rows * H * T * D * size)
        for turned in (D, D // 4 * 2):
            job = ops_cpu.Rope(dtype, x, cos, sin, out, rows, H, T, D, turned, H * T * D, T * D, D, T * D // 2)
            steps.rope(2, ctypes.addressof(job))
        for address in (x, cos, sin, out):
            libc.free(address)
    for lengths, n, H, H_kv, T, D, capacity, new, window in (
        ([1], 1, 1, 1, 1, 2, 1, 0, 0),
        ([5, 300], 3, 4, 2, 1, 64, 8, 5, 0),
        ([5, 2], 2, 2, 2, 3, 20, 7, 9, 4),
        ([6], 1, 3, 1, 1, 128, 3, 100, 3),
        *(([5, 129], 2, 6, 2, 1, D, 4, 3, 0) for D in (16, 40, 48, 72, 80, 96, 100, 112, 160)),
    ):
        stored = [min(length, window - 1) if window else length for length in lengths]
        B, R, P = len(lengths), len(lengths) * n, max(stored)
        numbers = (ctypes.c_int64 * B)(*lengths), (ctypes.c_int64 * B)(*stored)
        writers = (ctypes.c_int32 * (R * capacity))(*[row // n * n for row in range(R) for _ in range(capacity)])
        addresses = [ctypes.addressof(array) for array in (*numbers, writers)]
        shape = ops_cpu.Shape(*addresses, B, n, H, H_kv, T, D, P, capacity, new, window)
        q, out = buffer(R * T * H * D * size), buffer(R * T * H * D * size)
        k, v = buffer(R * T * H_kv * D * size), buffer(R * T * H_kv * D * size)
        prompts = [buffer(B * H_kv * P * D * size) for _ in range(2)]
        fresh = [buffer(R * H_kv * capacity * D * size) for _ in range(2)]
        pointers = q, k, v, out, ctypes.addressof(shape), *prompts, *fresh
        job = ops_cpu.Attention(dtype, *pointers)
        assert steps.attention(2, ctypes.addressof(job)) == 0
        for address in (q, out, k, v, *prompts, *fresh):
            libc.free(address)


def run_tape(dtype):
    """Steps of several files on one tape, with scratch memory, run after what they were recorded from is gone."""
    M, K, r = 3, 192, 7
    tape, size = steps.tape_new(), BYTES[dtype]
    x, weight, low, out = buffer(M * K * size), buffer(K * size), buffer(r * K * 4), buffer(M * K * size)
    packed, absmax = buffer(K * K // 2), buffer(K * K // 64 * 4)
    lib.record(tape)
    steps.rms_norm(2, dtype, x, weight, out, M, K, 1e-5)
    for _ in range(2):  # the second borrows what the first gave back
        weight_4_bit = nf4_cpu.Weight(packed, absmax)
        assert run_nf4("matmul", nf4_cpu.Matmul(dtype, out, weight_4_bit, x, M, K, K)) == 0
        job = ops_cpu.LoRA(dtype, out, x, low, low, M, K, K, r, 0.5)
        assert steps.lora(2, ctypes.addressof(job)) == 0
    steps.add(2, dtype, x, weight, x, M * K, K)
    lib.record(None)
    left_open = steps.tape_new()  # and forgotten before it goes
    lib.record(left_open)
    steps.tape_free(left_open)
    steps.layer_norm(2, dtype, x, weight, weight, out, M, K, 1e-5)
    for _ in range(3):
        assert steps.tape_run(tape) == 0
    steps.tape_free(tape)
    for address in (x, weight, low, out, packed, absmax):
        libc.free(address)


level = int(sys.argv[2])
assert lib.kernel_level() == level
for dtype in BYTES:
    run(dtype)
    if dtype != 1:
        run_steps(dtype)
        run_lora(dtype)
        run_tape(dtype)
    if dtype == 0 or dtype == 2 and level >= 3:
        run_linears(dtype)
print("clean")
