"""Measure the 4-bit kernels on the layers of Llama-2-7B, Mistral-7B and Phi-2, beside bitsandbytes and torch."""

from minitune.config import run_script
from minitune.kernel_benchmark import BenchKernelsConfig, bench_kernels

if __name__ == "__main__":
    run_script(BenchKernelsConfig, bench_kernels, __doc__)
