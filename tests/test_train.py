"""The training loop on a random model of two layers: what a run computes, what it leaves on disk, and that it goes on
exactly, whenever and however it was stopped."""

import json
import math
import os
import random
import re
import shutil
import signal
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from forks import SCRIPT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F

import minitune.train as loop
from minitune import checkpoint, data, model_folder
from minitune.adapters import lora
from minitune.config import TrainConfig, parse, run_script
from minitune.decoding.options import GenerateConfig
from minitune.files import read_json
from minitune.generate import generate
from minitune.models import build
from minitune.plan import StepPlan, learning_rate
from minitune.runs import curves as run_curves
from minitune.runs import folder as run_folder
from minitune.runs import state as run_state
from minitune.runs.folder import append_line, hold, keep_lines, read_lines
from minitune.runs.state import read_progress
from minitune.tokenizer import load_tokenizer
from minitune.train import train

ROOT = Path(__file__).resolve().parents[1]
CLOCK = {"seconds", "tokens_per_s", "peak_bytes"}  # what no two runs share
SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 16},
    "phi": {"resid_pdrop": 0.1, "partial_rotary_factor": 0.5},
}


def make_model(folder, family, takes_bos=True):
    """A model folder with random weights and a tokenizer of one token a byte."""
    folder.mkdir()
    vocab = {text: i for i, text in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": takes_bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    config = {"model_type": family, **SIZES, **FAMILIES[family]}
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


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, and no picture at every save (one test draws it)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(loop, "draw_curves", lambda records, path: None)
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
    draw, loop.draw_curves = loop.draw_curves, lambda records, path: None
    run = train(options(tmp_path_factory.mktemp("done") / "run"), say=lambda line: None)
    loop.draw_curves = draw
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
    """Two runs ended alike, bit for bit: adapters, last and best weights, metrics but for the clock, samples."""
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
    """at_step(n, act): in the first micro-batch of step n, act(loss) gives the loss that training sees.
    Once: a run that goes on does not meet it again."""

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


# --- a process that is killed, and the run that goes on

TRAIN = """
import os, signal, sys
from functools import partial
import torch
import minitune.train as loop
from minitune.config import TrainConfig, run_script

torch.set_num_threads(1)
loop.draw_curves = lambda records, path: None
left = [int(sys.argv.pop())]  # it kills itself before this file operation

def counted(call):
    def wrapped(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped

if left[0]:
    for name in ("write", "fsync", "replace", "unlink", "chmod"):
        setattr(os, name, counted(getattr(os, name)))
# a scale that grows every second step until gradients overflow, so that it has a history to keep
torch.amp.GradScaler = partial(torch.amp.GradScaler, growth_interval=2)
run_script(TrainConfig, loop.train, "")
"""


@pytest.fixture(scope="session")
def start(forks, tmp_path_factory):
    """start(config, die_before=0) -> a process that trains, and kills itself before its n-th file operation."""
    stored = tmp_path_factory.mktemp("options") / "options.json"

    def start(config, die_before=0):
        stored.write_text(json.dumps(asdict(config)))
        return forks.start(TRAIN, "train.py", "--config", stored, die_before)

    return start


def kill(process):
    """Kill it, if it still runs. The exit code."""
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (0, -signal.SIGKILL), process.err.read_text()
    return process.returncode


def finish(process):
    assert process.wait() == 0, process.err.read_text()


EXACT = {  # every source of state at once, in each precision
    "fp32": {"lora_dropout": 0.2, "group_by_length": True, "warmup": 3.0},
    "bf16": {"lora_dropout": 0.2, "checkpointing": True, "quantize": "nf4-dq", "sample_tokens": 2},
    "fp16": {"lora_dropout": 0.2, "model": "phi", "learning_rate": 3e-3, "keep": "last", "patience": 9},
}


@pytest.fixture(scope="session")
def exact(start, options, base, tmp_path_factory):
    """{precision: (options(run, **changes) of its run, the folder of the uninterrupted one, its seconds)}."""
    made = {}

    def of(precision):
        if precision not in made:
            changes = {"dtype": precision, "save_every": 1, "eval_every": 3, "max_steps": 14, **EXACT[precision]}
            if "model" in changes:
                changes["model"] = str(base / changes["model"])
            make = lambda run, **more: options(run, **{**changes, **more})
            run, started = tmp_path_factory.mktemp("exact") / precision, time.perf_counter()
            finish(start(make(run)))
            made[precision] = make, run, time.perf_counter() - started
        return made[precision]

    return of


@pytest.mark.parametrize("precision", EXACT)
def test_a_run_killed_at_random_moments_ends_as_the_uninterrupted_one(exact, start, tmp_path, precision):
    make, expected, seconds = exact(precision)
    moments, state, killed_at = random.Random(precision), tmp_path / "run" / "last" / "state.safetensors", [0]
    while killed_at[-1] < 10 and len(killed_at) < 4:
        process = start(make(tmp_path / "run"))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not (state.exists() and read_progress(state).step > killed_at[-1]):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, seconds / 5))
        if kill(process) == 0:  # on a busy machine it may have finished first
            break
        killed_at.append(read_progress(state).step)
    assert killed_at == sorted(killed_at) and len(killed_at) > 1, "each process went on from the one before"
    finish(start(make(tmp_path / "run")))
    assert_same_end(tmp_path / "run", expected)


@pytest.mark.parametrize("moment", ["state", "half"])
def test_a_run_killed_while_it_saves_ends_as_the_uninterrupted_one(exact, start, tmp_path, moment):
    make, expected, _ = exact("fp32")
    state, seen = tmp_path / "run" / "last" / "state.safetensors", None

    def is_saving():
        nonlocal seen
        if moment == "half":
            return any(state.parent.glob(".state*.part")) if state.exists() else False
        now = state.stat().st_mtime_ns if state.exists() else None
        changed, seen = now != seen, now
        return changed

    kills = 0
    for _ in range(4):
        process = start(make(tmp_path / "run"))
        deadline = time.monotonic() + 20
        while not is_saving() and time.monotonic() < deadline and process.poll() is None:
            pass
        kills += kill(process) != 0
    assert kills
    finish(start(make(tmp_path / "run")))
    assert_same_end(tmp_path / "run", expected)


