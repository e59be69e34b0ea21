"""The training loop on a random model of two layers: what a step computes, and what a run writes."""

import json
import math
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from small import FAMILIES
from small_runs import adapter, assert_same_end, losses, make_model, metrics, quiet, same
from torch.nn import functional as F

import minitune.train as loop
from minitune import checkpoint, data, model_folder
from minitune.adapters import lora
from minitune.config import TrainConfig
from minitune.decoding.options import GenerateConfig
from minitune.files import read_json
from minitune.generate import generate
from minitune.plan import StepPlan, learning_rate
from minitune.runs import curves as run_curves
from minitune.runs.folder import read_lines
from minitune.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("quick")

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


def test_the_optimizer_is_torch_s_and_a_training_step_loads_no_compiler():
    """Of torch._dynamo and sympy, which take a second or two. In a process of its own: other tests may have loaded them."""
    code = """
import sys, torch
from minitune.config import TrainConfig
from minitune.train import make_optimizer
from minitune_kernels import ops
c = TrainConfig(model="tiny-llama", weight_decay=0.1)
options = {"lr": c.learning_rate, "betas": (c.adam_beta1, c.adam_beta2), "eps": c.adam_eps, "weight_decay": 0.1}
weight, states = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), []
for make in (lambda p: make_optimizer({"w": p}, c), lambda p: torch.optim.AdamW([p], **options, fused=True)):
    head = torch.nn.Linear(4, 9, bias=False)
    head.weight.data.copy_(weight)
    optimizer = make(head.weight)
    for step in range(3):
        optimizer.zero_grad()
        ops.cross_entropy(torch.arange(8.0).view(2, 4) - step, head, torch.tensor([1, 2])).backward()
        torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
    states.append((head.weight.detach(), *optimizer.state_dict()["state"][0].values()))
    print(sorted({"torch._dynamo", "sympy"} & set(sys.modules)))
print([torch.equal(*pair) for pair in zip(*states)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, theirs, equal = done.stdout.splitlines()
    assert ours == "[]" and theirs != "[]" and equal == "[True, True, True, True]"


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
