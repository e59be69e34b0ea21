"""Files that are read whole and checked, and files that appear whole or not at all. Nothing here knows what they hold."""

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
    """Where a file that is written to `path` will lie, as a Path: a symbolic link is followed.

    Raises ValueError unless a regular file or nothing is there. Renaming a new file onto /dev/null or a pipe would
    destroy it, as root for the whole machine."""
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
    """Write bytes or str to `path` so that a reader, or a process that starts after a kill, sees the old file or the
    new one.

    The content goes to a temporary file in the same folder, to the disk, and then takes the name in one step. A lone
    surrogate in a str becomes its escape, which JSON reads as the same character. Raises ValueError where writable()
    does, and OSError with the path in it (a full disk)."""
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
    """Raises ValueError where write_whole(path) could not work: before the work whose result it is to keep."""
    target = writable(path)
    with paths_explained(path, "written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def to_json(value, indent=None):
    """JSON text of a value: UTF-8 letters as they are, lone surrogates as escapes, so that it can always be written."""
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def fingerprint(value):
    """sha256 of a value as JSON has it, whatever the order of its keys: the same before it is written and after it is read."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path, value):
    """Write `value` as indented JSON, whole or not at all."""
    write_whole(path, to_json(value, indent=2) + "\n")


# --- reading ---


def read_bytes(path):
    """The content of a regular file. Raises ValueError in one line where there is none, or it cannot be read."""
    path = expand(path)
    with paths_explained(path):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ValueError(f"{path} is a folder, expected a file")
        if not stat.S_ISREG(mode):  # a pipe may never end, and /dev/zero never does
            raise ValueError(f"{path} is {kind_of(mode)}, expected a regular file")
        return path.read_bytes()


def read_text(path):
    """The text of a UTF-8 file, with or without a BOM. Raises ValueError as read_bytes(), and where it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None


def read_json(path, shape=None):
    """The value in a JSON file; shape: what it must hold, for schema.check(). Raises ValueError with the file and the
    place where it is missing, not JSON, or of another shape."""
    value = parse_json(read_text(path), path)
    return value if shape is None else check(value, shape, path)


class JsonFolder:
    """The JSON files of a folder, each of which is parsed once, at its first use."""

    def __init__(self, path):
        self.path, self.parsed = Path(path), {}

    def json(self, name, shape=None, is_optional=False):
        """The value in the file `name`, which nobody may change; {} where is_optional and there is no such file. shape: for
        schema.check(). Raises ValueError as read_json()."""
        path = self.path / name
        if is_optional and not path.is_file():
            return {}
        if name not in self.parsed:
            self.parsed[name] = read_json(path)
        return self.parsed[name] if shape is None else check(self.parsed[name], shape, path)


def parse_json(text, where):
    """The value of JSON text. Raises ValueError that begins with `where`, whatever is wrong: broken, nested too deeply,
    a number without end."""
    try:
        value = json.loads(text, parse_int=whole_number)
        if text.count("[") + text.count("{") > LEVELS and is_deeper(value, LEVELS):
            raise RecursionError
        return value
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where} is not valid JSON: {place}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON for us: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON for us: {error}") from None


LEVELS = 200  # of lists and objects within each other; whoever reads or writes the value calls itself as often


def is_deeper(value, levels):
    """Whether lists and objects lie more than `levels` deep within each other."""
    row = [value]
    for _ in range(levels):
        inner = [one.values() if isinstance(one, dict) else one for one in row if isinstance(one, (dict, list))]
        row = list(itertools.chain.from_iterable(inner))
    return any(isinstance(one, (dict, list)) for one in row)


def whole_number(digits):
    if len(digits) > 300:  # close to the largest float; Python itself stops at 4,300
        raise ValueError(f"it has a whole number of {len(digits):,} digits")
    return int(digits)


# --- paths ---


def expand(path):
    """`path` as a Path, with ~ for a home. Raises ValueError where it cannot be a path."""
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
    """Turns an OSError about `path` into a ValueError in one line."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{short(str(path))} cannot be {verb}: {error.strerror}") from None


def kind_of(mode):
    """What a file that is not a regular one is, in words."""
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    return next((words for asks, words in kinds.items() if asks(mode)), "a special file")


def differences(before, after):
    """What differs between two dicts, in words: ["name value -> value", ...]."""
    return [
        f"{brief(name, 40)} {brief(before.get(name))} -> {brief(after.get(name))}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def brief(value, length=12):
    return printable(value[:length]) if isinstance(value, str) else short(value)