@pytest.mark.parametrize("operation", [3, 20, 33, 52, 75, 110, 165, 240])
def test_a_run_killed_before_a_file_operation_ends_as_the_uninterrupted_one(exact, start, tmp_path, operation):
    make, expected, _ = exact("fp32")
    assert start(make(tmp_path / "run"), die_before=operation).wait() == -signal.SIGKILL
    finish(start(make(tmp_path / "run")))
    assert_same_end(tmp_path / "run", expected)


def test_the_scaler_of_fp16_has_a_history_worth_keeping(exact):
    _, run, _ = exact("fp16")
    norms = [record["grad_norm"] for record in metrics(run) if "loss" in record]
    assert None in norms, "no gradient ever overflowed, so nothing was skipped"
    assert norms[0] is not None
    _, facts = run_state.read_state(run / "last" / "state.safetensors")
    assert json.loads(facts["scaler"])["scale"] != 65536.0


# --- Ctrl-C


def test_ctrl_c_to_the_script_saves_says_how_to_go_on_and_exits_130(options, tmp_path, forks):
    config = options(tmp_path / "my run", max_steps=40, eval_every=20, samples=0, lora_dropout=0.1, resume="never")
    (tmp_path / "options.json").write_text(json.dumps(asdict(config)))
    one_thread = "import torch; torch.set_num_threads(1)\n"  # as in this process
    process = forks.start(one_thread + SCRIPT, ROOT / "scripts" / "train.py", "--config", tmp_path / "options.json")
    lines = tmp_path / "my run" / "metrics.jsonl"
    while process.poll() is None and (not lines.exists() or lines.read_bytes().count(b"\n") < 4):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    process.wait()
    err = process.err.read_text()
    assert process.returncode == 130, err
    step, command = re.search(r"^stopped: after step (\d+) of 40; .*Go on with: (.*)$", err, re.M).groups()
    assert read_progress(tmp_path / "my run" / "last" / "state.safetensors").step == int(step)
    assert command == f"python scripts/train.py --config '{tmp_path}/my run/config.json'"
    assert (tmp_path / "my run" / "curves.png").exists() and "Traceback" not in err

    train(parse(TrainConfig, ["--config", str(tmp_path / "my run" / "config.json")]), say=lambda line: None)
    train(config.replace(run=str(tmp_path / "other")), say=lambda line: None)
    assert_same_end(tmp_path / "my run", tmp_path / "other")


def test_sigterm_is_as_ctrl_c(exact, start, tmp_path):
    make, expected, _ = exact("fp32")
    process, state = start(make(tmp_path / "run")), tmp_path / "run" / "last" / "state.safetensors"
    while not state.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    assert re.search(r"^stopped: after step \d+ of 14; .*Go on with", process.err.read_text(), re.M)
    finish(start(make(tmp_path / "run")))
    assert_same_end(tmp_path / "run", expected)


