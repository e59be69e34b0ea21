"""What this machine reaches: matrix products in fp32, bf16 and int8, products of one row, 4-bit products, memory. Measured once,
in less than half a second, and kept with the compiled kernels; measured again when the processor, torch or a setting that
changes the arithmetic is another one.

A processor's flags do not say what it reaches: a Xeon with AVX-512 bf16 multiplies bf16 at half its fp32 rate, a Zen 4 at
twice."""

import functools
import hashlib
import json
import os
import platform
import re
import time
from pathlib import Path

import torch
from minitune_kernels import built, nf4, nf4_cpu, ops_cpu
from torch.nn import functional as F

ROWS, WIDTH = 256, 1024  # of a product as in training
WIDE = 4096  # of a product of one row: the weight is larger than the caches, as a model is
FEW = 16  # rows of a 4-bit product between one row and many
SETTINGS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MINITUNE_KERNELS", "DNNL_MAX_CPU_ISA", "CC")
SHARE = 0.06  # seconds for one group of measurements; there are six


def cpu_name():
    """The processor in the system's words."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def conditions():
    """What the figures depend on: {what: value}."""
    flags = Path("/proc/cpuinfo").read_text().partition("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    flags = " ".join(line for line in flags.splitlines() if line.startswith(("flags", "Features")))
    return {
        "processor": cpu_name(),
        "flags": hashlib.sha256(flags.encode()).hexdigest()[:16],  # a machine of the same name may lack some
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "kernels": nf4_cpu.describe() if nf4_cpu.why_not(torch.device("cpu")) is None else "none",
        **{name: os.environ.get(name, "") for name in SETTINGS},
    }


@functools.cache
def machine():
    """The figures of this machine's CPU, kept or measured now: {"conditions", "seconds" that measuring took, "products" {dtype:
    operations/s}, "one row" {dtype: weights/s}, "copy", "read" (bytes/s), "4 bit" {rows: weights/s}}, all of one core."""
    found = conditions()
    key = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    name = f"machine-{key}"
    if (path := built.kept(name, ".json")) is not None:
        return json.loads(path.read_bytes())
    figures = {"conditions": found, **measure()}
    built.keep(name, ".json", json.dumps(figures, indent=1).encode())
    return figures


def forget():
    """Have the next machine() measure again."""
    for path in built.folder().glob("machine-*.json"):
        path.unlink(missing_ok=True)
    machine.cache_clear()


@torch.no_grad()
def measure(threads=1):
    """The figures of machine() without its conditions. threads: one, since the threads of a busy machine wait for each other,
    which can slow a call a hundred times; what is faster on one core is faster on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return timed()
    finally:
        torch.set_num_threads(before)


def timed():
    started = time.perf_counter()
    large = torch.full((WIDE, WIDE), 0.05)
    other = large.bfloat16()
    figures = {"products": products(large, other)}
    calls = {"fp32": lambda: one_row(large[:1], large), "bf16": lambda: one_row(other[:1], other)}
    figures["one row"] = {name: WIDE**2 / t for name, t in race(calls, SHARE).items()}

    packed, scales = other.view(torch.uint8).view(-1)[: WIDE**2 // 2], large.view(-1)[: WIDE**2 // nf4.BLOCK]
    dtype = torch.bfloat16 if figures["one row"]["bf16"] > figures["one row"]["fp32"] else torch.float32
    calls = {
        str(rows): functools.partial(nf4.matmul, large[:rows].to(dtype), packed, scales, (WIDE, WIDE))
        for rows in (1, FEW)
    }
    figures["4 bit"] = {name: int(name) * WIDE**2 / t for name, t in race(calls, SHARE).items()}

    half = WIDE // 2
    seconds = race({"copy": lambda: large[:half].copy_(large[half:]), "read": large.sum}, SHARE)
    figures["copy"], figures["read"] = large.nbytes / seconds["copy"], large.nbytes / seconds["read"]
    return {"seconds": round(time.perf_counter() - started, 3), **figures}


def products(large, other):
    """{"fp32", "bf16", "int8": operations/s, None where torch has no such product}, forward and backward. large, other: numbers
    in fp32 and bf16. One that is slow with few rows, and would take a second with many, is not tried with many."""
    whole = torch.ones(WIDTH, WIDTH, dtype=torch.int8)
    flat = {"fp32": large.view(-1), "bf16": other.view(-1)}

    def rates(names, rows, width, seconds):
        """{name: operations/s} of x (rows, width) and a weight (width, width)."""
        weights = {name: flat[name][: width**2].view(width, width) for name in names if name in flat}
        calls = {name: functools.partial(forward_and_backward, w[:rows], w) for name, w in weights.items()}
        if "int8" in names:
            calls["int8"] = functools.partial(torch._int_mm, whole[:rows, :width], whole[:width, :width].T)
        work = {name: (2 if name == "int8" else 4) * rows * width**2 for name in names}
        return {name: work[name] / t for name, t in race(calls, seconds).items()}

    names = [*flat, "int8"]
    try:
        torch._int_mm(whole[:32, :32], whole[:32, :32])
    except (RuntimeError, AttributeError):
        names.remove("int8")
    found = rates(names, 8, WIDTH // 2, SHARE / 4)
    found |= rates([name for name in names if found[name] > max(found.values()) / 4], ROWS, WIDTH, SHARE)
    return found | ({} if "int8" in names else {"int8": None})


def forward_and_backward(x, weight):
    """The two products that a frozen linear layer costs in training."""
    F.linear(x, weight) @ weight


def one_row(x, weight):
    """The product of a decoding step."""
    return ops_cpu.linear(x, weight) if ops_cpu.fits(x, weight) else F.linear(x, weight)


def race(calls, seconds, clock=time.perf_counter):
    """{name: seconds of its fastest call}. The calls take turns, so that a busy moment of the machine meets all of them, until
    the time is used up. One that is four times slower than the fastest is called no more: its figure is clear."""
    best = {}
    end, rounds = clock() + seconds, 0
    while rounds < 2 or clock() < end:  # the first call is slow: memory comes, code is prepared
        for name, call in calls.items():
            if name not in best or best[name] <= 4 * min(best.values()):
                started = clock()
                call()
                best[name] = min(best.get(name, float("inf")), clock() - started)
        rounds += 1
    return best


def faster_dtype(job):
    """(torch dtype, the reason in words): the faster of fp32 and bf16 on this CPU. job: "training", which multiplies many rows,
    or "decoding", which reads a prompt of some rows and then takes one row a step."""
    found = machine()
    products, rows = found["products"], found["one row"]
    if job == "training":
        cost = {name: 1 / products[name] for name in ("fp32", "bf16")}
    else:  # as many tokens of an answer as of its prompt
        cost = {name: 2 / products[name] + 1 / rows[name] for name in ("fp32", "bf16")}
    name = min(cost, key=cost.get)
    words = ", ".join(f"{products[d] / 1e12:.2g} TFLOP/s in {d}" for d in ("fp32", "bf16"))
    if job == "decoding":
        words += "; one row reads " + ", ".join(f"{rows[d] / 1e9:.2g} G weights/s in {d}" for d in ("fp32", "bf16"))
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name], f"measured here: {words}"
