"""Rows to batches: files, split, labels, over-length policies, packing and order."""

import json
import sys

import numpy as np
import pytest
import torch

from minitune import data, hub
from minitune.data import dataset, labels
from minitune.formats.rows import detect, segments
from minitune.formats.templates import alpaca_prompt
from minitune.tokenizer import load_tokenizer

FOLDERS = ("tokenizers/llama-2", "tokenizers/mistral-v0.1", "tokenizers/phi-2", "tokenizers/gpt2", "stories260K")
BOS, EOS = 256, 257
NO_PYARROW = "Parquet is read only where pyarrow is installed"
TRAPS = {
    "special text": "a <s> b </s> c <|endoftext|> d <|bos|><|eos|>",
    "the marker in the answer": "### Response:\nNo.\n\n### Instruction:\nx\n\n### Response:\n",
    "CRLF": "one\r\ntwo\rthree\r\n",
    "unicode": "日本語 e\u0301 😀 \u202eRTL\u202c \u2028 \x00 \u00a0",
    "spaces": "  two  and\ttab ",
}


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


# Prompts


def test_alpaca_prompt_is_the_original_to_the_letter():
    assert alpaca_prompt("Add.", "1 {instruction}") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 {instruction}"
        "\n\n### Response:\n"
    )
    assert alpaca_prompt("Add {input}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {input}.\n\n### Response:\n"
    )


def test_alpaca_prompt_and_answer_are_the_text_column_of_the_study(data_dir):
    rows = json.loads((data_dir / "alpaca_like/alpaca_tiny.json").read_text())
    assert len(rows) == 100 and sum(bool(row["input"]) for row in rows) == 46
    for row in rows:
        assert "".join(text for text, _ in segments(row, "alpaca")) == row["text"]


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_a_blank_input_counts_as_none(blank):
    row = {"instruction": "Add.", "output": "2"}
    assert (
        segments({**row, "input": blank}, "alpaca")
        == segments(row, "alpaca")
        == [(alpaca_prompt("Add."), False), ("2", True)]
    )


def test_formats_are_detected_by_keys():
    assert detect({"instruction": "a", "output": "b", "text": "c"}) == "alpaca"
    assert detect({"prompt": "a", "completion": "b", "id": 3}) == "prompt_completion"
    assert detect({"text": "a"}) == "text"


@pytest.mark.parametrize("row", [{"messages": []}, {"conversations": []}, {"question": "a", "answer": "b"}, {}])
def test_a_row_of_another_format_is_an_error_that_names_the_supported_ones(row):
    with pytest.raises(ValueError, match=r"Alpaca rows .* prompt/completion rows .* text rows") as caught:
        detect(row)
    assert all(key in str(caught.value) for key in row)


# Files


ROWS = [
    {"instruction": 'Say, "hi"\nnow', "input": "é日\u2028😀", "output": "hi\r\nthere"},
    {"instruction": "Add.", "input": "", "output": "2"},
]


def as_csv(rows):
    quote = lambda text: '"' + text.replace('"', '""') + '"'
    return "\r\n".join([",".join(rows[0]), *(",".join(map(quote, row.values())) for row in rows)]) + "\r\n"


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", json.dumps(ROWS, ensure_ascii=False, indent=1)),
        ("rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("rows.jsonl", "\n\n".join(json.dumps(row) for row in ROWS) + "\r\n\n"),
        ("rows.csv", as_csv(ROWS)),
    ],
)
def test_every_file_format_gives_the_same_rows(tmp_path, name, text, bom):
    (tmp_path / name).write_bytes((bom + text).encode())
    assert data.read_rows(tmp_path / name) == ROWS


def test_parquet_gives_the_same_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason=NO_PYARROW)
    parquet = pytest.importorskip("pyarrow.parquet", reason=NO_PYARROW)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert data.read_rows(tmp_path / "rows.parquet") == ROWS
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        data.read_rows(tmp_path / "rows.parquet")


def test_parquet_without_pyarrow_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="needs pyarrow, which is not installed"):
        data.read_rows(tmp_path / "rows.parquet")


