"""A lock file that one process at a time can hold. The file that a killed process leaves behind does not block others."""

import warnings
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout

from minitune.screen import warn


@contextmanager
def held(path, refusal):
    """Context that holds the lock file `path` (a Path) and removes it at the end. Its folder must exist.

    Raises ValueError with the text `refusal` if another process holds the lock, and PermissionError if the file cannot be
    created. On a file system without locks it prints a warning and holds nothing."""
    lock = FileLock(path, timeout=0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "flock not supported"; the warning below says it in our words
            lock.acquire()
    except Timeout:
        raise ValueError(refusal) from None
    except PermissionError:
        raise
    except (OSError, NotImplementedError) as error:
        warn(f"{path.parent} cannot be locked ({error}): do not let two processes write there at once")
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove a file that is open; there release() removes it
            path.unlink()
        lock.release()
