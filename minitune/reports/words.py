"""The words of a report for metrics and options, and the format of its numbers."""

import json

from minitune.evaluation.metrics import METRICS, Metric
from minitune.files import to_json
from minitune.study.names import PARAMETERS

TABLE = ("bleu", "rouge_l", "bertscore", "perplexity", "human")  # the study's columns
FIGURE = TABLE[:4]
ORDER = (*TABLE, *(name for name in METRICS if name not in TABLE))  # order of the metrics in a report
IN_OPTIONS = (*PARAMETERS, "max_new_tokens", "do_sample")  # options that options_words() names
LONG = 1000  # longest text of a value, in characters
GRADE_NAMES = {"grammatical_correctness": "grammar", "coherence": "coherence", "correctness_of_answer": "correctness"}


def metric(name):
    """The Metric of this name. For an unknown name, a Metric with that name as its label."""
    return METRICS.get(name, Metric(name, name, "", 3))


def with_arrow(name):
    """A metric's label with the arrow that says which direction is better."""
    return f"{metric(name).label}\u00a0{metric(name).arrow}".strip()


def shown(name, value, sign=""):
    """A number as text with the digits of its metric, and a minus sign instead of a hyphen."""
    form = f"{sign}.{metric(name).digits}f" if abs(value) < 1e7 else f"{sign}.3g"
    return minus(f"{value:{form}}")


def interval_words(name, found):
    """A tuple with the interval of `found` (it has .low and .high) as text, or () if there is no interval."""
    return (
        () if found.low is None or found.high is None else (f"[{shown(name, found.low)}, {shown(name, found.high)}]",)
    )


def p_words(p):
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def options_words(options):
    """Options of decoding in words. Without sampling, top_k and temperature have no effect and are not named."""
    drawn = options.get("do_sample") is not False
    names = [*(PARAMETERS if drawn else ["num_beams"]), "max_new_tokens"]
    words = [f"{name} {options[name]:g}" for name in names if isinstance(options.get(name), (int, float))]
    return ", ".join(words if drawn else [*words, "no sampling"])


def minus(text):
    """`text` with minus signs in place of hyphens."""
    return text.replace("-", "−")


def superscript(number):
    return "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(d)] for d in str(number))


def count(number, noun):
    return f"{number} {noun}{'' if number == 1 else 's'}"


def flat(value, levels=6):
    """A JSON value as one line of at most about LONG characters, for a table. levels: deepest nesting to write out."""
    if levels and isinstance(value, dict):
        text = ", ".join(f"{k} {flat(v, levels - 1)}" for k, v in value.items() if v not in (None, [], {}))
    elif levels and isinstance(value, list):
        text = ", ".join(flat(item, levels - 1) for item in value)
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONG else f"{text[: LONG - 100]} … ({len(text):,} characters)"


def terms_apart(systems):
    """For each System, a tuple of lines that say how its decoding and scoring differ from the others."""
    settings = [options_words(system.options) for system in systems]
    terms = [{n: v for n, v in system.terms().items() if n not in IN_OPTIONS} for system in systems]
    return [
        ((setting,) if setting and len(set(settings)) > 1 else ()) + words
        for setting, words in zip(settings, apart(terms), strict=True)
    ]


def apart(terms):
    """For each dict of the list, a tuple of "name value" texts for the entries that are not equal in all of them."""
    names = dict.fromkeys(name for found in terms for name in found)
    names = [name for name in names if len({to_json(found.get(name)) for found in terms}) > 1]
    return [tuple(f"{name} {term_words(name, found)}" for name in names) for found in terms]


def term_words(name, terms):
    if name not in terms:
        return "not said"
    return "none" if terms[name] in (None, [], {}) else flat(terms[name])
