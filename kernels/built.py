"""Builds the C kernels on first use, as one shared library for this CPU's instruction set, and keeps built files in a cache
folder. nvrtc.py keeps its cubins there too.

A kept file is code that runs with this user's rights. So the cache folder must belong to this user, with no write access for
others. The name of a file in it ends with a digest of its content, which is checked before the file is loaded: a file that was
cut short, or altered or planted by somebody else, is never run."""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch  # noqa: F401 - loads OpenMP; our library, loaded later, then shares it

HERE = Path(__file__).parent
HEADERS = ("common.h", "vectors.h", "bf16.h")
# Each file with its flags for speed. -O3 compiles attend.c for 15 s and makes it no faster; -fpeel-loops unrolls loops of a
# known length, so that their sums stay in registers.
SOURCES = {
    "attend.c": ("-O2", "-fpeel-loops"),
    "lora.c": ("-O2", "-fpeel-loops"),
    "linear.c": ("-O3",),
    "nf4.c": ("-O3",),
    "rows.c": ("-O3",),
    "tape.c": ("-O2",),
}
# -Wno-psabi: the warning is about vectors of 64 bytes as arguments, which only inlined functions take here.
FLAGS = ("-fopenmp", "-fPIC", "-Wno-psabi")
LEVELS = ("portable C", "AVX2", "AVX-512", "AVX-512 with bf16", "AMX")  # each includes the ones before it
LEVEL_FLAGS = (  # the compiler's flags that a level adds to the one before
    (),
    ("-mavx2", "-mfma", "-mf16c"),
    ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
    ("-mavx512bf16",),
    ("-mamx-tile", "-mamx-bf16"),
)
CPU_FLAGS = (  # the same in the words of /proc/cpuinfo
    (),
    ("avx2", "fma", "f16c"),
    ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    ("avx512_bf16",),
    ("amx_tile", "amx_bf16"),
)


INT, POINTER, SIZE = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64


BACKENDS = {
    "torch": "nf4_reference",
    "cpu": "nf4_cpu",
    "triton": "nf4_triton",
    "cuda": "nf4_cuda",
}  # name -> module for NF4


def check_backend(wanted):
    """Raises ValueError where MINITUNE_KERNELS, if it is set, names no backend."""
    if wanted and wanted not in BACKENDS:
        raise ValueError(f"MINITUNE_KERNELS is {wanted!r}, expected {', '.join(BACKENDS)}")


class NoCompiler(Exception):
    """The C kernels cannot be built or loaded. The text says why."""


@functools.cache
def tell(line):
    """Write a line for the user to stderr, once in a process. Control characters are escaped."""
    if sys.stderr is not None:
        print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in f"minitune: {line}"), file=sys.stderr)


# --- the cache ---


