"""Benchmarks the NF4 kernels on shapes of real layers, in turn with bitsandbytes and torch, and against the best speed of this
machine.

A row of the result is one operation on one layer for M rows of x, either "hot" (always the same matrix) or "cycling" over
several matrices, so that none is in a cache. The systems run in turn (A B C A B C ...), so that ratios stay valid if the speed of
the machine drifts."""

import datetime
import importlib
import importlib.metadata
import io
import itertools
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from minitune_kernels import nf4, ops, ops_torch

from minitune.config import arg, positive
from minitune.device import DTYPES, choose_device, environment
from minitune.files import write_json, write_whole
from minitune.models.layers import Rope

LAYERS = {  # name: (out, in)
    "llama-2-7b attention": (4096, 4096),
    "llama-2-7b gate, up": (11008, 4096),
    "llama-2-7b down": (4096, 11008),
    "mistral-7b k, v": (1024, 4096),
    "mistral-7b gate, up": (14336, 4096),
    "mistral-7b down": (4096, 14336),
    "phi-2 attention": (2560, 2560),
    "phi-2 fc1": (10240, 2560),
    "phi-2 fc2": (2560, 10240),
}
MATRICES = 8  # matrices of a cycling measurement
CEILING_BYTES = 256 << 20  # size of the tensor that is copied to measure the bandwidth
FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


@dataclass(frozen=True)
class BenchKernelsConfig:
    """The options of bench_kernels.py."""

    layers: tuple[str, ...] = arg(tuple(LAYERS), "layers to measure", choices=tuple(LAYERS))
    rows: tuple[int, ...] = arg((1, 4, 16, 64, 512, 2048), "numbers M of rows of x")
    dtype: str = arg("bf16", "dtype of x and of the dequantised weight", choices=tuple(DTYPES))
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")
    threads: int | None = arg(None, "CPU threads; not set: torch's choice")
    seconds: float = arg(0.5, "seconds for each measurement and system; at least 5 calls are made")
    peers: bool = arg(True, "measure bitsandbytes (if installed) and torch's linear layers too")
    out: str | None = arg(None, "folder for JSON and PNG; not set: kernels/benchmarks")

    def __post_init__(self):
        positive(self, "threads", "seconds")
        if bad := [rows for rows in self.rows if rows < 1]:
            raise ValueError(f"rows has {bad[0]}, expected numbers above 0")


def bench_kernels(config, say=print):
    """Measure, print the table, write JSON and PNG. Returns the results, a dict."""
    device, dtype = choose_device(config.device), DTYPES[config.dtype]
    if config.threads:
        torch.set_num_threads(config.threads)
    timer = Timer(device, config.seconds)
    say(f"{nf4.describe(device)}; {torch.get_num_threads()} threads")
    ceilings = measure_ceilings(device, dtype, timer)
    say(f"ceilings: copy {ceilings['copy_gb_s']:.1f} GB/s, matmul {ceilings['matmul_tflop_s']:.3f} TFLOP/s\n")
    rows = []
    say(HEADER)
    for layer in config.layers:
        for operation in operations(layer, dtype, device, config):
            for mode, count in (("hot", 1), ("cycling", MATRICES)):
                timings = timer.in_turn({name: calls[:count] for name, calls in operation["systems"].items()})
                row = finish_row(layer, operation, mode, timings, ceilings)
                rows.append(row)
                say(table_line(row))
    if device.type == "cuda" and ops.why_no_triton(device) is None:
        rows += triton_rows(dtype, device, timer, ceilings, say)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": environment(device) | {"bitsandbytes": version_of("bitsandbytes")},
        "backend": nf4.describe(device),
        "settings": {"dtype": config.dtype, "threads": torch.get_num_threads(), "seconds": config.seconds},
        "ceilings": ceilings,
        "rows": rows,
    }
    name = re.sub(r"[^a-z0-9]+", "-", f"{record['machine']['device']} {config.dtype}".lower()).strip("-")
    folder = Path(config.out) if config.out else FOLDER
    write_json(folder / f"{name}.json", record)
    draw_roofline(record, folder / f"{name}.png")
    say(f"\n{folder / name}.json, .png")
    return record


