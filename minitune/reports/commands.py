"""Commands for the reader of a report: to compute what is missing, or to repeat a computation with the same options."""

import shlex
from dataclasses import fields

from minitune.decoding.options import GenerateConfig

SCORED = {  # options of scoring that evaluate.py and sweep.py share, with their defaults
    **dict.fromkeys(("judge", "encoder", "encoder_layer", "encoder_baseline", "limit")),
    **dict.fromkeys(("bleu_tokenize", "bleu_order", "bleu_weights")),
    "encoder_prefix_space": False,
    "encoder_idf": False,
    "rouge_tokenize": "words",
    "resamples": 5000,
}
DECODED = {f.name: f.default for f in fields(GenerateConfig) if f.name not in ("lookup", "eos_ids", "stop")}
OF_SWEEP = {**DECODED, "max_new_tokens": 128, "do_sample": True, "top_k": 50, "num_beams": 5, "temperature": 1.0}


def example_run(results):
    """A run folder to name in a command, or DIR if there is none (as when two files were compared)."""
    asked = [run.folder for run in results.runs if not run.settings or run.settings.get("model") is not None]
    return shlex.quote(str(asked[0])) if asked else "DIR"


def evaluate_command(results):
    """The evaluate.py command for more scores of the same answers."""
    of_files = example_run(results) == "DIR" and any(run.settings for run in results.runs)
    return "python scripts/evaluate.py " + (
        "--predictions FILE --references FILE" if of_files else f"--run {example_run(results)}"
    )


def evaluate_again(run, stored):
    """The command that computes the evaluation.json of a run again. stored: its content."""
    settings = stored["settings"]
    options = [*given(settings, SCORED), *given(settings["decoding"] or {}, DECODED)]
    options += [] if "base" in stored["systems"] else ["--no-base"]
    return " ".join(["python scripts/evaluate.py --run", shlex.quote(str(run)), *options, "--resume never"])


def sweep_again(run, points, listed):
    """The command that computes points of a sweep over decoding again.

    points: [(options that were varied, content of evaluation.json), ...]. listed: the content of sweep.json."""
    first = points[0][1]
    values = {}
    for options, _ in points:
        for name, value in options.items():
            values.setdefault(name, []).append(value)
    lists = {name: list(dict.fromkeys(map(text_of, found))) for name, found in values.items()}
    axes = [f"{flag(name)} {' '.join(found)}" for name, found in lists.items()]
    decoding = {name: value for name, value in (first["settings"]["decoding"] or {}).items() if name not in lists}
    if all(
        "temperature" in options for options, _ in points
    ):  # a temperature of 0 does not sample, whatever --do-sample was
        drawn = any((stored["settings"]["decoding"] or {}).get("do_sample") for _, stored in points)
        decoding["do_sample"] = drawn or all(options["temperature"] == 0 for options, _ in points)
    options = [*axes, *given(first["settings"], SCORED), *given(decoding, OF_SWEEP)]
    options += ["--grid full"] if listed.get("grid") == "full" else []
    options += ["--base"] if "base" in first["systems"] else []
    return " ".join(["python scripts/sweep.py --run", shlex.quote(str(run)), *options, "--resume never"])


def given(values, defaults):
    """Words of a command line for those `values` that differ from `defaults`."""
    words = []
    for name, default in defaults.items():
        value = values.get(name, default)
        if value is None or value == default or value == []:
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        else:
            words.append(f"{flag(name)} {' '.join(map(text_of, value if isinstance(value, list) else [value]))}")
    return words


def flag(name):
    return f"--{name.replace('_', '-')}"


def text_of(value):
    """A value of a file as one word of a command line, quoted for a shell."""
    text = str(value)
    return shlex.quote(text if len(text) <= 200 else f"{text[:200]}…")
