"""Measure BLEU, ROUGE-L and chrF of 10,000 pairs of texts on one core, in turn with sacrebleu and rouge_score.

A peer of your own gets a JSON file with references and candidates and prints a JSON line with system, seconds and scores:
python scripts/bench_metrics.py --peer "python peer.py {pairs}" """

from minitune.config import run_script
from minitune.metric_benchmark import BenchMetricsConfig, bench_metrics

if __name__ == "__main__":
    run_script(BenchMetricsConfig, bench_metrics, __doc__)
