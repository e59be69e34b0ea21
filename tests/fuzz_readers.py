"""Reads damaged files and reports how each reading ended. tests/test_fuzz.py starts it, writes the files, and sees crashes.

In: a line {"reader": name, "argv": [words of a command line]} for each input. Out: a line {"fault": words or null, "refused":
words or null, "seconds": of CPU}. The working folder holds what test_fuzz.make_folder() wrote."""

import contextlib
import io
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path

import torch

from minitune import data, train
from minitune.checkpoint import load_encoder, load_model
from minitune.config import TrainConfig, parse
from minitune.jobs import chat, evaluate, inspect_data, report, sweep
from minitune.jobs import generate as generate_job
from minitune.reports.results import read_results
from minitune.runs import state as run_state
from minitune.tokenizer import load_tokenizer

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
JOBS = {
    "train": TrainConfig,
    "generate": generate_job.AnswerConfig,
    "chat": chat.ChatConfig,
    "evaluate": evaluate.EvaluateConfig,
    "sweep": sweep.SweepConfig,
    "report": report.ReportConfig,
    "inspect_data": inspect_data.InspectConfig,
}
QUICK = {"resamples": 20}


def read_tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("How many? <s> </s> \u00e9\u4e2d")
    tokenizer.decode([*ids, *tokenizer.eos_ids, tokenizer.vocab_size])
    for token_id in ids:
        tokenizer.piece(token_id)


def read_model(folder, adapter=None):
    with torch.inference_mode():
        load_model(folder, adapter=adapter)(torch.tensor([[2, 3]]))


def ask(**options):
    generate_job.answer(generate_job.AnswerConfig(model="model", max_new_tokens=1, dtype="fp32", **options), print)


def compare(kind):
    files = {"predictions": f"texts/answers.{kind}", "references": f"texts/rows.{kind}"}
    evaluate.evaluate(evaluate.EvaluateConfig(out="texts/out.json", **files, **QUICK))


def read_report(folder):
    """The report without its pictures, which take a second."""
    config = report.ReportConfig(folders=(folder,), **QUICK)
    report.write_sections(read_results(config.folders), config)


def go_on():
    """A training that is finished: its state, metrics and options are read, and its adapter is written again."""
    train.train(parse(TrainConfig, ["--config", "run/config.json"]))


def sweep_on():
    sweep.sweep(
        sweep.SweepConfig(run="run", num_beams=(1,), top_k=(5, 50), do_sample=False, max_new_tokens=(2,), **QUICK)
    )


READERS = {
    "model": lambda: read_model("model"),
    "sharded": lambda: read_model("sharded"),
    "4bit": lambda: read_model("4bit"),
    "encoder": lambda: load_encoder("encoder"),
    "adapter": lambda: ask(adapter="adapter", prompt="a"),
    "sentencepiece": lambda: read_tokenizer("sentencepiece"),
    "tokenizers": lambda: read_tokenizer("tokenizers"),
    "questions": lambda: ask(prompts="questions/asked.txt"),
    "answers": lambda: ask(prompts="questions/asked.txt", out="questions/out.jsonl"),
    "answers as a list": lambda: ask(prompts="questions/asked.txt", out="questions/out.json"),
    "state": lambda: run_state.read_progress("run/last/state.safetensors"),
    "resume": go_on,
    "evaluate a run": lambda: evaluate.evaluate(evaluate.EvaluateConfig(run="run", max_new_tokens=2, **QUICK)),
    "sweep a run": sweep_on,
    "report a run": lambda: read_report("run"),
    "study": lambda: read_report("study"),
    "config": lambda: parse(TrainConfig, ["--config", "options/train.json"]),
    "config of generate": lambda: parse(generate_job.AnswerConfig, ["--config", "options/generate.json"]),
    "config of sweep": lambda: parse(sweep.SweepConfig, ["--config", "options/sweep.json"]),
    **{
        f"{kind} rows": lambda kind=kind: data.load(f"rows/rows.{kind}", TOKENIZER, test_size=0.2)
        for kind in ("json", "jsonl", "csv")
    },
    **{f"{kind} texts": lambda kind=kind: compare(kind) for kind in ("json", "jsonl", "csv", "txt")},
}


def fault_of(call):
    """(what is wrong with how `call` ended and with what it said; what it refused), in words, or None."""
    said, code, text = io.StringIO(), 0, None
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            call()
    except (ValueError, OSError) as error:
        text = str(error)
    except SystemExit as end:
        code = end.code
    except BaseException:
        return traceback.format_exc(limit=-4), None
    if code not in (0, 2):
        return f"exit code {code}", None
    lines = [] if text is None else [text]
    lines += said.getvalue().splitlines() if code else []
    for line in lines:
        if len(line) >= 500 or "\n" in line or not line.strip() or CONTROL.search(line):
            return f"an error of {len(line)} characters: {line[:1000]!r}", text
    found = CONTROL.search(said.getvalue())
    return f"it said {said.getvalue()[max(0, found.start() - 100) :][:200]!r}" if found else None, text or code or None


if __name__ == "__main__":
    torch.set_num_threads(1)
    train.draw_curves = lambda records, path: None  # it takes a second
    torch._dynamo  # noqa: B018 - torch.optim imports it at its first use, which takes a second
    TOKENIZER = load_tokenizer("model")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library writes by itself is no reply
    print(json.dumps({"folder": str(Path.cwd())}), file=replies, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if job["reader"] in JOBS:
            call = lambda job=job: parse(JOBS[job["reader"]], job["argv"])
        else:
            call = READERS[job["reader"]]
        started = time.process_time()
        fault, refused = fault_of(call)
        reply = {"fault": fault, "refused": refused, "seconds": time.process_time() - started}
        print(json.dumps(reply), file=replies, flush=True)
