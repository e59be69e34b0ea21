"""Rows to batches: read a file, split it, tokenise and label each row, and lay rows end to end in micro-batches.

Not here: templates (prompts.py), downloads (hub.py), the loss (train.py).
A micro-batch has no padded columns. Its rows lie in one sequence of N tokens, `documents` gives their lengths, and
padding is one more document at the end, known by its position. So a pad token that is the end token harms nothing."""

import csv
import hashlib
import io
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from minitune import hub
from minitune.prompts import FORMATS, detect, segments

IGNORED = -100  # the label of a token that is not supervised
STUDY_SEED, STUDY_TEST_SIZE = 42, 0.0005
FILE_TEST_SIZE = 0.05
# sha256 over the 27 test instructions of the study, each stripped, joined by "\n", in UTF-8.
STUDY_TEST_DIGEST = "7f494a3fc528122c73c23e2d0851f565d83a07a8cefc256ef7a2d2fcfc53ac63"
MEGA_BATCH = 50  # micro-batches that are sorted by length together, as in transformers


class NoAnswer(ValueError):
    """A row with nothing to learn from."""


@dataclass(frozen=True)
class Example:
    """One tokenised row. labels[t] is the label of token t (not shifted), IGNORED where it is not supervised."""

    ids: list[int]
    labels: list[int]
    row: int  # index in the file, from 0
    prompt_length: int  # tokens before the answer, BOS included


@dataclass(frozen=True)
class Dataset:
    """The examples of one part of a file, with what was done to it. `rows` are the raw rows, one an example."""

    source: str
    part: str  # train or test
    row_format: str
    max_length: int
    examples: list[Example] = field(repr=False)
    rows: list[dict] = field(repr=False)
    read: int  # rows of this part before anything was dropped
    truncated: int  # examples whose answer was cut, so without an end token
    dropped: int  # rows longer than max_length
    left_out: int  # rows of the downloaded Alpaca without anything to learn from
    unused: list[str]  # keys of the rows that the format does not read
    fingerprint: str  # sha256 of `rows`

    def __len__(self):
        return len(self.examples)

    def describe(self):
        """One line for the terminal."""
        tokens = sum(len(e.ids) for e in self.examples)
        supervised = sum(count_supervised(e.labels) for e in self.examples)
        parts = [
            f"{self.part}: {len(self.examples):,} of {self.read:,} {self.row_format} rows of {self.source}",
            f"{tokens:,} tokens, {supervised:,} supervised",
        ]
        parts += [
            f"{count:,} {what}"
            for count, what in (
                (self.truncated, f"truncated to {self.max_length} tokens"),
                (self.dropped, f"dropped as longer than {self.max_length} tokens"),
                (self.left_out, "left out without an answer that fits"),
            )
            if count
        ]
        parts += [f"not used: {', '.join(self.unused)}"] if self.unused else []
        return "; ".join([*parts, f"sha256 {self.fingerprint[:12]}"])


@dataclass(frozen=True)
class Batch:
    """A micro-batch: rows laid end to end. The padding, where there is any, is the last document and not in `rows`."""

    input_ids: torch.Tensor  # (1, N) int64
    labels: torch.Tensor  # (1, N) int64, the label of the token at the same place, IGNORED where not supervised
    documents: list[int]  # lengths, N in sum
    rows: list[int]  # index in the file of each document but the padding
    supervised: int  # tokens that are predicted and have a label

    def targets(self):
        """(positions, next_tokens), both (supervised,) int64: where a supervised token follows, and that token.

        The shift stays inside documents: the first token of one is never predicted from the last of another."""
        is_first = torch.zeros(self.labels.shape[1], dtype=torch.bool)
        is_first[np.cumsum([0, *self.documents[:-1]]).tolist()] = True
        predicted = ((self.labels[0] != IGNORED) & ~is_first).nonzero()[:, 0]
        return predicted - 1, self.labels[0, predicted]


