"""Measure pairs/s of BERTScore, in turn with a peer's command on the same machine.

python scripts/bench_bertscore.py --peer "python tests/peer_bert_score.py {model} {data} {layer}" """

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.bench.bertscore", "BenchBertScoreConfig", "bench_bertscore", __doc__)
