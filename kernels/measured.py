"""What this machine reaches: matrix products in fp32, bf16 and int8, products of few rows, 4-bit products, memory. Measured once,
in less than half a second, and kept with the compiled kernels; measured again when the processor, torch, the C kernels or a
setting that changes the arithmetic is another one.

A processor's flags do not say what it reaches: a Xeon with AVX-512 bf16 multiplies bf16 at half its fp32 rate, a Zen 4 at
twice. So `auto` takes the dtype that was faster here (faster_dtype), and a product of few rows is computed in C up to the number
of rows at which torch was faster here (max_rows)."""

import functools
import hashlib
import itertools
import json
import os
import platform
import re
import time
from pathlib import Path

import torch
from minitune_kernels import built
from minitune_kernels.direct import apart
from torch.nn import functional as F

FORMAT = 2  # of the kept file
ROWS, WIDTH = 256, 1024  # of a product as in training
WIDE = 4096  # in a row of the weights of few rows by a weight, which lie in 64 MB: more than the caches hold, as a model is
PART, PART_4BIT = 256, 1024  # rows of a weight; as many as its dequantised copy needs to be written past the caches
COUNTS = (1, 4, 8, 16, 32, 64, 128)  # rows for which C and torch are compared; the last is the most that C takes
TIE = 1.1  # C may be this much slower, as its calls can be replayed (replay.py) and give a row the same bits in any company
CLEAR = 4  # times slower: no further measurement would change that
SETTINGS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MINITUNE_KERNELS", "DNNL_MAX_CPU_ISA", "CC")
SHARE = 0.05  # seconds for one group of measurements
TURN = 0.005  # seconds for one number of rows
# Time of this thread alone, which a busy machine does not stretch, where the system counts it finely enough.
CLOCK = time.thread_time if time.get_clock_info("thread_time").resolution < 1e-6 else time.perf_counter
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        "format": FORMAT,
        "processor": cpu_name(),
        "flags": hashlib.sha256(flags.encode()).hexdigest()[:16],  # a machine of the same name may lack some
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "kernels": kernels(),
        **{name: os.environ.get(name, "") for name in SETTINGS},
    }


def kernels():
    """Instruction set and sources of the C kernels; "none" without a compiler, or where MINITUNE_KERNELS asks for others."""
    if os.environ.get("MINITUNE_KERNELS") not in (None, "", "cpu"):
        return "none"
    try:
        _, level = built.library()
    except built.NoCompiler:
        return "none"
    texts = [(built.HERE / name).read_bytes() for name in (*built.SOURCES, *built.HEADERS)]
    return f"{built.LEVELS[level]} {hashlib.sha256(b''.join(texts)).hexdigest()[:16]}"


@functools.cache
def machine():
    """The figures of this machine's CPU, kept or measured now, all of one core: {"conditions", "seconds" that measuring took,
    "products" {dtype: operations/s}, "one row" {dtype: weights/s}, "few rows" {"linear", "4 bit": {dtype: see compared()}},
    "copy", "read" (bytes/s)}."""
    found = conditions()
    key = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    name = f"machine-{key}"
    if (path := built.kept(name, ".json")) is not None:
        kept = json.loads(path.read_bytes())
        if isinstance(kept, dict) and kept.get("conditions") == found:
            return kept
    figures = {"conditions": found, **apart(measure)}
    built.keep(name, ".json", json.dumps(figures, indent=1).encode())
    return figures


def forget():
    """Have the next machine() measure again."""
    for path in built.folder().glob("machine-*.json"):
        path.unlink(missing_ok=True)
    machine.cache_clear()
    max_rows.cache_clear()


@functools.cache
def max_rows(product, dtype):
    """The largest number of rows of x for which C multiplies no slower than torch; 0: none. One number for the whole process.
    product: "linear" or "4 bit". fp16 is taken to be like fp32, which C computes it in."""
    return machine()["few rows"][product]["bf16" if dtype is torch.bfloat16 else "fp32"]["max rows"]


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
    started = CLOCK()
    numbers = torch.full((WIDE * WIDE,), 0x3D4D3D4D, dtype=torch.int32)  # 0.05, be they read as fp32 or as bf16
    flat = {name: numbers.view(dtype) for name, dtype in DTYPES.items()}
    figures = {"products": products(flat)}
    linear = {name: compared(linear_rates(values)) for name, values in flat.items()}
    packed, scales = numbers.view(torch.uint8), flat["fp32"]
    four_bit = {name: compared(four_bit_rates(packed, scales, values)) for name, values in flat.items()}
    figures["one row"] = {name: max(found["rates"]["1"].values()) for name, found in linear.items()}
    figures["few rows"] = {"linear": linear, "4 bit": four_bit}
    half = len(numbers) // 2
    seconds = race({"copy": lambda: numbers[:half].copy_(numbers[half:]), "read": flat["fp32"].sum}, SHARE)
    figures["copy"], figures["read"] = numbers.nbytes / seconds["copy"], numbers.nbytes / seconds["read"]
    return {"seconds": round(CLOCK() - started, 3), **figures}


