"""Measure the 4-bit kernels on the layers of Llama-2-7B, Mistral-7B and Phi-2, beside bitsandbytes and torch."""

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.bench.kernels", "BenchKernelsConfig", "bench_kernels", __doc__)
