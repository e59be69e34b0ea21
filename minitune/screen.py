"""Text for a person: the one place through which every line to a terminal goes, and values of files in messages.

Rows, adapters, servers and models bring text that nobody here wrote: an escape sequence in it would move the cursor or
hide a line, and a value of 100,000 characters would bury what a message says. A message never ends a job: a screen that
lacks a letter shows its escape, and one that was closed shows nothing."""

import os
import re
import reprlib
import sys

from tqdm import tqdm

# C0 and C1 but for newline and tab, line and paragraph separators, marks that turn the direction of writing, lone surrogates.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text):
    """`text` with escapes (\\x1b, \\u202e) for the characters that steer a terminal or cannot be written."""
    return UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def say(line=""):
    """Print one line of results or progress on stdout, above an open progress bar."""
    write(sys.stdout, f"{line}\n")


def tell(line=""):
    """The same on stderr: for jobs whose result is what they print on stdout."""
    write(sys.stderr, f"{line}\n")


def warn(text):
    """Tell what is probably not meant, without stopping."""
    tell(f"warning: {text}")


def write(stream, text):
    """Write printable(text), above an open progress bar. Nothing where there is no stream, or it was closed."""
    try:
        show(stream, text)
    except (BrokenPipeError, ValueError):  # a closed pipe; a closed file
        pass
    except OSError as error:
        if error.errno != 5:  # EIO: the terminal is gone
            raise


def show(stream, text):
    """The same for a result: raises BrokenPipeError where nobody reads on, so that a job whose result is what it prints can
    end."""
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        with tqdm.external_write_mode(file=stream):
            stream.write(text)
            stream.flush()
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:  # for what is left in the buffer: Python writes it at the end once more
            os.dup2(nowhere.fileno(), stream.fileno())
        raise


def progress(total, unit, **options):
    """A tqdm bar on stderr; none where that is no terminal. options: of tqdm."""
    return tqdm(total=total, unit=unit, file=sys.stderr, **{"disable": None, "dynamic_ncols": True, **options})


def prepare():
    """At the start of a script: streams that are missing (2>&-) or lack letters (LC_ALL=C) must not end it."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class Short(reprlib.Repr):
    """repr() of a value of unknown size and depth, bounded in length and in time."""

    def __init__(self, length):
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = length
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 5, 5, 5

    def repr_int(self, value, level):
        if value.bit_length() > 10_000:  # Python refuses to write more than 4,300 digits
            return f"a whole number of {value.bit_length()} bits"
        return super().repr_int(value, level)


def short(value, length=100):
    """repr(value) on one line, printable, at most about `length` characters: for values of files in messages."""
    text = printable(Short(length).repr(value)).replace("\n", "\\n")
    return text if len(text) <= length + 20 else f"{text[: length // 2]} ... {text[-length // 4 :]}"


def some(names, count=5):
    """The first names of a list as text, and how many more there are."""
    names = list(names)
    shown = ", ".join(printable(name if len(name) <= 100 else f"{name[:97]}...") for name in map(str, names[:count]))
    shown = shown.replace("\n", "\\n")
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")
