"""BLEU, chrF, ROUGE, token F1 and exact match: the same numbers as nltk, sacrebleu, rouge_score and SQuAD's script."""

import json
import logging
import random
import re
import string
import time
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction
from nltk.translate.bleu_score import sentence_bleu as nltk_sentence_bleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from minitune.metrics import bleu, chrf, ngrams, rouge
from minitune.metrics.exact_match import exact_match
from minitune.metrics.token_f1 import token_f1

logging.getLogger("sacrebleu").setLevel(logging.ERROR)

PIECES = (
    "a b the The cat. Running ponies flies dying 1,000 2. (1 3-4 - 's &amp; &lt;x <skipped> é 中文字 中 ... … ., x.y "
    "$5 “q” 1. .5 ² ½.5 ٣. 𝔸 🙂 İ ΑΣ sky's-the_limit A4 \U0001fae8 \U0001e030"
).split()
SPACES = ["", " ", " ", " ", "  ", "\n", "-\n", "\t", "\u2028", "\x85", "\x1c", "\u3000"]
ODD_TEXTS = ["", " ", "\n", "a", "the the the the the", "中", "中文文中文字" * 3, "!!!", "1.", "a" * 300, "word " * 400]


def random_text(rng):
    length = rng.choice([0, 1, 2, 3, 5, 8, 30])
    return "".join(rng.choice(PIECES) + rng.choice(SPACES) for _ in range(length))


def random_pair(rng):
    """(reference, candidate) with something in common, in two of five cases."""
    reference, candidate = random_text(rng), random_text(rng)
    return reference, reference[: len(candidate) + 3] + candidate if rng.random() < 0.4 else candidate


ODD_PAIRS = [(reference, candidate) for reference in ODD_TEXTS for candidate in ODD_TEXTS]


# sentence BLEU


@pytest.mark.parametrize("method", bleu.SMOOTHING_METHODS)
def test_sentence_bleu_is_that_of_nltk(method):
    rng, smoothing, undefined = random.Random(0), getattr(SmoothingFunction(), method), 0
    for reference, candidate in ODD_PAIRS + [random_pair(rng) for _ in range(400)]:
        references = [reference, random_text(rng)][: rng.choice([1, 1, 2])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nltk warns of every zero
            try:
                want = nltk_sentence_bleu(
                    [r.split() for r in references], candidate.split(), smoothing_function=smoothing
                )
            except AssertionError:
                undefined += 1
                with pytest.raises(ValueError, match="trigram"):
                    bleu.sentence_bleu(references, candidate, method)
                continue
        assert bleu.sentence_bleu(references, candidate, method) == pytest.approx(want, rel=1e-12, abs=1e-12)
    assert (undefined > 0) == (method == "method6")


def test_sentence_bleu_without_options_is_what_the_study_calls():
    reference, candidate = "The capital of France is Paris .", "Paris is the capital of France ."
    want = nltk_sentence_bleu([reference.split()], candidate.split(), smoothing_function=SmoothingFunction().method1)
    assert bleu.sentence_bleu(reference, candidate) == pytest.approx(want, rel=1e-12) and 0.1 < want < 0.9


def test_an_unknown_option_of_bleu_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="method8.*method0, .*method7"):
        bleu.sentence_bleu("a", "a", "method8")
    with pytest.raises(ValueError, match="ja.*13a, intl, zh, char, none, ja-mecab"):
        bleu.corpus_bleu(["a"], ["a"], tokenize="ja")
    with pytest.raises(ValueError, match="add-one.*exp, floor, add-k, none"):
        bleu.corpus_bleu(["a"], ["a"], smoothing="add-one")


# sacrebleu's BLEU

OWN = ("13a", "intl", "zh", "char", "none")  # tokenisers that need no dictionary


