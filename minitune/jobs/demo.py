"""The demonstration: fine-tune the embedded models with LoRA and QLoRA, and compare them with their bases. Needs no network and
no GPU."""

import functools
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from minitune_kernels import ops

from minitune import checkpoint, data, screen
from minitune.config import TrainConfig, arg
from minitune.decoding.options import GenerateConfig
from minitune.device import choose_device, choose_dtype
from minitune.files import write_json
from minitune.generate import generate
from minitune.metrics.exact_match import exact_match
from minitune.model_folder import ModelFolder
from minitune.runs.folder import read_lines
from minitune.train import train

EVAL_EVERY = 101  # steps: in the middle of a run of 202, and at its end
KINDS = {"none": "LoRA", "nf4": "QLoRA"}
RUNS = (("tiny-mistral", "none"), ("tiny-mistral", "nf4"), ("tiny-llama", "none"), ("tiny-phi", "none"))


@dataclass(frozen=True)
class DemoConfig:
    """The options of demo.py."""

    runs: str = arg("runs/demo", "folder for the run folders of the demonstration; existing ones are replaced")
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")


def demo(config, say=print):
    """Fine-tune each of RUNS. Print a table with held-out loss and exact match before and after, and a sample answer of each.

    Returns the rows of the table, a list of dicts, which are also written to demo.json in the folder."""
    started = time.perf_counter()
    count = processes(config.device)
    table = side_by_side(config, count) if count > 1 else one_by_one(config, say)
    columns = ("model", "method", "held-out loss", "", "exact match", "", "seconds")
    say("\n{:<14}{:<8}{:>14}{:>9}{:>14}{:>9}{:>10}".format(*columns))
    say("{:<14}{:<8}{:>14}{:>9}{:>14}{:>9}{:>10}".format("", "", "before", "after", "before", "after", ""))
    for row in table:
        say(
            f"{row['model']:<14}{row['method']:<8}{row['loss_before']:>14.3f}{row['loss_after']:>9.3f}"
            f"{row['exact_match_before']:>14.1%}{row['exact_match_after']:>9.1%}{row['seconds']:>10.1f}"
        )
    for row in table:
        sample = row["sample"]
        say(f"\n{row['model']}, {row['method']}, asked: {sample['question']!r}")
        say(f"  before: {sample['before']!r}\n  after:  {sample['after']!r}\n  right:  {sample['right'].strip()!r}")
    write_json(Path(config.runs) / "demo.json", table)
    say(f"\n{time.perf_counter() - started:.0f} s in total. Adapters, curves and logs: {config.runs}/*/")
    return table


def processes(device):
    """How many of RUNS are done at once. On a CPU as many as there are cores: with steps this short, two threads of one run are
    little faster than one. Only on Linux can a process be forked that uses torch."""
    can_fork = sys.platform == "linux" and choose_device(device).type == "cpu"
    return min(len(RUNS), torch.get_num_threads()) if can_fork else 1


def one_by_one(config, say):
    """The rows of the table, a run after the other."""
    rows = []
    for name, quantize in RUNS:
        say(f"\n== {name}, {KINDS[quantize]} ==")
        rows.append(fine_tune_and_compare(name, quantize, config, say))
    return rows


def side_by_side(config, count):
    """The rows of the table, by `count` processes that share the threads. A stop or an error of one ends the others, too."""
    ops.prepare()  # builds the C kernels, before the processes need them
    fork, threads = multiprocessing.get_context("fork"), max(1, torch.get_num_threads() // count)
    pool = ProcessPoolExecutor(count, fork, torch.set_num_threads, (threads,))
    try:
        rows = [pool.submit(compare_apart, *run, config) for run in RUNS]
        for row in as_completed(rows):
            row.result()  # raises what it failed with
        return [row.result() for row in rows]
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise OSError(
                "a process of the demonstration was killed; if memory was short, OMP_NUM_THREADS=1 makes the runs one by one"
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def compare_apart(name, quantize, config):
    """fine_tune_and_compare() in a process of its own, whose lines say which run they are about."""
    screen.progress = functools.partial(screen.progress, disable=True)  # two bars would overwrite each other
    try:
        say = lambda line: screen.say(f"{name}, {KINDS[quantize]}: {line}")  # noqa: E731
        return fine_tune_and_compare(name, quantize, config, say)
    except KeyboardInterrupt:
        os._exit(130)  # the process that waits says it


def fine_tune_and_compare(name, quantize, config, say):
    """One row of the table, a dict. name: an embedded model. quantize: as in TrainConfig."""
    started, kind = time.perf_counter(), KINDS[quantize]
    run = Path(config.runs) / f"{name}-{kind.lower()}"
    options = TrainConfig(
        model=name,
        quantize=quantize,
        run=str(run),
        resume="never",
        samples=0,
        eval_every=EVAL_EVERY,
        device=config.device,
    )
    folder, device = ModelFolder.open(name), choose_device(options.device)
    tokenizer = folder.tokenizer
    _, test_set = data.load_for(options, tokenizer)
    answers, scores = [], []
    for adapter in (None, run / "adapter"):
        if adapter:
            train(options, say)
        dtype, _ = choose_dtype(options.dtype, device, "training")
        model = checkpoint.load_model(folder, dtype, device, quantize, adapter)
        answers.append(answer(model, tokenizer, test_set, options.sample_tokens))
        scores.append(exact_match([row["output"] for row in test_set.rows], answers[-1]))
    losses = [record["eval_loss"] for record in read_lines(run / "metrics.jsonl") if "eval_loss" in record]
    shown = test_set.rows[0]
    return {
        "model": name,
        "method": kind,
        "loss_before": losses[0],
        "loss_after": min(losses[1:]),
        "exact_match_before": scores[0],
        "exact_match_after": scores[1],
        "seconds": time.perf_counter() - started,
        "sample": {
            "question": " ".join(filter(None, (shown["instruction"], shown["input"]))),
            "before": answers[0][0],
            "after": answers[1][0],
            "right": shown["output"],
        },
    }


def answer(model, tokenizer, dataset, max_new_tokens):
    """Greedy answers to the prompts of a Dataset, a list of texts."""
    prompts = [example.ids[: example.prompt_length] for example in dataset.examples]
    settings = GenerateConfig(max_new_tokens, eos_ids=tuple(tokenizer.eos_ids))
    return [tokenizer.decode(ids) for ids in generate(model, prompts, settings)]
