"""Token ids against the vectors of sentencepiece, tokenizers and tiktoken, and where BOS and EOS come from."""

import functools
import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from minitune.hub import resolve
from minitune.tokenizer import load_tokenizer

FOLDERS = ("tokenizers/llama-2", "tokenizers/mistral-v0.1", "tokenizers/phi-2", "tokenizers/gpt2", "stories260K")
SENTENCEPIECE = ("tokenizers/llama-2", "tokenizers/mistral-v0.1", "stories260K")
SPECIAL_TEXT = "a<s>b</s>c<|endoftext|>d<unk>e"


@pytest.fixture(scope="session")
def load(data_dir):
    return functools.cache(lambda name: load_tokenizer(data_dir / name))


def vectors(data_dir, name):
    return json.loads((data_dir / name / "vectors.json").read_text())


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_equal_the_vectors_to_the_last_one(load, data_dir, name):
    for case in vectors(data_dir, name)["vectors"]:
        assert load(name).encode(case["text"], add_bos=False) == case["ids"], case


@pytest.mark.parametrize("name", FOLDERS)
def test_decoded_text_equals_the_vectors(load, data_dir, name):
    given = vectors(data_dir, name)
    for case in given["vectors"]:
        assert load(name).decode(case["ids"]) == case["decoded"], case
    for case in given["decode_vectors"]:
        assert load(name).decode(case["ids"]) == case["text"], case


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/phi-2"])
def test_special_text_is_plain_text_when_not_allowed(load, data_dir, name):
    ordinary = {case["text"]: case.get("ids_ordinary") for case in vectors(data_dir, "tokenizers/gpt2")["vectors"]}
    special = 0
    for case in vectors(data_dir, name)["vectors"]:
        ids = load(name).encode(case["text"], add_bos=False, allow_special=False)
        if ordinary[case["text"]]:  # phi-2 is gpt2 but for runs of spaces and tabs, and these strings have none
            special += 1
            assert ids == ordinary[case["text"]] and 50256 in case["ids"]
        else:
            assert ids == case["ids"]
    assert special == 3


@pytest.mark.parametrize("name", FOLDERS)
def test_special_text_in_a_row_never_becomes_a_special_id(load, name):
    tokenizer = load(name)
    ids = tokenizer.encode(SPECIAL_TEXT, allow_special=False)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert ids[: len(bos)] == bos and not set(ids[len(bos) :]) & {tokenizer.bos_id, *tokenizer.eos_ids}
    assert tokenizer.decode(ids) == SPECIAL_TEXT


@pytest.mark.parametrize("name", FOLDERS)
def test_bos_comes_exactly_once_or_never(load, name):
    tokenizer = load(name)
    assert tokenizer.bos_id == (1 if name in SENTENCEPIECE else None)
    for text in ("", "a", " \n", SPECIAL_TEXT):
        without = tokenizer.encode(text, add_bos=False)
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        assert tokenizer.encode(text) == bos + without
        assert tokenizer.bos_id not in without


def test_eos_vocabulary_and_padding_are_those_of_each_folder(load):
    facts = {name: (load(name).eos_id, load(name).eos_ids, load(name).vocab_size) for name in FOLDERS}
    assert facts == {
        "tokenizers/llama-2": (2, [2], 32000),
        "tokenizers/mistral-v0.1": (2, [2], 32000),
        "tokenizers/phi-2": (50256, [50256], 50295),
        "tokenizers/gpt2": (50256, [50256], 50257),
        "stories260K": (2, [2, 1], 512),
    }
    assert all(0 <= load(name).pad_id < load(name).vocab_size for name in FOLDERS)


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("tokenizers/llama-2", "Hi\n日\0", ["<s>", " Hi", "\n", "日", "\0"]),
        ("tokenizers/llama-2", "😀", ["<s>", " ", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]),
        ("tokenizers/phi-2", "Hi  é\n日", ["Hi", "  ", "é", "\n", "<0xE6><0x97>", "<0xA5>"]),
        ("tokenizers/phi-2", "   <|endoftext|>", ["   ", "<|endoftext|>"]),
    ],
)
def test_piece_is_what_a_person_reads(load, name, text, pieces):
    tokenizer = load(name)
    assert [tokenizer.piece(i) for i in tokenizer.encode(text)] == pieces


@pytest.mark.parametrize("name", FOLDERS)
def test_an_id_without_a_token_becomes_the_replacement_character(load, name):
    """The embedding of phi-2 has 51,200 rows and its tokenizer 50,295 ids: a sampled id may have no token."""
    tokenizer = load(name)
    ids = tokenizer.encode("cat", add_bos=False)
    assert tokenizer.decode([*ids, tokenizer.vocab_size, *ids, -1]) == "cat\ufffdcat\ufffd"
    assert tokenizer.piece(tokenizer.vocab_size) == "\ufffd"


