"""Measures a training run as a whole process, in turn with peers on the same machine, and keeps the figures with their stamp.

Nothing is timed inside: `scripts/train.py` runs as a user runs it, and what it wrote to metrics.jsonl is read."""

import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from minitune import data, hub
from minitune.checkpoint import load_model
from minitune.config import arg, positive
from minitune.device import DTYPES, choose_device, environment
from minitune.files import read_json, write_json
from minitune.generate import GenerateConfig, generate
from minitune.models import build
from minitune.run_folder import read_lines

GENERATE_MODES = {  # name -> (prompts, options of GenerateConfig)
    "greedy": (1, {}),
    "sample": (1, {"do_sample": True, "top_k": 50}),
    "beam5": (1, {"num_beams": 5}),
    "batch8beam5": (8, {"num_beams": 5}),
}
SHAPE_7B = "mistral-7b-shape"
TRAIN_SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train.py"


@dataclass(frozen=True)
class BenchTrainConfig:
    """What is trained, against whom, how often."""

    model: str = arg("tiny-mistral", "model folder, or any name that scripts/train.py takes")
    data: str = arg("embedded", "rows: a file in Alpaca format, or embedded")
    examples: int = arg(64, "rows that are read from the start of --data, one pass")
    quantize: str = arg("none", "frozen weights", choices=("none", "nf4", "nf4-dq"))
    dtype: str = arg("bf16", "compute dtype", choices=("fp32", "bf16", "fp16"))
    batch_size: int = arg(4, "rows in a step")
    max_length: int = arg(512, "longest row in tokens")
    lora_rank: int = arg(16, "rank of the adapter on all linear layers")
    checkpointing: bool = arg(False, "recompute activations in the backward pass")
    peer: str | None = arg(
        None,
        "a peer's command, run in turn with minitune; {model} and {data} are filled in. It prints one JSON line with "
        "system, examples_per_s and peak_rss_mb",
    )
    repeats: int = arg(3, "runs of each, in turn (A B A B ...); medians are quoted")
    warm_steps: int = arg(1, "first steps of a run that are not timed")
    out: str | None = arg(None, "JSON file for the figures and their stamp")

    def __post_init__(self):
        positive(self, "examples", "batch_size", "max_length", "lora_rank", "repeats", "warm_steps")


