"""What a report calls things, and how it writes numbers."""

import json
import shlex
from typing import NamedTuple

from minitune.reports.study_files import PARAMETERS


class Metric(NamedTuple):
    label: str
    arrow: str  # ↑ higher is better, ↓ lower is better
    digits: int


METRICS = {
    "bleu": Metric("BLEU", "↑", 3),
    "rouge_l": Metric("ROUGE-L", "↑", 3),
    "bertscore": Metric("BERTScore", "↑", 3),
    "perplexity": Metric("Perplexity", "↓", 2),
    "human": Metric("Human evaluation", "↑", 3),
    "corpus_bleu": Metric("corpus BLEU", "↑", 1),
    "chrf": Metric("chrF", "↑", 1),
    "rouge_1": Metric("ROUGE-1", "↑", 3),
    "rouge_2": Metric("ROUGE-2", "↑", 3),
    "rouge_lsum": Metric("ROUGE-Lsum", "↑", 3),
    "exact_match": Metric("exact match", "↑", 3),
    "token_f1": Metric("token F1", "↑", 3),
    "perplexity_tokens": Metric("perplexity, token-weighted", "↓", 2),
    "reference_perplexity": Metric("perplexity of the references", "↓", 2),
    "length_ratio": Metric("length ratio", "", 2),
    "ended": Metric("share that ended", "↑", 3),
}
TABLE = ("bleu", "rouge_l", "bertscore", "perplexity", "human")  # the study's columns
FIGURE = TABLE[:4]
GRADE_NAMES = {"grammatical_correctness": "grammar", "coherence": "coherence", "correctness_of_answer": "correctness"}


def metric(name):
    """The Metric of this name; one that minitune does not know is called as it is."""
    return METRICS.get(name, Metric(name, "", 3))


def with_arrow(name):
    """A metric's label and which way is better."""
    return f"{metric(name).label}\u00a0{metric(name).arrow}".strip()


def shown(name, value, sign=""):
    """A number with the digits of its metric, as text; a minus, not a hyphen."""
    return minus(f"{value:{sign}.{metric(name).digits}f}")


def interval_words(name, found):
    """A tuple with the interval of something that has low and high, as text; empty where there is none."""
    return (
        () if found.low is None or found.high is None else (f"[{shown(name, found.low)}, {shown(name, found.high)}]",)
    )


def p_words(p):
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def options_words(options):
    """Options of decoding in words. Where nothing is drawn, top_k and temperature do nothing and are not named."""
    drawn = options.get("do_sample") is not False
    names = [*(PARAMETERS if drawn else ["num_beams"]), "max_new_tokens"]
    words = [f"{name} {options[name]:g}" for name in names if isinstance(options.get(name), (int, float))]
    return ", ".join(words if drawn else [*words, "no sampling"])


def minus(text):
    """text with a minus where it has a hyphen."""
    return text.replace("-", "−")


def superscript(number):
    return "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(d)] for d in str(number))


def count(number, noun):
    return f"{number} {noun}{'' if number == 1 else 's'}"


def flat(value):
    """A value of a JSON object in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {flat(v)}" for k, v in value.items() if v not in (None, [], {}))
    if isinstance(value, list):
        return ", ".join(map(flat, value))
    return value if isinstance(value, str) else json.dumps(value)


def example_run(results):
    """A run folder for a command, DIR where there is none: two files that were compared are none."""
    asked = [run.folder for run in results.runs if not run.settings or run.settings.get("model") is not None]
    return shlex.quote(str(asked[0])) if asked else "DIR"


def evaluate_command(results):
    """The command that gives more scores of what is there."""
    of_files = example_run(results) == "DIR" and any(run.settings for run in results.runs)
    return "python scripts/evaluate.py " + (
        "--predictions FILE --references FILE" if of_files else f"--run {example_run(results)}"
    )
