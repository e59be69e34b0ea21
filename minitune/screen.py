"""Output for people. Every line to a terminal goes through this module, and so does every value of a file in a message.

Rows, adapters, servers and models contain text from elsewhere. An escape sequence in it could move the cursor or hide a line,
and a value of 100,000 characters would make a message unreadable. Printing never ends a job: a character that the terminal's
encoding lacks is shown as an escape, and a closed stream shows nothing."""

import os
import re
import reprlib
import shutil
import sys
import unicodedata

from tqdm import tqdm

# C0 and C1 controls without newline and tab, line and paragraph separators, marks of writing direction, lone surrogates.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text):
    """`text` with escapes (\\x1b, \\u202e) in place of characters that control a terminal or cannot be encoded."""
    return UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def say(line=""):
    """Print one line of results or progress on stdout, above an open progress bar."""
    write(sys.stdout, f"{line}\n")


def tell(line=""):
    """Print one line on stderr, above an open progress bar: messages of jobs that print their result on stdout."""
    write(sys.stderr, f"{line}\n")


def warn(text):
    """Print a warning on stderr: about something that works but is probably not intended."""
    tell(f"warning: {text}")


def write(stream, text):
    """Write printable(text), above an open progress bar. Does nothing if `stream` is None or closed."""
    try:
        show(stream, text)
    except (BrokenPipeError, ValueError):  # a closed pipe; a closed file
        pass
    except OSError as error:
        if error.errno != 5:  # EIO: the terminal is gone
            raise


def show(stream, text):
    """As write(), but raises BrokenPipeError if the reader has closed the pipe, so that a job which prints its result can end."""
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        with tqdm.external_write_mode(file=stream):
            stream.write(text)
            stream.flush()
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:  # at exit Python flushes the buffer again, which must not fail
            os.dup2(nowhere.fileno(), stream.fileno())
        raise


def speaks_unicode():
    return (sys.stdout.encoding or "utf-8").lower().startswith("utf")


class Writer:
    """Called with each token of an answer: writes the text that has become certain. A token may hold half a character, and text
    that may begin one of the `stop` texts waits."""

    def __init__(self, tokenizer, stream=None, stop=()):
        self.tokenizer, self.stream, self.stop = tokenizer, stream or sys.stdout, stop
        self.ids, self.shown = [], ""

    def __call__(self, token):
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):
            self.write(text[: certain(text, self.stop)])

    def write(self, text):
        show(self.stream, text[len(self.shown) :])
        self.shown = max(self.shown, text, key=len)

    def end(self, text=None):
        """Write the rest: of `text`, the whole answer, or of all tokens."""
        self.write(self.tokenizer.decode(self.ids) if text is None else text)
        show(self.stream, "\n")


def certain(text, stop):
    """How much of `text` is before any stop text, whole or begun at its end."""
    ends = [len(text)]
    for wanted in stop:
        found = text.find(wanted)
        begun = [len(text) - n for n in range(1, len(wanted)) if text.endswith(wanted[:n])]
        ends += [found] if found >= 0 else begun
    return min(ends)


def progress(total, unit, **options):
    """A tqdm progress bar on stderr, which shows nothing if stderr is not a terminal. options: arguments of tqdm."""
    return tqdm(total=total, unit=unit, file=sys.stderr, **{"disable": None, "dynamic_ncols": True, **options})


def prepare():
    """Prepare the standard streams at the start of a script, so that a missing stream (2>&-) or a limited encoding (LC_ALL=C)
    does not end it."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class Short(reprlib.Repr):
    """repr() of a value of any size and depth, with bounded length and time."""

    def __init__(self, length):
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = length
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 5, 5, 5

    def repr_int(self, value, level):
        if value.bit_length() > 10_000:  # Python raises ValueError for more than 4,300 digits
            return f"a whole number of {value.bit_length()} bits"
        return super().repr_int(value, level)


def short(value, length=100):
    """repr(value) for a message: on one line, printable, at most `length` + 20 characters."""
    text = printable(Short(length).repr(value)).replace("\n", "\\n")
    return text if len(text) <= length + 20 else f"{text[: length // 2]} ... {text[-length // 4 :]}"


def some(names, count=5):
    """The first `count` names of a list as text, and how many more there are: "a, b and 3 more"."""
    names = list(names)
    shown = ", ".join(printable(name if len(name) <= 100 else f"{name[:97]}...") for name in map(str, names[:count]))
    shown = shown.replace("\n", "\\n")
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


# --- tables ---

NARROWEST = 20  # smallest width to lay text out for, in cells


def screen_width(width=None):
    """Width of a line in cells: `width` if given, else $COLUMNS, else the terminal's width, else 80."""
    return max(NARROWEST, shutil.get_terminal_size((80, 24)).columns if width is None else width)


