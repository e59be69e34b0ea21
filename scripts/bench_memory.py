"""Measure the peak memory of QLoRA on a Mistral-7B shape: load, NF4, LoRA and some optimizer steps, with random weights."""

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.bench.memory", "BenchMemoryConfig", "bench_memory", __doc__)
