"""Speed of decoding, in new tokens per second, measured in turn with a peer, and compared with the memory bandwidth."""

import datetime
import json
import shlex
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minitune.bench.shapes import MISTRAL_7B, write_random_checkpoint
from minitune.bench.turns import run_measured
from minitune.checkpoint import load_model
from minitune.config import arg, positive
from minitune.decoding.options import GenerateConfig
from minitune.device import DTYPES, choose_device, environment
from minitune.files import write_json
from minitune.generate import generate

GENERATE_MODES = {  # name -> (prompts, options of GenerateConfig)
    "greedy": (1, {}),
    "sample": (1, {"do_sample": True, "top_k": 50}),
    "beam5": (1, {"num_beams": 5}),
    "batch8beam5": (8, {"num_beams": 5}),
}
SHAPE_7B = "mistral-7b-shape"


@dataclass(frozen=True)
class BenchGenerateConfig:
    """The options of bench_generate.py."""

    model: str = arg(
        "tiny-mistral",
        f"a model, as in scripts/train.py; {SHAPE_7B}: 14.5 GB of random weights in a temporary folder",
    )
    quantize: str = arg("none", "4-bit format of the weights", choices=("none", "nf4", "nf4-dq"))
    dtype: str = arg("bf16", "compute dtype", choices=tuple(DTYPES))
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")
    modes: tuple[str, ...] = arg(
        ("greedy", "sample", "beam5", "batch8beam5"), "kinds of decoding to measure", choices=tuple(GENERATE_MODES)
    )
    prompt: int = arg(64, "number of random tokens in a prompt")
    new: int = arg(64, "new tokens of each answer")
    lookup: int = arg(0, "tokens guessed by prompt lookup in the mode greedy; 0: off")
    peer: str | None = arg(
        None,
        "command of another system, run in turn with minitune; {model} is replaced. It must print one JSON line for each mode, "
        "with system, mode and new_tokens_per_s",
    )
    repeats: int = arg(3, "runs of each system, in turn (A B A B ...); medians are reported")
    out: str | None = arg(None, "JSON file for the results, with settings and machine")

    def __post_init__(self):
        positive(self, "prompt", "new", "repeats")


def bench_generate(config, say=print):
    """Decode random prompts in each mode, in turn with the peer. Returns the results, a dict, which are also written to
    `config.out`."""
    device = choose_device(config.device)
    if config.model != SHAPE_7B:
        return bench_generate_on(device, config.model, config, say)
    with tempfile.TemporaryDirectory() as folder:
        say(f"writing random weights to {folder}")
        write_random_checkpoint(MISTRAL_7B, folder)
        return bench_generate_on(device, folder, config, say)


def bench_generate_on(device, folder, config, say):
    """bench_generate() for the model in `folder`."""
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
        f"\nA step reads {read_gb:.3f} GB of weights: {floor:.1f} ms at the measured read bandwidth of {read_gb_per_s:.1f} GB/s."
    )
    for mode, step in record["step_ms"].items():
        say(f"{mode:<14}{step:>8.1f} ms per step after the prompts, {floor / step:.0%} of that speed")
    if config.out:
        write_json(config.out, record)
    return record


def time_decoding(model, prompts, mode, config):
    """(new tokens per second, seconds per step after the prompts) of one decoding, after a short one to warm up."""
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
    """Bytes of the weights that a decoding step reads: all but the embedding, unless it is tied to the head."""
    embedding = model.model.embed_tokens.weight
    is_read = lambda t: t is not embedding or model.config.tie_word_embeddings
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if is_read(t))


def read_bandwidth(device, size=10**9):
    """Read bandwidth of `device` in GB/s: the best of five runs of max() over a tensor of `size` bytes."""
    numbers, times = torch.ones(size // 4, device=device), []
    for _ in range(5):
        started = time.perf_counter()
        numbers.max().item()
        times.append(time.perf_counter() - started)
    return size / min(times) / 1e9