def cells(text):
    """Number of terminal cells of a text: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    marks = ("Mn", "Me", "Cf")
    return sum((unicodedata.category(c) not in marks) * (1 + (unicodedata.east_asian_width(c) in "WF")) for c in text)


def wrap(text, width=None):
    """Split a text at spaces into lines of at most `width` cells (default: screen_width()). A longer word is cut."""
    width, lines = screen_width() if width is None else width, [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cells(joined) <= width:
            lines[-1] = joined
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while cells(lines[-1]) > width:
            head = fitting(lines[-1], width)
            lines[-1:] = [head, lines[-1][len(head) :]]
    return lines


def fitting(text, width):
    """The longest beginning of a text with at most `width` cells, but at least one character."""
    end = min(len(text), width)
    while end > 1 and cells(text[:end]) > width:
        end -= 1
    return text[:end]


def shortened(text, width):
    """A word in at most `width` cells: its beginning and its end with two dots between, if it is longer."""
    if cells(text) <= width:
        return text
    head = fitting(text, (width - 1) // 2)
    tail = fitting(text[::-1], width - 2 - cells(head))[::-1]
    return f"{head}..{tail}"


def table_lines(rows, width=None):
    """The lines of a table that fits a terminal. The first column is aligned left, the others right.

    rows: lists of texts; the first row is the head. width: as in screen_width(). A table that is too wide gets a wrapped head
    with shortened names. Columns that still do not fit follow in further parts below, each with the first column again. Last,
    every cell is wrapped."""
    width = screen_width(width)
    rows = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    first, *sizes = (max(map(cells, column)) for column in zip(*rows, strict=True))
    if first + sum(2 + size for size in sizes) > width:
        bodies = [max(map(cells, column[1:]), default=0) for column in list(zip(*rows, strict=True))[1:]]
        room = [max(12, width // 4, body) for body in (0, *bodies)]
        rows[0] = [
            " ".join(shortened(word, n) for word in cell.split(" ")) for cell, n in zip(rows[0], room, strict=True)
        ]
        words = [max(min(cells(cell), 12), *map(cells, cell.split(" "))) for cell in rows[0][1:]]
        sizes = list(map(max, words, bodies))
        narrow = min(first, max(8, width // 3))
        if len(beside(sizes, narrow, width)) < len(beside(sizes, first, width)):
            first = narrow
        first = min(first, max(8, width - 2 - max(sizes, default=0)))
        sizes = [min(size, width - 2 - first) for size in sizes]
    lines = []
    for part in beside(sizes, first, width):
        lines += [""] * bool(lines)
        for row in rows:
            lines += row_lines([row[0], *row[1:][part]], [first, *sizes[part]])
    return lines


def beside(sizes, first, width):
    """Slices of the columns that fit beside each other after the first column. Each slice has at least one column.

    sizes: widths of the columns after the first. first: width of the first."""
    starts, used = [0], first
    for place, size in enumerate(sizes):
        used += 2 + size
        if used > width and place > starts[-1]:
            starts, used = [*starts, place], first + 2 + size
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def row_lines(row, sizes):
    """The lines of one row, with each cell wrapped to the width of its column."""
    parts = [wrap(cell, size) for cell, size in zip(row, sizes, strict=True)]
    lines = []
    for i in range(max(map(len, parts))):
        texts = [part[i] if i < len(part) else "" for part in parts]
        gaps = [" " * (size - cells(text)) for text, size in zip(texts, sizes, strict=True)]
        lines.append("  ".join([texts[0] + gaps[0], *map(str.__add__, gaps[1:], texts[1:])]).rstrip())
    return lines