def test_a_signal_ends_the_step_in_hand_and_the_handler_goes_back(options, done, tmp_path, at_step):
    before = signal.getsignal(signal.SIGINT)
    at_step(3, lambda loss: (os.kill(os.getpid(), signal.SIGINT), loss)[1])
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 10"):
        quiet(options(tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is before
    assert [record["step"] for record in metrics(tmp_path / "run")] == [0, 1, 2, 3]
    assert quiet(options(tmp_path / "run"))[-4].startswith("step 10/10")
    assert_same_end(tmp_path / "run", done)


def test_a_second_signal_stops_at_once_and_the_last_save_stands(options, done, tmp_path, at_step):
    def twice(loss):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    at_step(7, twice)
    with pytest.raises(KeyboardInterrupt, match="at once"):
        quiet(options(tmp_path / "run"))
    assert read_progress(tmp_path / "run" / "last" / "state.safetensors").step == 4
    quiet(options(tmp_path / "run"))
    assert_same_end(tmp_path / "run", done)


def test_a_signal_in_the_last_step_changes_nothing(options, done, tmp_path, at_step):
    at_step(10, lambda loss: (os.kill(os.getpid(), signal.SIGINT), loss)[1])
    quiet(options(tmp_path / "run"))
    assert_same_end(tmp_path / "run", done)


def test_a_signal_after_the_step_waits_for_the_next_one_rather_than_skip_the_save(options, tmp_path, monkeypatch):
    append = loop.append_line

    def signalled(path, record):
        append(path, record)
        if record["step"] == 2 and path.name == "metrics.jsonl":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "append_line", signalled)
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 10"):
        quiet(options(tmp_path / "run"))
    assert read_progress(tmp_path / "run" / "last" / "state.safetensors").step == 3


# --- starting again


CHANGES = {
    "learning_rate": 5e-3,
    "lora_rank": 8,
    "lora_targets": ("q_proj",),
    "batch_size": 4,
    "accumulation": 1,
    "seed": 7,
    "schedule": "linear",
    "max_length": 20,
    "loss_on": "all",
    "quantize": "nf4",
    "lora_dropout": 0.1,
    "weight_decay": 0.1,
    "checkpointing": True,
    "test_size": 5,
}


def test_a_resume_with_changed_options_is_refused_with_their_names(options, done, monkeypatch):
    before = snapshot(done)
    monkeypatch.setattr(checkpoint, "load_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    for name, value in CHANGES.items():
        with pytest.raises(ValueError, match=f"other settings: .*{name} .* -> .*--resume never"):
            quiet(options(done, **{name: value}))
    with pytest.raises(ValueError, match=r"settings: learning_rate 0.01 -> 0.005, seed 42 -> 7\. Use --run .*-2, or"):
        quiet(options(done, learning_rate=5e-3, seed=7))
    with pytest.raises(ValueError, match="compute dtype float32 -> bfloat16"):
        quiet(options(done, dtype="bf16"))
    assert snapshot(done) == before


def test_another_model_or_other_rows_are_refused_by_their_content(options, base, done, tmp_path):
    other = shutil.copytree(base / "llama", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    rows = read_json(base / "rows.json")
    rows[3]["completion"] += "!"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"already holds a run on another model \(.*\)\. Use --run"):
        quiet(options(done, model=str(other)))
    with pytest.raises(
        ValueError,
        match=r"already holds a run on other data \(.*rows.json'\)\. Use --run .*-2, or --resume never to overwrite it\.$",
    ):
        quiet(options(done, data=str(tmp_path / "rows.json")))


def test_a_model_and_rows_that_moved_are_the_same(options, base, copied, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    lines = quiet(options(copied, model=str(moved / "llama"), data=str(moved / "rows.json")))
    assert any(line.startswith("going on from step 10 of 10") for line in lines)


def test_more_steps_of_a_constant_schedule_equal_the_longer_run(options, tmp_path):
    make = lambda run, steps: options(
        tmp_path / run, max_steps=steps, eval_every=2, schedule="constant", warmup=2.0, keep="last", lora_dropout=0.1
    )
    quiet(make("run", 4))
    quiet(make("run", 10))
    quiet(make("long", 10))
    assert_same_end(tmp_path / "run", tmp_path / "long")
    assert read_json(tmp_path / "run" / "config.json")["max_steps"] == 10, "--config goes on with what was asked last"
    with pytest.raises(ValueError, match="steps 10 -> 6, but 10 are done"):
        quiet(make("run", 6))


@pytest.mark.parametrize("changes", [{"schedule": "cosine"}, {"schedule": "constant", "warmup": 0.5}])
def test_more_steps_are_refused_where_they_change_the_rate_of_steps_done(options, tmp_path, changes):
    quiet(options(tmp_path / "run", max_steps=4, samples=0, **changes))
    with pytest.raises(ValueError, match="steps 4 -> 8, which changes the learning rate of steps already done"):
        quiet(options(tmp_path / "run", max_steps=8, samples=0, **changes))


def test_a_finished_run_started_again_changes_nothing(options, copied):
    quiet(options(copied))
    before = snapshot(copied)
    lines = quiet(options(copied))
    assert snapshot(copied) == before
    assert lines[-3].startswith("done: 10 steps") and lines[-1].startswith("next: python scripts/evaluate.py --run ")


def test_resume_never_starts_again_and_its_config_goes_on(options, copied, tmp_path):
    changed = options(copied, resume="never", seed=7, max_steps=3)
    quiet(changed)
    assert [record["step"] for record in metrics(copied)] == [0, 1, 2, 3]
    quiet(options(tmp_path / "fresh", seed=7, max_steps=3))
    assert_same_end(copied, tmp_path / "fresh")
    assert read_json(copied / "config.json")["resume"] == "auto"


def test_a_damaged_state_is_one_line_with_the_way_out(options, copied):
    state = copied / "last" / "state.safetensors"
    whole = state.read_bytes()
    for content in (whole[:-1], whole[:40], b"", b"\xff" * 100):
        state.write_bytes(content)
        with pytest.raises(ValueError, match="is not a whole state of a run.*--resume never"):
            quiet(options(copied))
    quiet(options(copied, resume="never", max_steps=2))


def test_best_of_a_lost_future_is_not_taken_for_the_best(options, copied, base):
    newer = adapter(copied / "best")
    save_file({name: t + 1 for name, t in newer.items()}, copied / "best" / "adapter_model.safetensors")
    lines = quiet(options(copied))
    assert any("best does not hold step 10" in line for line in lines)
    assert same(adapter(copied / "adapter"), adapter(copied / "last"))


def test_config_json_of_a_run_gives_the_same_adapter(done, tmp_path):
    config = parse(TrainConfig, ["--config", str(done / "config.json"), "--run", str(tmp_path / "other")])
    quiet(config)
    assert_same_end(tmp_path / "other", done)


# --- what a step computes


def test_accumulation_changes_nothing(options, tmp_path):
    """4 x 1, 2 x 2 and 1 x 4 rows, with a last step of one row. AdamW divides by the gradient's size, so a large
    epsilon keeps rounding noise from growing."""
    runs = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        runs.append(tmp_path / f"{batch_size}x{accumulation}")
        quiet(
            options(
                runs[-1], batch_size=batch_size, accumulation=accumulation, max_steps=12, adam_eps=1e-3, samples=0,
                weight_decay=0.1,
            )
        )  # fmt: skip
    whole, *split = runs
    counts = [(r["supervised_tokens"], r["examples"]) for r in metrics(whole) if "loss" in r]
    assert len(set(counts)) > 3 and counts[5][1] == 1, "steps of unequal rows and tokens, one of them of one row"
    for run in split:
        assert [(r["supervised_tokens"], r["examples"]) for r in metrics(run) if "loss" in r] == counts
        torch.testing.assert_close(losses(run), losses(whole), rtol=2e-6, atol=0)
        for name, expected in adapter(whole / "adapter").items():
            torch.testing.assert_close(adapter(run / "adapter")[name], expected, rtol=1e-4, atol=2e-6)


def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_supervised_tokens(options, base, tmp_path, loaded):
    """Against plain autograd over single rows, without packing, padding or chunks. AdamW's first moment after one step
    is 0.1 x gradient."""
    config = options(tmp_path / "run", max_steps=1, max_grad_norm=0.0, samples=0)
    quiet(config)
    tokenizer = load_tokenizer(base / "llama")
    train_set, _ = data.load(config.data, tokenizer, test_size=4)
    rows = [r for b in StepPlan(config, train_set).batches(0, train_set, 0) for r in b.rows]
    model = checkpoint.load_model(config.model)
    lora.inject(model, 4, 16.0, 0.0, ("all-linear",), seed=42)
    total, count = 0.0, 0
    for example in (e for e in train_set.examples if e.row in rows):
        labels = torch.tensor(example.labels[1:])
        logits = model(torch.tensor([example.ids]))[0, :-1]
        total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += (labels != -100).sum()
    (total / count).backward()
    state = load_file(tmp_path / "run" / "last" / "state.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(state[f"exp_avg.{name}"] / 0.1, parameter.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(losses(tmp_path / "run"), [(total / count).item()], rtol=1e-6, atol=0)


@pytest.mark.parametrize("limit", [0.05, 1e3, 0.0])
def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_logged(options, tmp_path, limit):
    quiet(options(tmp_path / "run", max_steps=1, max_grad_norm=limit, samples=0))
    state = load_file(tmp_path / "run" / "last" / "state.safetensors")
    norm = math.sqrt(sum((t / 0.1).square().sum().item() for name, t in state.items() if name.startswith("exp_avg.")))
    logged = metrics(tmp_path / "run")[-1]["grad_norm"]
    assert logged > 0.1
    assert norm == pytest.approx(limit if limit == 0.05 else logged, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_tensor_gets_a_gradient_and_checkpointing_the_same_one(
    options, base, tmp_path, family, monkeypatch
):
    inject, calls = lora.inject, {"plain": 0, "checkpointed": 0}

    def counted(model, *args):
        model.model.layers[0].register_forward_pre_hook(lambda *_: calls.update({run: calls[run] + model.training}))
        return inject(model, *args)

    monkeypatch.setattr(lora, "inject", counted)
    for run in ("plain", "checkpointed"):
        quiet(
            options(
                tmp_path / run, model=str(base / family), max_steps=2, samples=0, lora_dropout=0.1,
                checkpointing=run == "checkpointed",
            )
        )  # fmt: skip
    assert calls == {"plain": 4, "checkpointed": 8}, "each of 4 micro-batches runs again in the backward pass"
    state = load_file(tmp_path / "plain" / "last" / "state.safetensors")
    moments = {name: t for name, t in state.items() if name.startswith("exp_avg.")}
    assert len(moments) == len(adapter(tmp_path / "plain" / "adapter")) > 20
    assert all(t.any() for t in moments.values()), "B learns from step 1, A from step 2"
    assert_same_end(tmp_path / "checkpointed", tmp_path / "plain")


def test_a_tensor_without_a_gradient_is_an_error(options, tmp_path, monkeypatch):
    def cut(self, x):
        y = self.base_layer(x)
        return y + F.linear(F.linear(x, self.lora_A.weight), self.lora_B.weight.detach())

    monkeypatch.setattr(lora.LoRALinear, "forward", cut)
    with pytest.raises(RuntimeError, match="14 trained tensors got no gradient, such as .*lora_B"):
        quiet(options(tmp_path / "run", samples=0))


def test_logits_are_computed_only_where_a_label_is(options, tmp_path, monkeypatch):
    seen, load = [], checkpoint.load_model

    def watched(*args, **kwargs):
        model = load(*args, **kwargs)
        model.lm_head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0].numel() // 32))
        return model

    monkeypatch.setattr(checkpoint, "load_model", watched)
    quiet(options(tmp_path / "run", test_size=0.0, samples=0))
    assert sum(seen) == sum(record["supervised_tokens"] for record in metrics(tmp_path / "run"))
    assert 0 < sum(seen) < metrics(tmp_path / "run")[-1]["tokens"] / 2


def test_a_padding_id_that_ends_texts_changes_nothing(options, done, tmp_path, monkeypatch):
    load, pads = model_folder.load_tokenizer, []

    def other_pad(folder):
        tokenizer = load(folder)
        pads.append((tokenizer.pad_id, tokenizer.eos_id))
        tokenizer.pad_id = 77
        return tokenizer

    monkeypatch.setattr(model_folder, "load_tokenizer", other_pad)
    quiet(options(tmp_path / "run"))
    assert pads == [(1, 1)]
    assert_same_end(tmp_path / "run", done)


def test_weight_decay_shrinks_matrices_only():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))
    optimizer = loop.make_optimizer({"m": matrix, "v": vector}, TrainConfig(learning_rate=0.5, weight_decay=0.1))
    matrix.grad, vector.grad = torch.zeros(2, 3), torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(matrix.data, torch.full((2, 3), 1 - 0.5 * 0.1))
    assert torch.equal(vector.data, torch.ones(3))


@pytest.mark.parametrize(
    "schedule, warmup, expected",
    [
        ("constant", 0.0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 0.0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", 0.0, [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]),
        ("constant", 0.25, [0.5, 1, 1, 1, 1, 1, 1, 1]),
        ("constant", 0.3, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]),  # a share is rounded up, as in transformers
        ("linear", 4.0, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", 4.0, [0.25, 0.5, 0.75, 1, *[0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]]),
        ("linear", 8.0, [i / 8 for i in range(1, 9)]),
        ("cosine", 16.0, [i / 16 for i in range(1, 9)]),
    ],
)
def test_learning_rates(schedule, warmup, expected):
    config = TrainConfig(learning_rate=0.5, schedule=schedule, warmup=warmup)
    assert [learning_rate(step, 8, config) for step in range(8)] == pytest.approx(
        [0.5 * e for e in expected], abs=1e-15
    )


def test_the_rate_of_the_schedule_is_logged_and_used(options, tmp_path):
    config = options(tmp_path / "run", schedule="linear", warmup=2.0, max_steps=4, samples=0)
    quiet(config)
    assert [r["lr"] for r in metrics(tmp_path / "run") if "lr" in r] == [learning_rate(s, 4, config) for s in range(4)]
    quiet(options(tmp_path / "one", schedule="constant", max_steps=1, samples=0))
    quiet(options(tmp_path / "half", schedule="constant", warmup=2.0, max_steps=1, samples=0))
    whole, half = (adapter(tmp_path / name / "adapter") for name in ("one", "half"))
    name = next(name for name in whole if "lora_B" in name)  # from 0, AdamW's first step is the rate x the sign
    torch.testing.assert_close(half[name] * 2, whole[name], rtol=1e-5, atol=0)


def test_order_is_a_function_of_seed_and_epoch(options, base):
    config = options("unused", group_by_length=True)
    train_set, _ = data.load(config.data, load_tokenizer(base / "llama"), test_size=4)
    rows = lambda config, step: [b.rows for b in StepPlan(config, train_set).batches(step, train_set, 0)]
    plan = StepPlan(config, train_set)
    assert plan.steps_per_epoch == 6  # 21 rows in 11 micro-batches of 2
    forwards = [[b.rows for b in plan.batches(step, train_set, 0)] for step in range(18)]
    assert [rows(config, step) for step in reversed(range(18))] == forwards[::-1], "whatever was asked before"
    epochs = [forwards[i : i + 6] for i in (0, 6, 12)]
    assert all(sorted(r for s in e for b in s for r in b) == sorted(e.row for e in train_set.examples) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [rows(config.replace(seed=1), step) for step in range(6)] != epochs[0]
    changed = config.replace(learning_rate=1.0, lora_rank=1, max_steps=99, checkpointing=True, eval_every=1)
    assert [rows(changed, step) for step in range(6)] == epochs[0]


def test_epochs_give_the_number_of_steps(options, base):
    train_set, _ = data.load(str(base / "rows.json"), load_tokenizer(base / "llama"), test_size=4)
    steps = lambda **changes: StepPlan(options("unused", **changes), train_set).total
    assert steps(max_steps=None, epochs=1.0) == 6
    assert steps(max_steps=None, epochs=2.5) == 15
    assert steps(max_steps=None, epochs=0.01) == 1
    assert steps(max_steps=None, epochs=3.0, accumulation=4) == 9
    assert steps(max_steps=4, epochs=3.0) == 4


# --- what a run writes

KEYS = {
    "step", "epoch", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "examples", "seconds", "tokens_per_s",
    "peak_bytes",
}  # fmt: skip


def test_metrics_have_one_line_a_logged_step_with_every_key(options, base, tmp_path):
    config = options(tmp_path / "run", log_every=3)
    quiet(config)
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 3, 4, 6, 8, 9, 10]
    assert set(records[0]) == {"step", "eval_loss"}
    for record in records[1:]:
        assert set(record) == KEYS | ({"eval_loss"} if record["step"] in (4, 8, 10) else set())
        assert record["peak_bytes"] > 1e6 and record["seconds"] > 0
        assert record["epoch"] == round(record["step"] / 6, 4)
    train_set, _ = data.load(config.data, load_tokenizer(base / "llama"), test_size=4)
    assert records[3]["tokens"] == sum(len(e.ids) for e in train_set.examples), "step 6 ends the epoch; no padding"


def test_environment_and_config_describe_the_run(done, options):
    environment, config = read_json(done / "environment.json"), read_json(done / "config.json")
    assert environment["seed"] == 42 and len(environment["data_fingerprint"]) == 64
    assert environment["packages"]["torch"] == torch.__version__
    assert set(config) == set(asdict(TrainConfig())) and config["run"] == str(done)
    facts = {"template": "prompt_completion", "base_model": config["model"], "revision": None}
    assert read_json(done / "adapter" / "minitune.json") == facts | {
        "dtype": "fp32",
        "quantize": "none",
        "special_text": "text",
    }


def test_held_out_rows_are_written_as_they_were_read(done, base):
    _, test_set = data.load(str(base / "rows.json"), load_tokenizer(base / "llama"), test_size=4)
    assert read_lines(done / "heldout.jsonl") == test_set.rows


def test_an_adapter_has_one_fingerprint_and_none_where_it_is_not_whole(copied):
    whole = run_folder.adapter_fingerprint(copied / "adapter")
    assert re.fullmatch("[0-9a-f]{64}", whole)
    assert run_folder.adapter_fingerprint(copied / "last") == whole, "the best step was the last: the same adapter"
    config = read_json(copied / "adapter" / "adapter_config.json")
    (copied / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    assert run_folder.adapter_fingerprint(copied / "adapter") != whole
    (copied / "adapter" / "adapter_model.safetensors").unlink()
    assert run_folder.adapter_fingerprint(copied / "adapter") is None
    assert run_folder.adapter_fingerprint(None) is None


def plain_loss(config, folder, tokenizer):
    """The held-out loss with F.cross_entropy over one row at a time."""
    _, test_set = data.load(config.data, tokenizer, test_size=config.test_size)
    model = checkpoint.load_model(config.model, adapter=folder)
    total = count = 0
    for example in test_set.examples:
        labels = torch.tensor(example.labels[1:])
        logits = model(torch.tensor([example.ids]))[0, :-1]
        total += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    return total / count


@pytest.mark.parametrize("batch_size", [1, 3])
def test_held_out_loss_equals_plain_cross_entropy_weighted_by_token(options, base, tmp_path, batch_size):
    config = options(
        tmp_path / "run", batch_size=batch_size, max_steps=4, eval_every=2, keep="last", lora_dropout=0.5, test_size=7
    )
    quiet(config)
    tokenizer = load_tokenizer(base / "llama")
    values = {record["step"]: record["eval_loss"] for record in metrics(tmp_path / "run") if "eval_loss" in record}
    assert list(values) == [0, 2, 4]
    assert values[0] == pytest.approx(plain_loss(config, None, tokenizer), rel=1e-6)
    assert values[4] == pytest.approx(plain_loss(config, tmp_path / "run" / "adapter", tokenizer), rel=1e-6)
    assert len({round(value, 4) for value in values.values()}) == 3


def test_samples_are_greedy_answers_to_held_out_prompts(options, base, done):
    config, tokenizer = options(done), load_tokenizer(base / "llama")
    records = read_lines(done / "samples.jsonl")
    assert [record["step"] for record in records] == [0, 4, 8, 10]
    assert records[0]["decoding"] == {"do_sample": False, "num_beams": 1, "max_new_tokens": 6}
    _, test_set = data.load(config.data, tokenizer, test_size=4)
    model = checkpoint.load_model(config.model, adapter=done / "last")
    prompts = [tokenizer.encode(row["prompt"]) for row in test_set.rows[:2]]
    answers = generate(model, prompts, GenerateConfig(max_new_tokens=6, eos_ids=(1,)))
    assert records[-1]["samples"] == [
        {"prompt": "<s>" + row["prompt"], "answer": tokenizer.decode(ids), "reference": row["completion"]}
        for row, ids in zip(test_set.rows[:2], answers, strict=True)
    ]
    assert records[0]["samples"] != records[-1]["samples"]


def test_text_rows_of_a_tokenizer_without_bos_have_no_prompt_to_answer(options, tmp_path):
    model = make_model(tmp_path / "model", "llama", takes_bos=False)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(9)))
    quiet(options(tmp_path / "run", model=str(model), data=str(tmp_path / "rows.jsonl"), max_steps=2))
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_without_held_out_rows_the_last_step_is_kept(options, tmp_path):
    lines = quiet(options(tmp_path / "run", test_size=0.0, max_steps=3))
    assert any("no held-out rows" in line for line in lines)
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3]
    assert same(adapter(tmp_path / "run" / "adapter"), adapter(tmp_path / "run" / "last"))
    assert not (tmp_path / "run" / "best").exists()
    with pytest.raises(ValueError, match="patience needs held-out rows"):
        quiet(options(tmp_path / "other", test_size=0.0, patience=2))


@pytest.fixture
def held_out(monkeypatch):
    """held_out([...]): the losses that the evaluations of the next runs give."""

    def give(values):
        left = list(values)
        monkeypatch.setattr(loop, "held_out_loss", lambda *args: left.pop(0))

    return give


@pytest.mark.parametrize("keep", ["best", "last"])
def test_patience_stops_and_the_adapter_is_the_best_or_the_last(options, tmp_path, held_out, keep):
    make = lambda run, **changes: options(
        tmp_path / run, eval_every=1, schedule="constant", samples=0, **{"keep": keep, "patience": 3, **changes}
    )
    held_out([5.0, 4.0, 3.0, 3.5, 3.0, 3.1, 1.0])
    lines = quiet(make("run"))
    assert [record["step"] for record in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4, 5], "an equal loss is no best"
    held_out([5.0] * 9)
    quiet(make("two", keep="last", max_steps=2, patience=None))
    quiet(make("five", keep="last", max_steps=5, patience=None))
    assert same(adapter(tmp_path / "run" / "best"), adapter(tmp_path / "two" / "last"))
    assert same(adapter(tmp_path / "run" / "last"), adapter(tmp_path / "five" / "last"))
    expected = tmp_path / ("two" if keep == "best" else "five") / "last"
    assert same(adapter(tmp_path / "run" / "adapter"), adapter(expected))
    assert any("holds step 2, held-out loss 3.0000" in line for line in lines) == (keep == "best")
    held_out([])
    quiet(make("run"))  # stays stopped
    assert len(metrics(tmp_path / "run")) == 6
    other = "last" if keep == "best" else "best"
    quiet(make("run", keep=other))  # the other one can still be had
    assert same(adapter(tmp_path / "run" / "adapter"), adapter(tmp_path / "run" / other))


def test_where_no_step_beats_the_base_the_last_is_kept_and_it_is_said(options, tmp_path, held_out):
    held_out([1.0, 2.0, 2.0, 2.0])
    lines = quiet(options(tmp_path / "run", samples=0))
    assert any("no step had a lower held-out loss than the base" in line for line in lines)
    assert same(adapter(tmp_path / "run" / "adapter"), adapter(tmp_path / "run" / "last"))
    assert not (tmp_path / "run" / "best").exists()


def test_curves_are_a_whole_picture(done, tmp_path):
    run_curves.draw_curves(read_lines(done / "metrics.jsonl"), tmp_path / "curves.png")
    png = (tmp_path / "curves.png").read_bytes()
    assert png.startswith(b"\x89PNG") and png.endswith(b"IEND\xaeB`\x82") and len(png) > 10_000
    run_curves.draw_curves([], tmp_path / "curves.png")
    run_curves.draw_curves([{"step": 0, "eval_loss": 2.0}], tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_lines_survive_separators_kills_and_numbers_that_json_lacks(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"step": 1, "text": "a\u2028b\x85c\nd", "norm": math.inf})
    append_line(path, {"step": 2, "norm": math.nan})
    expected = [{"step": 1, "text": "a\u2028b\x85c\nd", "norm": None}, {"step": 2, "norm": None}]
    assert read_lines(path) == expected
    with open(path, "a") as file:
        file.write('{"step": 3, "te')
    assert read_lines(path) == expected
    first = path.read_bytes().splitlines(keepends=True)[0]
    keep_lines(path, len(first), zlib.crc32(first), step=1)
    assert read_lines(path) == expected[:1]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_lines(path)


def test_a_short_write_of_a_line_is_taken_back(tmp_path, monkeypatch):
    path, write = tmp_path / "lines.jsonl", os.write
    append_line(path, {"step": 1})
    monkeypatch.setattr(os, "write", lambda handle, content: write(handle, content[:5]))
    with pytest.raises(OSError, match="No space left"):
        append_line(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n'


# --- numbers that break


def test_nan_stops_with_its_rows_and_the_state_before_it_goes_on_exactly(options, base, tmp_path, at_step):
    config = options(tmp_path / "run", lora_dropout=0.2)
    train_set, _ = data.load(config.data, load_tokenizer(base / "llama"), test_size=4)
    rows = [r for b in StepPlan(config, train_set).batches(5, train_set, 0) for r in b.rows]
    at_step(6, lambda loss: loss * math.nan)
    with pytest.raises(FloatingPointError) as stop:
        quiet(config)
    named = f"step 6: the loss is nan. Its rows (counted from 0 in the file): {', '.join(map(str, rows))}."
    assert named in str(stop.value)
    assert "state before this step is in" in str(stop.value) and "lower --learning-rate (now 0.01)" in str(stop.value)
    assert read_progress(tmp_path / "run" / "last" / "state.safetensors").step == 5
    assert all(t.isfinite().all() for t in adapter(tmp_path / "run" / "last").values())
    quiet(config)
    quiet(options(tmp_path / "other", lora_dropout=0.2))
    assert_same_end(tmp_path / "run", tmp_path / "other")


def test_a_poisoned_weight_is_named(options, tmp_path, loaded, at_step):
    def poison(loss):
        loaded[0].model.layers[1].mlp.up_proj.base_layer.weight.data[3, 3] = math.nan
        return loss * math.nan

    at_step(3, poison)
    with pytest.raises(FloatingPointError, match=r"step 3: .* first in the output of model\.layers\.1\.mlp\.up_proj"):
        quiet(options(tmp_path / "run", eval_every=1))


def test_nan_in_the_first_step_is_no_error_of_the_adapter(options, tmp_path, at_step):
    at_step(1, lambda loss: loss * math.nan)
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan.*No step was done before it"):
        quiet(options(tmp_path / "run"))
    assert not (tmp_path / "run" / "last").exists()


def test_nan_on_held_out_rows_names_them(options, base, tmp_path, monkeypatch):
    load = checkpoint.load_model

    def poisoned(*args, **kwargs):
        model = load(*args, **kwargs)
        model.model.norm.weight.data[0] = math.nan
        return model

    monkeypatch.setattr(checkpoint, "load_model", poisoned)
    with pytest.raises(
        FloatingPointError, match=r"held-out loss .* in the output of model\.norm\. Its rows .*: \d+, \d+"
    ):
        quiet(options(tmp_path / "run", samples=0))


BLOWN = "blew the adapter up: it changes the weights of model.layers"


@pytest.mark.parametrize(
    "rate, save_every, says",
    [
        (1e10, 1, f"step 1 {BLOWN}.* is left as last saved. Lower "),
        (1e4, 9, f"step 2: the step before {BLOWN}.*The steps before broke the weights; .* is left as last saved. "),
        (1e39, 1, "step 1 made weights that are not finite; .* is left as last saved. Lower "),  # beyond fp32
        (1e39, 9, f"step 2: the step before {BLOWN}.*The steps before broke the weights; .* is left as last saved. "),
    ],
)
def test_a_huge_rate_ends_in_exit_1_and_saves_no_broken_adapter(
    options, tmp_path, monkeypatch, capsys, rate, save_every, says
):
    config = options(
        tmp_path / "run", learning_rate=rate, schedule="constant", samples=0, eval_every=9, save_every=save_every,
        spike_factor=0.0,
    )  # fmt: skip
    (tmp_path / "options.json").write_text(json.dumps(asdict(config)))
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(tmp_path / "options.json")])
    with pytest.raises(SystemExit) as end:
        run_script(TrainConfig, train, "")
    err = capsys.readouterr().err
    assert end.value.code == 1 and re.search(rf"^error: {says}.*--learning-rate \(now 1", err, re.M), err
    assert not (tmp_path / "run" / "last").exists()


