"""A run goes on exactly, whenever and however it was stopped: killed, by a signal, or finished and started again."""

import json
import os
import random
import re
import shutil
import signal
import time
from dataclasses import asdict

import pytest
from forks import ROOT, SCRIPT
from safetensors.torch import load_file, save_file
from small_runs import adapter, assert_same_end, metrics, quiet, same, snapshot

import minitune.train as loop
from minitune import checkpoint
from minitune.config import TrainConfig, parse
from minitune.files import read_json
from minitune.runs import state as run_state
from minitune.runs.state import read_progress
from minitune.train import train

pytestmark = pytest.mark.usefixtures("quick")

# --- a process that is killed, and the run that goes on

TRAIN = """
import os, signal, sys
from functools import partial
import torch
import minitune.train as loop
from minitune.config import TrainConfig, run_script

torch.set_num_threads(1)
loop.draw_curves = lambda records, path: None
moment, operations, states = sys.argv.pop(), [], []

def counted(name, call):
    def wrapped(*args, **kwargs):
        operations.append(name)
        if name == "replace" and str(args[1]).endswith("state.safetensors"):
            states.append(name)
        if moment in (f"operation {len(operations)}", f"state {len(states)}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped

if moment:
    for name in ("write", "fsync", "replace", "unlink", "chmod"):
        setattr(os, name, counted(name, getattr(os, name)))
# a scale that grows in every step, until gradients overflow in the sixth
torch.amp.GradScaler = partial(torch.amp.GradScaler, growth_interval=1)
run_script(TrainConfig, loop.train, "")
"""


@pytest.fixture(scope="session")
def start(forks, tmp_path_factory):
    """start(config, die_before="") -> a process that trains, and kills itself before "operation N" on a file, or before "state N"
    gets its name, when it is written."""
    stored = tmp_path_factory.mktemp("options") / "options.json"

    def start(config, die_before=""):
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


STEPS = 8
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
            changes = {"save_every": 1, "eval_every": 3, "max_steps": STEPS, "lora_targets": ("q_proj", "v_proj")}
            changes |= {"dtype": precision, **EXACT[precision]}
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
    for _ in range(12):
        if killed_at[-1] >= STEPS - 2 or len(killed_at) == 4:
            break
        process = start(make(tmp_path / "run"))
        while process.poll() is None and not (state.exists() and read_progress(state).step > killed_at[-1]):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, seconds / 5))
        if kill(process) == 0:  # on a busy machine it may have finished first: then once more
            shutil.rmtree(tmp_path / "run")
            killed_at = [0]
        else:
            killed_at.append(read_progress(state).step)
    assert killed_at == sorted(killed_at) and len(killed_at) > 1, "each process went on from the one before"
    finish(start(make(tmp_path / "run")))
    assert_same_end(tmp_path / "run", expected)


def test_a_run_killed_when_it_has_saved_its_state_ends_as_the_uninterrupted_one(exact, start, tmp_path):
    make, expected, _ = exact("fp32")
    state, seen = tmp_path / "run" / "last" / "state.safetensors", None

    def has_saved():
        nonlocal seen
        now = state.stat().st_mtime_ns if state.exists() else None
        changed, seen = now != seen, now
        return changed

    kills = 0
    for _ in range(3):
        process = start(make(tmp_path / "run"))
        while not has_saved() and process.poll() is None:
            pass
        kills += kill(process) != 0
    assert kills
    finish(start(make(tmp_path / "run")))
    assert_same_end(tmp_path / "run", expected)


@pytest.mark.parametrize(
    "moment", [*(f"operation {n}" for n in (3, 20, 33, 52, 75, 110, 165)), "state 3"]
)  # of 184 and 8
def test_a_run_killed_before_a_file_operation_ends_as_the_uninterrupted_one(exact, start, tmp_path, moment):
    make, expected, _ = exact("fp32")
    assert start(make(tmp_path / "run"), die_before=moment).wait() == -signal.SIGKILL
    assert not moment.startswith("state") or any((tmp_path / "run" / "last").glob(".state*.part"))
    finish(start(make(tmp_path / "run")))
    assert_same_end(tmp_path / "run", expected)


def test_the_scaler_of_the_fp16_run_skipped_steps_and_changed_its_scale(exact):
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
    step, command = re.search(r"^stopped: after step (\d+) of 40; .*Resume with: (.*)$", err, re.M).groups()
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
    assert re.search(r"^stopped: after step \d+ of 8; .*Resume with", process.err.read_text(), re.M)
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
    monkeypatch.setattr("minitune_kernels.ops.formulas_fingerprint", lambda: "edited")
    with pytest.raises(ValueError, match="settings: the formulas in kernels/, which were edited. Use --run"):
        quiet(options(done))
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
    assert any(line.startswith("resuming from step 10 of 10") for line in lines)


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


def test_a_best_adapter_that_is_newer_than_the_state_is_not_used(options, copied, base):
    newer = adapter(copied / "best")
    save_file({name: t + 1 for name, t in newer.items()}, copied / "best" / "adapter_model.safetensors")
    lines = quiet(options(copied))
    assert any("best was changed and no longer holds the best step, 10" in line for line in lines)
    assert same(adapter(copied / "adapter"), adapter(copied / "last"))


def test_config_json_of_a_run_gives_the_same_adapter(done, tmp_path):
    config = parse(TrainConfig, ["--config", str(done / "config.json"), "--run", str(tmp_path / "other")])
    quiet(config)
    assert_same_end(tmp_path / "other", done)
