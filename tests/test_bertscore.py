"""BERTScore against the bert-score package, with one random encoder for both, saved as transformers saves it."""

import json
import math
import random
import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from minitune import hub
from minitune.checkpoint import load_encoder
from minitune.config import parse
from minitune.files import read_json, write_json
from minitune.jobs.evaluate import EvaluateConfig, evaluate
from minitune.metrics import bertscore as module
from minitune.metrics.bertscore import LAYERS, bert_score
from minitune.tokenizer import BERT_SPECIAL, ROBERTA_SPECIAL, load_tokenizer

transformers = pytest.importorskip("transformers", reason="bert-score runs transformers' encoders")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    package = pytest.importorskip("bert_score", reason="parity is proven against bert-score")

SIZES = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96)
ODD = [  # (reference, candidate)
    ("The cat sat on the mat.", "The cat sat on the mat."),
    ("The cat sat on the mat.", "A dog lay under a rug, I think."),
    ("one", "one"),
    ("one", "two three four five six seven"),
    ("the the the the the", "the"),
    ("  spaces   inside\tand\nnew lines  ", "spaces inside and new lines"),
    ("Ünïcödé — “quotes” … 🙂", "Unicode - \"quotes\" ... :)"),
    ("猫坐在垫子上。", "狗躺在地毯下面。"),
    ("UPPER lower", "upper LOWER"),
    ("a </s> b [SEP] c <mask> [MASK]", "a <s> b [CLS] c <pad> [PAD]"),
    ("?", "!"),
    ("very long " * 90, "very long " * 60 + "indeed"),
    ("very long " * 90, "short"),
]  # fmt: skip


