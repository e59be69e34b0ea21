"""The files of a run: metrics.jsonl, the state that makes a resume exact, curves.png. Each appears whole or not at
all."""

import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import re
import tempfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from minitune.files import parse_json, read_bytes, read_json, to_json, write_whole
from minitune.schema import COUNT, Number, check
from minitune.screen import short, some


@contextmanager
def hold(run):
    """Hold the run folder for this process: made if need be, proved writable, locked, and free of the temporary files
    of a process that was killed. A folder that is still empty in the end goes away again.

    Raises ValueError where it cannot be written, is a model's folder, or another process works in it."""
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    handle = None
    try:
        try:
            run.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run).close()
            handle = os.open(run, os.O_RDONLY)
        except OSError as error:
            raise ValueError(
                f"the run folder {run} cannot be written: {error.strerror}; choose another --run"
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:  # anything else: a file system without locks, so we go without
                raise ValueError(f"another process works in {run}; wait for it, or choose another --run") from None
        if (run / "config.json").exists():
            stored = read_json(run / "config.json")
            if isinstance(stored, dict) and "model_type" in stored:
                raise ValueError(f"{run} is the folder of a model, which a run would overwrite; choose another --run")
        for half in (path for part in ("", "adapter", "best", "last") for path in (run / part).glob(".*.part")):
            half.unlink()
        yield
    finally:
        if handle is not None:
            os.close(handle)
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def append_line(path, record):
    """Append `record` as one JSON line, with null for a number that is not finite (JSON has none).

    One write call: a kill leaves the whole line or none of it, and so does a full disk (OSError with the path in it)."""
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    line = (to_json(record) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        if os.write(handle, line) < len(line):
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


def read_lines(path, shape=None):
    """The records of a .jsonl file; an absent file has none. A torn last line (a crash of the machine) is left out.

    shape: of a line, for schema.check(). Raises ValueError with the line that is not JSON or does not fit."""
    path = Path(path)
    lines = read_bytes(path).split(b"\n") if path.exists() else []  # splitlines() would cut at U+2028 in an answer
    records = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            found = [parse_json(line.decode(), where)] if line else []
        except ValueError:  # not JSON, or not UTF-8
            if number < len(lines):
                raise ValueError(f"{where} is not JSON: {short(line)}") from None
        else:
            records += found if shape is None else [check(record, shape, where) for record in found]
    return records


STEPS = {"step": COUNT, "loss?": (float, None), "eval_loss?": (float, None), "lr?": (float, None)}


def read_steps(path):
    """The records of metrics.jsonl or samples.jsonl. Raises ValueError, with the line, unless each has a step that is
    above the one before it."""
    records = read_lines(path, STEPS)
    for number, (before, record) in enumerate(itertools.pairwise(records), 2):
        if record["step"] <= before["step"]:
            raise ValueError(
                f"{path}, line {number}: step is {record['step']} after step {before['step']}, expected a later one; "
                "put the lines in order, or start again with --resume never"
            )
    return records


def last_step(path):
    """The step of the last line of metrics.jsonl that can be read, 0 where there is none."""
    for line in reversed(Path(path).read_bytes().split(b"\n") if Path(path).is_file() else []):
        with suppress(ValueError):
            return check(parse_json(line.decode(), path), STEPS, path)["step"]
    return 0


def keep_lines(path, size, crc, step):
    """Cut a .jsonl file to its first `size` bytes, those of the state of `step`: a resumed run writes the others again.

    Raises ValueError where it does not begin with these bytes. crc: their zlib.crc32()."""
    content = read_bytes(path) if path.exists() else b""
    if len(content) < size or zlib.crc32(content[:size]) != crc:
        raise ValueError(
            f"{path} was changed or cut since step {step} was saved, so the run cannot go on with it; put back the file as "
            "it was, or start again with --resume never"
        )
    if len(content) > size:
        write_whole(path, content[:size])


def sync_lines(path, size, crc):
    """Have the lines of a .jsonl file on the disk, where it is one. Returns [bytes, zlib.crc32] of them, from those of its
    first `size` bytes. Raises OSError where it has become shorter."""
    if size == 0 and not path.exists():
        return [0, 0]
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        file.seek(size)
        added = file.read()
        if os.fstat(file.fileno()).st_size < size:
            raise OSError(f"{path} was cut while this training wrote it; the state of the last save stays")
    return [size + len(added), zlib.crc32(added, crc)]


def model_fingerprint(folder):
    """sha256 over what a model folder holds: config, tokenizer, and of each weight file its size and 16 samples."""
    digest = hashlib.sha256()
    for name in (
        "config.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
    ):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    for path in sorted(p for p in folder.glob("*.safetensors") if p.is_file()):  # not a link whose blob is gone
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for i in range(16):
                file.seek(size * i // 16)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()


def file_sha256(path):
    """sha256 of a file, or None where there is none."""
    return hashlib.sha256(read_bytes(path)).hexdigest() if Path(path).exists() else None


def adapter_folder(run):
    """Where the adapter of a run lies: adapter/, which train.py writes in the end; of a run that did not end best/ or last/.
    None where there is none."""
    folders = (Path(run) / name for name in ("adapter", "best", "last"))
    return next((folder for folder in folders if (folder / "adapter_model.safetensors").is_file()), None)


def adapter_fingerprint(folder):
    """sha256 of an adapter in PEFT's format, or None where `folder` is None or holds no adapter.

    Whatever is made from an adapter (answers, scores, points of a sweep) stores it: what does not fit is out of date."""
    if folder is None:
        return None
    parts = [file_sha256(Path(folder) / name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    return None if None in parts else hashlib.sha256("".join(parts).encode()).hexdigest()


@dataclass
class Progress:
    """What a run knows of itself beyond its tensors."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens read, prompts included
    best_loss: float | None = None
    best_step: int | None = None
    best_sha256: str | None = None  # of the weights in best/, which a kill may leave newer than this state
    evaluations_since_best: int = 0
    first_loss: float | None = None  # of step 1
    recent_losses: list[float] = field(default_factory=list)
    logged: dict = field(default_factory=dict)  # {file: [bytes, crc32]} of metrics.jsonl and samples.jsonl up to here
    config: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)  # what must be the same in a resume beyond the options: {what: value}


PROGRESS = {
    "step": COUNT,
    "tokens": COUNT,
    "best_loss": (float, None),
    "best_step": (COUNT, None),
    "best_sha256": (str, None),
    "evaluations_since_best": COUNT,
    "first_loss": (float, None),
    "recent_losses": [float],
    "logged": {str: [COUNT]},
    "config": {"max_steps": (COUNT, None), "epochs": Number(0), "model": str, "data": (str, None)},
    "facts": {str: str},
}
SCALER = {
    "scale": Number(0),
    "growth_factor": Number(1),
    "backoff_factor": Number(0, 1),
    "growth_interval": COUNT,
    "_growth_tracker": COUNT,
}


def random_state(device):
    """{name: state} of the generators that the dropout of a step draws from."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def save_state(path, progress, parameters, optimizer, scaler, random):
    """One safetensors file with everything that the next step depends on: weights, AdamW's moments, random state,
    progress, and a checksum over the whole file.

    parameters: {name: trained parameter}; random: of random_state(). One file, so that a kill can never leave halves of
    two states."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    tensors = {name: t.cpu().contiguous() for name, t in (tensors | random).items()}
    facts = {"format": "pt", "progress": json.dumps(asdict(progress)), "scaler": json.dumps(scaler.state_dict())}
    content = save(tensors, metadata=facts | {"sha256": NO_DIGEST})
    start, end = place_of_digest(content)
    write_whole(path, content[:start] + hashlib.sha256(content).hexdigest().encode() + content[end:])


NO_DIGEST = "0" * 64  # stands where the checksum goes while it is computed


def place_of_digest(content):
    """(start, end) of the 64 digits of the checksum in the bytes of a state file, None where it has none."""
    found = list(re.finditer(rb'"sha256":"([0-9a-f]{64})"', content[: 8 + int.from_bytes(content[:8], "little")]))
    return found[0].span(1) if len(found) == 1 else None


def read_state(path):
    """(the bytes, the metadata) of a state file. Raises ValueError unless it is whole, bit for bit."""
    content, problem = read_bytes(path), "it has no checksum"
    if place := place_of_digest(content):
        start, end = place
        digest = hashlib.sha256(content[:start] + NO_DIGEST.encode())
        digest.update(memoryview(content)[end:])
        problem = "its checksum does not fit" if digest.hexdigest().encode() != content[start:end] else None
    if problem:
        raise ValueError(f"{path} is not a whole state of a run: {problem}; use --resume never to start again")
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")].decode(), path)
    return content, check(header, {"__metadata__": {"progress": str, "scaler": str}}, path)["__metadata__"]


def read_progress(path):
    """The Progress in a state file, or None where there is no such file. Raises ValueError where it is damaged."""
    if not Path(path).exists():
        return None
    stored = check(parse_json(read_state(path)[1]["progress"], path), PROGRESS, f"{path}, progress")
    return Progress(**{f.name: stored[f.name] for f in fields(Progress)})


def load_state(path, parameters, optimizer, scaler):
    """Put the tensors of a state file back in place. Raises ValueError, with nothing changed, where names, shapes, dtypes
    or values are not those of a state of `parameters`: fused AdamW would read beyond the end of a moment."""
    content, metadata = read_state(path)
    scaler_state = parse_json(metadata["scaler"], path)
    if scaler_state != {}:
        check(scaler_state, SCALER, f"{path}, scaler")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole state of a run: {error}; use --resume never to start again") from None
    expected = {"random.cpu": torch.get_rng_state()}
    for name, parameter in parameters.items():
        expected[f"weight.{name}"] = parameter
        if f"step.{name}" in tensors:  # none where fp16 has skipped every step
            expected |= {f"{key}.{name}": parameter for key in ("exp_avg", "exp_avg_sq")}
            expected[f"step.{name}"] = torch.zeros(())
    device = next(iter(parameters.values())).device
    if "random.cuda" in tensors:
        expected["random.cuda"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else tensors["random.cuda"]
    kinds = lambda found: {name: f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for name, t in found.items()}
    there, wanted = kinds(tensors), kinds(expected)
    if other := next((name for name in {**wanted, **there} if wanted.get(name) != there.get(name)), None):
        raise ValueError(
            f"{path} is the state of another adapter: {some([other])} is {there.get(other, 'missing')}, expected "
            f"{wanted.get(other, 'no such tensor')}; use --resume never to start again"
        )
    if broken := [name for name, t in tensors.items() if not t.isfinite().all()]:
        raise ValueError(f"{path} holds NaN or infinity in {some(broken, 2)}; use --resume never to start again")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"weight.{name}"])
        moments = {key: tensors.get(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if moments["step"] is not None:
            optimizer.state[parameter] = {key: t.to(parameter.device) for key, t in moments.items()}
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
    if scaler_state:
        scaler.load_state_dict(scaler_state)


class Curve:
    """The records that curves.png is drawn from: every one of a short run, a regular part of a long one, so that neither
    memory nor the time of a drawing grows with the run."""

    LIMIT = 2000  # points of each line

    def __init__(self, records=()):
        self.lines = {"loss": [], "eval_loss": []}
        self.every, self.seen = {"loss": 1, "eval_loss": 1}, {"loss": 0, "eval_loss": 0}
        for record in records:
            self.add(record)

    def add(self, record):
        for key, keys in (("loss", ("step", "loss", "lr")), ("eval_loss", ("step", "eval_loss"))):
            if record.get(key) is None:
                continue
            if self.seen[key] % self.every[key] == 0:
                self.lines[key].append({k: record[k] for k in keys})
            self.seen[key] += 1
            if len(self.lines[key]) > self.LIMIT:
                self.lines[key], self.every[key] = self.lines[key][::2], self.every[key] * 2

    def records(self):
        return [*self.lines["loss"], *self.lines["eval_loss"]]


def draw_curves(records, path):
    """curves.png: training and held-out loss over the steps, the learning rate below."""
    image = io.BytesIO()
    curves(records).savefig(image, format="png", dpi=130)
    write_whole(path, image.getvalue())


def curves(records, figsize=(7, 5)):
    """The figure of curves.png, a matplotlib Figure, from the records of metrics.jsonl. figsize: in inches."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no state between figures
    from matplotlib.ticker import MaxNLocator

    train = [(r["step"], r["loss"], r["lr"]) for r in records if "loss" in r]
    held_out = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    figure = Figure(figsize=figsize, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    if train:
        steps, losses, rates = zip(*train, strict=True)
        smooth, average = [], losses[0]
        for loss in losses:
            average += (loss - average) * min(1.0, 2 / (1 + 0.05 * len(losses) + 1))
            smooth.append(average)
        top.plot(steps, losses, color="#9db8d9", linewidth=0.8)
        top.plot(steps, smooth, color="#1f5fa8", linewidth=1.8, label="training (smoothed)")
        bottom.plot(steps, rates, color="#555555", linewidth=1.2)
    if held_out:
        top.plot(
            *zip(*held_out, strict=True), color="#c8501e", marker="o", markersize=4, linewidth=1.5, label="held-out"
        )
    if train or held_out:
        top.legend(frameon=False)
    top.set_ylabel("loss per supervised token (nats)")
    bottom.set_ylabel("learning rate")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_xlabel("optimizer step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure
