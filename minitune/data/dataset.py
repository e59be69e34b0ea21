"""A file of rows to the examples of one part: read, split into train and test, tokenised and labelled."""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minitune import hub
from minitune.data.labels import Example, NoAnswer, count_supervised, encode_row
from minitune.formats.files import read_rows, show
from minitune.formats.rows import FORMATS, detect, segments
from minitune.formats.templates import MARKUP
from minitune.screen import some

STUDY_SEED, STUDY_TEST_SIZE = 42, 0.0005
FILE_TEST_SIZE = 0.05
# sha256 over the 27 test instructions of the study, each stripped, joined by "\n", in UTF-8.
STUDY_TEST_DIGEST = "7f494a3fc528122c73c23e2d0851f565d83a07a8cefc256ef7a2d2fcfc53ac63"


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