@pytest.fixture
def flat(monkeypatch):
    """5 nats a token in every step, whatever the weights, with the gradients of the true loss."""
    plain = loop.batch_loss

    def constant(model, batch):
        loss = plain(model, batch)
        return loss - loss.detach() + 5.0 * batch.supervised

    monkeypatch.setattr(loop, "batch_loss", constant)


def test_a_dead_model_ends_in_exit_1_and_a_tiny_rate_does_not(options, tmp_path, flat):
    make = lambda run, rate: options(
        tmp_path / run, learning_rate=rate, schedule="constant", samples=0, eval_every=9, save_every=2
    )
    with pytest.raises(FloatingPointError, match=r"step 5: the loss stays at 5.0000 .* the model is dead .*last saved"):
        quiet(make("dead", 1.0))
    assert read_progress(tmp_path / "dead" / "last" / "state.safetensors").step == 4
    quiet(make("slow", 1e-9))
    quiet(make("asked", 1.0).replace(spike_factor=0.0))


def test_a_spike_stops_and_factor_0_lets_it_pass(options, tmp_path, at_step):
    at_step(18, lambda loss: loss * 50)
    config = options(tmp_path / "run", max_steps=20, eval_every=20, samples=0)
    with pytest.raises(FloatingPointError, match=r"step 18: the loss jumped to .*median of the 16 steps before.*: \d+"):
        quiet(config)
    assert read_progress(tmp_path / "run" / "last" / "state.safetensors").step == 17
    at_step(18, lambda loss: loss * 50)
    quiet(config.replace(run=str(tmp_path / "other"), spike_factor=0.0))
    assert len(losses(tmp_path / "other")) == 20


