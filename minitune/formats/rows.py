"""Formats of rows, detected by their keys, and the text of a row. Not here: tokens and files."""

from minitune.formats.templates import alpaca_prompt
from minitune.screen import short, some

FORMATS = {  # name -> keys that the format reads; a row has the first format whose first key is in the row
    "alpaca": ("instruction", "input", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
SUPPORTED = (
    "minitune reads Alpaca rows (instruction, output and perhaps input), prompt/completion rows (prompt, "
    "completion) and text rows (text)"
)
CONVERSATIONS = ("messages", "conversations")


def detect(row):
    """The name of a row's format. Raises ValueError that names the supported formats if none fits."""
    for name, keys in FORMATS.items():
        if keys[0] in row:
            return name
    if found := [key for key in CONVERSATIONS if key in row]:
        raise ValueError(
            f"it has the key {found[0]!r}, so it is a conversation, which is not supported yet; {SUPPORTED}"
        )
    raise ValueError(f"its keys are {some(map(repr, row)) or 'none'}; {SUPPORTED}")


def segments(row, row_format):
    """The text of a row in pieces: [(text, whether it is the answer), ...]. Joined, the texts are the text of the row.

    Raises ValueError with the key if a value is missing or not text."""
    if row_format == "text":
        return [(text_of(row, "text"), True)]
    if row_format == "prompt_completion":
        return [(text_of(row, "prompt"), False), (text_of(row, "completion"), True)]
    if row_format == "alpaca":
        return [
            (
                alpaca_prompt(
                    text_of(row, "instruction"), text_of(row, "input") if row.get("input") is not None else ""
                ),
                False,
            ),
            (text_of(row, "output"), True),
        ]
    raise ValueError(f"row_format is {row_format!r}, expected one of {', '.join(FORMATS)}")


def text_of(row, key):
    if key not in row:
        raise ValueError(f"{key!r} is missing; the row has {some(map(repr, row))}")
    if not isinstance(row[key], str):
        raise ValueError(f"{key!r} is {short(row[key])}, expected text")
    return row[key]
