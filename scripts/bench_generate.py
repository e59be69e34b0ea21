"""Measure new tokens/s of greedy decoding, sampling and beam search, in turn with a peer's command on the same machine.

A peer prints a JSON line for each mode with system, mode and new_tokens_per_s:
python scripts/bench_generate.py --model DIR --peer "python peer.py {model}" """

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.bench.decoding", "BenchGenerateConfig", "bench_generate", __doc__)