def test_fp16_skips_overflowing_steps_until_the_scale_fits(options, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(*args, init_scale=2.0**26, **kwargs))
    quiet(options(tmp_path / "run", dtype="fp16", save_every=1, eval_every=1, samples=0))
    norms = [record["grad_norm"] for record in metrics(tmp_path / "run") if "loss" in record]
    skipped = norms.index(next(norm for norm in norms if norm is not None))
    assert 0 < skipped < 9 and None not in norms[skipped:]
    state = load_file(tmp_path / "run" / "last" / "state.safetensors")
    assert {t.item() for name, t in state.items() if name.startswith("step.")} == {10 - skipped}
    values = [record["eval_loss"] for record in metrics(tmp_path / "run")]
    assert values[0] == values[skipped] != values[skipped + 1], "a skipped step moves no weight"


def test_fp16_stops_where_no_scale_fits(options, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.tensor(math.inf))
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(*args, init_scale=0.5, **kwargs))
    with pytest.raises(FloatingPointError, match="step 1: the loss is .* but the gradient norm is inf"):
        quiet(options(tmp_path / "run", dtype="fp16", samples=0))


def test_running_out_of_gpu_memory_names_the_knobs(options, tmp_path, at_step):
    def full(loss):
        raise torch.OutOfMemoryError("CUDA out of memory")

    at_step(1, full)
    with pytest.raises(
        MemoryError, match="--batch-size 2, --max-length 512.* turn on --checkpointing, halve --batch-size"
    ):
        quiet(options(tmp_path / "run", samples=0))


