"""From a file of rows to the Datasets of its two parts, train and test: read, split, tokenise and label."""

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
    """The examples of one part of a file, and counts of what was done to it. rows[i] is the raw row of examples[i]."""

    source: str
    part: str  # "train" or "test"
    row_format: str
    max_length: int  # tokens
    examples: list[Example] = field(repr=False)
    rows: list[dict] = field(repr=False)
    read: int  # rows of this part before any was dropped
    truncated: int  # examples whose answer was truncated; they have no end token
    dropped: int  # rows dropped because they were longer than max_length
    left_out: int  # rows of the downloaded Alpaca without a supervised token
    unused: list[str]  # keys of the rows that the format does not read
    fingerprint: str  # sha256 of `rows`
    templated: int = 0  # rows that contain the text of special tokens
    markup: tuple[str, ...] = ()  # these texts
    special_text: str = "text"  # how they were read: "text" or "tokens"

    def __len__(self):
        return len(self.examples)

    def describe(self):
        """One line for the terminal: numbers of rows and tokens, and what was left out."""
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
                (self.left_out, "left out (no answer, or the prompt fills max_length)"),
            )
            if count
        ]
        if self.templated:
            parts.append(self.describe_markup())
        parts += [f"not used: {some(self.unused)}"] if self.unused else []
        return "; ".join([*parts, f"sha256 {self.fingerprint[:12]}"])

    def describe_markup(self):
        """The part of describe() about special tokens in the rows."""
        if self.special_text == "tokens":
            return f"{self.templated:,} contain special tokens ({some(self.markup)}), read as tokens"
        return (
            f"{self.templated:,} contain the text of special tokens ({some(self.markup)}), read as plain text: if a chat "
            "template wrote these rows, use --special-text tokens; else remove that text from instruction and output"
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
    """(train, test), two Datasets, or only those that `parts` names. test is empty if test_size is 0.

    data: "alpaca" (the original file, downloaded and checked), "embedded" (which has its own held-out rows), or the
    path of a JSON, JSONL, CSV or Parquet file.
    test_data: a file with the held-out rows; None: they are split from `data`.
    test_size: see split(); None: 0.0005 for alpaca and 0.05 for a file.
    over_length: what to do with a row of more than max_length tokens: "truncate" the end of its answer (with the end token),
    "drop" the row, or "stop" with an error. loss_on: supervised tokens, those of the "answer" or "all". special_text: how to
    read the text of a special token in a row, as ordinary "text" or as "tokens", for rows that a chat template wrote.
    Raises ValueError, with the file and the row, on rows that cannot be used."""
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
    """load() with the options of a job. config: a dataclass with TrainConfig's fields about rows. If its `data` is None, an
    embedded model uses the embedded rows and every other model Alpaca."""
    source = config.data or ("embedded" if config.model in hub.EMBEDDED else "alpaca")
    names = ("test_data", "test_size", "split_seed", "max_length", "over_length", "loss_on", "special_text")
    return load(source, tokenizer, parts=parts, **{name: getattr(config, name) for name in names})


def one_format(rows, path):
    """The name of the format that all rows have. Raises ValueError with the first row that has another format or none."""
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
    """Raises ValueError unless these are the original 52,002 rows in their order, for which the study's split gives its 27 test
    instructions."""
    again = f"delete {path} to download it again, or use the file unchanged with --data {path}"
    if len(rows) != hub.ALPACA_ROWS:
        raise ValueError(f"{path} has {len(rows):,} rows, but the original Alpaca has {hub.ALPACA_ROWS:,}; {again}")
    _, test = split(len(rows), STUDY_TEST_SIZE, STUDY_SEED)
    text = "\n".join(str(rows[i].get("instruction")).strip() for i in test)
    if hashlib.sha256(text.encode()).hexdigest() != STUDY_TEST_DIGEST:
        raise ValueError(f"{path} is not the original Alpaca: its split lacks the study's 27 test rows; {again}")


def split(n, test_size, seed=STUDY_SEED):
    """(train_indices, test_indices) of n rows. A numpy permutation with this seed; its first part is the test set.

    test_size: a share of the rows, rounded up, if below 1; else a number of rows; 0 for none.
    Raises ValueError if no row would be left for training."""
    if isinstance(test_size, bool) or not test_size >= 0 or (test_size >= 1 and test_size != int(test_size)):
        raise ValueError(f"test_size is {test_size}, expected a share from 0 to 1 or a whole number of rows")
    count = math.ceil(test_size * n) if test_size < 1 else int(test_size)
    if count >= n:
        raise ValueError(
            f"test_size {test_size} takes {count} of {n} rows and leaves none to train on; use a smaller one, or 0"
        )
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
    """The Dataset of the rows with the indices `numbers`.

    leave_out: count and leave out rows with a blank answer, or whose prompt alone fills max_length. It is used for the
    original Alpaca, which has 28 blank answers (stanford_alpaca#265). Otherwise such a row is a ValueError that shows it. Other
    arguments as in load()."""
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
    """(number of rows that contain the text of a special token, tuple of these texts).

    Searches for the tokenizer's special tokens and, with special_text "text", for those of known chat formats too."""
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
