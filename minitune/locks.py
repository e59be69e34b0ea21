"""One process at a time: a lock file that is locked while it is held. What a killed process leaves of it stops nobody."""

import warnings
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout

from minitune.screen import warn


@contextmanager
def held(path, refusal):
    """Hold the lock file `path` (a Path) for this process; it is removed afterwards. Its folder must exist.

    Raises ValueError with the text `refusal` where another process holds it, OSError where the file cannot be made. On a file
    system that has no locks that is said, and nothing is held."""
    lock = FileLock(path, timeout=0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "flock not supported": filelock then writes its process id into the file
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
        with suppress(OSError):  # Windows removes it at the release
            path.unlink()
        lock.release()
