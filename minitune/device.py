"""What this machine is: device, precision and why, peak memory, versions. No model, no file of a run."""

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
    """`auto` is the first CUDA device where there is one, else the CPU. Raises ValueError where `name` is not here."""
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
    """(compute dtype, the reason in words) for `auto` or a name in DTYPES. job: "training" or "decoding", which may be fastest in
    two dtypes on one CPU."""
    if name != "auto":
        return DTYPES[name], "as asked"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        chip = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        if major >= 8:
            return torch.bfloat16, f"{chip} has bf16 tensor cores"
        return torch.float16, f"{chip} has no bf16 tensor cores; gradients go through a scaler"
    return measured.faster_dtype(job)


def reset_peak(device):
    """Let the next peak_bytes() count from now, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # not Linux, or not permitted: the peak then counts from the start of the process


def peak_bytes(device):
    """Highest memory in use since reset_peak: allocated on a GPU, resident on a CPU (0 where the system does not
    tell)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else proc_status("VmHWM")


def resident_bytes():
    """Resident memory of this process now (0 where the system does not tell)."""
    return proc_status("VmRSS")


def proc_status(key):
    try:
        found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def environment(device):
    """Versions, machine and commit, for environment.json."""
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
    """The commit of this checkout, or None outside of one or without git."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None