@functools.cache
def scratch():
    """A private folder of this process, deleted when it ends."""
    folder = tempfile.mkdtemp(prefix="minitune-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def folder():
    """The cache folder: minitune in XDG_CACHE_HOME or ~/.cache, made with mode 0700.

    If it cannot be made, or others may write there, a line says so and a private folder of this process serves instead."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "minitune"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = path.stat()
    except OSError as error:
        return instead_of(path, error.strerror)
    if not is_own(found):
        return instead_of(path, "it belongs to another user")
    if others_may_write(found):
        return instead_of(path, f"others may write there (chmod 700 {shlex.quote(str(path))})")
    return path


def is_own(found):
    """Whether a file with this os.stat() belongs to this user. Windows has no user ids, so the answer there is True."""
    return not hasattr(os, "getuid") or found.st_uid == os.getuid()


def others_may_write(found):
    """Whether other users may write a file with this os.stat(). Windows' st_mode does not show it: False there."""
    return hasattr(os, "getuid") and bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def instead_of(path, why):
    tell(f"built kernels are not kept in {path}: {why}. Every process builds them; XDG_CACHE_HOME names another folder")
    return scratch()


def kept(name, suffix):
    """The path of the undamaged file NAME-DIGEST.SUFFIX in the cache, or None. A damaged one is reported and deleted."""
    for path in sorted(folder().glob(f"{name}-*{suffix}")):
        found = path.lstat()
        is_trusted = stat.S_ISREG(found.st_mode) and is_own(found) and not others_may_write(found)
        if is_trusted and path.name == file_name(name, suffix, path.read_bytes()):
            return path
        tell(f"{path} is damaged or belongs to somebody else; it is built again")
        with suppress(OSError):  # of a cache that cannot be written
            path.unlink(missing_ok=True)
    return None


def keep(name, suffix, content):
    """Write bytes to the cache, under a name with their digest, and return the path. The file appears whole or not at all.

    If the cache cannot be written, a line says so and a private folder of this process serves instead. Raises OSError if
    that cannot be written either."""
    path = folder() / file_name(name, suffix, content)
    try:
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{name}.", suffix=".part")
    except OSError as error:
        path = instead_of(path.parent, error.strerror) / path.name
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return path


def file_name(name, suffix, content):
    return f"{name}-{hashlib.sha256(content).hexdigest()[:32]}{suffix}"


# --- the library ---


def highest_level():
    """The highest of LEVELS that this CPU has; 0 if the system does not say."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return 0
    try:
        words = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].split()
    except OSError:
        return 0
    has = [set(wanted) <= set(words) for wanted in CPU_FLAGS]
    return next((level - 1 for level in range(1, len(has)) if not has[level]), len(has) - 1)


def compiler():
    """The compiler's command, as a list: CC, else cc. Raises NoCompiler if it is not installed."""
    try:
        command = shlex.split(os.environ.get("CC") or "cc") or ["cc"]
    except ValueError as error:
        raise NoCompiler(f"CC cannot be read: {error}") from None
    if not shutil.which(command[0]):
        raise NoCompiler(f"there is no C compiler {command[0]!r}; install gcc or clang, or set CC")
    return command


def build(level, extra=()):
    """The path of the library for one of LEVELS, built unless the cache has it. extra: more flags. Raises NoCompiler."""
    command = compiler()
    flags = [*FLAGS, f"-DLEVEL={level}", *(flag for added in LEVEL_FLAGS[: level + 1] for flag in added), *extra]
    try:
        version = subprocess.run([*command, "--version"], capture_output=True).stdout
        texts = [(HERE / name).read_bytes() for name in (*SOURCES, *HEADERS)]
        words = [*command, *flags, *(flag for own in SOURCES.values() for flag in own)]
        key = hashlib.sha256(b"\0".join([*texts, version, *map(str.encode, words)])).hexdigest()[:16]
        name = f"kernels-{level}-{key}"
        if (path := kept(name, ".so")) is not None:
            return path
        tell(f"building the C kernels for {LEVELS[level]}, once; this takes a few seconds")
        with tempfile.TemporaryDirectory(dir=scratch()) as work:
            return keep(name, ".so", link(command, compile_all(command, flags, work), [*flags, *extra], work))
    except OSError as error:
        raise NoCompiler(f"{error.filename or 'the C compiler'} cannot be used ({error.strerror})") from None


def compile_all(command, flags, work):
    """The paths of the object files of SOURCES, compiled in parallel. Raises NoCompiler, which quotes the first failure."""
    started, waiting = [], list(SOURCES.items())
    try:
        while waiting or any(process.poll() is None for _, process in started):
            running = sum(process.poll() is None for _, process in started)
            if waiting and running < (os.cpu_count() or 1):
                name, own = waiting.pop(0)
                line = [*command, *own, *flags, "-c", str(HERE / name), "-o", f"{work}/{name}.o"]
                started.append((name, start(line, f"{work}/{name}.err")))
            else:
                time.sleep(0.01)
    finally:
        for _, process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
    for name, process in started:
        if process.returncode:
            text = Path(work, f"{name}.err").read_text(errors="replace")
            raise NoCompiler(failure(command, name, text, process.returncode))
    return [f"{work}/{name}.o" for name in SOURCES]


def start(line, errors):
    """Start a compiler's command. Its stderr goes to the file `errors`; its stdin is empty, so that it never waits for input."""
    with open(errors, "wb") as file:
        return subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file)


def link(command, objects, flags, work):
    """The bytes of the shared library made of object files. Raises NoCompiler."""
    line = [*command, *flags, "-shared", *objects, "-o", f"{work}/kernels.so", "-lm"]
    done = subprocess.run(line, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode:
        raise NoCompiler(failure(command, "the library", done.stderr, done.returncode))
    return Path(work, "kernels.so").read_bytes()


def failure(command, what, text, code):
    """The message for a compiler that failed, with the last line of its output `text` that has the word error."""
    lines = [line for line in text.strip().splitlines() if "error" in line] or text.strip().splitlines()
    return f"{shlex.join(command)} cannot build {what}: {(lines or [f'exit code {code}'])[-1][:200]}"


def struct(name, *fields):
    """A struct of the C files as a ctypes class. fields: groups (ctypes type, names with spaces between)."""
    return type(name, (ctypes.Structure,), {"_fields_": [(n, kind) for kind, names in fields for n in names.split()]})


def load(path):
    """The ctypes library at `path`. Raises NoCompiler."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompiler(f"the built library cannot be loaded: {error}") from None
    library.record.argtypes, library.record.restype = (ctypes.c_void_p,), None  # of tape.c; see replay.py
    return library


@functools.cache
def library():
    """(the C kernels for this CPU as a ctypes library, the level that runs). Builds them if the cache has none, which takes
    seconds: call it before a measurement starts. Raises NoCompiler."""
    first = None
    for level in range(highest_level(), -1, -1):  # an older compiler may not know the newest instructions
        try:
            found = load(build(level))
            return found, found.kernel_level()
        except NoCompiler as error:
            first = first or error
    raise first
