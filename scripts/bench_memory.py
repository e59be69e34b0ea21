"""Measure the peak memory of QLoRA on a Mistral-7B shape: load, NF4, LoRA and some optimizer steps, with random weights."""

from minitune.benchmark import BenchMemoryConfig, bench_memory
from minitune.config import run_script

if __name__ == "__main__":
    run_script(BenchMemoryConfig, bench_memory, __doc__)