@pytest.mark.parametrize("name", ["stories260K", "tokenizers/gpt2"])
@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a"]])
def test_encode_refuses_what_is_not_text(load, name, text):
    with pytest.raises(ValueError, match="expected text"):
        load(name).encode(text)
    with pytest.raises(ValueError, match="surrogate"):
        load(name).encode("a\ud800")


@pytest.mark.parametrize("name", ["tiny-mistral", "tiny-phi"])
def test_a_token_that_is_no_text_is_refused(name, tmp_path):
    folder = shutil.copytree(resolve(name), tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "\ud800"}))
    with pytest.raises(ValueError, match=r"names a token that \w+ does not take: '\\ud800'"):
        load_tokenizer(folder)


def copy(data_dir, name, to, **files):
    """A tokenizer folder with other JSON files beside it; None takes a file away."""
    shutil.copytree(data_dir / name, to, ignore=shutil.ignore_patterns("vectors.json", "*.safetensors", "expected*"))
    to.chmod(0o755)
    for file, content in files.items():
        path = to / file.replace("_json", ".json").replace("_model", ".model")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return to


def test_tokenizer_model_takes_no_bos_where_the_config_says_so(data_dir, tmp_path):
    folder = copy(data_dir, "stories260K", tmp_path / "a", tokenizer_config_json={"add_bos_token": False})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_id is None and tokenizer.encode("a") == tokenizer.encode("a", add_bos=False)