@pytest.mark.parametrize("tokenize", OWN)
def test_tokens_are_those_of_sacrebleu(tokenize):
    peer, rng = BLEU(tokenize=tokenize), random.Random(1)
    for text in ODD_TEXTS + [random_text(rng) for _ in range(1000)]:
        assert bleu.tokens(text, tokenize) == peer._preprocess_segment(text).split()


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8") | st.sampled_from(" .,-0aA&;\n(")))
def test_tokens_of_any_text_are_those_of_sacrebleu(text):
    for tokenize in OWN:
        assert bleu.tokens(text, tokenize) == BLEU(tokenize=tokenize)._preprocess_segment(text).split()


@pytest.mark.parametrize("smoothing", bleu.SMOOTHING_VALUES)
@pytest.mark.parametrize("tokenize", OWN)
def test_corpus_bleu_its_parts_and_its_signature_are_those_of_sacrebleu(tokenize, smoothing):
    rng = random.Random(2)
    for turn in range(60):
        pairs = [random_pair(rng) for _ in range(rng.choice([1, 2, 5]))] if turn else ODD_PAIRS
        references, candidates = map(list, zip(*pairs, strict=True))
        second = [random_text(rng) for _ in candidates]
        value = rng.choice([None, 0.01, 2.5])
        for several in ([references], [references, second]):
            options = {"lowercase": rng.random() < 0.3, "effective_order": rng.random() < 0.3}
            peer = BLEU(tokenize=tokenize, smooth_method=smoothing, smooth_value=value, **options)
            want = peer.corpus_score(candidates, several)
            ours = references if len(several) == 1 else [list(texts) for texts in zip(*several, strict=True)]
            statistics = bleu.bleu_statistics(ours, candidates, tokenize, options["lowercase"]).sum(0)
            got = bleu.bleu_score(statistics, smoothing, value, options["effective_order"])
            assert got.score == want.score
            assert (list(got.counts), list(got.totals), list(got.precisions)) == (
                want.counts,
                want.totals,
                want.precisions,
            )
            assert got[4:] == (want.bp, want.sys_len, want.ref_len)
            if not options["effective_order"]:
                assert (
                    bleu.corpus_bleu(ours, candidates, tokenize, smoothing, value, options["lowercase"]) == want.score
                )
            signature = bleu.bleu_signature(ours, tokenize, smoothing, value, **options)
            assert signature == re.sub(r"version:.*", "version:" + bleu.SACREBLEU, peer.get_signature().format())


def test_segment_bleu_is_sacrebleus_sentence_bleu():
    rng = random.Random(3)
    for reference, candidate in ODD_PAIRS + [random_pair(rng) for _ in range(500)]:
        references = [reference, random_text(rng), random_text(rng)][: rng.choice([1, 2, 3])]
        for effective in (True, False):
            want = BLEU(effective_order=effective).sentence_score(candidate, references).score
            assert bleu.segment_bleu(references, candidate, effective_order=effective) == want


def test_corpora_with_unequal_numbers_of_references_say_so_in_the_signature():
    peer = BLEU()
    want = peer.corpus_score(["a b c d e", "b c"], [["a b c d", "b c d"], ["a b d e f", None]])
    references = [["a b c d", "a b d e f"], "b c d"]
    assert bleu.corpus_bleu(references, ["a b c d e", "b c"]) == want.score
    assert "nrefs:var" in bleu.bleu_signature(references) and "nrefs:var" in peer.get_signature().format()


# chrF


def test_chrf_and_its_signature_are_those_of_sacrebleu():
    rng = random.Random(4)
    for turn in range(300):
        pairs = [random_pair(rng) for _ in range(3)] if turn > 2 else ODD_PAIRS
        candidates = [candidate for _, candidate in pairs]
        several = [[reference, *(random_text(rng) for _ in range(rng.choice([0, 0, 2])))] for reference, _ in pairs]
        options = {
            "char_order": rng.choice([6, 6, 1, 4]),
            "word_order": rng.choice([0, 2, 1]),
            "beta": rng.choice([2, 1, 3]),
        }
        options |= {key: rng.random() < 0.3 for key in ("lowercase", "whitespace", "eps_smoothing")}
        peer, columns = CHRF(**options), max(map(len, several))
        want = peer.corpus_score(candidates, [[(r + [None] * 3)[k] for r in several] for k in range(columns)]).score
        assert chrf.corpus_chrf(several, candidates, **options) == want
        del options["beta"]
        signature = re.sub(r"version:.*", "version:" + chrf.SACREBLEU, peer.get_signature().format())
        assert chrf.chrf_signature(several, **options) == signature


@pytest.mark.parametrize("word_order", [0, 2])
def test_segment_chrf_is_sacrebleus_sentence_chrf(word_order):
    rng, peer = random.Random(5), CHRF(word_order=word_order)
    for reference, candidate in ODD_PAIRS + [random_pair(rng) for _ in range(300)]:
        want = peer.sentence_score(candidate, [reference]).score
        assert chrf.segment_chrf(reference, candidate, word_order=word_order) == want


# n-grams


def alphabets():
    """Texts of few and of more different characters than any packing holds, and one pair beside another of each kind."""
    rng = random.Random(6)
    for size, length, pairs in ((3, 40, 700), (200, 200, 300), (3000, 400, 5), (30000, 3000, 2)):
        yield [
            ["".join(chr(0x4E00 + rng.randrange(size)) for _ in range(rng.randrange(length))) for _ in range(pairs)]
            for _ in range(2)
        ]


@pytest.mark.parametrize("max_order", [1, 4, 6])
def test_packed_counts_are_those_of_counters(max_order):
    for references, candidates in alphabets():
        want = [ngrams.overlap(r, c, max_order) for r, c in zip(references, candidates, strict=True)]
        assert ngrams.overlaps(references, candidates, max_order).tolist() == want
        words = [[list(text) for text in texts] for texts in (references, candidates)]
        assert ngrams.overlaps(*words, max_order).tolist() == want
    assert sum(map(sum, want)) > 0


def test_the_alphabets_of_that_test_take_each_way(monkeypatch):
    taken = Counter()
    packed, single = ngrams.packed_overlaps, ngrams.overlap
    monkeypatch.setattr(ngrams, "packed_overlaps", lambda *a: (taken.update([("packed", a[2] > 1)]), packed(*a))[1])
    monkeypatch.setattr(ngrams, "overlap", lambda *a: (taken.update(["counters"]), single(*a))[1])
    for references, candidates in alphabets():
        ngrams.overlaps(references, candidates, 6)
    assert taken["counters"] and taken["packed", True] and taken["packed", False]


# ROUGE


@pytest.mark.parametrize("use_stemmer", [True, False])
def test_rouge_is_that_of_rouge_score(use_stemmer):
    rng = random.Random(7)
    peer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=use_stemmer)
    long = [("word " * 400, "a word " * 200), ("caresses\nponies ties\n\nbe", "ties pony\n \ncaress be be")]
    for reference, candidate in long + ODD_PAIRS[:81] + [random_pair(rng) for _ in range(500)]:
        want = {name: tuple(score) for name, score in peer.score(reference, candidate).items()}
        assert rouge.rouge_n(reference, candidate, 1, use_stemmer) == want["rouge1"]
        assert rouge.rouge_n(reference, candidate, 2, use_stemmer) == want["rouge2"]
        assert rouge.rouge_l(reference, candidate, use_stemmer) == want["rougeL"]
        assert rouge.rouge_lsum(reference, candidate, use_stemmer) == want["rougeLsum"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abcd")), st.lists(st.sampled_from("abcd")))
def test_the_bit_vectors_give_a_longest_common_subsequence(reference, candidate):
    table = [[0] * (len(candidate) + 1) for _ in range(len(reference) + 1)]
    for i, x in enumerate(reference, 1):
        for j, y in enumerate(candidate, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    assert rouge.lcs_length(reference, candidate) == table[-1][-1]
    found = [reference[i] for i in sorted(rouge.lcs_places(reference, candidate))]
    rest = iter(candidate)
    assert len(found) == table[-1][-1] and all(word in rest for word in found)


def test_rouge_n_of_no_words_is_refused():
    with pytest.raises(ValueError, match="n is 0"):
        rouge.rouge_n("a", "a", 0)


# exact match and token F1


def squad_f1(reference, candidate):
    """Token F1 step by step, as SQuAD 2.0's evaluation states it."""
    words = []
    for text in (reference, candidate):
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        words.append(re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text).split())
    theirs, ours = words
    same = sum((Counter(theirs) & Counter(ours)).values())
    if len(theirs) == 0 or len(ours) == 0:
        return int(theirs == ours)
    if same == 0:
        return 0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def test_token_f1_is_that_of_squad():
    rng = random.Random(8)
    for reference, candidate in ODD_PAIRS + [random_pair(rng) for _ in range(500)]:
        assert token_f1(reference, candidate) == squad_f1(reference, candidate)


def test_token_f1_knows_answers_by_hand():
    assert token_f1("The Eiffel Tower", "eiffel tower!") == 1.0
    assert token_f1("in Paris", "Paris, France") == 0.5
    assert token_f1("the", "a") == 1.0 and token_f1("the", "word") == 0.0
    assert token_f1(["Lyon", "in Paris"], "Paris") == pytest.approx(2 / 3)


def test_exact_match_takes_any_of_several_references():
    assert exact_match([["4", "four"], "no"], [" four\n", "yes"]) == 0.5


# all


@pytest.mark.parametrize(
    "score",
    [bleu.corpus_bleu, chrf.corpus_chrf, exact_match],
)
def test_lists_that_do_not_fit_together_are_one_clear_error(score):
    with pytest.raises(ValueError, match="2 references and 1 candidates"):
        score(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="0 references"):
        score([], [])
    with pytest.raises(ValueError, match="one text; wrap it"):
        score("abc", ["a", "b", "c"])
    with pytest.raises(ValueError, match="row 1: the candidate is None"):
        score(["a", "b"], ["a", None])
    with pytest.raises(ValueError, match="row 1: the reference is nan"):
        score(["a", float("nan")], ["a", "b"])
    with pytest.raises(ValueError, match=r"row 0: the reference is \[\]"):
        score([[], "b"], ["a", "b"])


def test_the_answers_of_the_study_score_as_in_the_libraries(data_dir):
    """Two of its systems against each other: real answers of 60 words, with lists, code and cut ends."""
    folder = data_dir / "seed_results" / "data" / "section_2"
    files = [json.loads((folder / f"{m}-finetuned_topk50_nb5_t1.json").read_text()) for m in ("phi-2", "Mistral-7B")]
    references, candidates = files
    assert len(references) == len(candidates) == 27
    assert bleu.corpus_bleu(references, candidates) == BLEU().corpus_score(candidates, [references]).score
    assert chrf.corpus_chrf(references, candidates) == CHRF().corpus_score(candidates, [references]).score
    peer, smoothing = RougeScorer(["rougeL"], use_stemmer=True), SmoothingFunction().method1
    for reference, candidate in zip(references, candidates, strict=True):
        assert rouge.rouge_l(reference, candidate) == tuple(peer.score(reference, candidate)["rougeL"])
        want = nltk_sentence_bleu([reference.split()], candidate.split(), smoothing_function=smoothing)
        assert bleu.sentence_bleu(reference, candidate) == pytest.approx(want, rel=1e-12)


def test_a_text_of_100_000_words_is_scored_in_seconds():
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 5000, 100_000))) for _ in range(2)]
    started = time.process_time()
    scores = bleu.corpus_bleu(texts[:1], texts[1:]), chrf.corpus_chrf(texts[:1], texts[1:])
    assert all(0 < score < 99 for score in scores)
    assert time.process_time() - started < 10  # about 1 s; a method of quadratic cost would take minutes
