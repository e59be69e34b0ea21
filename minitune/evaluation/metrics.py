"""METRICS, the only table of metrics: labels, digits, the function that computes a metric, and the model or key that it needs.
The formulas are in minitune/metrics.

The functions in the table take (records, judges) and return Rows; scoring.py describes records and Judges."""

from typing import NamedTuple

import numpy as np

from minitune.metrics.bleu import (
    MAX_ORDER,
    bleu_score,
    bleu_statistics,
    check_weights,
    closest_length,
    sentence_score,
    sentence_statistics,
)
from minitune.metrics.bleu_tokens import tokens
from minitune.metrics.chrf import chrf_score, chrf_statistics
from minitune.metrics.exact_match import is_exact
from minitune.metrics.pairs import as_list
from minitune.metrics.perplexity import exp, judge_perplexity
from minitune.metrics.rouge import rouge_l, rouge_lsum, rouge_n
from minitune.metrics.token_f1 import token_f1
from minitune.metrics.writing import is_outside_ascii, is_without_spaces


class Rows(NamedTuple):
    """The numbers of one metric for the n examples of one system, from which score and interval are computed."""

    rows: np.ndarray  # (n,) values, or (n, k) statistics if there is a `score`
    score: object = (
        None  # function from the sum of the rows (k,) to the metric; None: the metric is the mean of the rows
    )
    examples: list | None = (
        None  # value of each example, None for an example without one; None: the rows are the values
    )
    kept: np.ndarray | None = None  # (n,) bool, True for the examples that count; None: all
    note: str = ""  # for the reader of the table


def bleu_weights(config):
    """The weights of BLEU's n-grams of 1, 2, ... words, a list."""
    return check_weights(MAX_ORDER if config.bleu_order is None else config.bleu_order, config.bleu_weights)


NEEDS = {  # Metric.needs -> the words for an error message
    "judge": "a GPT-2 that computes the perplexity of the answers: a folder or a hub id, such as openai-community/gpt2",
    "encoder": "a RoBERTa or BERT that compares the texts: a folder or a hub id, such as FacebookAI/roberta-large",
    "ended_by": "how each answer ended, which these files do not say (it is in the files of --run)",
    "reference_loss": "the model, so it works with --run only",
}


# --- metrics ---


def of_each(function, note=lambda records, config: ""):
    """The row function of a metric that is the mean of function(reference, answer, config) over the examples.

    note: function (records, config) -> Rows.note."""
    return lambda records, judges: Rows(
        np.array([float(function(r["reference"], r["answer"], judges.config)) for r in records]),
        note=note(records, judges.config),
    )


def texts(records):
    """(references, answers) of the records."""
    return [r["reference"] for r in records], [r["answer"] for r in records]


def sentence_bleu_rows(records, judges):
    """Sentence BLEU of each answer, with notes on smoothing and on texts that BLEU cannot split."""
    config, weights = judges.config, bleu_weights(judges.config)
    split = str.split if config.bleu_tokenize is None else lambda text: tokens(text, config.bleu_tokenize)
    found = [
        sentence_statistics([split(text) for text in as_list(r["reference"])], split(r["answer"]), len(weights))
        for r in records
    ]
    empty = sum(row[2] > 0 and not row[1 + len(weights)] for row in found)
    smoothed = (
        f"{empty} of {len(records)} answers share no {len(weights)}-gram with their reference: a smoothed count is used"
    )
    notes = [smoothed if empty else "", unread_by_bleu(records, config.bleu_tokenize)]
    return Rows(np.array([sentence_score(row, weights) for row in found]), note="; ".join(filter(None, notes)))


def corpus_bleu_rows(records, judges):
    """The n-gram counts of corpus BLEU, with notes on missing n-grams."""
    config, tokenize = judges.config, judges.config.bleu_tokenize or "13a"
    orders = len(bleu_weights(config))
    rows = bleu_statistics(*texts(records), tokenize, max_order=orders)
    matches, totals = rows.sum(0)[2:].reshape(2, orders)
    note = ""
    if missing := [n for n in range(orders) if matches[0] and not matches[n]]:
        order = missing[0] + 1
        note = (
            f"no answer shares a {order}-gram with its reference: a smoothed count is used"
            if totals[missing[0]]
            else f"no answer has {order} words, so corpus BLEU is 0 (--bleu-order {order - 1} counts shorter n-grams only)"
        )
    notes = [note, unread_by_bleu(records, tokenize)]
    score = lambda total: bleu_score(total, weights=config.bleu_weights).score
    return Rows(rows, score, note="; ".join(filter(None, notes)))


def chrf_rows(records, judges):
    rows = chrf_statistics(*texts(records))
    return Rows(rows, chrf_score, [chrf_score(row) for row in rows])


def length_ratio_rows(records, judges):
    lengths = [(len(r["answer"].split()), [len(t.split()) for t in as_list(r["reference"])]) for r in records]
    rows = np.array([[ours, closest_length(ours, theirs)] for ours, theirs in lengths])
    each = [ours / theirs if theirs else None for ours, theirs in rows.tolist()]
    return Rows(rows, lambda total: total[0] / max(total[1], 1), each, note=unread_by_words(records))


# notes on texts that a metric cannot read


def unread(records, is_unread, words):
    """A note on the number of examples with a text for which is_unread(text) holds, or "". words: what these texts are."""
    count = sum(any(map(is_unread, [*as_list(r["reference"]), r["answer"]])) for r in records)
    return f"{count} of {len(records)} examples are {words}" if count else ""