# --- folders that cannot be, and disks that are full


def test_bad_input_leaves_no_run_folder(options, base, tmp_path):
    broken = shutil.copytree(base / "llama", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-9])
    small = shutil.copytree(base / "llama", tmp_path / "small")
    config = read_json(small / "config.json") | {"vocab_size": 90}
    (small / "config.json").write_text(json.dumps(config))
    save_file(build(config).state_dict(), small / "model.safetensors", metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    for changes, says in (
        ({"model": str(broken)}, "not a whole safetensors file"),
        ({"model": str(small)}, "but the model has 90 tokens"),
        ({"model": str(tmp_path / "absent")}, "does not exist"),
        ({"data": str(tmp_path / "absent.json")}, "does not exist"),
        ({"lora_targets": ("dense",)}, "no linear layer is named dense"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"max_length": 3}, "no supervised token"),
        ({"test_size": 25}, "leaves none to train on"),
    ):
        with pytest.raises(ValueError, match=says):
            quiet(options(tmp_path / "runs" / "new" / "run", **changes))
        assert sorted(tmp_path.iterdir()) == before, changes


def test_a_run_folder_that_cannot_be_written_is_one_line(options, tmp_path):
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(ValueError, match=f"the run folder {run} cannot be written: .*another --run"):
            quiet(options(run))


