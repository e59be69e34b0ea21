"""The files of a run: metrics.jsonl, the state that makes a resume exact, curves.png. Each appears whole or not at
all."""

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from minitune.files import read_json, write_whole


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

    One write call: a kill leaves the whole line or none of it, and so does a full disk (OSError)."""
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        if os.write(handle, line) < len(line):
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(handle)


def read_lines(path):
    """The records of a .jsonl file; an absent file has none. A torn last line (a crash of the machine) is left out."""
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else []  # splitlines() would cut at U+2028 in an answer
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records += [json.loads(line)] if line else []
        except ValueError:  # not JSON, or not UTF-8
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: {line[:80]!r}") from None
    return records


def keep_steps(path, last_step):
    """Drop the records of steps after `last_step`, which a resumed run will write again."""
    if Path(path).exists():
        kept = [record for record in read_lines(path) if record["step"] <= last_step]
        write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


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
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).exists() else None


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
    recent_losses: list[float] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)  # what must be the same in a resume beyond the options: {what: value}


def random_state(device):
    """{name: state} of the generators that the dropout of a step draws from."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def save_state(path, progress, parameters, optimizer, scaler, random):
    """One safetensors file with everything that the next step depends on: weights, AdamW's moments, random state,
    progress.

    parameters: {name: trained parameter}; random: of random_state(). One file, so that a kill can never leave halves of
    two states."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    tensors = {name: t.cpu().contiguous() for name, t in (tensors | random).items()}
    facts = {"format": "pt", "progress": json.dumps(asdict(progress)), "scaler": json.dumps(scaler.state_dict())}
    write_whole(path, save(tensors, metadata=facts))


def read_progress(path):
    """The Progress in a state file, or None where there is no such file."""
    if not Path(path).exists():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            return Progress(**json.loads(f.metadata()["progress"]))
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a state of a run ({error}); use --resume never to start again") from None


def load_state(path, parameters, optimizer, scaler):
    """Put the tensors of a state file back in place. Raises ValueError where they are not those of `parameters`."""
    with safe_open(path, framework="pt") as f:
        tensors = {name: f.get_tensor(name).clone() for name in f.keys()}
        scaler_state = json.loads(f.metadata()["scaler"])
    stored = {name.removeprefix("weight."): t.shape for name, t in tensors.items() if name.startswith("weight.")}
    if stored != {name: parameter.shape for name, parameter in parameters.items()}:
        raise ValueError(f"{path} holds the weights of another adapter; use --resume never to start again")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"weight.{name}"])
        moments = {
            key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors
        }
        if moments:
            optimizer.state[parameter] = {key: t.to(parameter.device) for key, t in moments.items()}
    torch.set_rng_state(tensors["random.cpu"])
    device = next(iter(parameters.values())).device
    if "random.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
    if scaler_state:
        scaler.load_state_dict(scaler_state)


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
