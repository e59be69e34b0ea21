"""The C kernels as a shared library, built on first use with the machine's C compiler and called through ctypes.

The library lies in a cache folder under a name that holds a digest of the source and of the compiler, so a change builds
anew. It appears there in one step: two processes that build at once do no harm."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # noqa: F401 - before the library, which then finds the OpenMP that torch loaded
from minitune_kernels import cache

COMMON = Path(__file__).with_name("common.h")
FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC")
loaded = []  # the libraries of this process
LEVELS = ("portable C", "AVX2", "AVX-512", "AVX-512 with bf16", "AMX")


class NoCompiler(Exception):
    """Why there is no library, in words."""


def compiler():
    """The command of CC, else cc. Raises NoCompiler where there is none."""
    command = shlex.split(os.environ.get("CC") or "cc") or ["cc"]
    if not shutil.which(command[0]):
        raise NoCompiler(f"there is no C compiler {command[0]!r}; install gcc or clang, or set CC")
    return command


def build(source, flags=FLAGS, folder=None):
    """Path of the library of `source`, a Path, built unless it lies in `folder` (the cache). Raises NoCompiler."""
    try:
        command = [*compiler(), *flags]
        version = subprocess.run([*compiler(), "--version"], capture_output=True).stdout
        parts = [source.read_bytes(), COMMON.read_bytes(), version, *map(str.encode, command)]
        digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
        library = Path(folder or cache.folder()) / f"{source.stem}-{digest[:16]}.so"
        if library.exists():
            return library
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch) / library.name
            done = subprocess.run([*command, str(source), "-o", str(built), "-lm"], capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                raise NoCompiler(f"{shlex.join(command)} cannot build {source.name}: {last}")
            cache.keep(library, built.read_bytes())
    except OSError as error:
        raise NoCompiler(
            f"{error.filename or 'the cache'} cannot be used ({error.strerror}); XDG_CACHE_HOME names another cache folder"
        ) from None
    except (RuntimeError, ValueError) as error:  # no home folder; CC with an open quote
        raise NoCompiler(f"it cannot be built: {error}") from None
    return library


def load(path):
    """The library at `path`. Raises NoCompiler."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompiler(f"the built library cannot be loaded: {error}; delete it to build it again") from None
    for function in (library.record, library.forget):  # of common.h; see tape.py
        function.argtypes, function.restype = (ctypes.c_void_p,), None
    loaded.append(library)
    return library
