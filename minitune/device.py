"""Device, compute dtype, peak memory and versions of this machine."""

import functools
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from minitune_kernels import measured

from minitune.screen import short

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name):
    """The torch.device for `name`: auto, cpu, cuda or cuda:N. auto is the current CUDA device if there is one, else the CPU.

    Raises ValueError if the machine does not have the device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"device is {short(name)}, expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return device


def choose_dtype(name, device, job="decoding"):
    """(compute dtype, the reason in words) for `auto` or a name in DTYPES.

    job: "training" or "decoding". On a CPU each of them uses the dtype that was measured to be fastest for it."""
    if name != "auto":
        return DTYPES[name], "as asked"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        chip = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        if major >= 8:
            return torch.bfloat16, f"{chip} has bf16 tensor cores"
        return torch.float16, f"{chip} has no bf16 tensor cores; training scales the gradients"
    return measured.faster_dtype(job)


def reset_peak(device):
    """Let the next peak_bytes() count from now, if the system supports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # not Linux, or not permitted: the peak then counts from the start of the process


def peak_bytes(device):
    """Peak memory in bytes since reset_peak(): allocated by torch on a GPU, resident in the process on a CPU. 0 if the system
    does not report it."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else proc_status("VmHWM")


def resident_bytes():
    """Resident memory of this process in bytes, 0 if the system does not report it."""
    return proc_status("VmRSS")


def proc_status(key):
    """A size in /proc/self/status, in bytes; 0 if it is not there."""
    try:
        found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def environment(device):
    """Versions, machine and commit, as a dict for environment.json."""
    return {
        "python": platform.python_version(),
        "packages": dict(versions()),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".strip(", "),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else measured.cpu_name(),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "git_commit": git_commit(),
    }


@functools.cache
def versions():
    """((package, version or None), ...) of what a run depends on."""
    found = {}
    for name in ("minitune", "torch", "safetensors", "sentencepiece", "tokenizers", "huggingface-hub", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return tuple(found.items())


@functools.cache
def git_commit():
    """The commit of this checkout, or None if it is not a git checkout or git is missing."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None
