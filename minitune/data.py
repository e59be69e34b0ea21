"""Rows to batches: read a file, split it, tokenise and label each row, and lay rows end to end in micro-batches.

Not here: templates (prompts.py), downloads (hub.py), the loss (train.py).
A micro-batch has no padded columns. Its rows lie in one sequence of N tokens, `documents` gives their lengths, and
padding is one more document at the end, known by its position. So a pad token that is the end token harms nothing."""

import csv
import hashlib
import io
import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from minitune import hub
from minitune.files import expand, parse_json, paths_explained, read_bytes, read_text
from minitune.prompts import BOS, EOS, FORMATS, MARKUP, detect, segments
from minitune.screen import printable, short, some

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
    templated: int = 0  # rows that hold the text of special tokens
    markup: tuple[str, ...] = ()  # these texts
    special_text: str = "text"  # what they were read as

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
        if self.templated:
            parts.append(self.describe_markup())
        parts += [f"not used: {some(self.unused)}"] if self.unused else []
        return "; ".join([*parts, f"sha256 {self.fingerprint[:12]}"])

    def describe_markup(self):
        if self.special_text == "tokens":
            return f"{self.templated:,} hold special tokens ({some(self.markup)}), read as tokens"
        return (
            f"{self.templated:,} hold the text of special tokens ({some(self.markup)}), read as plain text: if a chat template "
            "made these rows, use --special-text tokens, else give the bare texts as instruction and output"
        )


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
    special_text="text",
    parts=("train", "test"),
):
    """(train, test), two Datasets, or only those that `parts` names. test has no examples where test_size is 0.

    data: "alpaca" (the original file, downloaded and checked), "embedded" (which has its own held-out rows), or the
    path of a JSON, JSONL, CSV or Parquet file.
    test_data: a file with the held-out rows; without it they are split off `data`.
    test_size: see split(); None is 0.0005 for alpaca and 0.05 for a file.
    over_length: what happens to a row of more than max_length tokens: "truncate" cuts the end of its answer (with the
    end token), "drop", or "stop" (an error). loss_on: "answer" or "all". special_text: what the text of a special token
    in a row is: "text" like any, or "tokens", for rows that a chat template made.
    Raises ValueError, with the file and the row, on whatever cannot be trained on."""
    for name, value, choices in (
        ("over_length", over_length, ("truncate", "drop", "stop")),
        ("loss_on", loss_on, ("answer", "all")),
        ("special_text", special_text, ("text", "tokens")),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    if test_data is not None and test_size:
        raise ValueError(f"test_data and test_size={test_size} are both given; use one of them")
    options = {"max_length": max_length, "over_length": over_length, "loss_on": loss_on, "special_text": special_text}
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
    names = ("test_data", "test_size", "split_seed", "max_length", "over_length", "loss_on", "special_text")
    return load(source, tokenizer, parts=parts, **{name: getattr(config, name) for name in names})


def read_rows(path, of_texts=False, of_lists=False):
    """The rows of a .json (list of objects), .jsonl, .csv (with a header) or .parquet file, as a list of dicts; of_texts: a
    row may be a text too; of_lists: or a list.

    Text is UTF-8, with or without a BOM. Raises ValueError with the file and the place on anything else."""
    path = expand(path)
    with paths_explained(path):
        exists, is_folder = path.exists(), path.is_dir()
    readers = {".json": read_json_rows, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
    if not exists:
        raise ValueError(f"{path} does not exist; expected alpaca, embedded, or a .json, .jsonl, .csv or .parquet file")
    if path.suffix.lower() not in readers or is_folder:
        kind = "a folder" if is_folder else f"a {path.suffix or 'nameless'} file"
        raise ValueError(f"{path} is {kind}; rows are read from .json, .jsonl, .csv and .parquet files")
    rows = readers[path.suffix.lower()](path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) and not (of_texts and isinstance(row, str) or of_lists and isinstance(row, list)):
            expected = "a text or an object" if of_texts else "an object"
            raise ValueError(f"{path}, row {number} is a {type(row).__name__}, expected {expected}: {show(row)}")
    return rows


def read_filled(path):
    """The text of a file. Raises ValueError where there is none."""
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def read_json_rows(path):
    try:
        rows = parse_json(read_filled(path), path)
    except ValueError as error:
        hint = "; one object a line belongs into a .jsonl file" if str(error).endswith("Extra data") else ""
        raise ValueError(f"{error}{hint}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}, expected a list of rows")
    return rows


def read_jsonl(path):
    rows = []
    for number, line in enumerate(read_filled(path).split("\n"), 1):  # splitlines() would cut at U+2028 inside a string
        if line.strip():
            try:
                rows.append(parse_json(line, f"{path}, line {number}"))
            except ValueError as error:  # in a line of its own, so only the column says more
                raise ValueError(str(error).replace(" JSON: line 1, column", " JSON: column", 1)) from None
    return rows


def read_csv(path):
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        reader = csv.reader(io.StringIO(read_filled(path), newline=""), strict=True)
        header, rows = next(reader), []
        if len(set(header)) < len(header):
            raise ValueError(f"{path} names a column twice in its first line: {some(header)}")
        for values in reader:
            if values and len(values) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num} (row {len(rows)}) has {len(values)} fields, "
                    f"expected the {len(header)} of the first line: {some(header)}"
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
    content = pyarrow.BufferReader(read_bytes(path))
    try:
        return pyarrow.parquet.read_table(content).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a Parquet file: {short(str(error).splitlines()[0])}") from None


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


def encode_row(row, tokenizer, row_format, number=0, loss_on="answer", special_text="text"):
    """A whole row as an Example, of any length: BOS, prompt, answer, end token.

    The ids are those of the row as one text, see Tokenizer.encode_pieces(). Supervised are the answer and the end token;
    with loss_on "all" everything but BOS. special_text "tokens": the text of a special token is its id, and a row that
    brings its own BOS or end token gets no second one; "text": it is plain text.
    Raises NoAnswer where the answer is blank, ValueError where a value is no text or the tokenizer has no end."""
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer names no end token; set eos_token in tokenizer_config.json")
    parts = segments(row, row_format)
    if any(is_answer and not text.strip() for text, is_answer in parts):
        raise NoAnswer("it has no supervised token, since its answer is blank")
    pieces = [(BOS, False), *parts, (EOS, True)]  # with whether each is of the answer
    if special_text == "tokens":
        pieces = [(new, is_answer) for piece, is_answer in pieces for new in split_special(piece, tokenizer)]
        pieces = once(pieces, tokenizer)
    ids, labels, prompt_length = [], [], 0
    for i, new in enumerate(tokenizer.encode_pieces([piece for piece, _ in pieces])):
        is_answer = pieces[i][1]
        ids += new
        labels += new if is_answer or (loss_on == "all" and i > 0) else [IGNORED] * len(new)
        prompt_length += 0 if is_answer else len(new)
    return Example(ids, labels, number, prompt_length)


def split_special(piece, tokenizer):
    return tokenizer.split_special(piece) if isinstance(piece, str) else [piece]


def once(pieces, tokenizer):
    """`pieces` of a row, [(piece, is_answer)], without a second BOS at the start and a second end token at the end."""
    is_blank = lambda piece: isinstance(piece, str) and not piece.strip()
    at = next((i for i, (piece, _) in enumerate(pieces) if piece is not BOS and not is_blank(piece)), 0)
    if pieces[0][0] is BOS and pieces[at][0] == tokenizer.bos_id is not None:
        pieces = [pieces[0], *pieces[at + 1 :]]
    if pieces[-1][0] is EOS:
        at = max((i for i, (piece, _) in enumerate(pieces[:-1]) if not is_blank(piece)), default=0)
        if pieces[at][0] in tokenizer.eos_ids and pieces[at][1]:
            pieces = pieces[: at + 1]
    return pieces


def read_special(pieces, tokenizer):
    """The pieces of a conversation with ids where their texts hold the text of a special token; BOS once."""
    split = [(new, False) for piece in pieces for new in split_special(piece, tokenizer)]
    return [piece for piece, _ in once(split, tokenizer)]


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
    special_text="text",
):
    """Dataset of the rows at `numbers`.

    leave_out: rows with a blank answer, or whose prompt alone fills max_length, are counted and left out, since the
    original Alpaca has 28 blank answers (stanford_alpaca#265). Else they are an error that shows the row."""
    examples, truncated, dropped, hopeless, too_long = [], 0, 0, [], []
    for number in numbers:
        try:
            example = encode_row(rows[number], tokenizer, row_format, number, loss_on, special_text)
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
    templated, markup = find_markup(used, row_format, tokenizer, special_text)
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
        templated,
        markup,
        special_text,
    )


def find_markup(rows, row_format, tokenizer, special_text):
    """(number, texts): how many rows hold the text of special tokens, and these. With special_text "tokens" only those that
    the tokenizer has; else those that chat formats have, too."""
    own = [text for text in tokenizer.special_tokens if text.strip()]
    texts = own if special_text == "tokens" else {*own, *MARKUP}
    if not texts:
        return 0, ()
    pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
    count, seen = 0, {}
    for row in rows:
        if found := [text for part, _ in segments(row, row_format) for text in pattern.findall(part)]:
            count += 1
            seen |= dict.fromkeys(found)
    return count, tuple(seen)


def show(row, length=200):
    """A row on one line for an error message, shortened to `length` characters."""
    text = printable(json.dumps(row, ensure_ascii=False, default=str))
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
