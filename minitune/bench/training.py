"""Speed and peak memory of whole training runs, measured in turn with a peer on the same machine.

scripts/train.py runs as for a user, and the times are read from the metrics.jsonl that it writes."""

import datetime
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from minitune import data, hub
from minitune.bench.turns import TRAIN_SCRIPT, measure_peer, run_measured
from minitune.config import arg, positive
from minitune.device import environment
from minitune.files import write_json
from minitune.runs.folder import read_lines


@dataclass(frozen=True)
class BenchTrainConfig:
    """The options of bench_train.py."""

    model: str = arg("tiny-mistral", "a model, as in scripts/train.py")
    data: str = arg("embedded", "rows: a file in Alpaca format, or embedded")
    examples: int = arg(64, "number of rows from the start of --data; one epoch over them is trained")
    quantize: str = arg("none", "4-bit format of the frozen weights", choices=("none", "nf4", "nf4-dq"))
    dtype: str = arg("bf16", "compute dtype", choices=("fp32", "bf16", "fp16"))
    batch_size: int = arg(4, "rows in a step")
    max_length: int = arg(512, "longest row in tokens")
    lora_rank: int = arg(16, "rank of the adapter on all linear layers")
    checkpointing: bool = arg(False, "recompute activations in the backward pass")
    peer: str | None = arg(
        None,
        "command of another system, run in turn with minitune; {model} and {data} are replaced. It must print one JSON line with "
        "system, examples_per_s and peak_rss_mb",
    )
    repeats: int = arg(3, "runs of each system, in turn (A B A B ...); medians are reported")
    warm_steps: int = arg(1, "number of first steps of a run that are not timed")
    out: str | None = arg(None, "JSON file for the results, with settings and machine")

    def __post_init__(self):
        positive(self, "examples", "batch_size", "max_length", "lora_rank", "repeats", "warm_steps")


def measure_minitune(config, rows_file, folder):
    """Run scripts/train.py once. Returns {"system", "examples_per_s", "tokens_per_s", "peak_rss_mb", "steps"}."""
    options = {
        "model": config.model, "data": rows_file, "run": folder, "quantize": config.quantize, "dtype": config.dtype,
        "batch-size": config.batch_size, "max-length": config.max_length, "lora-rank": config.lora_rank,
        "lora-targets": "all-linear", "epochs": 1, "test-size": 0, "samples": 0, "learning-rate": 2e-4,
        "max-grad-norm": 0.3, "schedule": "constant", "resume": "never", "eval-every": 10**6,
    }  # fmt: skip
    command = [sys.executable, str(TRAIN_SCRIPT)]
    command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    command += ["--checkpointing"] if config.checkpointing else []
    _, peak_rss_mb = run_measured(command)
    steps = read_lines(Path(folder) / "metrics.jsonl")
    timed = steps[config.warm_steps :]
    if not timed:
        raise ValueError(
            f"the run has {len(steps)} steps, of which the first {config.warm_steps} are not timed; give more --examples"
        )
    seconds = sum(step["seconds"] for step in timed)
    return {
        "system": "minitune" + ("" if config.quantize == "none" else f"-{config.quantize}"),
        "examples_per_s": sum(step["examples"] for step in timed) / seconds,
        "tokens_per_s": (timed[-1]["tokens"] - steps[config.warm_steps - 1]["tokens"]) / seconds,
        "peak_rss_mb": peak_rss_mb,
        "steps": len(steps),
    }


def bench_train(config, say=print):
    """Run both systems in turn and print medians and ratios. Returns the results, a dict, which are also written to
    `config.out`."""
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        source = config.data
        if source == "embedded":
            source = str(hub.embedded_rows("train"))
        rows_file = Path(folder) / "rows.json"
        write_json(rows_file, data.read_rows(source)[: config.examples])
        for turn in range(config.repeats):
            results = [measure_minitune(config, rows_file, Path(folder) / f"run{turn}")]
            if config.peer:
                results.append(
                    measure_peer(config.peer.replace("{model}", config.model).replace("{data}", str(rows_file)))
                )
            for result in results:
                measured.setdefault(result["system"], []).append(result)
                say(f"{result['system']}: {result['examples_per_s']:.2f} examples/s, {result['peak_rss_mb']} MiB")
    record = {
        "date": datetime.date.today().isoformat(),
        "settings": {k: getattr(config, k) for k in ("model", "examples", "quantize", "dtype", "batch_size", "max_length",
                                                     "lora_rank", "checkpointing", "repeats")}
        | {"model": Path(config.model).name},
        "machine": environment(torch.device("cpu")),
        "runs": measured,
        "median": {system: {key: statistics.median(r[key] for r in runs) for key in ("examples_per_s", "peak_rss_mb")}
                   for system, runs in measured.items()},
    }  # fmt: skip
    systems = list(measured)
    say(f"\n{'system':<24}{'examples/s':>12}{'peak MiB':>12}")
    for system, row in record["median"].items():
        say(f"{system:<24}{row['examples_per_s']:>12.2f}{row['peak_rss_mb']:>12.0f}")
    if len(systems) == 2:
        ours, theirs = (record["median"][system] for system in systems)
        pairs = [a["examples_per_s"] / b["examples_per_s"] for a, b in zip(*measured.values(), strict=True)]
        record["speed_ratio"] = statistics.median(pairs)
        record["memory_ratio"] = ours["peak_rss_mb"] / theirs["peak_rss_mb"]
        shown = ", ".join(f"{pair:.2f}" for pair in pairs)
        say(f"speed {record['speed_ratio']:.2f}x (pairs {shown}), memory {record['memory_ratio']:.0%}")
    if config.out:
        write_json(config.out, record)
    return record
