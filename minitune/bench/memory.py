"""Peak memory of a QLoRA training run on a model with the shape of Mistral-7B and random weights."""

import datetime
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minitune.bench.shapes import MISTRAL_7B, write_random_checkpoint
from minitune.bench.turns import TRAIN_SCRIPT, run_measured
from minitune.config import arg, positive
from minitune.device import environment
from minitune.files import read_json, write_json
from minitune.runs.folder import read_lines


@dataclass(frozen=True)
class BenchMemoryConfig:
    """The options of bench_memory.py."""

    folder: str | None = arg(
        None, "folder for the 14.5 GB of random weights, used again if it has them; not set: a temporary folder"
    )
    quantize: str = arg("nf4", "4-bit format of the frozen weights", choices=("nf4", "nf4-dq"))
    steps: int = arg(2, "optimizer steps")
    max_length: int = arg(128, "longest row in tokens")
    out: str | None = arg(None, "JSON file for the results, with settings and machine")

    def __post_init__(self):
        positive(self, "steps", "max_length")


def bench_memory(config, say=print):
    """Run scripts/train.py with QLoRA for some steps, and measure the peak memory of the process. Returns the results, a dict."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.folder or temporary)
        if not (folder / "model.safetensors.index.json").exists():
            say(f"writing random weights to {folder}")
            write_random_checkpoint(MISTRAL_7B, folder)
        elif read_json(folder / "config.json") != MISTRAL_7B:
            raise ValueError(f"{folder} holds another model than this benchmark's; give an empty --folder")
        options = (
            f"--quantize {config.quantize} --max-steps {config.steps} --max-length {config.max_length} --batch-size 1"
        )
        options += " --checkpointing --data embedded --test-size 0 --samples 0 --dtype bf16"
        run = Path(temporary) / "run"
        started = time.perf_counter()
        output, peak_rss_mb = run_measured(
            [sys.executable, str(TRAIN_SCRIPT), "--model", str(folder), "--run", str(run), *options.split()]
        )
        record = {
            "date": datetime.date.today().isoformat(),
            "settings": {"shape": "mistral-7b", "options": options},
            "machine": environment(torch.device("cpu")),
            "load": next(line for line in output.splitlines() if line.startswith("Loaded")).replace(
                folder.name, "mistral-7b"
            ),
            "steps": [
                {key: step[key] for key in ("step", "seconds", "tokens", "loss")}
                for step in read_lines(run / "metrics.jsonl")
            ],
            "seconds": time.perf_counter() - started,
            "peak_rss_mb": peak_rss_mb,
        }
    say(record["load"])
    for step in record["steps"]:
        say(f"step {step['step']}: {step['seconds']:.1f} s, loss {step['loss']:.3f}")
    say(f"peak resident memory {peak_rss_mb / 1024:.2f} GiB, {record['seconds']:.0f} s in total")
    if config.out:
        write_json(config.out, record)
    return record