def products(flat):
    """{"fp32", "bf16", "int8": operations/s, None where torch has no such product}, forward and backward. flat: {dtype: numbers}.
    One that is slow with few rows, and would take a second with many, is not tried with many."""
    whole = torch.ones(WIDTH, WIDTH, dtype=torch.int8)

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
    found |= rates([name for name in names if found[name] > max(found.values()) / CLEAR], ROWS, WIDTH, SHARE)
    return found | ({} if "int8" in names else {"int8": None})


def forward_and_backward(x, weight):
    """The two products that a frozen linear layer costs in training."""
    F.linear(x, weight) @ weight


# --- few rows: C or torch ---


def compared(rates, seconds=SHARE, clock=CLOCK):
    """{"max rows": number of rows up to which C is no slower than torch, "rates": {rows: {"C", "torch": multiplications/s}}}.

    rates(rows): measures both, or torch alone where C has no such product. A loss of C is measured three times, so that a busy
    moment of the machine does not decide. After `seconds` no more rows are tried."""
    table, most, end = {}, 0, clock() + seconds
    for rows in COUNTS:
        if rows > 1 and clock() > end:
            break
        found = rates(rows)
        for _ in range(2):
            if "C" in found and is_slower(found):
                found = {name: max(rate, found[name]) for name, rate in rates(rows).items()}
        table[str(rows)] = found
        if is_slower(found):
            break
        most = rows
        if rows >= 8 and found["C"] > CLEAR * found["torch"]:  # which is slow with more rows too
            most = COUNTS[-1]
            break
    return {"max rows": most, "rates": table}


def is_slower(rates):
    return rates.get("C", 0) * TIE < rates["torch"]


def linear_rates(values):
    """The argument of compared() for x @ weight.T. values: numbers of a dtype, of which every call takes the next ones."""
    from minitune_kernels import ops_cpu  # which asks max_rows()

    parts = itertools.cycle(values.view(-1, PART, WIDE))
    calls = {"torch": lambda x: F.linear(x, next(parts))}
    if ops_cpu.runs_here(os.environ.get("MINITUNE_KERNELS")) and ops_cpu.multiplies(values.dtype):
        calls["C"] = lambda x: ops_cpu.linear(x, next(parts))
    return rates_of(calls, values, PART)


def four_bit_rates(packed, scales, values):
    """The same for the product of a 4-bit weight, (packed, scales). Dequantised weights are written over `values`, all but those
    of x, which are in the first part."""
    from minitune_kernels import nf4_cpu, nf4_reference, ops_cpu  # which ask max_rows()

    has_c, shape = ops_cpu.runs_here(os.environ.get("MINITUNE_KERNELS")), (PART_4BIT, WIDE)
    parts = itertools.cycle(packed.view(-1, PART_4BIT * WIDE // 2))
    weights = itertools.cycle(values.view(-1, *shape)[1:])
    scales = scales[: PART_4BIT * WIDE // nf4_reference.BLOCK]
    dequantize, given = (nf4_cpu.dequantize, (scales,)) if has_c else (nf4_reference.dequantize, scales)
    calls = {"torch": lambda x: F.linear(x, dequantize(next(parts), given, next(weights)))}
    if has_c:
        calls["C"] = lambda x: nf4_cpu.matmul(x, next(parts), given, shape, x.new_empty(len(x), PART_4BIT))
    return rates_of(calls, values, PART_4BIT)


def rates_of(calls, values, outputs):
    """The argument of compared(): the rates of functions of x (rows, WIDE), which multiply it by a weight (outputs, WIDE)."""
    for call in calls.values():  # the first call is slow: memory comes, code is prepared
        call(values[:WIDE].view(1, WIDE))

    def rates(rows):
        x = values[: rows * WIDE].view(rows, WIDE)
        seconds = race({name: functools.partial(call, x) for name, call in calls.items()}, TURN)
        return {name: rows * outputs * WIDE / t for name, t in seconds.items()}

    return rates


def race(calls, seconds, clock=CLOCK):
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
        cost = {name: 1 / products[name] for name in DTYPES}
    else:  # as many tokens of an answer as of its prompt
        cost = {name: 2 / products[name] + 1 / rows[name] for name in DTYPES}
    name = min(cost, key=cost.get)
    words = ", ".join(f"{products[d] / 1e12:.2g} TFLOP/s in {d}" for d in DTYPES)
    if job == "decoding":
        words += "; one row reads " + ", ".join(f"{rows[d] / 1e9:.2g} G weights/s in {d}" for d in DTYPES)
    return DTYPES[name], f"measured here: {words}"
