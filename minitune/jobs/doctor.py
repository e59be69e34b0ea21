"""Reports the measured speed of this machine, the choices based on it, and missing parts: the job of scripts/doctor.py."""

import getpass
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from minitune import screen
from minitune.config import arg

LEAST_SPACE = 2 * 10**9  # bytes for a cache that can hold a small model
OPTIONAL = {  # package -> its use
    "pyarrow": "rows in Parquet files",
    "triton": "the kernels of NVIDIA GPUs",
}


@dataclass(frozen=True)
class DoctorConfig:
    """The options of doctor.py."""

    json: bool = arg(False, "print JSON for a bug report, without user names and paths of the home folder")
    again: bool = arg(False, "measure again, instead of using the stored figures of this machine")


def doctor(config, say=screen.say):
    """Print the report. Returns it, as examine() does."""
    report = examine(config.again)
    if config.json:
        say(json.dumps(without_names(report), indent=1))
    else:
        for line in as_lines(report):
            say(line)
    return report


def examine(again=False):
    """The report: {"machine", "versions", "settings", "reached", "chosen", "missing", "verdict"}. again: measure again."""
    import torch
    from minitune_kernels import built, measured, nf4

    from minitune.device import choose_device, choose_dtype, environment

    if again:
        measured.forget()
    device = choose_device("auto")
    known = environment(device)
    figures = measured.machine()
    chosen = {job: choose_dtype("auto", device, job) for job in ("training", "decoding")}
    missing = missing_parts(device)
    return {
        "machine": {
            "processor": measured.cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": memory_bytes(),
            "gpus": gpus(),
            "system": known["system"],
        },
        "versions": {
            "python": known["python"],
            **known["packages"],
            "commit": known["git_commit"],
            "cuda": known["cuda"],
        },
        "settings": {name: value for name in measured.SETTINGS if (value := os.environ.get(name))},
        "reached": {name: value for name, value in figures.items() if name != "conditions"},
        "chosen": {
            "device": str(device),
            **{
                job: {"dtype": str(dtype).removeprefix("torch."), "reason": why} for job, (dtype, why) in chosen.items()
            },
            "4-bit kernels": nf4.describe(device),
            "kept in": str(built.folder()),
        },
        "missing": missing,
        "verdict": verdict(device, missing),
    }


def missing_parts(device):
    """[(what is missing, the effect and what to do), ...]. device: the torch.device that minitune would use."""
    import torch
    from minitune_kernels import built, nf4_cpu

    found = []
    if why := nf4_cpu.why_not(torch.device("cpu")):
        found.append(("the C kernels", f"{why}. Without them decoding on a CPU takes several times as long"))
    for package, use in OPTIONAL.items():
        if importlib.util.find_spec(package) is None and (package != "triton" or device.type == "cuda"):
            found.append((package, f"it is needed for {use}: pip install {package}"))
    if torch.version.cuda is None:
        if shutil.which("nvidia-smi"):
            found.append(
                ("CUDA in torch", "the machine has an NVIDIA driver, but this build of torch is for CPUs only")
            )
    elif not torch.cuda.is_available():
        found.append(
            ("a GPU that torch can use", "torch was built for CUDA, but sees no device: check the driver (nvidia-smi)")
        )
    cache = built.folder()
    if cache == built.scratch():
        found.append(
            (
                "the cache folder",
                "every process compiles the kernels and measures the machine again; a line above says why",
            )
        )
    elif (space := shutil.disk_usage(cache).free) < LEAST_SPACE:
        found.append(
            ("disk space", f"{space / 1e9:.1f} GB are free on the disk of the cache folder; a 7 B model takes 15 GB")
        )
    return found


