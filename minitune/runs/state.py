"""The state file in last/, from which training resumes exactly: progress, random states, the optimizer's moments."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from minitune.files import parse_json, read_bytes, write_whole
from minitune.schema import COUNT, Number, check
from minitune.screen import some


@dataclass
class Progress:
    """What a run must remember beside its tensors."""

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
    """{name: state} of the random generators that dropout draws from."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def save_state(path, progress, parameters, optimizer, scaler, random):
    """Write one safetensors file with all that the next step depends on: weights, AdamW's moments, random states, progress,
    and a checksum of the whole file.

    parameters: {name: trained parameter}. random: see random_state(). It is one file, so a kill cannot leave parts of two
    states."""
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
    """(start, end) of the 64 digits of the checksum in the bytes of a state file. None if it has no checksum."""
    found = list(re.finditer(rb'"sha256":"([0-9a-f]{64})"', content[: 8 + int.from_bytes(content[:8], "little")]))
    return found[0].span(1) if len(found) == 1 else None


def read_state(path):
    """(bytes, metadata) of a state file. Raises ValueError if its checksum does not match."""
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
    """The Progress in a state file, None if the file does not exist. Raises ValueError if it is damaged."""
    if not Path(path).exists():
        return None
    stored = check(parse_json(read_state(path)[1]["progress"], path), PROGRESS, f"{path}, progress")
    return Progress(**{f.name: stored[f.name] for f in fields(Progress)})


def load_state(path, parameters, optimizer, scaler):
    """Copy the tensors of a state file into the parameters, the optimizer and the random generators. Raises ValueError, with
    nothing changed, if names, shapes, dtypes or values do not fit `parameters`. (Fused AdamW would read beyond the end of a
    moment that is too short.)"""
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
