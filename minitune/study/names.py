"""The names that the study uses: of a decoding (topk50_nb5_t1), of its files and of its scores, and the grid of its sweep. They
are written and read here."""

import re
from dataclasses import fields

from minitune.decoding.options import GenerateConfig

SHORT = {"top_k": "topk", "num_beams": "nb", "temperature": "t"}
NAMED = (  # options that change answers; in a name if they differ from their default
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "length_penalty",
    "early_stopping",
    "seed",
)


def point_name(config, others=()):
    """The name of a decoding. config: a GenerateConfig. others: names of options that are varied, and so always in the name.

    With sampling it is the study's name, topk50_nb5_t1; without, greedy or beam5. Options in NAMED that differ from their default
    follow, as in topk50_nb1_t1_topp0.9. max_new_tokens is not in the name; the files themselves name all settings."""
    named = SHORT if config.do_sample else {}
    words = [f"{short_name}{written(getattr(config, name))}" for name, short_name in named.items()]
    if not config.do_sample:
        words = ["greedy" if config.num_beams == 1 else f"beam{config.num_beams}"]
        named = {"num_beams": "nb"}
    meaning, default = config.meaning(), {f.name: f.default for f in fields(GenerateConfig)}
    set_apart = [name for name in NAMED if name in default and getattr(meaning, name) != default[name]]
    extra = dict.fromkeys(name for name in (*set_apart, *others) if name not in named)
    return "_".join(
        [*words, *(f"{SHORT.get(name, name.replace('_', ''))}{written(getattr(config, name))}" for name in extra)]
    )


def written(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


NAME = re.compile(
    r"(?P<model>.+)_topk(?P<top_k>\d{1,9})_nb(?P<num_beams>\d{1,9})_t(?P<temperature>\d{1,9}(?:\.\d{1,9})?)(?P<kind>|_score|_HE|_HE_score)\.json"
)
SCORES = {"Perplexity": "perplexity", "BLEU": "bleu", "ROUGE-L": "rouge_l", "BERTScore": "bertscore"}
PARAMETERS = ("top_k", "num_beams", "temperature")


def parse_name(name):
    """(model, {"top_k", "num_beams", "temperature"}, kind) of the name of a file of the study, or None for another name. kind:
    "", "_score", "_HE" or "_HE_score"."""
    found = NAME.fullmatch(name)
    if not found:
        return None
    options = {
        "top_k": int(found["top_k"]),
        "num_beams": int(found["num_beams"]),
        "temperature": float(found["temperature"]),
    }
    return found["model"], options, found["kind"]


# The study used beam sampling: its answers depend on top_k, and its two runs of one point differ.
STUDY = {"top_k": (30, 40, 50, 60, 80), "num_beams": (2, 4, 5, 6), "temperature": (0.0, 0.5, 0.7, 1.0)}
CENTRE = {"top_k": 50, "num_beams": 5, "temperature": 1.0, "max_new_tokens": 128}  # the study's defaults, used by sweep
