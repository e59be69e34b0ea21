"""Reads files whole with checks, and writes files atomically. Knows nothing of their content."""

import hashlib
import itertools
import json
import os
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path

from minitune.schema import check
from minitune.screen import printable, short

# --- writing ---


def writable(path):
    """The Path of the file that writing to `path` would replace or create; symbolic links are followed.

    Raises ValueError if there is something other than a regular file: renaming a new file onto /dev/null or a pipe would
    destroy it."""
    with paths_explained(path):
        asked = expand(path)
        mode = asked.stat().st_mode if asked.exists() else stat.S_IFREG
        target = Path(os.path.realpath(asked))
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path} is a folder, expected a file to write")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {kind_of(mode)}, expected a regular file or a new name")
    return target


def write_whole(path, content):
    """Write bytes or str to `path` atomically: a reader sees either the old or the new content, even after a kill.

    The content is written to a temporary file in the same folder, synced to disk and renamed. A lone surrogate in a str is
    written as its escape, which JSON reads as the same character. Raises ValueError as writable() does, and OSError with the path
    (such as for a full disk)."""
    target, temporary = writable(path), None
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, target)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror:
            raise type(error)(error.errno, error.strerror, str(path)) from None
        raise


def prove_writable(path):
    """Raises ValueError if write_whole(path) could not work. Called before the work whose result goes to `path`."""
    target = writable(path)
    with paths_explained(path, "written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def to_json(value, indent=None):
    """JSON text of a value. Non-ASCII letters stay as they are; lone surrogates become escapes, so that the text can be encoded
    as UTF-8."""
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def fingerprint(value):
    """sha256 of a value's JSON with sorted keys: equal before the value is written and after it is read again."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path, value):
    """Write `value` as indented JSON, atomically. Raises as write_whole()."""
    write_whole(path, to_json(value, indent=2) + "\n")


# --- reading ---


def read_bytes(path):
    """The content of a regular file. Raises ValueError if it does not exist or cannot be read."""
    path = expand(path)
    with paths_explained(path):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ValueError(f"{path} is a folder, expected a file")
        if not stat.S_ISREG(mode):  # reading a pipe or /dev/zero may never end
            raise ValueError(f"{path} is {kind_of(mode)}, expected a regular file")
        return path.read_bytes()


def read_text(path):
    """The text of a UTF-8 file, with or without a BOM. Raises ValueError as read_bytes(), and if it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None


def read_json(path, shape=None):
    """The value of a JSON file. shape: for schema.check(), or None.

    Raises ValueError with the file and the place if it is missing, not JSON, or of another shape."""
    value = parse_json(read_text(path), path)
    return value if shape is None else check(value, shape, path)


class JsonFolder:
    """The JSON files of a folder. Each file is parsed once, at its first use."""

    def __init__(self, path):
        self.path, self.parsed = Path(path), {}

    def json(self, name, shape=None, is_optional=False):
        """The value of the file `name`. It is shared, so callers must not change it.

        shape: for schema.check(), or None. is_optional: return {} if there is no such file. Raises ValueError as read_json()."""
        path = self.path / name
        if is_optional and not path.is_file():
            return {}
        if name not in self.parsed:
            self.parsed[name] = read_json(path)
        return self.parsed[name] if shape is None else check(self.parsed[name], shape, path)


def parse_json(text, where):
    """The value of JSON text. Raises ValueError that begins with `where` if the text is not valid JSON, is nested too deeply, or
    has a number with too many digits."""
    try:
        value = json.loads(text, parse_int=whole_number)
        if text.count("[") + text.count("{") > LEVELS and is_deeper(value, LEVELS):
            raise RecursionError
        return value
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where} is not valid JSON: {place}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{where} cannot be read as JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} cannot be read as JSON: {error}") from None


LEVELS = 200  # deepest nesting of lists and objects; functions that walk a value recurse as deep


def is_deeper(value, levels):
    """Whether lists and objects are nested more than `levels` deep."""
    row = [value]
    for _ in range(levels):
        inner = [one.values() if isinstance(one, dict) else one for one in row if isinstance(one, (dict, list))]
        row = list(itertools.chain.from_iterable(inner))
    return any(isinstance(one, (dict, list)) for one in row)


def whole_number(digits):
    """int(digits). Raises ValueError for more than 300 digits."""
    if len(digits) > 300:  # the largest float has 309 digits; int() itself fails above 4,300
        raise ValueError(f"it has a whole number of {len(digits):,} digits")
    return int(digits)


# --- paths ---


def expand(path):
    """`path` as a Path, with ~ expanded. Raises ValueError if it cannot be a path."""
    try:
        path = Path(path).expanduser()
        os.fsencode(path)
    except RuntimeError:
        raise ValueError(f"{short(str(path))}: there is no such user's home folder") from None
    except UnicodeEncodeError:
        raise ValueError(f"{short(str(path))} cannot be the name of a file: it is not Unicode text") from None
    if "\0" in str(path):
        raise ValueError(f"{short(str(path))} cannot be the name of a file: it has a null byte")
    return path


@contextmanager
def paths_explained(path, verb="read"):
    """Context that turns an OSError about `path` into a ValueError of one line. verb: "read" or "written", for the message."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{short(str(path))} cannot be {verb}: {error.strerror}") from None


def kind_of(mode):
    """Kind of a file that is not a regular one, in words. mode: st_mode of its stat()."""
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    return next((words for asks, words in kinds.items() if asks(mode)), "a special file")


def differences(before, after):
    """The differences between two dicts, as texts: ["name value -> value", ...]."""
    return [
        f"{brief(name, 40)} {brief(before.get(name))} -> {brief(after.get(name))}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def brief(value, length=12):
    """The first characters of a text, or short() of another value."""
    return printable(value[:length]) if isinstance(value, str) else short(value)