def unread_by_rouge(records, config):
    words = "mostly in letters that ROUGE ignores (it reads a-z and 0-9 only): use --rouge-tokenize characters"
    return unread(records, is_outside_ascii, words) if config.rouge_tokenize == "words" else ""


def unread_by_bleu(records, tokenize):
    if tokenize not in (None, "13a", "intl", "zh", "none"):
        return ""  # the others split texts in every script
    split = str.split if tokenize is None else lambda text: tokens(text, tokenize)
    words = "in a script without spaces between words, which BLEU reads as one word: use --bleu-tokenize zh, ja-mecab or char"
    return unread(records, lambda text: not text.isascii() and is_without_spaces(text, split(text)), words)


def unread_by_words(records, config=None):
    words = "in a script without spaces between words: a whole sentence counts as one word"
    return unread(records, is_without_spaces, words)


def ended_rows(records, judges):
    return Rows(np.array([float(r["ended_by"] != "length") for r in records]))


def loss_rows(losses, note=""):
    """Rows of a perplexity: exp(sum of nats / sum of tokens). losses: [(nats, tokens), ...] of each text. Texts without tokens
    are left out."""
    rows = np.array(losses, np.float64)
    kept = rows[:, 1] > 0
    missing = int((~kept).sum())
    note = note or (f"{missing} answers without a token to predict are left out" if missing else "")
    each = [exp(nats / tokens) if tokens else None for nats, tokens in rows.tolist()]
    return Rows(rows, lambda total: exp(total[0] / total[1]), each, kept, note)


def reference_perplexity_rows(records, judges):
    return loss_rows([r["reference_loss"] for r in records])


def perplexity_rows(records, judges):
    found = judged(records, judges)
    empty = len(found["unscored"])
    note = f"{empty} answers without a token to predict count as 0, as in the study" if empty else ""
    return Rows(np.array(found["perplexities"]), note=note)


def perplexity_tokens_rows(records, judges):
    return loss_rows(judged(records, judges)["losses"])


def judged(records, judges):
    model, tokenizer = judges.judge
    return judge_perplexity(model, tokenizer, [r["answer"] for r in records])


def bertscore_rows(records, judges):
    return Rows(judges.encoder(*texts(records))[2].double().numpy())  # F1


def rouge(function, *options):
    """The row function of a ROUGE of minitune/metrics: the mean of its F-measure. options: its further arguments."""
    measure = lambda reference, answer, config: function(reference, answer, *options, tokenize=config.rouge_tokenize)[2]
    return of_each(measure, unread_by_rouge)


exact = lambda reference, answer, config: is_exact(reference, answer)
f1 = lambda reference, answer, config: token_f1(reference, answer)


class Metric(NamedTuple):
    """A row of METRICS."""

    label: str  # name in a report
    title: str  # name in a table on the terminal, with the range
    arrow: str  # ↑ higher is better, ↓ lower is better
    digits: int  # after the decimal point
    rows: object = None  # function (records, judges) -> Rows; None: graded by people
    needs: str | None = None  # a model ("judge", "encoder") or a key of the records
    study: str | None = None  # key in the study's score files
    is_mean: bool = True  # whether the metric is the mean of the values of the examples


METRICS = {
    "bleu": Metric("BLEU", "BLEU, sentences (0-1)", "↑", 3, sentence_bleu_rows, study="BLEU"),
    "corpus_bleu": Metric("corpus BLEU", "BLEU, corpus (0-100)", "↑", 1, corpus_bleu_rows, is_mean=False),
    "chrf": Metric("chrF", "chrF (0-100)", "↑", 1, chrf_rows, is_mean=False),
    "rouge_1": Metric("ROUGE-1", "ROUGE-1 (0-1)", "↑", 3, rouge(rouge_n, 1)),
    "rouge_2": Metric("ROUGE-2", "ROUGE-2 (0-1)", "↑", 3, rouge(rouge_n, 2)),
    "rouge_l": Metric("ROUGE-L", "ROUGE-L (0-1)", "↑", 3, rouge(rouge_l), study="ROUGE-L"),
    "rouge_lsum": Metric("ROUGE-Lsum", "ROUGE-Lsum (0-1)", "↑", 3, rouge(rouge_lsum)),
    "exact_match": Metric("exact match", "exact match (share)", "↑", 3, of_each(exact)),
    "token_f1": Metric("token F1", "token F1 (0-1)", "↑", 3, of_each(f1, unread_by_words)),
    "bertscore": Metric("BERTScore", "BERTScore F1", "↑", 3, bertscore_rows, "encoder", "BERTScore"),
    "perplexity": Metric("Perplexity", "perplexity of the judge", "↓", 2, perplexity_rows, "judge", "Perplexity"),
    "perplexity_tokens": Metric(
        "perplexity, token-weighted", "the same, by token", "↓", 2, perplexity_tokens_rows, "judge", is_mean=False
    ),
    "reference_perplexity": Metric(
        "perplexity of the references",
        "perplexity of references",
        "↓",
        2,
        reference_perplexity_rows,
        "reference_loss",
        is_mean=False,
    ),
    "length_ratio": Metric("length ratio", "length ratio (words)", "", 2, length_ratio_rows, is_mean=False),
    "ended": Metric("share that ended", "ended by itself (share)", "↑", 3, ended_rows, "ended_by"),
    "human": Metric("Human evaluation", "human grades", "↑", 3),
}
COMPUTED = [name for name, metric in METRICS.items() if metric.rows]
STUDY_KEYS = ("Perplexity", "BLEU", "ROUGE-L", "BERTScore")
