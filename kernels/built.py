"""What is built on first use and kept: the C kernels, as one shared library for this CPU's instruction set, and the cubins
of nvrtc.py.

A kept file is code that runs as this user. So the cache folder has to be this user's alone, and the name of a file in it
ends with a digest of its content, which is checked before it is loaded: one that was cut short, altered or planted by
somebody else is never run."""

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
from pathlib import Path

import torch  # noqa: F401 - before the library, which then finds the OpenMP that torch loaded

HERE = Path(__file__).parent
HEADERS = ("common.h", "vectors.h", "bf16.h")
# Each file with the flags that it needs for its speed. -O3 takes 15 s for attend.c and brings nothing there; -fpeel-loops
# unrolls loops of a known length, which keeps their sums in registers.
SOURCES = {
    "attend.c": ("-O2", "-fpeel-loops"),
    "lora.c": ("-O2", "-fpeel-loops"),
    "linear.c": ("-O3",),
    "nf4.c": ("-O3",),
    "rows.c": ("-O3",),
    "tape.c": ("-O2",),
}
FLAGS = ("-fopenmp", "-fPIC", "-Wno-psabi")  # vectors of 64 bytes pass between inlined functions only
LEVELS = ("portable C", "AVX2", "AVX-512", "AVX-512 with bf16", "AMX")  # each includes the ones before it
LEVEL_FLAGS = (  # what a level adds to the one before
    (),
    ("-mavx2", "-mfma", "-mf16c"),
    ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
    ("-mavx512bf16",),
    ("-mamx-tile", "-mamx-bf16"),
)
CPU_FLAGS = (  # /proc/cpuinfo's words for them
    (),
    ("avx2", "fma", "f16c"),
    ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    ("avx512_bf16",),
    ("amx_tile", "amx_bf16"),
)


class NoCompiler(Exception):
    """Why there is no library, in words."""


@functools.cache
def tell(line):
    """Write one line for the user to stderr, once in a process, with escapes for what would steer a terminal."""
    if sys.stderr is not None:
        print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in f"minitune: {line}"), file=sys.stderr)


# --- the cache ---


@functools.cache
def scratch():
    """A private folder of this process, which goes away with it."""
    folder = tempfile.mkdtemp(prefix="minitune-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def folder():
    """Where built kernels are kept: minitune in XDG_CACHE_HOME or ~/.cache, made with mode 0700. Where others may write
    there, or it cannot be made, that is said, and it is a private folder of this process."""
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
    """Whether a file of this os.stat() is this user's. Windows has no numbers of users: a folder there is the user's own
    unless its access list says otherwise."""
    return not hasattr(os, "getuid") or found.st_uid == os.getuid()


def others_may_write(found):
    """Whether another user may write a file of this os.stat(). Windows' st_mode does not tell."""
    return hasattr(os, "getuid") and bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def instead_of(path, why):
    tell(f"built kernels are not kept in {path}: {why}. Every process builds them; XDG_CACHE_HOME names another folder")
    return scratch()


def kept(name, suffix):
    """The path of the whole file in the cache whose name begins with `name`, or None. A damaged one is said and removed."""
    for path in sorted(folder().glob(f"{name}-*{suffix}")):
        found = path.lstat()
        is_trusted = stat.S_ISREG(found.st_mode) and is_own(found) and not others_may_write(found)
        if is_trusted and path.name == file_name(name, suffix, path.read_bytes()):
            return path
        tell(f"{path} is damaged or of somebody else; it is built again")
        path.unlink(missing_ok=True)
    return None


def keep(name, suffix, content):
    """Write bytes to the cache in one step, under a name that holds their digest; returns the path. Where the cache cannot
    be written, that is said, and it is a private folder of this process. Raises OSError where that cannot be, either."""
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
    """The highest of LEVELS that this CPU has; 0 where the system does not tell."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return 0
    try:
        words = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].split()
    except OSError:
        return 0
    has = [set(wanted) <= set(words) for wanted in CPU_FLAGS]
    return next((level - 1 for level in range(1, len(has)) if not has[level]), len(has) - 1)


def compiler():
    """The command of CC, else cc. Raises NoCompiler where there is none."""
    try:
        command = shlex.split(os.environ.get("CC") or "cc") or ["cc"]
    except ValueError as error:
        raise NoCompiler(f"CC cannot be read: {error}") from None
    if not shutil.which(command[0]):
        raise NoCompiler(f"there is no C compiler {command[0]!r}; install gcc or clang, or set CC")
    return command


def build(level, extra=()):
    """Path of the library for one of LEVELS, built unless it is kept. extra: flags of every file. Raises NoCompiler."""
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
    """The object files of SOURCES, compiled side by side. Raises NoCompiler with the last line of the first that fails."""
    started, waiting = [], list(SOURCES.items())
    try:
        while waiting or any(process.poll() is None for _, process in started):
            running = sum(process.poll() is None for _, process in started)
            if waiting and running < (os.cpu_count() or 1):
                name, own = waiting.pop(0)
                line = [*command, *own, *flags, "-c", str(HERE / name), "-o", f"{work}/{name}.o"]
                # /dev/null: a compiler that asks for input must not wait for the terminal
                started.append((name, subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                                       stderr=open(f"{work}/{name}.err", "wb"))))  # fmt: skip
            else:
                time.sleep(0.01)
    finally:
        for _, process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
    for name, process in started:
        if process.returncode:
            raise NoCompiler(
                said(command, name, Path(work, f"{name}.err").read_text(errors="replace"), process.returncode)
            )
    return [f"{work}/{name}.o" for name in SOURCES]


def link(command, objects, flags, work):
    """The content of the shared library made of object files. Raises NoCompiler."""
    line = [*command, *flags, "-shared", *objects, "-o", f"{work}/kernels.so", "-lm"]
    done = subprocess.run(line, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode:
        raise NoCompiler(said(command, "the library", done.stderr, done.returncode))
    return Path(work, "kernels.so").read_bytes()


def said(command, what, text, code):
    """That a compiler failed, with its last line that says why."""
    lines = [line for line in text.strip().splitlines() if "error" in line] or text.strip().splitlines()
    return f"{shlex.join(command)} cannot build {what}: {(lines or [f'exit code {code}'])[-1][:200]}"


def load(path):
    """The library at `path`. Raises NoCompiler."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompiler(f"the built library cannot be loaded: {error}") from None
    library.record.argtypes, library.record.restype = (ctypes.c_void_p,), None  # of tape.c; see replay.py
    return library


@functools.cache
def library():
    """(the C kernels for this CPU, the level that runs). Built where they are not kept: call it before a clock starts.
    Raises NoCompiler."""
    fault = None
    for level in range(highest_level(), -1, -1):  # an older compiler may not know the newest instructions
        try:
            found = load(build(level))
            return found, found.kernel_level()
        except NoCompiler as error:
            fault = fault or error
    raise fault
