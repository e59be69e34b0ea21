"""Builds nf4.cu into machine code (a cubin) with NVIDIA's run-time compiler NVRTC, through ctypes. Needs no GPU and no nvcc.

The cubins of sm_70 (V100) and sm_75 (T4) are stored in kernels/cubin, because NVRTC 13 cannot build sm_70 any more; NVRTC 12
can. `python -m minitune_kernels.nvrtc` writes them again. Cubins of other chips are built on first use and kept in the cache
folder (see built.py)."""

import ctypes
import functools
import hashlib
import json
import sys
from pathlib import Path

import torch
from minitune_kernels import built

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "nf4.cu"
STORED = ("sm_70", "sm_75")
RECIPE_VERSION = "12.9"  # of the NVRTC for the stored cubins; another version gives other bytes
CUBINS = FOLDER / "cubin"
RECORD = "built_from.json"  # beside the stored cubins: the source and the NVRTC that they were built from
OPTIONS = ("--std=c++17",)


class Nvrtc:
    """An NVRTC library. version: such as "12.9"; architectures: those that it builds for, such as "sm_70".
    Raises OSError if `path` cannot be loaded."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._check(self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self._check(self.library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        numbers = (ctypes.c_int * count.value)()
        self._check(self.library.nvrtcGetSupportedArchs(numbers))
        self.version = f"{major.value}.{minor.value}"
        self.architectures = [f"sm_{number}" for number in numbers]

    def build(self, source, architecture, options=OPTIONS):
        """(cubin, log) of `source`, the text of a .cu file without #include. Raises RuntimeError with NVRTC's log."""
        program = ctypes.c_void_p()
        create = self.library.nvrtcCreateProgram
        self._check(create(ctypes.byref(program), source.encode(), SOURCE.name.encode(), 0, None, None))
        try:
            flags = [f"--gpu-architecture={architecture}".encode(), *(option.encode() for option in options)]
            failed = self.library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode()
            if failed:
                raise RuntimeError(f"NVRTC {self.version} does not build {SOURCE.name} for {architecture}:\n{log}")
            return self._read(program, "CUBIN"), log
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program, what):
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        content = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, content))
        return content.raw

    def _check(self, error):
        if error:
            raise RuntimeError(f"NVRTC: {self.library.nvrtcGetErrorString(error).decode()}")


@functools.cache
def compilers():
    """Every NVRTC that is installed: from wheels on sys.path and from the system. First those with the major version of torch's
    CUDA, whose cubins the installed driver can load."""
    folders = [Path(p) / "nvidia" / inner for p in sys.path for inner in ("cuda_nvrtc/lib", "cu13/lib")]
    paths = [path for folder in folders for path in sorted(folder.glob("libnvrtc.so.1?"))]
    found = {}
    for path in [*paths, "libnvrtc.so.12", "libnvrtc.so.13"]:
        try:
            compiler = Nvrtc(path)
        except OSError:
            continue
        found.setdefault(compiler.version, compiler)
    major = (torch.version.cuda or RECIPE_VERSION).split(".")[0]
    return sorted(found.values(), key=lambda compiler: compiler.version.split(".")[0] != major)


def compiler_for(architecture):
    """The first of compilers() that builds for `architecture`, or None."""
    return next((c for c in compilers() if architecture in c.architectures), None)


def stored_cubin(architecture):
    """The path of the cubin that comes with the package, or None. Code for sm_70 runs on sm_72 too."""
    architecture = "sm_70" if architecture == "sm_72" else architecture
    return CUBINS / f"nf4.{architecture}.cubin" if architecture in STORED else None


def why_not(architecture):
    """None if a cubin for `architecture` is stored or can be built, else the reason."""
    if stored_cubin(architecture) or compiler_for(architecture):
        return None
    have = ", ".join(c.version for c in compilers())
    if have:
        return f"NVRTC {have} does not build for {architecture}; install a newer nvidia-cuda-nvrtc"
    return f"no cubin is stored for {architecture} and NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12"


def cubin(architecture):
    """The machine code of nf4.cu for `architecture`, as bytes: stored, from the cache folder, or built now and kept there.

    The name of the cache file has a hash of everything that the build depends on, so processes that build at the same time write
    the same file. If the folder cannot be used, built.folder() says so and each process builds its own."""
    if path := stored_cubin(architecture):
        return path.read_bytes()
    compiler, source = compiler_for(architecture), SOURCE.read_text()
    key = hashlib.sha256("\0".join([source, architecture, compiler.version, *OPTIONS]).encode()).hexdigest()[:16]
    name = f"nf4.{architecture}.{key}"
    if path := built.kept(name, ".cubin"):
        return path.read_bytes()
    image, _ = compiler.build(source, architecture)
    built.keep(name, ".cubin", image)
    return image


def source_hash():
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


def main(folder=CUBINS):
    """Write the cubins that come with the package, and the record of what they were built from."""
    compiler = next((c for c in compilers() if c.version == RECIPE_VERSION), None)
    if compiler is None:
        sys.exit(f"NVRTC {RECIPE_VERSION} is not installed: pip install nvidia-cuda-nvrtc-cu12=={RECIPE_VERSION}.*")
    for architecture in STORED:
        image, _ = compiler.build(SOURCE.read_text(), architecture)
        path = folder / stored_cubin(architecture).name
        path.write_bytes(image)
        print(f"{path}: {len(image)} bytes")
    record = {"nvrtc": compiler.version, "source_sha256": source_hash()}
    (folder / RECORD).write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
