"""Measure examples/s and peak memory of training, in turn with a peer's command on the same machine.

A peer prints one JSON line with system, examples_per_s and peak_rss_mb:
python scripts/bench_train.py --model DIR --data FILE --peer "python peer.py {model} {data}" """

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.bench.training", "BenchTrainConfig", "bench_train", __doc__)