def verdict(device, missing):
    """One or two sentences on whether minitune is ready to run."""
    if device.type == "cuda":
        ready = "Ready: training and decoding run on the GPU."
    elif any(what == "the C kernels" for what, _ in missing):
        ready = "Works, but slowly: the C kernels cannot be built."
        missing = [(what, words) for what, words in missing if what != "the C kernels"]
    else:
        ready = "Ready: training and decoding run on the CPU, with compiled kernels."
    return ready + (f" {len(missing)} optional part{'s are' * (len(missing) > 1) or ' is'} missing." if missing else "")


def memory_bytes():
    """Memory of the machine in bytes, 0 if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def gpus():
    """[{"name", "capability", "memory_bytes"}, ...] for the GPUs that torch sees."""
    import torch

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory} for p in found]


def as_lines(report):
    """The report as lines of text, at most 80 columns wide."""
    machine, reached, chosen = report["machine"], report["reached"], report["chosen"]
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else ""
    yield from section(
        "machine", f"{machine['processor']}, {machine['cores']} cores ({machine['threads']} threads){memory}"
    )
    for gpu in machine["gpus"]:
        yield from section("", f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB")
    versions = [f"{name} {value}" for name, value in report["versions"].items() if value]
    yield from section("versions", ", ".join(versions))
    for name, value in report["settings"].items():
        yield from section("setting", f"{name}={value}")
    yield ""
    yield f"Speed of one core (measured in {reached['seconds']:.1f} s):"
    rates = [
        f"{kind} {rate / 1e9:,.0f}" if rate else f"{kind} not available" for kind, rate in reached["products"].items()
    ]
    yield from section("products", f"{', '.join(rates)} GFLOP/s")
    rates = [f"{kind} {rate / 1e9:.1f}" for kind, rate in reached["one row"].items()]
    yield from section("one row", f"{', '.join(rates)} billion weights/s: a step of decoding")
    yield from section("memory", f"copy {reached['copy'] / 1e9:.1f} GB/s, read {reached['read'] / 1e9:.1f} GB/s")
    yield ""
    yield "Products with few rows, in billion multiplications/s of C and of torch:"
    for product, dtypes in reached["few rows"].items():
        for dtype, found in dtypes.items():
            yield from section(f"{product} {dtype}".removeprefix("linear "), few_rows(found))
    yield ""
    yield "Chosen:"
    for job in ("training", "decoding"):
        yield from section(job, f"{chosen[job]['dtype']} on {chosen['device']} ({chosen[job]['reason']})")
    yield from section("4 bit", chosen["4-bit kernels"])
    yield from section("cache", chosen["kept in"])
    if report["missing"]:
        yield ""
        yield "Missing:"
        for what, words in report["missing"]:
            first, *others = screen.wrap(f"{what}: {words}", 74)
            yield from (f"  - {first}", *(f"    {line}" for line in others))
    yield ""
    yield from screen.wrap(report["verdict"], 79)


def few_rows(found):
    """A result of measured.compared() in words."""
    rates = [
        f"{rows} row{'s' * (rows != '1')} {rate['C'] / 1e9:.1f} and {rate['torch'] / 1e9:.1f}"
        for rows, rate in found["rates"].items()
        if "C" in rate
    ]
    if not rates:
        return "torch, as there is no such product in C here"
    return f"C up to {found['max rows']} rows ({', '.join(rates)})"


def section(name, text):
    """Lines with a name on the left and `text`, wrapped, on the right."""
    for number, line in enumerate(screen.wrap(text, 66)):
        yield f"  {name if number == 0 else '':<10} {line}"


def without_names(value):
    """A report with placeholders for the home folder and the names of user and host in its texts."""
    if isinstance(value, dict):
        return {key: without_names(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_names(inner) for inner in value]
    if not isinstance(value, str):
        return value
    value = value.replace(str(Path.home()), "~")
    for name, instead in ((user_name(), "USER"), (platform.node(), "HOST"), (socket.gethostname(), "HOST")):
        if len(name) > 1:
            value = re.sub(rf"(?<=[/\\@]){re.escape(name)}(?![\w-])", instead, value)
    return value


def user_name():
    """The name of the user, "" if the system has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user id without a name
        return ""