class Timer:
    """Times calls on a device. On a GPU a batch of calls is recorded as one CUDA graph, to exclude the launch overhead of
    Python."""

    def __init__(self, device, seconds):
        self.device, self.seconds = device, seconds

    def in_turn(self, systems):
        """{name: [seconds per call, ...]}. systems: {name: list of functions}. Every round runs one batch of each system."""
        batches = {name: self.batch(calls) for name, calls in systems.items()}
        for run, _ in batches.values():
            run()
        timings = {name: [] for name in systems}
        started = time.perf_counter()
        while len(next(iter(timings.values()))) < 5 or time.perf_counter() - started < self.seconds * len(systems):
            for name, (run, count) in batches.items():
                timings[name].append(self.time(run) / count)
        return timings

    def batch(self, calls):
        """(function that makes some of the calls, their number)."""
        if self.device.type != "cuda":
            cycle = itertools.cycle(calls)
            return (lambda: next(cycle)()), 1
        for call in calls:  # compiles kernels and allocates workspaces before the capture
            call()
        count = max(20, len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in itertools.islice(itertools.cycle(calls), count):
                call()
        return graph.replay, count

    def time(self, run):
        """Seconds of one run()."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def measure_ceilings(device, dtype, timer):
    """The best speed of this machine: of a copy in GB/s (read plus written bytes), and of a matrix product in TFLOP/s."""
    source = torch.ones(CEILING_BYTES // 4, device=device)
    target = torch.empty_like(source)
    x, w = (torch.randn(2048, 4096, device=device).to(dtype) for _ in range(2))
    seconds = timer.in_turn({"copy": [lambda: target.copy_(source)], "matmul": [lambda: F.linear(x, w)]})
    return {
        "copy_gb_s": 2 * CEILING_BYTES / min(seconds["copy"]) / 1e9,
        "matmul_tflop_s": 2 * len(x) * len(w) * x.shape[1] / min(seconds["matmul"]) / 1e12,
    }


def operations(layer, dtype, device, config):
    """Yields {"name", "M", "bytes", "flops", "systems"} for each operation on a layer.

    bytes: the least number of bytes that the operation must move. flops: of the product. systems: {name: list of functions,
    one for each of several matrices}."""
    shape = LAYERS[layer]
    n, size = shape[0] * shape[1], torch.empty(0, dtype=dtype).element_size()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.05).to(dtype).to(device)
    packed, absmax = nf4.quantize(weight)
    copies = [(packed.clone(), absmax.clone()) for _ in range(MATRICES)]
    nested = [nf4.double_quantize(scale) for _, scale in copies]
    kept = torch.empty(shape, dtype=dtype, device=device)
    dense = [weight.clone() for _ in range(MATRICES)] if config.peers else []
    peer = bitsandbytes_peer(copies, shape, dtype) if config.peers else None
    int4 = int4_peer(shape, device, dtype) if config.peers else None
    dequantize = {"minitune": [lambda c=c: nf4.dequantize(*c, shape, dtype, out=kept) for c in copies]}
    if peer:
        dequantize["bitsandbytes"] = peer["dequantize"]
    small = n // 2 + n // 64 * 4
    yield {"name": "dequantize", "M": 0, "bytes": small + n * size, "flops": 0, "systems": dequantize}
    double = {"minitune": [lambda p=p, s=s: nf4.dequantize(p, s, shape, dtype, out=kept)
                           for (p, _), s in zip(copies, nested, strict=True)]}  # fmt: skip
    yield {"name": "dequantize nf4-dq", "M": 0, "bytes": n // 2 + n // 64 + n * size, "flops": 0, "systems": double}
    for M in config.rows:
        x = torch.randn(M, shape[1], generator=torch.Generator().manual_seed(M)).to(dtype).to(device)
        moved = small + (M * shape[0] + M * shape[1]) * size
        systems = products(x, shape, copies, dense, peer, int4 if M <= 16 else None)
        yield {"name": "matmul", "M": M, "bytes": moved, "flops": 2 * M * n, "systems": systems}
        if M == 512:
            systems = training_products(x, shape, copies, peer)
            yield {"name": "forward + backward", "M": M, "bytes": 2 * moved, "flops": 4 * M * n, "systems": systems}


def products(x, shape, copies, dense, peer, int4):
    """{system: list of functions} that multiply x by the weight."""
    systems = {"minitune": [lambda c=c: no_grad(nf4.matmul, x, *c, shape) for c in copies]}
    if peer:
        systems["bitsandbytes"] = [lambda f=f: no_grad(f, x) for f in peer["layers"]]
    if dense:
        systems["torch fp32" if x.element_size() == 4 else "torch 16 bit"] = [lambda w=w: F.linear(x, w) for w in dense]
    if int4:
        systems["torch int4"] = int4(x)
    return systems


def training_products(x, shape, copies, peer):
    """{system: list of functions} that compute the product and the gradient of x."""
    layers = {"minitune": [lambda x, c=c: nf4.matmul(x, *c, shape) for c in copies]}
    if peer:
        layers["bitsandbytes"] = peer["layers"]
    return {name: [lambda f=f: forward_backward(f, x) for f in functions] for name, functions in layers.items()}


def no_grad(function, *arguments):
    with torch.no_grad():
        return function(*arguments)


def forward_backward(layer, x):
    """The gradient of x for a function of x."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return torch.autograd.grad(y, x, y.detach())


def bitsandbytes_peer(copies, shape, dtype):
    """{"dequantize": list of functions, "layers": list of functions of x} of bitsandbytes, or None if it is not installed."""
    try:
        bnb = importlib.import_module("bitsandbytes")  # only measured; minitune does not use it
    except ImportError:
        return None
    code = torch.tensor(nf4.CODE, device=copies[0][0].device)
    state = lambda absmax: bnb.functional.QuantState(
        absmax, shape=torch.Size(shape), code=code, blocksize=64, quant_type="nf4", dtype=dtype
    )
    pairs = [(packed.view(-1, 1), state(absmax)) for packed, absmax in copies]
    return {
        "dequantize": [lambda p=p, s=s: bnb.functional.dequantize_4bit(p, s) for p, s in pairs],
        "layers": [lambda x, p=p, s=s: bnb.matmul_4bit(x, p.t(), s) for p, s in pairs],
    }


def int4_peer(shape, device, dtype):
    """A function from x to a list of functions that run torch's 4-bit linear layer (groups of 64), on a CPU in bf16; else
    None."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return None
    indices = torch.randint(0, 16, shape, dtype=torch.int32)
    weights = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(indices, 1) for _ in range(MATRICES)]
    scales = torch.ones(shape[1] // 64, shape[0], 2, dtype=dtype)
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: [lambda w=w: multiply(x, w, 64, scales) for w in weights]


def triton_rows(dtype, device, timer, ceilings, say):
    """Rows of the result for the operations in Triton, forward and backward, compared with ops_torch.py, for 2048 tokens of
    Llama-2-7B."""
    rows = []
    for name, moved, ours, plain, inputs in triton_examples(dtype, device):
        systems = {}
        for system, function in (("minitune", ours), ("torch", plain)):
            step = lambda f=function, i=inputs: forward_backward_all(f, i)
            systems[system] = [step]
        operation = {"name": name, "M": 2048, "bytes": moved, "flops": 0}
        row = finish_row("llama-2-7b", operation, "hot", timer.in_turn(systems), ceilings)
        rows.append(row)
        say(table_line(row))
    return rows


def triton_examples(dtype, device):
    """[(name, least number of bytes to move, function in Triton, function in PyTorch, inputs), ...]. The Triton cross-entropy
    overwrites the logits with their gradient."""
    from minitune_kernels import ops_triton

    at = {"device": device, "dtype": dtype}
    size = torch.empty(0, dtype=dtype).element_size()
    x, weight = torch.randn(1, 2048, 4096, requires_grad=True, **at), torch.ones(4096, **at)
    gate, up = (torch.randn(1, 2048, 11008, requires_grad=True, **at) for _ in range(2))
    q = torch.randn(1, 2048, 32, 128, **at).transpose(1, 2).requires_grad_()
    cos, sin = Rope(128, 10000.0).tables(torch.arange(2048, device=device)[None], dtype)
    logits, targets = torch.randn(2048, 32000, **at), torch.randint(32000, (2048,), device=device)
    return [
        ("rms_norm", 5 * x.numel() * size, lambda x: ops_triton.rms_norm(x, weight, 1e-5),
         lambda x: ops_torch.rms_norm(x, weight, 1e-5), [x]),
        ("swiglu", 8 * gate.numel() * size, ops_triton.swiglu, ops_torch.swiglu, [gate, up]),
        ("rope", 4 * q.numel() * size, lambda q: ops_triton.rope(q, cos, sin), lambda q: ops_torch.rope(q, cos, sin), [q]),
        ("cross_entropy", 2 * logits.numel() * size, lambda: ops_triton.loss_and_gradient(logits, targets),
         lambda: ops_torch.loss_and_gradient(logits, targets), []),
    ]  # fmt: skip


def forward_backward_all(function, inputs):
    """The gradients of all inputs of a function, or its result if it has no inputs."""
    y = function(*inputs)
    return torch.autograd.grad(y, inputs, y.detach()) if inputs else y


def finish_row(layer, operation, mode, timings, ceilings):
    """One row of the result, a dict. timings: {system: [seconds per call, ...]}. ceilings: of measure_ceilings()."""
    ours = statistics.median(timings["minitune"])
    best = max(operation["bytes"] / ceilings["copy_gb_s"] / 1e9, operation["flops"] / ceilings["matmul_tflop_s"] / 1e12)
    row = {
        "layer": layer,
        "shape": LAYERS.get(layer),
        "operation": operation["name"],
        "M": operation["M"],
        "mode": mode,
        "ms": {},
        "gb_s": operation["bytes"] / ours / 1e9,
        "tflop_s": operation["flops"] / ours / 1e12,
        "bytes": operation["bytes"],
        "flops": operation["flops"],
        "of_ceiling": best / ours,
        "times_faster_than": {},
    }
    for system, seconds in timings.items():
        p20, *_, p80 = statistics.quantiles(seconds, n=5)
        median = statistics.median(seconds)
        row["ms"][system] = {"median": median * 1e3, "p20": p20 * 1e3, "p80": p80 * 1e3, "calls": len(seconds)}
        if system != "minitune":  # median of the ratios of calls in the same round
            pairs = zip(seconds, timings["minitune"], strict=True)
            row["times_faster_than"][system] = statistics.median(theirs / own for theirs, own in pairs)
    return row


HEADER = (
    f"{'layer':<22}{'operation':<19}{'M':>5} {'':<8}{'ms':>9}{'p20':>9}{'p80':>9}{'speed':>15}{'of ceiling':>12}  "
    "times faster than"
)


def table_line(row):
    """A row of the result as a line of the table."""
    own = row["ms"]["minitune"]
    is_product = row["M"] > 16 and row["flops"]
    speed = f"{row['tflop_s']:.3f} TFLOP/s" if is_product else f"{row['gb_s']:.1f} GB/s"
    ratios = ", ".join(f"{system} {ratio:.2f}" for system, ratio in row["times_faster_than"].items())
    return (
        f"{row['layer']:<22}{row['operation']:<19}{row['M'] or '':>5} {row['mode']:<8}{own['median']:>9.3f}{own['p20']:>9.3f}"
        f"{own['p80']:>9.3f}{speed:>15}{row['of_ceiling']:>12.0%}  {ratios}"
    )


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def draw_roofline(record, path):
    """Write the roofline plot: TFLOP/s of the products over arithmetic intensity, with the limits of bandwidth and of matmul."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    products = [row for row in record["rows"] if row["operation"] == "matmul" and row["mode"] == "cycling"]
    if not products:
        return
    figure, axes = plt.subplots(figsize=(8.5, 5.5), layout="constrained")
    bandwidth, peak = record["ceilings"]["copy_gb_s"] / 1e3, record["ceilings"]["matmul_tflop_s"]
    intensities = [row["flops"] / row["bytes"] for row in products]
    low, high = min(intensities) / 2, max(intensities) * 2
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    axes.plot(xs, [min(bandwidth * x, peak) for x in xs], color="#333333", linewidth=1.5, label="roof: copy, matmul")
    colours = {"minitune": "#1f5fa8", "bitsandbytes": "#c8501e", "torch int4": "#7a5ea8"}
    markers = {"minitune": "o", "bitsandbytes": "s"}
    for system in dict.fromkeys(system for row in products for system in row["ms"]):
        shown = [(row["flops"] / row["bytes"], row["flops"] / row["ms"][system]["median"] / 1e9)
                 for row in products if system in row["ms"]]  # fmt: skip
        axes.scatter(
            *zip(*shown, strict=True), s=26, alpha=0.75, label=system, color=colours.get(system, "#5a9367"),
            marker=markers.get(system, "^"), linewidths=0,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that a 4-bit product must move")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"NF4 matmul on {record['machine']['device']}, {record['settings']['threads']} threads, "
                   f"{record['settings']['dtype']}, {record['date']}", fontsize=10)  # fmt: skip
    by_rows = {}
    for row, x in zip(products, intensities, strict=True):
        by_rows.setdefault(row["M"], []).append(x)
    for rows, found in by_rows.items():
        axes.annotate(f"M={rows}", (statistics.median(found), axes.get_ylim()[0]), fontsize=8, ha="center", va="bottom")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    plt.close(figure)
    write_whole(path, image.getvalue())
