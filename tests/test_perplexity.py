"""Perplexity against recorded numbers of a real model, transformers' loss, and its own invariants."""

import json
import math

import pytest
import torch
from minitune_kernels import ops_torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

from minitune.checkpoint import load_model
from minitune.metrics.perplexity import judge_perplexity, perplexity, sequence_nll
from minitune.models import build
from minitune.tokenizer import load_tokenizer

GPT2 = dict(model_type="gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)


@pytest.fixture(scope="module")
def stories(data_dir):
    expected = json.loads((data_dir / "text/expected_perplexity_stories260K.json").read_text())
    return load_model(data_dir / "stories260K"), load_tokenizer(data_dir / "stories260K"), expected


@pytest.fixture
def judge(tmp_path):
    """A small random GPT-2 and a tokenizer of one token a letter, which has no BOS."""
    torch.manual_seed(0)
    model = build(GPT2).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, *((0.0, 0.2) if parameter.ndim > 1 else (1.0, 0.1)))
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters | {"<|endoftext|>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return model, load_tokenizer(tmp_path)


def reference_nll(model, ids, first=1):
    """-ln p of ids[first:], from all logits at once in fp32 on one row."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, first - 1 : -1]
    return F.cross_entropy(logits.double(), torch.tensor(ids[first:]), reduction="none")


# --- a real model against recorded numbers: fp32 against their fp64, 2e-5 as its provenance says ---


def test_documents_have_the_recorded_loss(stories):
    model, tokenizer, expected = stories
    documents = expected["documents"]
    sequences = [tokenizer.encode(document["text"])[:512] for document in documents]
    for document, (nll, tokens) in zip(documents, sequence_nll(model, sequences), strict=True):
        assert tokens == document["n_tokens_incl_bos"] - 1
        assert abs(nll / tokens - document["mean_nll"]) < 2e-5, document["source"]


def test_sliding_window_over_long_text_has_the_recorded_perplexity(stories, data_dir):
    model, tokenizer, expected = stories
    shakespeare = expected["files"][1]
    text = (data_dir / "text" / shakespeare["file"]).read_text()[:40000]
    ids = tokenizer.encode(text, add_bos=False)[: shakespeare["first_n_tokens"]]
    [(nll, tokens)] = sequence_nll(model, [[tokenizer.bos_id, *ids]], context=512, stride=256)
    recorded = shakespeare["sliding_ctx512_stride256"]
    assert tokens == recorded["scored"] == 8000
    assert abs(nll / tokens - recorded["mean_nll"]) < 2e-5
    windows = [[tokenizer.bos_id, *ids[i : i + 511]] for i in range(0, len(ids), 511)]
    nlls, counts = zip(*sequence_nll(model, windows), strict=True)
    recorded = shakespeare["bos_windows_511"]
    assert sum(counts) == recorded["scored"] and abs(math.fsum(nlls) / sum(counts) - recorded["mean_nll"]) < 2e-5


def test_per_word_and_bits_per_byte_are_of_the_same_loss(stories):
    model, tokenizer, expected = stories
    texts = [document["text"] for document in expected["documents"][:3]] + ["Ünïcode 你好"]
    found = perplexity(model, tokenizer, texts)
    nll = sum(float(reference_nll(model, tokenizer.encode(text)).sum()) for text in texts)
    words, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    assert (found["words"], found["bytes"]) == (words, size)
    assert found["tokens"] == sum(len(tokenizer.encode(text)) - 1 for text in texts)
    assert found["perplexity"] == pytest.approx(math.exp(nll / found["tokens"]), rel=1e-5)
    assert found["word_perplexity"] == pytest.approx(math.exp(nll / words), rel=1e-4)  # its exponent is larger
    assert found["bits_per_byte"] == pytest.approx(nll / size / math.log(2), rel=1e-5)


def test_an_answer_is_scored_after_its_prompt_and_the_prompt_is_not(stories):
    model, tokenizer, _ = stories
    prompts, answers = ["Once upon a time", ""], [" there was a dog.", "He ran."]
    found = perplexity(model, tokenizer, answers, prompts)
    losses = []
    for prompt, answer in zip(prompts, answers, strict=True):
        before = tokenizer.encode(prompt)
        losses.append(reference_nll(model, before + tokenizer.encode(answer, add_bos=False), len(before)))
    losses = torch.cat(losses)
    assert found["tokens"] == len(losses)
    assert found["mean_nll"] == pytest.approx(float(losses.mean()), abs=2e-5)


# --- windows ---


@pytest.mark.parametrize("context, stride", [(64, 32), (64, 63), (64, 1), (10, 3), (2, 1)])
@pytest.mark.parametrize("length, start", [(200, 0), (64, 0), (65, 0), (200, 130), (2, 1), (200, 199)])
def test_every_token_is_scored_once_in_the_window_that_the_stride_says(judge, context, stride, length, start):
    model, _ = judge
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    [(nll, tokens)] = sequence_nll(model, [ids], [start], context, stride)
    begin, done, expected = 0, max(1, start), 0.0
    while done < length:
        end = min(begin + context, length)
        if end > done:
            expected += float(reference_nll(model, ids[begin:end], done - begin).sum())
            done = end
        begin += stride
    assert tokens == length - max(1, start)
    assert nll == pytest.approx(expected, rel=1e-5)


def test_what_is_packed_together_does_not_matter(judge):
    model, _ = judge
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (5, 1, 0, 90, 64, 2)]
    together, alone = (sequence_nll(model, sequences, batch_tokens=n) for n in (1000, 1))
    assert [tokens for _, tokens in together] == [4, 0, 0, 89, 63, 1]
    assert [n for n, _ in together] == pytest.approx([n for n, _ in alone], rel=1e-5)


def test_no_more_logits_than_a_chunk_exist(judge, monkeypatch):
    model, _ = judge
    sizes = []
    model.lm_head.register_forward_hook(lambda _, __, out: sizes.append(out.shape[:-1].numel()))
    monkeypatch.setattr(ops_torch, "CHUNK", 16)
    sequence_nll(model, [list(range(60)), list(range(50))])
    assert sum(sizes) == 108 and max(sizes) == 16


# --- the judge ---


def test_the_studys_number_is_the_mean_of_exp_of_transformers_loss(judge, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the study took the loss from transformers")
    model, tokenizer = judge
    options = {key: value for key, value in GPT2.items() if key != "model_type"}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).eval()
    theirs.load_state_dict(model.state_dict())
    texts = ["A short answer.", "", "A longer answer, of two sentences. Here is one.", "x", "的 ünï"]
    expected, losses = [], []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)])
        loss = 0.0
        if ids.shape[1] > 1:
            with torch.no_grad():
                loss = theirs(ids, labels=ids).loss.item()
            losses.append((loss * (ids.shape[1] - 1), ids.shape[1] - 1))
        expected.append(math.exp(loss) if ids.shape[1] > 1 else 0.0)
    found = judge_perplexity(model, tokenizer, texts)
    assert found["perplexities"] == pytest.approx(expected, rel=1e-5)
    assert found["mean_perplexity"] == pytest.approx(sum(expected) / 5, rel=1e-5)
    assert found["unscored"] == [1, 3]
    nll, tokens = map(sum, zip(*losses, strict=True))
    assert found["tokens"] == tokens and found["token_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_a_start_token_scores_the_first_token_too(judge):
    model, tokenizer = judge
    found = judge_perplexity(model, tokenizer, ["x", "", "two words"], add_start_token=True)
    expected = [math.exp(float(reference_nll(model, [256, *tokenizer.encode(t)]).mean())) for t in ("x", "two words")]
    assert [found["perplexities"][i] for i in (0, 2)] == pytest.approx(expected, rel=1e-5)
    assert found["unscored"] == [1] and found["perplexities"][1] == 0.0 and found["tokens"] == 10


def test_an_answer_longer_than_the_judge_reads_is_scored_whole(judge):
    model, tokenizer = judge
    found = judge_perplexity(model, tokenizer, ["long " * 60])
    assert found["tokens"] == 299 and found["unscored"] == []


def test_nothing_to_judge_has_no_number(judge):
    model, tokenizer = judge
    empty = judge_perplexity(model, tokenizer, ["", "x"])
    assert empty["mean_perplexity"] == 0.0 and empty["token_perplexity"] is None
    assert judge_perplexity(model, tokenizer, [])["mean_perplexity"] is None
    with pytest.raises(ValueError, match="none of the 2 texts has a token to score"):
        perplexity(model, tokenizer, ["", "x"])


# --- errors ---


def test_nan_is_an_error_that_names_the_text(judge):
    model, tokenizer = judge
    with torch.no_grad():
        model.model.wte.weight[tokenizer.encode("z")[0]] = math.nan
    model.lm_head = torch.nn.Linear(32, 300, bias=False)
    with pytest.raises(ValueError, match="the loss of 1 of 3 texts is not finite; that of text 1 is nan"):
        judge_perplexity(model, tokenizer, ["good", "bad z text", "good"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"context": 65}, "context is 65, expected 2 to 64"),
        ({"context": 1}, "context is 1, expected 2 to 64"),
        ({"stride": 64}, "stride is 64, expected 1 to 63"),
        ({"stride": 0}, "stride is 0, expected 1 to 63"),
    ],
)
def test_windows_that_do_not_fit_are_refused(judge, options, message):
    with pytest.raises(ValueError, match=message):
        sequence_nll(judge[0], [[1, 2]], **options)


def test_a_foreign_token_training_mode_and_unequal_lists_are_refused(judge):
    model, tokenizer = judge
    with pytest.raises(ValueError, match="text 1 has the token 300, but the model has 300 tokens"):
        sequence_nll(model, [[1, 2], [1, 300]])
    with pytest.raises(ValueError, match="got 1 prompts and 2 texts"):
        perplexity(model, tokenizer, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="in training mode"):
        sequence_nll(model.train(), [[1, 2]])
