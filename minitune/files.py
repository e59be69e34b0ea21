"""Files that appear whole or not at all. Nothing here knows what the files hold."""

import json
import os
import tempfile
from pathlib import Path


def write_whole(path, content):
    """Write bytes or str to `path` so that a reader, or a process that starts after a kill, sees the old file or the
    new one.

    The content goes to a temporary file in the same folder, to the disk, and then takes the name in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def prove_writable(path):
    """Raises ValueError where write_whole(path) could not work: before the work whose result it is to keep."""
    path = Path(path)
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, expected a file to write")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_json(path, value):
    """Write `value` as indented JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path):
    """The value in a JSON file. Raises ValueError with the file and the place where it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # with or without a BOM
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, expected a JSON file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); expected JSON") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON for us: it is nested too deeply") from None


def differences(before, after):
    """What differs between two dicts, in words: ["name value -> value", ...]."""
    short = lambda value: value[:12] if isinstance(value, str) else value
    return [
        f"{name} {short(before.get(name))} -> {short(after.get(name))}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
