"""What a checkpoint's generation_config.json changes, against transformers, which reads it by itself."""

import json
import shutil

import pytest
import torch
import transformers

from minitune import hub
from minitune.checkpoint import load_model
from minitune.decoding import sampling
from minitune.decoding.options import GenerateConfig
from minitune.generate import generate
from minitune.generation_config import DecodingOptions, settle
from minitune.jobs.chat import ChatConfig, chat
from minitune.model_folder import ModelFolder
from minitune.tokenizer import load_tokenizer

PROMPT = "What is 3 + 4? What is 20 + 2?"
BASE = {"bos_token_id": 1, "eos_token_id": 2, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "m"
    shutil.copytree(hub.resolve("tiny-llama"), path)
    return path


@pytest.fixture(scope="module")
def models(folder):
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return load_model(folder, dtype=torch.float32), peer


def ask(folder, model, said=None, ids=None, **options):
    """(ids of the prompt, new ids with the options and what the folder's files say)."""
    tokenizer = load_tokenizer(folder)
    ids = ids or tokenizer.encode(PROMPT)
    lines = [] if said is None else said
    return ids, generate(model, [ids], settle(DecodingOptions(**options), ModelFolder(folder), tokenizer, lines.append))


def peer_answers(peer, content, ids, **options):
    peer.generation_config = transformers.GenerationConfig.from_dict(content)
    found = peer.generate(torch.tensor([ids]), pad_token_id=0, **options)[:, len(ids) :].tolist()
    ends = content["eos_token_id"] if isinstance(content["eos_token_id"], list) else [2]
    return [[i for i in row if i not in (0, *ends)] for row in found]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 4},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 3, "early_stopping": "never", "num_return_sequences": 2},
        {"num_beams": 3, "repetition_penalty": 1.5, "renormalize_logits": True},
        {"max_new_tokens": 5},
        {"max_new_tokens": None, "max_length": 26},
        {"max_new_tokens": 6, "max_length": 500},
        {"min_new_tokens": 9, "eos_token_id": "first"},
        {"min_length": 28, "eos_token_id": "first"},
        {"min_length": 3000, "max_new_tokens": 7},
        {"min_new_tokens": 3000, "max_new_tokens": 7},
        {"suppress_tokens": "first"},
        {"begin_suppress_tokens": "first"},
        {"bad_words_ids": "first"},
        {"forced_eos_token_id": 5, "num_beams": 2},
        {"forced_eos_token_id": [7, 9], "max_new_tokens": 4},
        {"top_k": 3, "top_p": 0.5, "temperature": 0.3, "typical_p": 0.4},  # nothing is drawn
    ],
    ids=str,
)
def test_every_key_gives_the_tokens_of_transformers(folder, models, keys):
    ours, peer = models
    ids = load_tokenizer(folder).encode(PROMPT)
    [plain] = peer_answers(peer, BASE, ids)
    first = {"suppress_tokens": plain[:2], "begin_suppress_tokens": plain[:1], "bad_words_ids": [plain[2:4], plain[:1]]}
    first["eos_token_id"] = [2, plain[4]]
    content = BASE | {key: first[key] if value == "first" else value for key, value in keys.items()}
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(content))
    expected = peer_answers(peer, content, ids)
    assert ask(folder, ours)[1] == expected
    changes_nothing = "temperature" in keys or not keys
    assert changes_nothing or expected != [plain]


def test_a_first_token_may_be_forced(folder, models):
    content = BASE | {"forced_bos_token_id": 77, "begin_suppress_tokens": [300]}
    (folder / "generation_config.json").write_text(json.dumps(content))
    for ids in ([1], [1, 5]):
        assert ask(folder, models[0], ids=ids)[1] == peer_answers(models[1], content, ids)


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.0}, {"max_new_tokens": 3}, {"num_beams": 2}])
def test_an_option_that_is_given_wins(folder, models, options):
    content = BASE | {"repetition_penalty": 1.3, "max_length": 28, "num_beams": 3}
    (folder / "generation_config.json").write_text(json.dumps(content))
    ids, found = ask(folder, models[0], **options)
    assert found == peer_answers(models[1], content, ids, **options)


def test_none_turns_them_off_and_a_line_says_what_is_applied(folder, models):
    content = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(content | {"guidance_scale": 1.5, "max_time": None}))
    said, tokenizer = [], load_tokenizer(folder)
    decoding = settle(DecodingOptions(top_p=0.5), ModelFolder(folder), tokenizer, said.append)
    assert (decoding.do_sample, decoding.temperature, decoding.top_p) == (True, 0.6, 0.5)
    assert said[0] == (
        "decoding defaults from generation_config.json: do_sample True, temperature 0.6 "
        "(--generation-config none turns them off)"
    )
    assert len(said) == 2 and "guidance_scale" in said[1] and "max_time" not in said[1]
    said.clear()
    decoding = settle(DecodingOptions(generation_config="none"), ModelFolder(folder), tokenizer, said.append)
    assert (decoding.do_sample, decoding.temperature, decoding.top_p, said) == (False, 1.0, 1.0, [])


