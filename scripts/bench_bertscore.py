"""Measure pairs/s of BERTScore, in turn with a peer's command on the same machine.

python scripts/bench_bertscore.py --peer "python tests/peer_bert_score.py {model} {data} {layer}" """

from minitune.bertscore_benchmark import BenchBertScoreConfig, bench_bertscore
from minitune.config import run_script

if __name__ == "__main__":
    run_script(BenchBertScoreConfig, bench_bertscore, __doc__)
