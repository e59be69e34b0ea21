"""The files of a run: metrics.jsonl, the state that makes a resume exact, curves.png. Each appears whole or not at
all."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from minitune.files import write_whole


def append_line(path, record):
    """Append `record` as one JSON line. One write call: a kill leaves the whole line or none of it."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, (json.dumps(record, ensure_ascii=False) + "\n").encode())
    finally:
        os.close(handle)


def read_lines(path):
    """The records of a .jsonl file; an absent file has none. A torn last line (a full disk) is left out."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: {line[:80]!r}") from None
    return records


def keep_steps(path, last_step):
    """Drop the records of steps after `last_step`, which a resumed run will write again."""
    if Path(path).exists():
        kept = [record for record in read_lines(path) if record["step"] <= last_step]
        write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


@dataclass
class Progress:
    """What a run knows of itself beyond its tensors."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens read, prompts included
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    recent_losses: list[float] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    data_fingerprint: str = ""


def save_state(path, progress, parameters, optimizer, scaler):
    """One safetensors file with everything that the next step depends on: weights, AdamW's moments, random state,
    progress.

    parameters: {name: trained parameter}. One file, so that a kill can never leave halves of two states."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    facts = {"format": "pt", "progress": json.dumps(asdict(progress)), "scaler": json.dumps(scaler.state_dict())}
    write_whole(path, save(tensors, metadata=facts))


def read_progress(path):
    """The Progress in a state file, or None where there is no such file."""
    if not Path(path).exists():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            return Progress(**json.loads(f.metadata()["progress"]))
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a state of a run ({error}); use --resume never to start again") from None


def load_state(path, parameters, optimizer, scaler):
    """Put the tensors of a state file back in place. Raises ValueError where they are not those of `parameters`."""
    with safe_open(path, framework="pt") as f:
        tensors = {name: f.get_tensor(name).clone() for name in f.keys()}
        scaler_state = json.loads(f.metadata()["scaler"])
    stored = {name.removeprefix("weight.") for name in tensors if name.startswith("weight.")}
    if stored != set(parameters):
        raise ValueError(f"{path} holds the weights of another adapter; use --resume never to start again")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"weight.{name}"])
        moments = {
            key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors
        }
        if moments:
            optimizer.state[parameter] = {
                key: t if key == "step" and t.device == parameter.device else t.to(parameter.device)
                for key, t in moments.items()
            }
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    if scaler_state:
        scaler.load_state_dict(scaler_state)


def draw_curves(records, path):
    """curves.png: training and held-out loss over the steps, the learning rate below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train = [(r["step"], r["loss"], r["lr"]) for r in records if "loss" in r]
    held_out = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=[3, 1], layout="constrained")
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
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    temporary = Path(path).with_suffix(".part.png")
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    os.replace(temporary, path)
