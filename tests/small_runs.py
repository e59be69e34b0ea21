"""Runs of ten steps of a random model of two layers: how tests make them, and what is compared of them.

Fixtures of every test file (conftest.py names this module)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import FAMILIES, sizes, write_byte_tokenizer

import minitune.train as loop
from minitune import checkpoint
from minitune.config import TrainConfig
from minitune.models import build
from minitune.plan import StepPlan
from minitune.runs.folder import read_lines
from minitune.train import train

CLOCK = {"seconds", "tokens_per_s", "peak_bytes"}  # differ between two runs of one config


def make_model(folder, family, takes_bos=True):
    """A model folder with random weights and a tokenizer of one token a byte."""
    folder.mkdir()
    write_byte_tokenizer(folder, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>", add_bos_token=takes_bos)
    config = {"model_type": family, **sizes(hidden_size=32, intermediate_size=64), **FAMILIES[family]}
    config |= {"resid_pdrop": 0.1} if family == "phi" else {}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(build(config).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with the models llama, mistral and phi, and rows.json: 25 rows with answers of 2 to 12 tokens."""
    folder = tmp_path_factory.mktemp("base")
    for family in FAMILIES:
        make_model(folder / family, family)
    rows = [{"prompt": f"{i} {'x' * (i % 4)}: ", "completion": "ab" * (i % 5) + str(i)} for i in range(25)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session", autouse=True)
def without_curves():
    """No training in this process draws curves.png, which takes half a second."""
    loop.draw_curves = lambda records, path: None


@pytest.fixture
def quick():
    """One thread. Every file of tests that compares runs bit for bit uses it (pytestmark)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def options(base):
    """options(run, **changes) -> TrainConfig of a run of 10 steps over two epochs."""

    def make(run, **changes):
        return TrainConfig(
            **{
                "model": str(base / "llama"),
                "data": str(base / "rows.json"),
                "test_size": 4,
                "run": str(run),
                "device": "cpu",
                "dtype": "fp32",
                "lora_rank": 4,
                "lora_targets": ("all-linear",),
                "batch_size": 2,
                "accumulation": 2,
                "learning_rate": 1e-2,
                "max_steps": 10,
                "eval_every": 4,
                "samples": 2,
                "sample_tokens": 6,
                **changes,
            }
        )

    return make


@pytest.fixture(scope="session")
def done(options, tmp_path_factory):
    """A finished run that tests read and copy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the runs that are compared with it: two threads sum in another order
    run = train(options(tmp_path_factory.mktemp("done") / "run"), say=lambda line: None)
    torch.set_num_threads(threads)
    return run


@pytest.fixture
def copied(done, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


def quiet(config):
    """train(config), and the lines that it said."""
    lines = []
    train(config, say=lines.append)
    return lines


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(run):
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in read_lines(Path(run) / "metrics.jsonl")]


def losses(run):
    return [record["loss"] for record in metrics(run) if "loss" in record]


def assert_same_end(run, expected):
    """Two runs ended with the same bits: adapters, last and best weights, samples, and metrics except for CLOCK."""
    run, expected = Path(run), Path(expected)
    assert metrics(run) == metrics(expected)
    assert read_lines(run / "samples.jsonl") == read_lines(expected / "samples.jsonl")
    for name in ("adapter", "last", "best"):
        assert (run / name).exists() == (expected / name).exists(), name
        if (expected / name).exists():
            assert same(adapter(run / name), adapter(expected / name)), name
    states = [load_file(folder / "last" / "state.safetensors") for folder in (run, expected)]
    assert same(*states), [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert_no_halves(run)


def assert_no_halves(run):
    assert not [path for path in Path(run).rglob("*") if ".part" in path.name]


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture
def loaded(monkeypatch):
    """A list that gets every model that train() loads."""
    found, load = [], checkpoint.load_model

    def keep(*args, **kwargs):
        found.append(load(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(checkpoint, "load_model", keep)
    return found


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, act): act(loss) replaces the loss of the first micro-batch of step n, once: not again in a run that goes on."""

    def plan(n, act):
        acts, due, batches, batch_loss = [act], [], StepPlan.batches, loop.batch_loss

        def noting(self, step, *args):
            due[:] = [acts.pop()] if step + 1 == n and acts else []
            return batches(self, step, *args)

        monkeypatch.setattr(StepPlan, "batches", noting)
        monkeypatch.setattr(
            loop, "batch_loss", lambda *args: (due.pop() if due else lambda loss: loss)(batch_loss(*args))
        )

    return plan