def test_config_json_is_read_where_there_is_no_other_file(folder, models, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").unlink()
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"repetition_penalty": 1.4}))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    said = []
    ids, found = ask(tmp_path / "m", models[0], said, max_new_tokens=12)
    new = peer.generate(torch.tensor([ids]), max_new_tokens=12, pad_token_id=0)[0, len(ids) :].tolist()
    assert found == [[i for i in new if i != 2]]
    assert "from config.json: repetition_penalty 1.4" in said[0]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"temperature": "hot"}, "temperature is 'hot', expected null or a number"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1"),
        (
            {"do_sample": True, "top_p": 1.5},
            "top_p is 1.5, expected a number above 0 and up to 1 (--generation-config none",
        ),
        ({"suppress_tokens": [[1]]}, "suppress_tokens[0] is [1]"),
        ({"bad_words_ids": [[]]}, "bad_words_ids has an empty list"),
        ({"num_return_sequences": 3}, "num_return_sequences is 3, but greedy decoding has one answer"),
        ({"num_beams": 10**400}, "num_beams is"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_with_its_file(folder, content, message):
    (folder / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        settle(DecodingOptions(), ModelFolder(folder), load_tokenizer(folder), print)
    assert str(folder / "generation_config.json") in str(error.value) and len(str(error.value)) < 500
    assert message in str(error.value) or content == {"num_beams": 10**400}


def test_a_chat_takes_one_stream_and_the_files_length(folder, capsys):
    (folder / "generation_config.json").write_text(json.dumps(BASE | {"num_beams": 3, "max_new_tokens": 4}))
    questions = iter(["What is 3 + 4?"])
    turns = chat(ChatConfig(model=str(folder)), lambda mark: next(questions, "/quit"))
    out, err = capsys.readouterr()
    assert len(turns) == 2 and "(cut: --max-new-tokens)" in out
    assert "num_beams 3, max_new_tokens 4" in err or "max_new_tokens 4, num_beams 3" in err
    assert "a chat streams one answer" in err


@pytest.mark.parametrize("mass", [0.2, 0.9])
def test_typical_tokens_are_those_of_transformers(mass):
    scores = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 3
    for keep in (1, 3):
        warper = transformers.TypicalLogitsWarper(mass, min_tokens_to_keep=keep)
        assert torch.equal(sampling.warp(scores, typical_p=mass, keep=keep), warper(None, scores))


def test_an_end_token_that_the_model_lacks_is_refused(folder):
    tokenizer = load_tokenizer(folder)
    assert settle(DecodingOptions(eos_ids=(5, 1023)), ModelFolder(folder), tokenizer, print).eos_ids == (5, 1023)
    with pytest.raises(ValueError, match=r"eos_ids is 1024, 2147483647, but .* has the tokens 0 to 1,023$"):
        settle(DecodingOptions(eos_ids=(5, 1024, 2**31 - 1)), ModelFolder(folder), tokenizer, print)


@pytest.mark.parametrize(
    "keys",
    [{"top_k": -1}, {"top_p": 0.0}, {"typical_p": 0.0}, {"min_length": -1}, {"no_repeat_ngram_size": -1}],
    ids=str,
)
def test_values_that_change_nothing_are_taken_whatever_they_are(folder, models, keys):
    (folder / "generation_config.json").write_text(json.dumps(BASE | keys))
    said = []
    ids, found = ask(folder, models[0], said, max_new_tokens=8)
    assert found == peer_answers(models[1], BASE | keys | {"max_new_tokens": 8}, ids) and not said


@pytest.mark.parametrize(
    "keys",
    [{"forced_bos_token_id": 1024}, {"forced_eos_token_id": [2, 1024]}, {"bad_words_ids": [[5], [7, 1024]]}],
    ids=str,
)
def test_a_token_that_an_answer_must_have_or_not_is_one_of_the_models(folder, keys):
    (folder / "generation_config.json").write_text(json.dumps(BASE | keys))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(
        ValueError, match=r"has 1024, but the model has the tokens 0 to 1,023 \(--generation-config none"
    ):
        settle(DecodingOptions(), ModelFolder(folder), tokenizer, print)
    settle(DecodingOptions(generation_config="none"), ModelFolder(folder), tokenizer, print)


def test_decoding_refuses_an_end_token_that_the_model_lacks(models):
    with pytest.raises(ValueError, match="eos_ids is 1024, but the model has the tokens 0 to 1,023"):
        generate(models[0], [[1]], GenerateConfig(eos_ids=(5, 1024)))