def run_measured(command):
    """Run a command to its end. Returns (standard output, peak resident memory in MiB).

    Linux counts this process's own memory at the start in, so
    a smaller child cannot be told. Raises ValueError with the child's last lines where it fails."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            tail = errors.read().decode(errors="replace").splitlines()[-5:]
            raise ValueError(f"{shlex.join(command)} ended with {process.returncode}: " + " | ".join(tail))
        return out.read().decode(errors="replace"), usage.ru_maxrss // 1024


def measure_minitune(config, rows_file, folder):
    """One run of scripts/train.py over the rows. Returns {"system", "examples_per_s", "tokens_per_s", "peak_rss_mb", ...}."""
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
            f"{len(steps)} steps, of which the first {config.warm_steps} are not timed; give more --examples"
        )
    seconds = sum(step["seconds"] for step in timed)
    return {
        "system": "minitune" + ("" if config.quantize == "none" else f"-{config.quantize}"),
        "examples_per_s": sum(step["examples"] for step in timed) / seconds,
        "tokens_per_s": (timed[-1]["tokens"] - steps[config.warm_steps - 1]["tokens"]) / seconds,
        "peak_rss_mb": peak_rss_mb,
        "steps": len(steps),
    }


def measure_peer(command):
    """One run of a peer. Its last line that is a JSON object counts."""
    output, peak_rss_mb = run_measured(shlex.split(command))
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise ValueError(f"{command} printed no JSON line")
    return json.loads(lines[-1]) | {"peak_rss_mb": peak_rss_mb}


def bench_train(config, say=print):
    """Run both in turn and print medians and ratios. Returns the record, which is also written to `config.out`."""
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


@dataclass(frozen=True)
class BenchGenerateConfig:
    """Which model decodes what, against whom."""

    model: str = arg(
        "tiny-mistral",
        f"model folder, or any name that scripts/train.py takes; {SHAPE_7B}: 14.5 GB of random weights in a temporary folder",
    )
    quantize: str = arg("none", "weights in 4 bit", choices=("none", "nf4", "nf4-dq"))
    dtype: str = arg("bf16", "compute dtype", choices=tuple(DTYPES))
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")
    modes: tuple[str, ...] = arg(
        ("greedy", "sample", "beam5", "batch8beam5"), "what is measured", choices=tuple(GENERATE_MODES)
    )
    prompt: int = arg(64, "tokens of a prompt, drawn from a seed")
    new: int = arg(64, "new tokens of each answer")
    lookup: int = arg(0, "tokens guessed by prompt lookup in the mode greedy; 0: off")
    peer: str | None = arg(
        None,
        "a peer's command, run in turn with minitune; {model} is filled in. It prints a JSON line for each mode, with "
        "system, mode and new_tokens_per_s",
    )
    repeats: int = arg(3, "runs of each, in turn (A B A B ...); medians are quoted")
    out: str | None = arg(None, "JSON file for the figures and their stamp")

    def __post_init__(self):
        positive(self, "prompt", "new", "repeats")


def bench_generate(config, say=print):
    """Decode random prompts in each mode, in turn with the peer. Returns the record, also written to `config.out`."""
    device = choose_device(config.device)
    if config.model != SHAPE_7B:
        return bench_generate_on(device, config.model, config, say)
    with tempfile.TemporaryDirectory() as folder:
        say(f"writing random weights to {folder}")
        write_random_checkpoint(MISTRAL_7B, folder)
        return bench_generate_on(device, folder, config, say)


def bench_generate_on(device, folder, config, say):
    model = load_model(folder, DTYPES[config.dtype], device, config.quantize, say=say)
    highest, measured, steps = min(30000, model.config.vocab_size), {}, {}
    for _ in range(config.repeats):
        generator = torch.Generator().manual_seed(0)
        for mode in config.modes:
            prompts = torch.randint(5, highest, (GENERATE_MODES[mode][0], config.prompt), generator=generator).tolist()
            speed, step = time_decoding(model, prompts, mode, config)
            measured.setdefault(mode, {}).setdefault("minitune", []).append(speed)
            steps.setdefault(mode, []).append(step)
        if config.peer:
            output, _ = run_measured(shlex.split(config.peer.replace("{model}", str(folder))))
            for line in output.splitlines():
                if line.startswith("{") and (row := json.loads(line))["mode"] in measured:
                    measured[row["mode"]].setdefault(row["system"], []).append(row["new_tokens_per_s"])
    read_gb, read_gb_per_s = step_bytes(model) / 1e9, read_bandwidth(device)
    record = {
        "date": datetime.date.today().isoformat(),
        "settings": {key: getattr(config, key) for key in ("quantize", "dtype", "prompt", "new", "lookup", "repeats")}
        | {"model": Path(config.model).name},
        "machine": environment(device),
        "new_tokens_per_s": measured,
        "median": {mode: {name: statistics.median(runs) for name, runs in systems.items()}
                   for mode, systems in measured.items()},
        "step_ms": {mode: statistics.median(runs) * 1e3 for mode, runs in steps.items()},
        "floor": {"read_gb": read_gb, "read_gb_per_s": read_gb_per_s, "step_ms": read_gb / read_gb_per_s * 1e3},
    }  # fmt: skip
    say(f"\n{'mode':<14}{'system':<24}{'new tokens/s':>14}{'ratio':>8}")
    for mode, systems in record["median"].items():
        for name, speed in systems.items():
            ratio = systems["minitune"] / speed
            say(f"{mode:<14}{name:<24}{speed:>14.1f}" + (f"{ratio:>7.2f}x" if name != "minitune" else ""))
    floor = record["floor"]["step_ms"]
    say(
        f"\nA step reads {read_gb:.3f} GB of weights, {floor:.1f} ms at the {read_gb_per_s:.1f} GB/s that a maximum reads."
    )
    for mode, step in record["step_ms"].items():
        say(f"{mode:<14}{step:>8.1f} ms a step after the prompts, {floor / step:.0%} of that speed")
    if config.out:
        write_json(config.out, record)
    return record


def time_decoding(model, prompts, mode, config):
    """(new tokens a second, seconds of a step after the prompts) of one decoding, after a short one that warms up."""
    options = {"eos_ids": (), **GENERATE_MODES[mode][1]} | ({"lookup": config.lookup} if mode == "greedy" else {})
    generate(model, prompts, GenerateConfig(max_new_tokens=4, **options))
    started = time.perf_counter()
    generate(model, prompts, GenerateConfig(max_new_tokens=1, **options))
    read = time.perf_counter()
    answers = generate(model, prompts, GenerateConfig(max_new_tokens=config.new, **options))
    seconds = time.perf_counter() - read
    steps = config.new - 1
    return sum(map(len, answers)) / seconds, (seconds - (read - started)) / steps if steps else seconds


def step_bytes(model):
    """Bytes of all weights that a decoding step reads: everything but the embedding, of which it takes a row."""
    embedding = model.model.embed_tokens.weight
    is_read = lambda t: t is not embedding or model.config.tie_word_embeddings
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if is_read(t))


def read_bandwidth(device, size=10**9):
    """GB/s at which `device` reads, the best of five maxima of a tensor of `size` bytes."""
    numbers, times = torch.ones(size // 4, device=device), []
    for _ in range(5):
        started = time.perf_counter()
        numbers.max().item()
        times.append(time.perf_counter() - started)
    return size / min(times) / 1e9


MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class BenchMemoryConfig:
    """How a Mistral-7B shape is trained."""

    folder: str | None = arg(
        None, "where the 14.5 GB of random weights go, or lie already; not set: a temporary folder"
    )
    quantize: str = arg("nf4", "frozen weights", choices=("nf4", "nf4-dq"))
    steps: int = arg(2, "optimizer steps")
    max_length: int = arg(128, "longest row in tokens")
    out: str | None = arg(None, "JSON file for the figures and their stamp")

    def __post_init__(self):
        positive(self, "steps", "max_length")


def write_random_checkpoint(raw, folder, shard_bytes=2 * 10**9):
    """A sharded bf16 checkpoint of a config.json (as a dict) with random weights, never more than one shard in memory."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build(raw).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(2**24 + 3, generator=generator) * 0.02).bfloat16()  # normal numbers, taken round and round
    weight_map, shard, size, place = {}, {}, 0, 0
    for name, shape in shapes.items():
        count = shape.numel()
        repeats = -(-(place + count) // len(pool))
        shard[name] = (
            torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else pool.repeat(repeats)[place:][:count].view(shape)
        )
        place = (place + count) % len(pool)
        size += 2 * count
        if size >= shard_bytes or name == list(shapes)[-1]:
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file({key: t.contiguous() for key, t in shard.items()}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    write_json(folder / "config.json", raw)
    total = sum(2 * shape.numel() for shape in shapes.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    tokenizer = (hub.resolve("tiny-mistral") / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(tokenizer)


def bench_memory(config, say=print):
    """Load a Mistral-7B shape, quantise it, add LoRA and take some steps, as one process whose peak memory is measured."""
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
    say(f"peak resident memory {peak_rss_mb / 1024:.2f} GiB, {record['seconds']:.0f} s in all")
    if config.out:
        write_json(config.out, record)
    return record
