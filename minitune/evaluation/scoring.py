"""From references and answers to a table of metrics: the value of each example, scores with intervals, and tests between two
systems.

The metrics are in metrics.py. A system is a list of records, one for each example: {"reference", "answer"}, optionally with
"tokens", "ended_by" and "reference_loss" ([nats, tokens]). A reference is a text, or a list of texts that are all correct."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from minitune import checkpoint
from minitune.config import arg, check_types, not_empty, positive
from minitune.device import choose_device
from minitune.evaluation.metrics import COMPUTED, METRICS, NEEDS, STUDY_KEYS, bleu_weights
from minitune.metrics.bertscore import bert_score, choose_layer, read_baseline
from minitune.metrics.bleu import bleu_signature
from minitune.metrics.bleu_tokens import TOKENIZERS, tokens
from minitune.metrics.chrf import chrf_signature
from minitune.metrics.rouge import TOKENIZERS as ROUGE_TOKENIZERS
from minitune.metrics.significance import bootstrap_interval, paired_bootstrap, paired_permutation
from minitune.model_folder import ModelFolder
from minitune.screen import short, some, table_lines, wrap

ENCODER_OPTIONS = ("encoder_layer", "encoder_prefix_space", "encoder_idf", "encoder_baseline")
LEAST_RESAMPLES, MOST_RESAMPLES = 10, 1_000_000


@dataclass(frozen=True)
class ScoreConfig:
    """The options of scoring, which evaluate and sweep share."""

    metrics: str | None = arg(
        None,
        "names, separated by commas: bleu, corpus_bleu, chrf, rouge_1, rouge_2, rouge_l, rouge_lsum, exact_match, "
        "token_f1, length_ratio, ended, reference_perplexity, perplexity and perplexity_tokens (with --judge), bertscore "
        "(with --encoder). Not set: all that can be computed",
        group="metrics",
    )
    bleu_tokenize: str | None = arg(
        None,
        "tokeniser of BLEU, by sacrebleu's name: zh for Chinese, ja-mecab for Japanese, ko-mecab for Korean, char or flores200 "
        "for any script. Not set: white space for sentence BLEU (as in nltk and the study), 13a for corpus BLEU (as sacrebleu)",
        choices=tuple(TOKENIZERS),
    )
    bleu_order: int | None = arg(None, "longest n-gram of BLEU, in words; not set: 4")
    bleu_weights: tuple[float, ...] | None = arg(
        None, "weights of BLEU's n-grams of 1, 2, ... words, such as 0.5 0.5; not set: equal weights"
    )
    rouge_tokenize: str = arg(
        "words",
        "units that ROUGE compares: words of a-z and 0-9, as in rouge_score, or characters, for any script",
        choices=ROUGE_TOKENIZERS,
    )
    judge: str | None = arg(
        None, "GPT-2 that computes the perplexity of the answers: a folder or a hub id, such as openai-community/gpt2"
    )
    encoder: str | None = arg(
        None,
        "RoBERTa or BERT for BERTScore: a folder or a hub id, such as FacebookAI/roberta-large, which the study used",
    )
    encoder_layer: int | None = arg(
        None, "layer of the encoder, from 0; not set: bert-score's choice for a model of that name"
    )
    encoder_prefix_space: bool = arg(
        False,
        "put a space before every text for a RoBERTa, as in bert-score's published numbers (slow tokenizers); with fast "
        "tokenizers, and so with transformers 5, bert-score does not. No effect on a BERT",
    )
    encoder_idf: bool = arg(
        False, "BERTScore: give rare tokens more weight, by their inverse frequency in the references"
    )
    encoder_baseline: str | None = arg(
        None,
        "BERTScore: file of bert-score's baselines for this encoder (from its rescale_baseline folder); not set: scores are not "
        "rescaled",
    )
    resamples: int = arg(5000, "draws of the bootstrap and of the permutation test")
    limit: int | None = arg(None, "use only this many rows, the first ones")
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self):
        check_types(self)
        not_empty(self)
        positive(self, "resamples", "limit")
        names = asked_metrics(self)
        if unknown := [name for name in names or () if name not in COMPUTED]:
            raise ValueError(f"metrics: there is no {short(unknown[0])}; expected some of {', '.join(COMPUTED)}")
        for name in names or ():
            if METRICS[name].needs in ("judge", "encoder") and getattr(self, METRICS[name].needs) is None:
                raise ValueError(f"metrics: {name} needs --{METRICS[name].needs}, {NEEDS[METRICS[name].needs]}")
        for option in ENCODER_OPTIONS if self.encoder is None else ():
            if getattr(self, option) not in (None, False):
                raise ValueError(f"{option} is an option of BERTScore, which needs --encoder, {NEEDS['encoder']}")
        if not LEAST_RESAMPLES <= self.resamples <= MOST_RESAMPLES:
            raise ValueError(
                f"resamples is {short(self.resamples)}, expected {LEAST_RESAMPLES} to {MOST_RESAMPLES:,} for an interval"
            )
        check_bleu(self)


def check_bleu(config):
    """Raises ValueError if the options of BLEU do not work. Called before anything is decoded."""
    if config.bleu_weights is not None and config.bleu_order not in (None, len(config.bleu_weights)):
        raise ValueError(
            f"bleu_weights has {len(config.bleu_weights)} weights and bleu_order is {short(config.bleu_order)}; give one of "
            "them, or as many weights as the order"
        )
    bleu_weights(config)  # raises on bad weights
    if config.bleu_tokenize is not None:
        tokens("", config.bleu_tokenize)  # raises if a dictionary or model is not installed


def asked_metrics(config):
    """The list of names in --metrics, or None for all that can be computed."""
    return None if config.metrics is None else list(dict.fromkeys(name.strip() for name in config.metrics.split(",")))


class Judges:
    """The models that the chosen metrics need, loaded once, and the options of scoring.

    judge: (model, tokenizer) for perplexity, or None. encoder: a function (references, answers) -> BERTScore, or None."""

    def __init__(self, config, say=lambda line: None):
        """config: a ScoreConfig. say: prints one line. Raises ValueError if a model cannot be loaded."""
        self.config = config
        self.judge = self.encoder = None
        device, asked = choose_device(config.device), asked_metrics(config) or COMPUTED
        wanted = lambda kind: any(METRICS[name].needs == kind for name in asked)
        if config.judge is not None and wanted("judge"):
            folder = ModelFolder.open(config.judge)
            say(f"model for perplexity: {config.judge}")
            self.judge = checkpoint.load_model(folder, device=device), folder.tokenizer
        if config.encoder is not None and wanted("encoder"):
            folder = ModelFolder.open(config.encoder)
            encoder = checkpoint.load_encoder(folder, device=device)
            if config.encoder_layer is None:
                try:
                    layer = choose_layer(encoder, None)
                except ValueError as error:
                    raise ValueError(f"--encoder {config.encoder}: {error} (--encoder-layer)") from None
            else:
                layer = choose_layer(encoder, config.encoder_layer)
            baseline = config.encoder_baseline and read_baseline(config.encoder_baseline, layer)
            how = ", a space before every text" * config.encoder_prefix_space + ", idf" * config.encoder_idf
            how += f", rescaled by {config.encoder_baseline}" if config.encoder_baseline else ""
            say(f"encoder for BERTScore: {config.encoder}, layer {layer}{how}")
            self.encoder = partial(
                bert_score,
                encoder=encoder,
                tokenizer=folder.tokenizer,
                layer=layer,
                idf=config.encoder_idf,
                baseline=baseline,
                prefix_space=config.encoder_prefix_space,
            )


def choose_metrics(config, judges, systems):
    """The metrics to compute, names in METRICS: those in --metrics, or all that can be computed. systems: lists of records.

    Raises ValueError if a metric in --metrics needs a model or a key that is missing."""
    names = asked_metrics(config) or COMPUTED
    in_records = lambda key: all(record.get(key) is not None for records in systems for record in records)
    has = lambda key: getattr(judges, key) is not None if key in ("judge", "encoder") else in_records(key)
    lacking = [name for name in names if METRICS[name].needs and not has(METRICS[name].needs)]
    if lacking and config.metrics is not None:
        raise ValueError(f"metrics: {lacking[0]} needs {NEEDS[METRICS[lacking[0]].needs]}")
    return [name for name in names if name not in lacking]


# --- a table ---


def score(systems, names, judges, resamples, seed):
    """(metrics of each system, comparisons of the first system with the second), in the form of evaluation.json.

    systems: {key: records}. Adds to each record "scores", the values of the metrics for this example. names: metrics in METRICS.
    judges: the Judges. resamples: draws of bootstrap and permutation test. The same seed gives the same numbers."""
    found = {key: {name: METRICS[name].rows(records, judges) for name in names} for key, records in systems.items()}
    for key, records in systems.items():
        for place, record in enumerate(records):
            record["scores"] = scores_of_example(found[key], place)
    metrics = {key: {name: measure(rows, resamples, seed) for name, rows in found[key].items()} for key in systems}
    comparisons = {}
    if len(systems) == 2:
        ours, theirs = found.values()
        comparisons = {name: compare(ours[name], theirs[name], resamples, seed) for name in names}
    return metrics, comparisons


def scores_of_example(found, place):
    """{metric: value} of the example at index `place`, without metrics that have no finite value. found: {metric: Rows}."""
    scores = {}
    for name, rows in found.items():
        values = rows.examples if rows.score else rows.rows
        if values is not None and values[place] is not None and math.isfinite(values[place]):
            scores[name] = float(values[place])
    return scores


def measure(rows, resamples, seed):
    """{"value", "low", "high", "n", "note"} of one metric. rows: its Rows."""
    values = rows.rows if rows.kept is None else rows.rows[rows.kept]
    if not len(values):
        return {"value": None, "low": None, "high": None, "n": 0, "note": rows.note or "no example has a value"}
    if not np.isfinite(values).all():
        note = f"not finite in {int((~np.isfinite(values)).sum())} of {len(values)} examples"
        return {"value": None, "low": None, "high": None, "n": len(values), "note": note}
    found = bootstrap_interval(values, rows.score, resamples=resamples, seed=seed)
    note = "; ".join(filter(None, (rows.note, found.note)))
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "note": note or None}


def compare(ours, theirs, resamples, seed):
    """{"difference", "low", "high", "p_bootstrap", "p_permutation", "n", "note"} of ours minus theirs.

    ours, theirs: the Rows of one metric of two systems. Only the examples that count in both are used."""
    kept = np.ones(len(ours.rows), bool)
    for side in (ours, theirs):
        kept &= True if side.kept is None else side.kept
    a, b = ours.rows[kept], theirs.rows[kept]
    empty = {"difference": None, "low": None, "high": None, "p_bootstrap": None, "p_permutation": None, "n": len(a)}
    if not len(a):
        return empty | {"note": "no example has a value in both"}
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return empty | {"note": "not finite in every example"}
    drawn = paired_bootstrap(a, b, ours.score, resamples=resamples, seed=seed)
    turned = paired_permutation(a, b, ours.score, resamples=resamples, seed=seed)
    left_out = f"over the {len(a)} of {len(kept)} examples that count in both" if len(a) < len(kept) else ""
    note = "; ".join(dict.fromkeys(filter(None, (left_out, drawn.note, turned.note))))
    return {
        "difference": drawn.difference,
        "low": drawn.low,
        "high": drawn.high,
        "p_bootstrap": drawn.p_value,
        "p_permutation": turned.p_value,
        "n": drawn.n,
        "note": note or None,
    }


def signatures(records, names, config):
    """{name: sacrebleu's signature} of those metrics that sacrebleu has: the settings they were computed with."""
    references, tokenize = [r["reference"] for r in records], config.bleu_tokenize or "13a"
    order, weights = len(bleu_weights(config)), config.bleu_weights
    made = {
        "corpus_bleu": lambda: bleu_signature(references, tokenize, max_order=order, weights=weights),
        "chrf": lambda: chrf_signature(references),
    }
    return {name: sign() for name, sign in made.items() if name in names}


def study_scores(metrics):
    """The metrics of one system under the study's keys; None for one that was not computed."""
    keys = {METRICS[name].study: entry["value"] for name, entry in metrics.items()}
    return {key: keys.get(key) for key in STUDY_KEYS}


def table(systems, comparisons, width=None):
    """The table of metrics as lines of text.

    systems: {key: {"name", "metrics"}} and comparisons: {metric: ...}, in the form of evaluation.json. width: as in
    screen.table_lines()."""
    names = list(next(iter(systems.values()))["metrics"])
    head = ["", *(system["name"] for system in systems.values()), *(["difference", "p"] if comparisons else [])]
    rows, notes = [head], {}
    for name in names:
        row = [METRICS[name].title]
        for system in systems.values():
            entry = system["metrics"][name]
            row.append(shown(entry["value"], entry["low"], entry["high"]))
            where = f"{METRICS[name].title} of {system['name']}" if len(systems) > 1 else METRICS[name].title
            for note in entry["note"].split("; ") if entry["note"] else ():
                notes.setdefault(note, []).append(where)
        if comparisons:
            entry = comparisons[name]
            row.append(shown(entry["difference"], entry["low"], entry["high"], sign="+"))
            row.append("" if entry["p_permutation"] is None else f"{entry['p_permutation']:.4f}")
        rows.append(row)
    n = max(entry["n"] for system in systems.values() for entry in system["metrics"].values())
    foot = [f"{n} examples. In brackets: 95 % bootstrap interval over them."]
    foot += ["p: paired permutation test of the difference."] if comparisons else []
    foot += [f"{note[0].upper()}{note[1:]}: {some(where, 4)}." for note, where in notes.items()]
    return table_lines(rows, width) + [line for text in foot for line in wrap(text, width)]


def shown(value, low, high, sign=""):
    """A score with its interval as text: "0.3124 [0.2810, 0.3436]". sign: "+" to show the sign of positive numbers."""
    if value is None:
        return "-"
    digits = 4 if abs(value) < 10 else 2
    interval = "" if low is None else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    return f"{value:{sign}.{digits}f}{interval}"
