"""Reads files of rows (.json, .jsonl, .csv and .parquet) as lists of dicts."""

import csv
import io
import json
import sys

from minitune.files import expand, parse_json, paths_explained, read_bytes, read_text
from minitune.screen import printable, short, some


def read_rows(path, of_texts=False, of_lists=False):
    """The rows of a .json (list of objects), .jsonl, .csv (with a header) or .parquet file, as a list of dicts.

    of_texts: a row may also be a text. of_lists: a row may also be a list. Text is UTF-8, with or without a BOM. Raises
    ValueError with the file and the place if the file cannot be read as such rows."""
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
    """The text of a file. Raises ValueError if the file is blank, or as files.read_text()."""
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def read_json_rows(path):
    """The rows of a .json file. Raises ValueError if it is not a list."""
    try:
        rows = parse_json(read_filled(path), path)
    except ValueError as error:
        hint = "; for one object per line, name the file .jsonl" if str(error).endswith("Extra data") else ""
        raise ValueError(f"{error}{hint}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}, expected a list of rows")
    return rows


def read_jsonl(path):
    """The rows of a .jsonl file, one JSON value in each line. Raises ValueError with the line."""
    rows = []
    for number, line in enumerate(read_filled(path).split("\n"), 1):  # splitlines() would cut at U+2028 inside a string
        if line.strip():
            try:
                rows.append(parse_json(line, f"{path}, line {number}"))
            except ValueError as error:  # the text is one line, so remove the "line 1" of the JSON parser
                raise ValueError(str(error).replace(" JSON: line 1, column", " JSON: column", 1)) from None
    return rows


def read_csv(path):
    """The rows of a .csv file as dicts of texts, with the header as keys. Raises ValueError with the line."""
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
    """The rows of a .parquet file. Raises ValueError if it is damaged or pyarrow is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow, which is not installed: pip install pyarrow, or use JSONL") from None
    content = pyarrow.BufferReader(read_bytes(path))
    try:
        return pyarrow.parquet.read_table(content).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a Parquet file: {short(str(error).splitlines()[0])}") from None


def show(row, length=200):
    """A row on one line for an error message, shortened to `length` characters."""
    text = printable(json.dumps(row, ensure_ascii=False, default=str))
    return text if len(text) <= length else text[:length] + f"... ({len(text):,} characters)"
