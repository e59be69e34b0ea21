"""A run whose numbers break stops, says what broke and where, and keeps the last good state."""

import json
import math
import re
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from small_runs import adapter, assert_same_end, losses, metrics, quiet

import minitune.train as loop
from minitune import checkpoint, data
from minitune.config import TrainConfig, run_script
from minitune.plan import StepPlan
from minitune.runs.state import read_progress
from minitune.tokenizer import load_tokenizer
from minitune.train import train

pytestmark = pytest.mark.usefixtures("quick")


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


BLOWN = "made the adapter too large: it changes each weight of model.layers"


@pytest.mark.parametrize(
    "rate, save_every, says",
    [
        (1e10, 1, f"step 1 {BLOWN}.* still holds the last saved state. Lower "),
        (
            1e4,
            9,
            f"step 2: the step before {BLOWN}.*The steps before broke the weights; .* still holds the last saved state. ",
        ),
        (
            1e39,
            1,
            "step 1 made weights that are not finite; .* still holds the last saved state. Lower ",
        ),  # beyond fp32
        (
            1e39,
            9,
            f"step 2: the step before {BLOWN}.*The steps before broke the weights; .* still holds the last saved state. ",
        ),
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
    with pytest.raises(
        FloatingPointError, match=r"step 5: the loss stays at 5.0000 .* the model no longer learns .*last saved"
    ):
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