def test_the_folder_of_a_model_is_no_run_folder(options, base, tmp_path):
    model = shutil.copytree(base / "llama", tmp_path / "model")
    before = snapshot(model)
    for resume in ("auto", "never"):
        with pytest.raises(ValueError, match="is the folder of a model"):
            quiet(options(model, model=str(model), resume=resume))
    assert snapshot(model) == before


def test_two_processes_cannot_share_a_run_folder(options, copied):
    before = snapshot(copied)
    with hold(copied), pytest.raises(ValueError, match="another process works in"):
        quiet(options(copied))
    assert snapshot(copied) == before
    quiet(options(copied))


def test_temporary_files_of_a_killed_process_go_away(options, copied):
    for name in (".metrics.jsonl.x1.part", "last/.state.safetensors.x2.part", "best/.minitune.json.x3.part"):
        (copied / name).write_text("half")
    (copied / "my.part").write_text("mine")
    quiet(options(copied))
    assert [path.name for path in copied.rglob("*.part")] == ["my.part"]


@pytest.mark.parametrize("call, number", [("fsync", 1), ("fsync", 9), ("fsync", 14), ("replace", 16), ("write", 5)])
def test_a_full_disk_leaves_no_half_and_the_run_goes_on_when_there_is_room(
    options, done, tmp_path, monkeypatch, call, number
):
    plain, calls = getattr(os, call), []

    def full(*args):
        calls.append(args)
        if len(calls) >= number:
            raise OSError(28, "No space left on device")
        return plain(*args)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        quiet(options(tmp_path / "run"))
    monkeypatch.setattr(os, call, plain)
    assert_no_halves(tmp_path / "run")
    quiet(options(tmp_path / "run"))
    assert_same_end(tmp_path / "run", done)


