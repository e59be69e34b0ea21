"""Speed of BLEU, ROUGE-L and chrF on many pairs of texts, measured in turn with sacrebleu and rouge_score, each in its own
process.

Each program gets a JSON file with references and candidates. It scores one short text to warm up, and then prints one JSON line
with its seconds and its scores. Different scores are an error."""

import datetime
import importlib.util
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from minitune.config import arg, positive
from minitune.device import environment
from minitune.files import write_json

METRICS = ("bleu", "rouge_l", "chrf")
FRAME = """
import json, sys, time
{imports}
metrics = {{
    "bleu": lambda references, candidates: {bleu},
    "rouge_l": lambda references, candidates: {rouge_l},
    "chrf": lambda references, candidates: {chrf},
}}
pairs = json.load(open(sys.argv[1], encoding="utf-8"))
seconds, scores = {{}}, {{}}
for name, score in metrics.items():
    score(["some words first"], ["some words"])
    started = time.perf_counter()
    scores[name] = score(pairs["references"], pairs["candidates"])
    seconds[name] = time.perf_counter() - started
print(json.dumps({{"system": {system!r}, "seconds": seconds, "scores": scores}}))
"""
OURS = FRAME.format(
    system="minitune",
    imports="from minitune.metrics.bleu import corpus_bleu\nfrom minitune.metrics.chrf import corpus_chrf\n"
    "from minitune.metrics.rouge import rouge_l",
    bleu="corpus_bleu(references, candidates)",
    rouge_l="sum(rouge_l(r, c)[2] for r, c in zip(references, candidates)) / len(candidates)",
    chrf="corpus_chrf(references, candidates)",
)
LIBRARIES = FRAME.format(
    system="sacrebleu and rouge_score",
    imports="from sacrebleu.metrics import BLEU, CHRF\nfrom rouge_score.rouge_scorer import RougeScorer\n"
    "rouge = RougeScorer(['rougeL'], use_stemmer=True)",
    bleu="BLEU().corpus_score(candidates, [references]).score",
    rouge_l="sum(rouge.score(r, c)['rougeL'].fmeasure for r, c in zip(references, candidates)) / len(candidates)",
    chrf="CHRF().corpus_score(candidates, [references]).score",
)


@dataclass(frozen=True)
class BenchMetricsConfig:
    """The options of bench_metrics.py."""

    pairs: int = arg(10_000, "number of random pairs of a reference and a candidate")
    words: int = arg(60, "mean length of a reference in words")
    seed: int = arg(0, "random seed of the pairs")
    peer: str | None = arg(
        None,
        "command of another system, run in turn with minitune instead of sacrebleu and rouge_score; {pairs} is replaced by the "
        "JSON file. It must print one JSON line with system, seconds and scores, by metric",
    )
    repeats: int = arg(3, "runs of each system, in turn (A B A B ...); medians are reported")
    out: str | None = arg(None, "JSON file for the results, with settings and machine")

    def __post_init__(self):
        positive(self, "pairs", "words", "repeats")


def synthetic_pairs(count, words, seed):
    """(references, candidates), two lists of `count` random texts.

    A reference has words/2 to 3*words/2 words of a vocabulary of 20,000 with Zipf-like frequencies, with punctuation, numbers and
    line breaks. Its candidate has a quarter of the words replaced and some left out."""
    rng = random.Random(seed)
    syllable = lambda: rng.choice("bcdfghklmnprstvw") + rng.choice("aeiou") + rng.choice(["", "n", "r", "s"])
    endings = ["", "", "", "s", "ing", "ed", "ly", "ation", "ness"]
    vocabulary = ["".join(syllable() for _ in range(rng.randint(1, 3))) + rng.choice(endings) for _ in range(20_000)]
    vocabulary[10::50] = [f"{rng.randrange(10_000):,}" for _ in vocabulary[10::50]]
    weights = [1 / (rank + 3) for rank in range(len(vocabulary))]
    marks, ends = [1, 0.06, 0.06, 0.01, 0.01, 0.02], ["", ",", ".", "!", ":", "\n"]
    references, candidates = [], []
    for _ in range(count):
        length = rng.randint(max(1, words // 2), max(1, 3 * words // 2))
        drawn, others = (rng.choices(vocabulary, weights, k=length) for _ in range(2))
        closing = rng.choices(ends, marks, k=length)
        kept = [
            (w if rng.random() < 0.75 else other) + end for w, other, end in zip(drawn, others, closing, strict=True)
        ]
        references.append(" ".join(w + end for w, end in zip(drawn, closing, strict=True)))
        candidates.append(" ".join(word for word in kept if rng.random() < 0.95))
    return references, candidates


def measure(command):
    """Run a program on one thread. Returns its JSON line as a dict. Raises ValueError with its last lines if it fails."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environ = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        tail = " | ".join(done.stderr.splitlines()[-3:])
        raise ValueError(f"{command[0]} ended with {done.returncode} and {len(lines)} JSON lines: {tail}")
    return json.loads(lines[-1])


def bench_metrics(config, say=print):
    """Score the same pairs with each system in turn. Returns the results, a dict, which are also written to `config.out`."""
    references, candidates = synthetic_pairs(config.pairs, config.words, config.seed)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.json"
        write_json(file, {"references": references, "candidates": candidates})
        commands = [[sys.executable, "-c", OURS, str(file)]]
        if config.peer:
            commands.append(shlex.split(config.peer.replace("{pairs}", str(file))))
        elif all(importlib.util.find_spec(name) for name in ("sacrebleu", "rouge_score")):
            commands.append([sys.executable, "-c", LIBRARIES, str(file)])
        else:
            say("sacrebleu and rouge_score are not installed: minitune runs alone (pip install -e '.[test]')")
        for _ in range(config.repeats):
            for command in commands:
                run = measure(command)
                runs.setdefault(run["system"], []).append(run)
                say(f"{run['system']}: {sum(run['seconds'].values()):.2f} s")
    scores = next(iter(runs.values()))[0]["scores"]
    for system, found in runs.items():
        if any(run["scores"] != scores for run in found):
            raise ValueError(
                f"{system} gives the scores {found[0]['scores']}, but minitune {scores}: one of them is wrong"
            )
    median = {system: {name: statistics.median(run["seconds"][name] for run in found) for name in METRICS}
              | {"all": statistics.median(sum(run["seconds"].values()) for run in found)}
              for system, found in runs.items()}  # fmt: skip
    record = {
        "date": datetime.date.today().isoformat(),
        "settings": {key: getattr(config, key) for key in ("pairs", "words", "seed", "repeats")}
        | {"mean_words": sum(len(text.split()) for text in references) / config.pairs},
        "machine": environment(torch.device("cpu")),
        "scores": scores,
        "seconds": {system: [run["seconds"] for run in found] for system, found in runs.items()},
        "median_seconds": median,
    }
    say(f"\n{'seconds':<28}" + "".join(f"{name:>10}" for name in (*METRICS, "all")))
    for system, row in median.items():
        say(f"{system:<28}" + "".join(f"{row[name]:>10.2f}" for name in (*METRICS, "all")))
    if len(runs) == 2:
        ours, theirs = median.values()
        record["speed_ratio"] = {name: theirs[name] / ours[name] for name in ours}
        say(f"{'times as fast':<28}" + "".join(f"{record['speed_ratio'][name]:>9.1f}x" for name in ours))
    if config.out:
        write_json(config.out, record)
    return record
