"""Runs every C kernel on exact-sized buffers from malloc; tests/test_nf4_cpu.py starts it under sanitizers.
usage: sanitized_nf4.py LIBRARY"""

import ctypes
import sys

from minitune_kernels import nf4_cpu

BYTES = {0: 4, 1: 2, 2: 2}  # of a value, by the number of the dtype
lib = nf4_cpu.load(sys.argv[1])
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


def buffer(size):
    """A block of its own, so that a read or write one byte beyond it is seen. Filled with small numbers."""
    address = libc.malloc(size)
    ctypes.memset(address, 0x3C, size)
    return address


def run(level, dtype):
    for n in (1, 63, 64, 130, 640):
        weight, packed, absmax = buffer(n * BYTES[dtype]), buffer((n + 1) // 2), buffer(-(-n // 64) * 4)
        q, absmax2, code2, out = buffer(-(-n // 64)), buffer(4), buffer(1024), buffer(n * BYTES[dtype])
        lib.nf4_quantize(level, 2, dtype, weight, packed, absmax, n)
        for stream in (0, 1):
            lib.nf4_dequantize(level, 2, dtype, packed, absmax, None, None, None, 0.0, out, n, stream)
            lib.nf4_dequantize(level, 2, dtype, packed, None, q, absmax2, code2, 0.5, out, n, stream)
        for address in (weight, packed, absmax, q, absmax2, code2, out):
            libc.free(address)
    for N, K in ((1, 64), (7, 192), (17, 1088)):
        packed, absmax = buffer(N * K // 2), buffer(N * K // 64 * 4)
        q, absmax2, code2 = buffer(N * K // 64), buffer(-(-N * K // 64 // 256) * 4), buffer(1024)
        for M in (1, 2, 3, 4, 5, 33, 70, 128):
            x, out = buffer(M * K * BYTES[dtype]), buffer(M * N * BYTES[dtype])
            assert lib.nf4_matmul(level, 2, dtype, x, packed, absmax, None, None, None, 0.0, out, M, N, K) == 0
            assert lib.nf4_matmul(level, 2, dtype, x, packed, None, q, absmax2, code2, 0.5, out, M, N, K) == 0
            libc.free(x), libc.free(out)
        for address in (packed, absmax, q, absmax2, code2):
            libc.free(address)


def run_dense(level):
    for N, K in ((1, 32), (7, 96), (17, 1056)):
        weight = buffer(N * K * 2)
        for M in range(1, 9):
            x, out = buffer(M * K * 2), buffer(M * N * 2)
            assert lib.nf4_dense_matmul(level, 2, x, weight, out, M, N, K) == 0
            libc.free(x), libc.free(out)
        libc.free(weight)


highest = lib.nf4_level()
for level in range(5 if highest >= 3 else highest + 1):  # 4 is emulated
    for dtype in BYTES:
        run(level, dtype)
if highest >= 3:
    run_dense(highest)
print("clean")