def load(
    data,
    tokenizer,
    *,
    test_data=None,
    test_size=None,
    split_seed=STUDY_SEED,
    max_length=512,
    over_length="truncate",
    loss_on="answer",
    parts=("train", "test"),
):
    """(train, test), two Datasets, or only those that `parts` names. test has no examples where test_size is 0.

    data: "alpaca" (the original file, downloaded and checked), "embedded" (which has its own held-out rows), or the
    path of a JSON, JSONL, CSV or Parquet file.
    test_data: a file with the held-out rows; without it they are split off `data`.
    test_size: see split(); None is 0.0005 for alpaca and 0.05 for a file.
    over_length: what happens to a row of more than max_length tokens: "truncate" cuts the end of its answer (with the
    end token), "drop", or "stop" (an error). loss_on: "answer" or "all".
    Raises ValueError, with the file and the row, on whatever cannot be trained on."""
    for name, value, choices in (
        ("over_length", over_length, ("truncate", "drop", "stop")),
        ("loss_on", loss_on, ("answer", "all")),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    if test_data is not None and test_size:
        raise ValueError(f"test_data and test_size={test_size} are both given; use one of them")
    options = {"max_length": max_length, "over_length": over_length, "loss_on": loss_on}
    is_alpaca = data == "alpaca"
    path = hub.alpaca_file() if is_alpaca else hub.embedded_rows("train") if data == "embedded" else Path(data)
    rows, source = read_rows(path), data if data in ("alpaca", "embedded") else str(path)
    row_format = one_format(rows, path)
    if is_alpaca:
        check_alpaca(rows, path)
    train, test, test_rows, test_source = range(len(rows)), [], rows, source
    if data == "embedded" and test_data is None:
        if test_size:
            raise ValueError(f"test_size is {test_size}, but the embedded rows have a held-out part; leave it out")
        test_data = hub.embedded_rows("test") if test_size is None else None
    if test_data is not None:
        test_rows, test_source = read_rows(test_data), source if data == "embedded" else str(test_data)
        test = range(len(test_rows))
    elif data != "embedded":
        default = STUDY_TEST_SIZE if is_alpaca else FILE_TEST_SIZE
        train, test = split(len(rows), default if test_size is None else test_size, split_seed)
    test_format = row_format if test_rows is rows else one_format(test_rows, test_data)
    found = {
        "train": (rows, train, tokenizer, row_format, source, "train", is_alpaca),
        "test": (test_rows, test, tokenizer, test_format, test_source, "test", is_alpaca and test_rows is rows),
    }
    return tuple(tokenise(*found[part], **options) for part in parts)


def load_for(config, tokenizer, parts=("train", "test")):
    """load() with the options of a job, a dataclass with TrainConfig's fields about rows. Without `data`: the embedded
    rows for an embedded model, Alpaca for every other."""
    source = config.data or ("embedded" if config.model in hub.EMBEDDED else "alpaca")
    names = ("test_data", "test_size", "split_seed", "max_length", "over_length", "loss_on")
    return load(source, tokenizer, parts=parts, **{name: getattr(config, name) for name in names})


def read_rows(path, of_texts=False):
    """The rows of a .json (list of objects), .jsonl, .csv (with a header) or .parquet file, as a list of dicts; of_texts: a
    row may be a text too.

    Text is UTF-8, with or without a BOM. Raises ValueError with the file and the place on anything else."""
    path = Path(path)
    readers = {".json": read_json_rows, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected alpaca, embedded, or a .json, .jsonl, .csv or .parquet file")
    if path.suffix.lower() not in readers or not path.is_file():
        kind = "a folder" if path.is_dir() else f"a {path.suffix or 'nameless'} file"
        raise ValueError(f"{path} is {kind}; rows are read from .json, .jsonl, .csv and .parquet files")
    rows = readers[path.suffix.lower()](path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) and not (of_texts and isinstance(row, str)):
            expected = "a text or an object" if of_texts else "an object"
            raise ValueError(f"{path}, row {number} is a {type(row).__name__}, expected {expected}: {show(row)}")
    return rows


def read_text(path):
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def read_json_rows(path):
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        hint = "; one object a line belongs into a .jsonl file" if error.msg == "Extra data" else ""
        raise ValueError(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}{hint}") from None
    except RecursionError:
        raise ValueError(f"{path} is not a list of rows: it is nested too deeply") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}, expected a list of rows")
    return rows


def read_jsonl(path):
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines() would cut at U+2028 inside a string
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not a JSON object: {error}") from None
    return rows


def read_csv(path):
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
        header, rows = next(reader), []
        if len(set(header)) < len(header):
            raise ValueError(f"{path} names a column twice in its first line: {', '.join(header)}")
        for values in reader:
            if values and len(values) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num} (row {len(rows)}) has {len(values)} fields, "
                    f"expected the {len(header)} of the first line: {', '.join(header)}"
                )
            if values:
                rows.append(dict(zip(header, values, strict=True)))
        return rows
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def read_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow, which is not installed: pip install pyarrow, or use JSONL") from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None