def test_csv_takes_a_field_of_any_size_and_leaves_the_limit_as_it_was(tmp_path):
    import csv

    limit = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text("prompt,completion\na," + "x" * 500_000)
    assert len(data.read_rows(tmp_path / "rows.csv")[0]["completion"]) == 500_000 and csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "is empty"),
        ("a.json", " \n", "is empty"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl", "\n", "is empty"),
        ("a.csv", "text\n", "has no rows"),
        ("a.json", '{"text": "a"}', "holds a dict, expected a list of rows"),
        (
            "a.json",
            '{"text": "a"}\n{"text": "b"}',
            "line 2, column 1: Extra data; for one object per line, name the file .jsonl",
        ),
        ("a.json", '[{"text": "a"}, "b"]', 'row 1 is a str, expected an object: "b"'),
        ("a.json", '[{"text": "a"},]', "is not valid JSON: line 1"),
        ("a.json", "[" * 100_000, "is nested too deeply"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ', "line 3 is not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n["b"]', "row 1 is a list, expected an object"),
        ("a.csv", "text,text\na,b\n", "names a column twice"),
        ("a.csv", "prompt,completion\na,b\nc\n", r"line 3 \(row 1\) has 1 fields, expected the 2"),
        ("a.csv", 'text\n"a', "is not CSV"),
        ("a.json", b"\xff\xfe[\x00", "is not UTF-8 text"),
        ("a.txt", "x", "is a .txt file; rows are read from .json, .jsonl, .csv and .parquet"),
    ],
)
def test_a_file_without_rows_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        data.read_rows(tmp_path / name)
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_a_missing_file_and_a_folder_are_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="does not exist; expected alpaca, embedded, or a .json"):
        data.read_rows(tmp_path / "alpca")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        data.read_rows(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": 3}, "'output' is 3, expected text"),
        ({"instruction": "a", "output": None}, "'output' is None, expected text"),
        ({"instruction": "a", "input": float("nan"), "output": "b"}, "'input' is nan, expected text"),
        ({"instruction": "a"}, "'output' is missing; the row has 'instruction'"),
        ({"instruction": "a", "output": ""}, "no supervised token"),
        ({"instruction": "a", "output": " \n"}, "no supervised token"),
        ({"instruction": "a", "output": "\ud800"}, "surrogate"),
        ({"text": "a"}, "mixes formats: row 0 is alpaca, row 1 is text"),
        ({"messages": "a"}, "it has the key 'messages', so it is a conversation"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_an_error_that_shows_it(tmp_path, tokenizer, row, message):
    path = write(tmp_path / "a.json", [{"instruction": "a", "output": "b"}, row])
    with pytest.raises(ValueError, match=message) as caught:
        data.load(path, tokenizer, test_size=0)
    assert "row 1" in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_null_in_parquet_is_an_error_that_names_the_row(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow", reason=NO_PYARROW)
    parquet = pytest.importorskip("pyarrow.parquet", reason=NO_PYARROW)
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 1: 'text' is None, expected text"):
        data.load(tmp_path / "a.parquet", tokenizer, test_size=0)


# Split


@pytest.mark.parametrize(
    ("n", "test_size", "count"),
    [
        (52_002, 0.0005, 27),
        (999, 0.05, 50),
        (2, 0.05, 1),
        (10, 0, 0),
        (10, 0.0, 0),
        (10, 3, 3),
        (10, 3.0, 3),
        (10, 1, 1),
        (10, 0.9, 9),
    ],
)
def test_split_takes_the_first_rows_of_numpys_permutation(n, test_size, count):
    train, test = dataset.split(n, test_size, 42)
    assert test + train == np.random.default_rng(42).permutation(n).tolist() and len(test) == count
    assert dataset.split(n, test_size, 42) == (train, test)
    assert dataset.split(n, test_size, 43) != (train, test)


@pytest.mark.parametrize("test_size", [10, 11, 0.95, -1, -0.1, 1.5, float("nan"), True])
def test_split_refuses_sizes_that_leave_nothing_or_mean_nothing(test_size):
    with pytest.raises(ValueError, match="test_size"):
        dataset.split(10, test_size)


class OneToken:
    """A tokenizer that makes one token of any text, for many rows."""

    bos_id, eos_id, pad_id, folder, special_tokens = 1, 2, 0, "nowhere", {}

    def encode_pieces(self, pieces):
        return [[3] for _ in pieces]


@pytest.fixture
def alpaca(data_dir, tmp_path, monkeypatch):
    """Stand-in for the original file: 52,002 rows, the study's 27 where its split takes them from, 28 blank answers."""
    instructions = json.loads((data_dir / "seed_results/instructions27.json").read_text())
    rows = [{"instruction": f"Do {i}", "input": "", "output": "done"} for i in range(52_002)]
    places = np.random.default_rng(42).permutation(52_002)
    for place, instruction in zip(places[:27], instructions, strict=True):
        rows[place]["instruction"] = instruction
    for place in places[-28:]:
        rows[place]["output"] = ""
    monkeypatch.setattr(hub, "alpaca_file", lambda: tmp_path / "alpaca_data.json")
    return rows, tmp_path / "alpaca_data.json", instructions


def test_alpaca_splits_into_the_27_test_instructions_of_the_study(alpaca):
    rows, path, instructions = alpaca
    write(path, rows)
    train, test = data.load("alpaca", OneToken())
    assert [row["instruction"] for row in test.rows] == instructions
    assert (len(train), train.read, train.left_out, train.dropped) == (51_975 - 28, 51_975, 28, 0)
    assert "28 left out (no answer" in train.describe()
    assert not {e.row for e in train.examples} & {e.row for e in test.examples}
    own = write(path.with_name("own.json"), [pair("a", " ")])
    with pytest.raises(ValueError, match="own.json, row 0: it has no supervised token"):  # only Alpaca's are left out
        data.load("alpaca", OneToken(), test_data=own)


def test_a_file_that_is_not_the_original_alpaca_is_an_error(alpaca):
    rows, path, _ = alpaca
    dataset.check_alpaca(rows, path)
    with pytest.raises(ValueError, match="has 52,001 rows, but the original Alpaca has 52,002"):
        dataset.check_alpaca(rows[:-1], path)
    with pytest.raises(ValueError, match="not the original Alpaca: .* the study's 27 test rows"):
        dataset.check_alpaca(rows[::-1], path)
    write(path, rows[::-1])
    with pytest.raises(ValueError, match="not the original Alpaca"):
        data.load("alpaca", OneToken(), split_seed=7, test_size=100)


# Labels


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("trap", TRAPS)
def test_a_row_is_bos_prompt_answer_and_a_supervised_end_with_every_tokenizer(data_dir, name, trap):
    tokenizer, text = load_tokenizer(data_dir / name), TRAPS[trap]
    row = {"instruction": text, "input": text, "output": text}
    example = labels.encode_row(row, tokenizer, "alpaca", 5)
    start = 0 if tokenizer.bos_id is None else 1
    prompt, answer = example.ids[start : example.prompt_length], example.ids[example.prompt_length : -1]
    assert example.row == 5 and example.labels == [-100] * example.prompt_length + answer + [tokenizer.eos_id]
    assert example.ids[-1] == tokenizer.eos_id and example.ids[:start] == [1] * start
    assert not {tokenizer.bos_id, *tokenizer.eos_ids} & {*prompt, *answer}  # so BOS and the end come exactly once
    if name != "stories260K":  # its sentencepiece model takes doubled and outer spaces away
        assert tokenizer.decode(prompt) == alpaca_prompt(text, text)
        assert tokenizer.decode(answer, goes_on=True) == text


def test_loss_on_all_supervises_everything_but_bos(byte_tokenizers):
    for tokenizer in byte_tokenizers:
        example = labels.encode_row(pair("ab", "cd"), tokenizer, "prompt_completion", loss_on="all")
        bos = [] if tokenizer.bos_id is None else [-100]
        assert example.labels == bos + example.ids[len(bos) :] and len(example.ids) == len(bos) + 5


def test_text_rows_are_supervised_whole(byte_tokenizers):
    for tokenizer in byte_tokenizers:
        example = labels.encode_row({"text": "ab"}, tokenizer, "text")
        bos = [] if tokenizer.bos_id is None else [-100]
        assert example.labels == bos + example.ids[len(bos) :] and example.ids[-1] == EOS


def test_a_tokenizer_without_an_end_token_is_refused():
    class Endless(OneToken):
        eos_id = None

    with pytest.raises(ValueError, match="names no end token"):
        labels.encode_row({"text": "a"}, Endless(), "text")


# Over-length


def test_truncate_cuts_the_answer_and_supervises_no_false_end(tmp_path, tokenizer):
    path = write(tmp_path / "a.json", [pair("abc", "defghij"), pair("abc", "de")])
    train, _ = data.load(path, tokenizer, test_size=0, max_length=7)
    cut, whole = sorted(train.examples, key=lambda e: e.row)
    assert len(cut.ids) == 7 and EOS not in cut.ids and cut.labels == [-100] * 4 + cut.ids[4:]
    assert tokenizer.decode(cut.ids[1:]) == "abcdef"
    assert len(whole.ids) == 7 and whole.labels[-1] == EOS  # exactly max_length is not too long
    assert (train.truncated, train.dropped) == (1, 0) and "1 truncated to 7 tokens" in train.describe()


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_truncate_refuses_a_prompt_that_alone_fills_max_length_and_shows_the_row(tmp_path, tokenizer, loss_on):
    path = write(tmp_path / "a.json", [pair("a", "b"), pair("abcdef", "g")])
    with pytest.raises(
        ValueError,
        match=r"no supervised token.* set max_length to 9, or over_length to drop.* row 1: "
        r'\{"prompt": "abcdef", "completion": "g"\}',
    ):
        data.load(path, tokenizer, test_size=0, max_length=7, loss_on=loss_on)
    train, _ = data.load(path, tokenizer, test_size=0, max_length=8, loss_on=loss_on)
    assert train.truncated == 1 and labels.count_supervised(max(train.examples, key=lambda e: e.row).labels) >= 1


def test_drop_leaves_longer_rows_out_and_counts_them(tmp_path, tokenizer):
    path = write(tmp_path / "a.json", [pair("abc", "defghij"), pair("abc", "de"), pair("x" * 50, "y")])
    train, _ = data.load(path, tokenizer, test_size=0, max_length=7, over_length="drop")
    assert [e.row for e in train.examples] == [1] and train.rows == [pair("abc", "de")]
    assert (train.read, train.dropped, train.truncated) == (3, 2, 0) and "2 dropped" in train.describe()
    with pytest.raises(ValueError, match="none of the 3 train rows"):
        data.load(path, tokenizer, test_size=0, max_length=5, over_length="drop")


def test_stop_is_an_error_with_the_count_and_the_length_needed(tmp_path, tokenizer):
    path = write(tmp_path / "a.json", [pair("abc", "defghij"), pair("a", "b")])
    with pytest.raises(ValueError, match="1 train rows of .* longer than max_length=7 .* set max_length to 12.* row 0"):
        data.load(path, tokenizer, test_size=0, max_length=7, over_length="stop")
    train, _ = data.load(path, tokenizer, test_size=0, max_length=12, over_length="stop")
    assert len(train) == 2


# load()


def test_a_file_gives_a_twentieth_of_its_rows_to_the_test_unless_asked_otherwise(tmp_path, tokenizer):
    path = write(tmp_path / "a.json", [pair(f"p{i}", f"c{i}") for i in range(40)])
    train, test = data.load(path, tokenizer)
    assert (len(train), len(test)) == (38, 2) and train.read == 38
    assert sorted(e.row for e in train.examples + test.examples) == list(range(40))
    assert [row["prompt"] for row in test.rows] == [f"p{e.row}" for e in test.examples]
    assert len(data.load(path, tokenizer, test_size=0)[1]) == 0
    assert len(data.load(path, tokenizer, test_size=7)[1]) == 7


def test_test_data_gives_the_held_out_rows_and_the_whole_file_is_trained_on(tmp_path, tokenizer):
    path = write(tmp_path / "a.json", [pair("a", "b")] * 3)
    other = write(tmp_path / "b.json", [{"text": "c"}])
    train, test = data.load(path, tokenizer, test_data=other)
    assert (len(train), len(test), test.row_format, test.source) == (3, 1, "text", str(other))
    with pytest.raises(ValueError, match="both given"):
        data.load(path, tokenizer, test_data=other, test_size=0.1)


def test_embedded_rows_bring_their_own_held_out_part(tmp_path, tokenizer, monkeypatch):
    parts = {
        "train": write(tmp_path / "train.json", [pair("a", "b")] * 4),
        "test": write(tmp_path / "test.json", [pair("c", "d")]),
    }
    monkeypatch.setattr(hub, "embedded_rows", parts.__getitem__)
    train, test = data.load("embedded", tokenizer)
    assert (len(train), len(test), test.rows) == (4, 1, [pair("c", "d")])
    assert len(data.load("embedded", tokenizer, test_size=0)[1]) == 0
    with pytest.raises(ValueError, match="have a held-out part"):
        data.load("embedded", tokenizer, test_size=0.5)


@pytest.mark.parametrize("option", [{"over_length": "cut"}, {"loss_on": "prompt"}])
def test_an_unknown_option_is_refused(tokenizer, option):
    with pytest.raises(ValueError, match="expected one of"):
        data.load("nothing.json", tokenizer, **option)


def test_the_fingerprint_is_of_the_rows_used(tmp_path, tokenizer):
    def fingerprint(rows, **options):
        return data.load(write(tmp_path / "a.json", rows), tokenizer, test_size=0, split_seed=1, **options)[
            0
        ].fingerprint

    rows = [pair("a", "b"), pair("c", "dddddddd")]
    assert fingerprint(rows) == fingerprint([dict(reversed(row.items())) for row in rows])
    assert fingerprint(rows) != fingerprint([pair("a", "b"), pair("c", "dddddddx")])
    assert fingerprint(rows) != fingerprint(rows, max_length=5, over_length="drop")


# Batches


def examples_of(tokenizer, *pairs, loss_on="answer"):
    return [labels.encode_row(pair(*p), tokenizer, "prompt_completion", i, loss_on) for i, p in enumerate(pairs)]


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_targets_are_those_of_each_row_alone_and_padding_has_none(byte_tokenizers, loss_on):
    for tokenizer in byte_tokenizers:
        examples = examples_of(tokenizer, ("ab", "cd"), ("", "x"), ("abcdefgh", "ijk"), loss_on=loss_on)
        batch = data.collate(examples, pad_id=EOS)
        expected, start = [], 0
        for e in examples:
            expected += [(start + t, e.labels[t + 1]) for t in range(len(e.ids) - 1) if e.labels[t + 1] != -100]
            start += len(e.ids)
        positions, next_tokens = batch.targets()
        assert list(zip(positions.tolist(), next_tokens.tolist(), strict=True)) == expected
        assert batch.supervised == len(expected) and positions.dtype == next_tokens.dtype == torch.int64
        assert next_tokens.tolist().count(EOS) == 3  # the end of each row, and none of the padding, which is EOS too


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_a_batch_is_rows_end_to_end_with_padding_as_the_last_document(tokenizer, multiple):
    examples = examples_of(tokenizer, ("ab", "cd"), ("a", "b"))
    batch = data.collate(examples, pad_id=0, multiple=multiple)
    lengths, padding = [len(e.ids) for e in examples], -10 % multiple
    assert batch.input_ids.shape == batch.labels.shape == (1, 10 + padding) and batch.input_ids.dtype == torch.int64
    assert batch.documents == lengths + [padding] * (padding > 0) and batch.rows == [0, 1]
    assert batch.input_ids[0].tolist() == examples[0].ids + examples[1].ids + [0] * padding
    assert batch.labels[0].tolist() == examples[0].labels + examples[1].labels + [-100] * padding


LENGTHS = np.random.default_rng(0).integers(5, 400, 1001).tolist()


@pytest.mark.parametrize("group_by_length", [False, True])
def test_order_visits_every_row_once_and_keeps_the_smaller_batch(group_by_length):
    micro = data.order(LENGTHS, 4, 42, 0, group_by_length)
    assert sorted(i for batch in micro for i in batch) == list(range(1001))
    assert sorted(map(len, micro)) == [1] + [4] * 250


@pytest.mark.parametrize("group_by_length", [False, True])
def test_order_depends_on_seed_and_epoch_only(group_by_length):
    def made(seed, epoch):
        return data.order(LENGTHS, 4, seed, epoch, group_by_length)

    np.random.seed(1)
    first = made(42, 0)
    np.random.seed(2)
    assert made(42, 0) == first
    assert len({json.dumps(made(*at)) for at in ((42, 0), (42, 1), (43, 0), (1, 42), (0, 42))}) == 5


def test_group_by_length_pairs_rows_of_a_length_with_the_longest_first_and_the_rest_shuffled():
    micro = data.order(LENGTHS, 4, 42, 0, group_by_length=True)
    spread = lambda batches: np.mean([max(LENGTHS[i] for i in b) - min(LENGTHS[i] for i in b) for b in batches])
    assert spread(micro) < 0.1 * spread(data.order(LENGTHS, 4, 42, 0))
    for epoch in range(5):
        first = data.order(LENGTHS, 4, 42, epoch, group_by_length=True)[0]
        assert max(LENGTHS[i] for i in first) == max(LENGTHS)
    means = [np.mean([LENGTHS[i] for i in batch]) for batch in micro]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.2
    assert data.order([], 4, 42, 0, True) == data.order([], 4, 42, 0) == []


def test_batches_go_on_from_any_place(tokenizer):
    examples = examples_of(tokenizer, *[("a" * i, "b" * (i + 1)) for i in range(11)])
    whole = list(data.batches(examples, 2, 42, 3, True))
    rest = list(data.batches(examples, 2, 42, 3, True, start=4))
    assert len(whole) == 6 and [b.rows for b in rest] == [b.rows for b in whole[4:]]
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(rest, whole[4:], strict=True))
