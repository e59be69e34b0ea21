"""Measure BLEU, ROUGE-L and chrF of 10,000 pairs of texts on one core, in turn with sacrebleu and rouge_score.

A peer of your own gets a JSON file with references and candidates and prints a JSON line with system, seconds and scores:
python scripts/bench_metrics.py --peer "python peer.py {pairs}" """

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.bench.metrics", "BenchMetricsConfig", "bench_metrics", __doc__)