def rows():
    return json.loads(hub.embedded_rows("train").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small random RoBERTa and BERT with tokenizers trained on the embedded rows, as the files of the first releases."""
    texts = [f"{row['instruction']} {row['input']} {row['output']}" for row in rows()[:500]]
    made = {}
    for family in ("roberta", "bert"):
        folder = made[family] = tmp_path_factory.mktemp(family)
        if family == "roberta":
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            trainer = trainers.BpeTrainer(
                vocab_size=600, special_tokens=list(ROBERTA_SPECIAL), show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            )  # fmt: skip
            tokenizer.train_from_iterator(texts, trainer)
            tokenizer.model.save(str(folder))
            config = transformers.RobertaConfig(vocab_size=600, max_position_embeddings=130, type_vocab_size=1, **SIZES)
            model = transformers.RobertaModel(config)
        else:
            tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
            tokenizer.normalizer = normalizers.BertNormalizer()
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            trainer = trainers.WordPieceTrainer(
                vocab_size=600, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
            )
            tokenizer.train_from_iterator(texts, trainer)
            vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
            assert set(BERT_SPECIAL) <= set(vocabulary)
            (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
            config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=128, **SIZES)
            model = transformers.BertModel(config)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")  # of a LayerNorm
            torch.nn.init.normal_(parameter, float(is_scale), 0.15 if parameter.ndim > 1 else 0.1)
        model.save_pretrained(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 128}))
    return made


def load(folder):
    return load_encoder(folder), load_tokenizer(folder)


def theirs(folder, pairs, **options):
    references, candidates = zip(*pairs, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return package.score(list(candidates), list(references), model_type=str(folder), nthreads=0, **options)


def close(found, expected):
    """fp32 sums over 64 dims and at most 128 tokens, in another order: 1e-5 of scores up to 1."""
    for name, ours, reference in zip("P R F1".split(), found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def some_pairs(count):
    """Pairs of answers of very different lengths."""
    generator = random.Random(0)
    words = " ".join(row["output"] for row in rows()[:300]).split()
    text = lambda: " ".join(generator.choices(words, k=generator.choice([1, 2, 3, 8, 20, 40, 60])))
    return [(text(), text()) for _ in range(count)]


@pytest.mark.parametrize("idf", [False, True], ids=["plain", "idf"])
@pytest.mark.parametrize("layer", [0, 3, 4])
@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_scores_equal_bert_score(folders, family, layer, idf):
    pairs = ODD + some_pairs(40) + ODD[:2]
    found = bert_score(*zip(*pairs, strict=True), *load(folders[family]), layer=layer, idf=idf, batch_tokens=300)
    close(found, theirs(folders[family], pairs, num_layers=layer, idf=idf, batch_size=16))
    assert all(score.shape == (len(pairs),) and score.dtype == torch.float32 for score in found)
    assert found[2][0] == pytest.approx(1, abs=1e-6) and found[2][1] < 0.99, "the encoder must tell texts apart"


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_an_empty_text_scores_zero_as_in_bert_score(folders, family, monkeypatch):
    pairs = [("", "a cat"), ("a cat", ""), ("", ""), (" \n", "a"), ("a dog", "a cat")]
    made = package.score.__globals__["get_tokenizer"]

    def tokenizer_of_transformers_4(*arguments):  # bert-score asks it for an empty text; transformers 5 has it no more
        tokenizer = made(*arguments)
        tokenizer.build_inputs_with_special_tokens = lambda ids: [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
        return tokenizer

    monkeypatch.setitem(package.score.__globals__, "get_tokenizer", tokenizer_of_transformers_4)
    expected = theirs(folders[family], pairs, num_layers=3)
    found = bert_score(*zip(*pairs, strict=True), *load(folders[family]), layer=3)
    close(found, expected)
    assert torch.stack(found)[:, :4].eq(0).all() and found[2][4] > 0


def test_the_best_of_several_references_is_taken(folders):
    references = [["a cat sat", "a dog", "a cat sat on the mat"], ["one"], ["The sky is blue.", "a cat"]]
    candidates = ["a cat sat", "two", "a cat"]
    found = bert_score(references, candidates, *load(folders["roberta"]), layer=3, idf=True)
    close(found, theirs(folders["roberta"], list(zip(references, candidates, strict=True)), num_layers=3, idf=True))


def test_baselines_rescale_as_in_bert_score(folders, tmp_path):
    table = tmp_path / "baseline.tsv"
    table.write_text("LAYER,P,R,F\n" + "".join(f"{i},0.{i}1,0.{i}2,0.{i}3\n" for i in range(5)))
    pairs, judge = some_pairs(10), load(folders["bert"])
    expected = theirs(
        folders["bert"], pairs, num_layers=3, lang="en", rescale_with_baseline=True, baseline_path=str(table)
    )
    close(bert_score(*zip(*pairs, strict=True), *judge, layer=3, baseline=table), expected)
    close(bert_score(*zip(*pairs, strict=True), *judge, layer=3, baseline=(0.31, 0.32, 0.33)), expected)
    table.write_text(table.read_text().replace(",", "\t"))
    close(bert_score(*zip(*pairs, strict=True), *judge, layer=3, baseline=str(table)), expected)


def test_prefix_space_is_the_space_that_slow_tokenizers_put_before_a_text(folders):
    pairs = some_pairs(8)
    encoder, tokenizer = load(folders["roberta"])
    found = bert_score(*zip(*pairs, strict=True), encoder, tokenizer, layer=3, prefix_space=True)
    (folders["roberta"] / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 128, "add_prefix_space": True})
    )
    try:
        close(found, theirs(folders["roberta"], pairs, num_layers=3))
        close(bert_score(*zip(*pairs, strict=True), encoder, load_tokenizer(folders["roberta"]), layer=3), found)
        plain = bert_score(*zip(*pairs, strict=True), encoder, tokenizer, layer=3)
        assert (plain[2] - found[2]).abs().max() > 1e-3, "the space must matter"
    finally:
        (folders["roberta"] / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 128}))


@pytest.mark.parametrize(
    "options, how",
    [
        ({}, "layer 3"),
        ({"prefix_space": True}, "layer 3, a space before every text"),
        ({"idf": True}, "layer 3, idf"),
        ({"baseline": "table.tsv", "idf": True}, "layer 3, idf, rescaled by"),
    ],
)
def test_evaluate_scores_as_its_options_say_and_its_file_says_so(folders, tmp_path, options, how, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.tsv").write_text("LAYER,P,R,F\n2,0.1,0.1,0.1\n3,0.3,0.2,0.25\n")
    references, answers = zip(*some_pairs(6), strict=True)
    write_json(tmp_path / "r.json", references)
    write_json(tmp_path / "a.json", answers)
    argv = ["--predictions", "a.json", "--references", "r.json", "--resamples", "10", "--out", "e.json"]
    argv += ["--encoder", str(folders["roberta"]), "--encoder-layer", "3", "--metrics", "bertscore"]
    for name, value in options.items():
        argv += [f"--encoder-{name.replace('_', '-')}"] + ([] if value is True else [value])
    said = []
    evaluate(parse(EvaluateConfig, argv), said.append)
    stored = read_json(tmp_path / "e.json")
    expected = bert_score(references, answers, *load(folders["roberta"]), layer=3, **options)[2]
    found = [example["scores"]["bertscore"] for example in stored["systems"]["predictions"]["examples"]]
    assert found == expected.double().tolist() and sum(how in line for line in said) == 1
    for name in ("prefix_space", "idf", "baseline"):
        assert (stored["settings"][f"encoder_{name}"] or None) == options.get(name)


def test_tokens_of_both_libraries_are_the_same_from_either_form_of_file(folders, tmp_path):
    texts = [text for pair in ODD for text in pair]
    for family, folder in folders.items():
        reference = transformers.AutoTokenizer.from_pretrained(folder)
        reference.save_pretrained(tmp_path / family)
        assert (tmp_path / family / "tokenizer.json").is_file()
        for ours in (load_tokenizer(folder), load_tokenizer(tmp_path / family)):
            for text in texts:
                expected = reference.encode(text, max_length=128, truncation=True)
                assert ours.encode_framed(text, 128) == expected, text


def test_how_pairs_are_batched_does_not_matter(folders, monkeypatch):
    pairs, judge = ODD + some_pairs(60), load(folders["roberta"])
    references, candidates = zip(*pairs, strict=True)
    whole = bert_score(references, candidates, *judge, layer=3)
    monkeypatch.setattr(module, "PAIRS", 7)
    close(bert_score(references, candidates, *judge, layer=3, batch_tokens=1), whole)
    for i in range(0, len(pairs), 9):
        alone = bert_score(references[i : i + 1], candidates[i : i + 1], *judge, layer=3)
        close(alone, [score[i : i + 1] for score in whole])


def test_a_text_is_encoded_once_and_nothing_is_padded(folders):
    encoder, tokenizer = load(folders["roberta"])
    seen = []
    encoder.embeddings.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].numel()))
    references = ["a cat", "a cat", "a dog ran", "a cat"] * 40
    bert_score(references, references[::-1], encoder, tokenizer, layer=3)
    assert sum(seen) == sum(len(tokenizer.encode_framed(text)) for text in set(references))


def test_embeddings_of_finished_pairs_are_freed(folders, monkeypatch):
    encoder, tokenizer = load(folders["roberta"])
    held = []
    match = module.match
    monkeypatch.setattr(module, "PAIRS", 4)
    monkeypatch.setattr(
        module, "match", lambda pairs, embedded, *rest: held.append(len(embedded)) or match(pairs, embedded, *rest)
    )
    pairs = [(f"word {i} " * (i + 1), f"other {i} " * (i + 1)) for i in range(20)]
    bert_score(*zip(*pairs, strict=True), encoder, tokenizer, layer=1)
    assert max(held) == 8


def test_idf_that_leaves_no_weight_gives_zero_and_not_nan(folders):
    """One reference: all of its tokens are in all references. bert-score gives R = NaN and F1 = 0."""
    pairs = [("a cat sat", "a dog")]
    P, R, F1 = theirs(folders["roberta"], pairs, num_layers=3, idf=True)
    assert R.isnan().all() and F1.eq(0).all()
    found = bert_score(*zip(*pairs, strict=True), *load(folders["roberta"]), layer=3, idf=True)
    close(found, (P, torch.zeros(1), torch.zeros(1)))


def test_the_layer_is_bert_scores_for_the_models_that_load_here(folders):
    from bert_score.utils import model2layers

    assert LAYERS.items() <= model2layers.items()
    assert LAYERS["roberta-large"] == 17
    encoder, tokenizer = load(folders["roberta"])
    for name, layer in (("roberta-base", 10), ("FacebookAI/roberta-large", 17), ("google-bert/bert-base-uncased", 9)):
        encoder.name = name
        with pytest.raises(ValueError, match=f"layer is {layer}, expected 0 to 4"):
            bert_score(["a"], ["a"], encoder, tokenizer)
    encoder.name = "somebody/roberta-large"
    with pytest.raises(ValueError, match="no layer is known for 'somebody/roberta-large'; give layer=N"):
        bert_score(["a"], ["a"], encoder, tokenizer)
    with pytest.raises(ValueError, match="layer is 5, expected 0 to 4"):
        bert_score(["a"], ["a"], encoder, tokenizer, layer=5)


@pytest.mark.parametrize(
    "baseline, message",
    [
        ("missing.tsv", "cannot be read"),
        ("LAYER,P,R\n1,2,3\n", "does not begin with LAYER,P,R,F"),
        ("LAYER,P,R,F\n0,0.1,0.2,0.3\n", "has no row for layer 3"),
        ("LAYER,P,R,F\n3,a,0.2,0.3\n", "a row that is not four numbers"),
        ((0.1, 0.2), "expected three numbers below 1"),
        ((0.1, 0.2, 1.0), "expected three numbers below 1"),
        ((0.1, 0.2, math.nan), "expected three numbers below 1"),
    ],
)
def test_a_bad_baseline_is_one_clear_line(folders, tmp_path, baseline, message):
    if isinstance(baseline, str):
        path = tmp_path / "baseline.tsv"
        if "\n" in baseline:
            path.write_text(baseline)
        baseline = path
    with pytest.raises(ValueError, match=message):
        bert_score(["a"], ["a"], *load(folders["bert"]), layer=3, baseline=baseline)


def test_bad_input_is_one_clear_line(folders):
    encoder, tokenizer = load(folders["roberta"])
    with pytest.raises(ValueError, match="got 1 references and 2 candidates"):
        bert_score(["a"], ["a", "b"], encoder, tokenizer, layer=3)
    with pytest.raises(ValueError, match="pair 1 has no reference"):
        bert_score([["a"], []], ["a", "b"], encoder, tokenizer, layer=3)
    assert [score.tolist() for score in bert_score([], [], encoder, tokenizer, layer=3)] == [[], [], []]
    with torch.no_grad():
        encoder.encoder.layer[0].output.dense.bias[0] = math.nan
    with pytest.raises(ValueError, match="the score of pair 0 is"):
        bert_score(["a"], ["b"], encoder, tokenizer, layer=3)
    encoder.config.__dict__["vocab_size"] = 200
    with pytest.raises(ValueError, match="the tokenizer belongs to another model"):
        bert_score(["the cat"], ["the cat"], encoder, tokenizer, layer=3)
