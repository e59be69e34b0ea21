"""The folder where built kernels are kept: minitune in XDG_CACHE_HOME or ~/.cache. A file appears there whole or not at all."""

import os
import tempfile
from pathlib import Path


def folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitune"


def keep(path, content):
    """Write bytes to `path` in one step: processes that build at once write the same. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # others who share the folder may read it
            os.fsync(file.fileno())  # a library that a power cut left half would end the process that loads it
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