def one_format(rows, path):
    """The format that all rows have. Raises ValueError with the first row that has another or none."""
    expected = None
    for number, row in enumerate(rows):
        try:
            found = detect(row)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from None
        expected = expected or found
        if found != expected:
            raise ValueError(f"{path} mixes formats: row 0 is {expected}, row {number} is {found}: {show(row)}")
    return expected


def check_alpaca(rows, path):
    """Raises ValueError unless these are the original 52,002 rows, in their order: the study's split of them gives the
    study's 27 test instructions."""
    again = f"delete {path} to download it again, or give it as --data {path} to use it as it is"
    if len(rows) != hub.ALPACA_ROWS:
        raise ValueError(f"{path} has {len(rows):,} rows, but the original Alpaca has {hub.ALPACA_ROWS:,}; {again}")
    _, test = split(len(rows), STUDY_TEST_SIZE, STUDY_SEED)
    text = "\n".join(str(rows[i].get("instruction")).strip() for i in test)
    if hashlib.sha256(text.encode()).hexdigest() != STUDY_TEST_DIGEST:
        raise ValueError(f"{path} is not the original Alpaca: its split lacks the study's 27 test rows; {again}")


def split(n, test_size, seed=STUDY_SEED):
    """(train_indices, test_indices): numpy's permutation of n rows, whose first part is the test set.

    test_size: below 1 a share of the rows, rounded up; else a number of rows; 0 for none.
    Raises ValueError where no row would be left to train on."""
    if isinstance(test_size, bool) or not test_size >= 0 or (test_size >= 1 and test_size != int(test_size)):
        raise ValueError(f"test_size is {test_size}, expected a share from 0 to 1 or a whole number of rows")
    count = math.ceil(test_size * n) if test_size < 1 else int(test_size)
    if count >= n:
        raise ValueError(f"test_size {test_size} takes {count} of {n} rows and leaves none to train on; use less, or 0")
    order = np.random.default_rng(seed).permutation(n).tolist()
    return order[count:], order[:count]


def encode_row(row, tokenizer, row_format, number=0, loss_on="answer"):
    """A whole row as an Example, of any length: BOS, prompt, answer, end token.

    Each segment is tokenised by itself, and special-token text in it is plain text. Supervised are the answer and the
    end token; with loss_on "all" everything but BOS.
    Raises NoAnswer where the answer is blank, ValueError where a value is no text or the tokenizer has no end."""
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer names no end token; set eos_token in tokenizer_config.json")
    ids, labels, prompt_length = [], [], 0
    for i, (text, is_answer) in enumerate(segments(row, row_format)):
        if is_answer and not text.strip():
            raise NoAnswer("it has no supervised token, since its answer is blank")
        if i == 0 and tokenizer.bos_id is not None:
            ids, labels = [tokenizer.bos_id], [IGNORED]
        prompt_length = len(ids) if is_answer else prompt_length
        new = tokenizer.encode(text, add_bos=False, allow_special=False)
        ids += new
        labels += new if is_answer or loss_on == "all" else [IGNORED] * len(new)
    return Example([*ids, tokenizer.eos_id], [*labels, tokenizer.eos_id], number, prompt_length)