def test_a_folder_named_like_a_short_name_is_that_folder(options, base, tmp_path, monkeypatch):
    shutil.copytree(base / "llama", tmp_path / "mistral")
    monkeypatch.chdir(tmp_path)
    quiet(options(tmp_path / "run", model="./mistral", max_steps=1))
    monkeypatch.chdir(tmp_path / "mistral")
    quiet(options(tmp_path / "run2", model=".", max_steps=1).replace(run=None))
    assert (tmp_path / "mistral" / "runs" / "mistral-lora" / "adapter").is_dir()


def test_targets_and_tokens_that_the_model_lacks_are_refused_before_weights_load(options, base, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", lambda *args, **kwargs: pytest.fail("the weights were loaded"))
    with pytest.raises(ValueError, match="no linear layer is named dense_of_another"):
        train(options(tmp_path / "a", lora_targets=("dense_of_another",)), say=lambda line: None)
    small = shutil.copytree(base / "llama", tmp_path / "small")
    stored = read_json(small / "config.json")
    (small / "config.json").write_text(json.dumps(stored | {"vocab_size": 20}))
    with pytest.raises(ValueError, match=r"the rows have token \d+, but the model has 20 tokens"):
        train(options(tmp_path / "b", model=str(small)), say=lambda line: None)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
