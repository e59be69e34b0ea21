"""The benchmark of the metrics: the libraries score the same, and a program that scores something else is refused."""

import json
import sys

import pytest

from minitune.bench.metrics import BenchMetricsConfig, bench_metrics, synthetic_pairs


def test_minitune_and_the_libraries_give_the_same_scores_of_synthetic_pairs(tmp_path):
    lines = []
    bench_metrics(BenchMetricsConfig(pairs=40, repeats=1, out=str(tmp_path / "figures.json")), lines.append)
    record = json.loads((tmp_path / "figures.json").read_text())
    assert set(record["seconds"]) == {"minitune", "sacrebleu and rouge_score"}
    assert 10 < record["scores"]["bleu"] < 90 and 0.3 < record["scores"]["rouge_l"] < 0.95
    assert set(record["speed_ratio"]) == {"bleu", "rouge_l", "chrf", "all"}
    assert any("times as fast" in line for line in lines)


def test_a_peer_with_other_scores_is_an_error(tmp_path):
    peer = tmp_path / "peer.py"
    zeros = {name: 0.0 for name in ("bleu", "rouge_l", "chrf")}
    peer.write_text(f"print({json.dumps(json.dumps({'system': 'peer', 'seconds': zeros, 'scores': zeros}))})")
    config = BenchMetricsConfig(pairs=3, repeats=1, peer=f"{sys.executable} {peer} {{pairs}}")
    with pytest.raises(ValueError, match="peer gives the scores .*one of them is wrong"):
        bench_metrics(config, lambda line: None)
    peer.write_text("raise SystemExit('no such library')")
    with pytest.raises(ValueError, match="no such library"):
        bench_metrics(config, lambda line: None)


def test_the_pairs_come_from_the_seed_alone():
    references, candidates = synthetic_pairs(200, 60, seed=0)
    assert (references, candidates) == synthetic_pairs(200, 60, seed=0) != synthetic_pairs(200, 60, seed=1)
    assert 55 < sum(len(text.split()) for text in references) / 200 < 65
    assert len(candidates) == 200 and all(r != c for r, c in zip(references, candidates, strict=True))
