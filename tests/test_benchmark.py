"""The benchmarks run whole processes: what they report is what the process did."""

import json
import sys

import pytest
import torch

from minitune.bench import decoding, shapes
from minitune.bench.decoding import BenchGenerateConfig, bench_generate
from minitune.bench.shapes import write_random_checkpoint
from minitune.bench.training import BenchTrainConfig, bench_train
from minitune.bench.turns import run_measured
from minitune.checkpoint import load_model


def test_peak_memory_is_that_of_the_measured_process():
    code = "block = bytearray(100 * 2**20); block[::4096] = b'x' * len(block[::4096]); print('done')"
    own = torch.ones(300 * 2**18)  # 300 MiB, which are not the child's
    output, peak = run_measured([sys.executable, "-c", code])
    assert output == "done\n" and len(own)
    assert 100 < peak < 150


def test_a_run_that_fails_is_an_error_with_its_last_lines():
    with pytest.raises(ValueError, match="no such thing"):
        run_measured([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_minitune_is_measured_in_turn_with_a_peer(tmp_path):
    peer = tmp_path / "peer.py"
    peer.write_text("import json; print(json.dumps({'system': 'peer', 'examples_per_s': 0.001}))")
    lines = []
    config = BenchTrainConfig(
        examples=16,
        batch_size=4,
        dtype="fp32",
        repeats=1,
        peer=f"{sys.executable} {peer} {{model}}",
        out=str(tmp_path / "figures.json"),
    )
    bench_train(config, lines.append)
    record = json.loads((tmp_path / "figures.json").read_text())
    [ours] = record["runs"]["minitune"]
    assert ours["steps"] == 4 and ours["peak_rss_mb"] > 100
    assert record["speed_ratio"] == pytest.approx(ours["examples_per_s"] / 0.001)
    assert any("memory" in line for line in lines)


def test_a_random_checkpoint_of_several_shards_loads(tmp_path):
    raw = {"model_type": "mistral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    write_random_checkpoint(raw, tmp_path, shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    logits = load_model(tmp_path)(torch.tensor([[1, 2, 3]]))
    assert logits.isfinite().all() and logits.std() > 0


def test_the_shape_of_a_large_model_is_decoded_with_random_weights(monkeypatch):
    small = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    monkeypatch.setattr(decoding, "MISTRAL_7B", shapes.MISTRAL_7B | small | {"num_key_value_heads": 2})
    config = BenchGenerateConfig(
        model="mistral-7b-shape", quantize="nf4", modes=("greedy",), prompt=4, new=6, repeats=1
    )
    record = bench_generate(config, lambda line: None)
    assert record["median"]["greedy"]["minitune"] > 0 and record["settings"]["model"] == "mistral-7b-shape"
    assert 0 < record["floor"]["read_gb"] < 1e-3