def tokenise(
    rows,
    numbers,
    tokenizer,
    row_format,
    source,
    part,
    leave_out=False,
    *,
    max_length,
    over_length="truncate",
    loss_on="answer",
):
    """Dataset of the rows at `numbers`.

    leave_out: rows with a blank answer, or whose prompt alone fills max_length, are counted and left out, since the
    original Alpaca has 28 blank answers (stanford_alpaca#265). Else they are an error that shows the row."""
    examples, truncated, dropped, hopeless, too_long = [], 0, 0, [], []
    for number in numbers:
        try:
            example = encode_row(rows[number], tokenizer, row_format, number, loss_on)
        except ValueError as error:
            if not (leave_out and isinstance(error, NoAnswer)):
                raise ValueError(f"{source}, row {number}: {error}: {show(rows[number])}") from None
            hopeless.append(number)
            continue
        if len(example.ids) > max_length:
            too_long.append((number, len(example.ids)))
            if over_length == "drop":
                dropped += 1
                continue
            if max_length <= max(example.prompt_length, 1):
                hopeless.append(number)
                continue
            example = Example(example.ids[:max_length], example.labels[:max_length], number, example.prompt_length)
            truncated += 1
        examples.append(example)
    longest = max((length for _, length in too_long), default=0)
    if too_long and over_length == "stop":
        first = too_long[0][0]
        raise ValueError(
            f"{len(too_long)} {part} rows of {source} are longer than max_length={max_length} tokens; set "
            f"max_length to {longest}, or over_length to truncate or drop; the first is row {first}: "
            f"{show(rows[first])}"
        )
    if hopeless and not leave_out:
        raise ValueError(
            f"{len(hopeless)} {part} rows of {source} have no supervised token: the prompt alone fills "
            f"max_length={max_length}; set max_length to {longest}, or over_length to drop; the first is "
            f"row {hopeless[0]}: {show(rows[hopeless[0]])}"
        )
    if len(numbers) and not examples:
        raise ValueError(f"none of the {len(numbers)} {part} rows of {source} fits into max_length={max_length} tokens")
    used = [rows[e.row] for e in examples]
    digest = hashlib.sha256()
    for row in used:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return Dataset(
        source,
        part,
        row_format,
        max_length,
        examples,
        used,
        len(numbers),
        truncated,
        dropped,
        len(hopeless),
        [key for key in dict.fromkeys(key for row in used for key in row) if key not in FORMATS[row_format]],
        digest.hexdigest(),
    )


def show(row, length=300):
    """A row on one line for an error message, shortened to `length` characters."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= length else text[:length] + f"... ({len(text):,} characters)"


def count_supervised(labels):
    """Tokens of one row that are predicted and have a label: the first token of a row is never predicted."""
    return sum(label != IGNORED for label in labels[1:])


def collate(examples, pad_id, multiple=8):
    """Examples end to end as one Batch, with padding up to a multiple of `multiple` tokens (8 for tensor cores)."""
    ids = [i for e in examples for i in e.ids]
    labels = [label for e in examples for label in e.labels]
    documents = [len(e.ids) for e in examples]
    if padding := -len(ids) % multiple:
        ids, labels, documents = ids + [pad_id] * padding, labels + [IGNORED] * padding, [*documents, padding]
    return Batch(
        torch.tensor([ids]),
        torch.tensor([labels]),
        documents,
        [e.row for e in examples],
        sum(count_supervised(e.labels) for e in examples),
    )


def order(lengths, batch_size, seed, epoch, group_by_length=False):
    """The micro-batches of an epoch, as lists of indices into `lengths`. A function of its arguments only.

    group_by_length: rows are sorted by length within shuffled groups of 50 micro-batches, and the micro-batch with the
    longest row comes first, so that memory runs out at once or never. A smaller batch that remains is kept."""
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths)).tolist()
    if not group_by_length:
        return [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    mega = MEGA_BATCH * batch_size
    groups = [sorted(shuffled[i : i + mega], key=lambda j: -lengths[j]) for i in range(0, len(shuffled), mega)]
    micro = [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
    micro = [micro[i] for i in random.permutation(len(micro))]
    first = max(range(len(micro)), key=lambda i: max(lengths[j] for j in micro[i]), default=0)
    return micro[first : first + 1] + micro[:first] + micro[first + 1 :]


def batches(examples, batch_size, seed, epoch, group_by_length=False, pad_id=0, start=0):
    """The Batches of an epoch from number `start` on, in the order of order()."""
    for indices in order([len(e.ids) for e in examples], batch_size, seed, epoch, group_by_length)[start:]:
        yield collate([examples[i] for i in indices], pad_id)