def test_eos_of_tokenizer_config_wins_over_config_and_both_end_a_text(data_dir, tmp_path):
    added = {"added_tokens_decoder": {"512": {"content": "<|im_end|>", "special": True}}}
    folder = copy(
        data_dir,
        "stories260K",
        tmp_path / "a",
        config_json={"eos_token_id": [2, 1]},
        generation_config_json={},
        tokenizer_config_json={"eos_token": {"content": "<|im_end|>"}, **added},
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (512, [512, 2, 1], 513)
    folder = copy(
        data_dir,
        "stories260K",
        tmp_path / "b",
        config_json={"eos_token_id": [1, 2]},
        generation_config_json={"eos_token_id": 3},
        tokenizer_config_json={},
    )
    assert load_tokenizer(folder).eos_ids == [2, 3], "sentencepiece's own, then what ends a generation in transformers"


def test_added_tokens_beyond_tokenizer_model_are_decoded_and_never_parsed(data_dir, tmp_path):
    folder = copy(data_dir, "stories260K", tmp_path / "a", added_tokens_json={"<pad>": 512})
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("cat", add_bos=False)
    assert tokenizer.decode([*ids, 512]) == "cat<pad>" and tokenizer.piece(512) == "<pad>"
    assert 512 not in tokenizer.encode("cat<pad>") and tokenizer.decode(tokenizer.encode("cat<pad>")) == "cat<pad>"


def test_tokenizer_model_wins_over_tokenizer_json(data_dir, tmp_path):
    folder = copy(data_dir, "stories260K", tmp_path / "a")
    shutil.copy(data_dir / "tokenizers/phi-2/tokenizer.json", folder)
    assert load_tokenizer(folder).vocab_size == 512


def json_tokenizer(folder, post_processor=None, special=True, **files):
    """A byte-level tokenizer.json in the manner of Llama 3: ids 0..255 are bytes, 256 <|bos|>, 257 <|eos|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_tokens([AddedToken(t, special=special, normalized=False) for t in ("<|bos|>", "<|eos|>")])
    model.post_processor = post_processor
    model.enable_truncation(3)
    model.enable_padding(length=8)
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return load_tokenizer(folder)


def test_bos_of_tokenizer_json_is_what_its_post_processor_prepends(tmp_path):
    template = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 256)])
    with_bos = json_tokenizer(tmp_path / "a", template, config={"eos_token_id": 257})
    without = json_tokenizer(tmp_path / "b", config={"eos_token_id": 257, "bos_token_id": 256})
    assert (with_bos.bos_id, with_bos.eos_id, without.bos_id) == (256, 257, None)
    assert with_bos.encode("long text").count(256) == 1
    assert with_bos.encode("long text")[1:] == without.encode("long text")  # and no truncation, no padding
    assert len(without.encode("long text")) == 9


@pytest.mark.parametrize("bad", [{"a": 1}, [2, "a"], "x", 2.5, True, 1e400])
def test_an_end_id_that_is_none_is_refused_with_its_file(bad, tmp_path):
    with pytest.raises(
        ValueError, match=r"generation_config.json: eos_token_id(\[1\])? is .*, expected (null or )?a whole"
    ):
        json_tokenizer(tmp_path / "a", config={"eos_token_id": 257}, generation_config={"eos_token_id": bad})


@pytest.mark.parametrize("bad", [5, ["a"]])
def test_a_token_name_that_is_no_text_is_refused(bad, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer_config.json: eos_token is .*, expected null or text"):
        json_tokenizer(tmp_path / "a", tokenizer_config={"eos_token": bad})


@pytest.mark.parametrize(("add_bos", "expected"), [(True, 256), (False, None)])
def test_add_bos_token_of_the_config_settles_bos_of_tokenizer_json(tmp_path, add_bos, expected):
    with_bos = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 256)])
    config = {"add_bos_token": add_bos, "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    assert json_tokenizer(tmp_path / "a", None if add_bos else with_bos, tokenizer_config=config).bos_id == expected


def test_an_end_token_that_is_not_flagged_special_is_plain_text_in_a_row(tmp_path):
    tokenizer = json_tokenizer(tmp_path / "a", special=False, tokenizer_config={"eos_token": "<|eos|>"})
    assert tokenizer.encode("x<|eos|>")[-1] == 257
    assert 257 not in tokenizer.encode("x<|eos|>", allow_special=False)


def test_added_tokens_missing_from_tokenizer_json_are_added_at_their_id(tmp_path):
    added = {"added_tokens_decoder": {"258": {"content": "<|im_end|>", "special": True}}, "eos_token": "<|im_end|>"}
    tokenizer = json_tokenizer(tmp_path / "a", tokenizer_config=added)
    assert tokenizer.eos_id == 258 and tokenizer.decode([258]) == "<|im_end|>"
    with pytest.raises(ValueError, match="the id 300 .* gives it 258"):
        json_tokenizer(tmp_path / "b", added_tokens={"<|im_end|>": 300})


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("stories260K", {"tokenizer_model": None}, "has no tokenizer: expected tokenizer.model"),
        ("stories260K", {"tokenizer_model": b""}, "is empty"),
        ("stories260K", {"tokenizer_model": b"not a model"}, "is not a sentencepiece model"),
        ("stories260K", {"tokenizer_config_json": b"{"}, "is not valid JSON"),
        ("stories260K", {"tokenizer_config_json": []}, r"it is \[\], expected an object"),
        ("stories260K", {"tokenizer_config_json": {"eos_token": "<none>"}}, "names eos_token '<none>'"),
        ("stories260K", {"added_tokens_json": {"<pad>": "x"}}, "'<pad>' is 'x', expected a whole number"),
        ("stories260K", {"added_tokens_json": b'{"<pad>": -Infinity}'}, "'<pad>' is -inf, expected a whole number"),
        ("stories260K", {"added_tokens_json": {"<pad>": 10**18}}, "expected a whole number"),
        (
            "stories260K",
            {"tokenizer_config_json": {"added_tokens_decoder": {"600": "x"}}},
            "'600' is 'x', expected an obj",
        ),
        (
            "stories260K",
            {"tokenizer_config_json": {"added_tokens_decoder": {"-1": {"content": "x"}}}},
            "it is -1, expected",
        ),
        ("tokenizers/phi-2", {"tokenizer_json": b'{"version": "1.0"'}, "cannot be read as a tokenizer"),
        ("tokenizers/phi-2", {"tokenizer_json": None}, "has no tokenizer"),
        ("tokenizers/gpt2", {"vocab_json": b"{"}, "cannot be read as a tokenizer"),
    ],
)
def test_a_missing_or_corrupt_file_is_one_clear_line(data_dir, tmp_path, name, files, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(copy(data_dir, name, tmp_path / "a", **files))
    assert "\n" not in str(caught.value) and str(tmp_path / "a") in str(caught.value)


def test_a_tokenizer_model_that_was_cut_short_is_refused(data_dir, tmp_path):
    whole = (data_dir / "tokenizers/llama-2/tokenizer.model").read_bytes()
    folder = copy(data_dir, "tokenizers/llama-2", tmp_path / "a", tokenizer_model=whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        load_tokenizer(folder)


def test_bos_token_without_an_id_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="names bos_token '<s>'"):
        json_tokenizer(tmp_path / "a", tokenizer_config={"add_bos_token": True, "bos_token": "<s>"})


def test_piece_of_a_sentencepiece_tokenizer_in_json_shows_spaces_and_bytes(tmp_path):
    vocabulary = {"▁": 0, "a": 1, "<0x0A>": 2, "<0xE4>": 3, "▁a": 4}
    model = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.piece(i) for i in range(6)] == [" ", "a", "\n", "<0xE4>", " a", "\ufffd"]
    assert tokenizer.encode("a a\n") == [4, 4, 2] and tokenizer.eos_id is None
