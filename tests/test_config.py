"""Options: which source of a value goes before which, the study's recipes, one clear line for whatever is wrong, and files that
are written whole or not at all."""

import errno
import json
import os
import signal
import stat
import threading
from dataclasses import FrozenInstanceError, asdict, dataclass, fields

import pytest
import torch

from minitune import files
from minitune.config import RECIPES, TrainConfig, arg, parse, run_script
from minitune.device import choose_device
from minitune.files import read_json, write_json, write_whole


@pytest.fixture
def script(monkeypatch, capsys):
    """script(*argv, job=...) -> (exit code, stderr) of what scripts/train.py does, without a process."""

    def run(*argv, job=lambda config: None, cls=TrainConfig):
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, argv)])
        try:
            run_script(cls, job, "a script")
            code = 0
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    return run


def stored(tmp_path, **values):
    path = tmp_path / "options.json"
    path.write_text(json.dumps(values))
    return path


# DESIGN.md's table, spelled out: r, alpha, dropout, targets, batch x accumulation, and the column "other". The
# precision of that column is not a default: it is chosen by what the device can do.
STUDY = {"learning_rate": 2e-4, "quantize": "nf4", "epochs": 1.0, "seed": 42, "split_seed": 42, "use_rslora": False}
LLAMA = {
    "lora_rank": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "lora_targets": ("q_proj", "v_proj"),
    "batch_size": 2,
    "schedule": "constant",
    "warmup": 0.03,
    "weight_decay": 0.001,
    "max_grad_norm": 0.3,
    "group_by_length": True,
}
PHI = {
    "lora_rank": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_targets": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "batch_size": 2,
    "accumulation": 1,
    "schedule": "linear",
    "warmup": 0.0,
    "max_grad_norm": 1.0,
    "max_length": 2048,
    "group_by_length": False,
}


@pytest.mark.parametrize(
    "model, expected",
    [
        ("llama2", {**STUDY, **LLAMA, "accumulation": 8}),
        ("mistral", {**STUDY, **LLAMA, "accumulation": 16}),
        ("phi2", {**STUDY, **PHI}),
    ],
)
def test_recipe_equals_the_table_of_the_design(model, expected):
    config = parse(TrainConfig, ["--model", model])
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_recipe_leaves_the_split_of_rows_to_the_data():
    assert parse(TrainConfig, ["--model", "llama2"]).test_size is None  # alpaca's own: 0.0005
    assert parse(TrainConfig, ["--model", "llama2", "--test-data", "held_out.json"]).test_data == "held_out.json"


def test_the_command_line_goes_before_the_file_the_recipe_and_the_default(tmp_path):
    path = stored(tmp_path, model="llama2", lora_rank=7, accumulation=3, seed=1)
    config = parse(TrainConfig, ["--config", str(path), "--seed", "2", "--lora-rank", "5"])
    assert (config.lora_rank, config.seed) == (5, 2), "typed beats the file"
    assert config.accumulation == 3, "the file beats the recipe"
    assert (config.max_grad_norm, config.batch_size) == (0.3, 2), "the recipe of the file's model beats the defaults"
    assert config.adam_beta2 == TrainConfig.adam_beta2
    other = parse(TrainConfig, ["--config", str(path), "--model", "phi2"])
    assert other.max_grad_norm == 1.0 and other.lora_rank == 7, "the recipe is that of the model typed"


def test_without_a_model_the_recipe_is_that_of_the_default_model():
    assert parse(TrainConfig, []) == parse(TrainConfig, ["--model", TrainConfig.model])


def test_a_folder_or_hub_id_has_no_recipe():
    config = parse(TrainConfig, ["--model", "microsoft/phi-2"])
    assert asdict(config) == {f.name: f.default for f in fields(TrainConfig)} | {"model": "microsoft/phi-2"}


@pytest.mark.parametrize("model", [*RECIPES, "./mistral", "mistralai/Mistral-7B-v0.1"])
def test_python_code_gets_the_recipe_as_the_command_line_does(model):
    config = TrainConfig(model=model)
    assert config == parse(TrainConfig, ["--model", model])
    assert {name: getattr(config, name) for name in RECIPES.get(model, {})} == RECIPES.get(model, {})


def test_what_is_given_wins_over_the_recipe_also_where_it_is_the_default():
    config = TrainConfig(model="mistral", quantize="none", lora_rank=TrainConfig.lora_rank)
    assert (config.quantize, config.lora_rank, config.warmup) == ("none", 16, 0.03)
    assert config.replace(seed=1) == TrainConfig(model="mistral", quantize="none", lora_rank=16, seed=1)
    assert config.replace(model="phi2").max_grad_norm == 0.3, "a changed copy keeps what it had"
    assert TrainConfig() == TrainConfig(model="tiny-mistral") and TrainConfig().dtype == "fp32"
    assert TrainConfig(**asdict(config)) == config
    with pytest.raises(TypeError, match="no option epoch"):
        TrainConfig(epoch=3)


@pytest.mark.parametrize("model", ["tiny-mistral", "mistral", "phi2"])
def test_every_field_survives_config_json(model, tmp_path):
    config = parse(TrainConfig, ["--model", model, "--max-steps", "7", "--warmup", "3", "--no-group-by-length"])
    assert config.group_by_length is False
    write_json(tmp_path / "config.json", asdict(config))
    assert parse(TrainConfig, ["--config", str(tmp_path / "config.json")]) == config


def test_a_byte_order_mark_in_the_file_is_no_error(tmp_path):
    path = tmp_path / "options.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"seed": 3}')
    assert parse(TrainConfig, ["--config", str(path)]).seed == 3


def test_config_is_frozen_and_replace_checks_again():
    config = TrainConfig()
    with pytest.raises(FrozenInstanceError):
        config.seed = 1
    assert config.replace(seed=1).seed == 1
    with pytest.raises(ValueError, match="batch_size is 0"):
        config.replace(batch_size=0)


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse(TrainConfig, ["--help"])
    shown = "".join(capsys.readouterr().out.split())  # lines are broken at hyphens too
    assert end.value.code == 0
    for f in fields(TrainConfig):
        assert "--" + f.name.replace("_", "-") in shown
        default = getattr(TrainConfig(), f.name)  # of the recipe of the embedded model
        default = "".join(default) if isinstance(default, tuple) else default
        assert default is None or f"(default:{default})" in shown, f.name


def test_help_may_hold_a_percent_sign_and_a_list_of_numbers(capsys):
    @dataclass(frozen=True)
    class Config:
        share: float = arg(0.5, "50% of it")
        sizes: tuple[int, ...] = arg((1, 2), "sizes")

    with pytest.raises(SystemExit):
        parse(Config, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "50% of it (default: 0.5)" in shown and "(default: 1 2)" in shown
    assert parse(Config, ["--sizes", "3", "4"]).sizes == (3, 4)


@pytest.mark.parametrize("model", ["mistral", "phi2"])
def test_help_beside_a_model_shows_its_recipe_in_80_columns(model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help", "--model", model], "Fine-tune.")
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 80 and "adapter:" in lines and "of this --model" not in text
    assert f"rank r of the adapter (default: {RECIPES[model]['lora_rank']})" in text and "(default: nf4)" in text


@pytest.mark.parametrize(
    "typed, says",
    [
        ("--epoch 3", "no option --epoch; did you mean --epochs?"),
        ("--lr 1", "no option --lr; did you mean --learning-rate?"),
        ("--r=8", "no option --r; did you mean --lora-rank?"),
        ("--lora_rank 8", "did you mean --lora-rank?"),
        ("--load-in-4bit", "did you mean --quantize?"),
        ("--wramup 1", "did you mean --warmup?"),
        ("--quantize nf", "--quantize is 'nf', expected one of none, nf4, nf4-dq; did you mean nf4?"),
        ("--batch-size two", "--batch-size is 'two', expected a whole number"),
        ("--seed " + "9" * 5000, "expected a whole number"),
        ("what is it", "'what is it' follows no option"),
        ("--\x1b[31mred 1", r"no option --\x1b[31mred"),
        ("--zzzz 1", "no option --zzzz (--help lists the options)"),
    ],
)
def test_a_mistyped_option_is_guessed_in_one_short_line(script, typed, says):
    code, err = script(*typed.split(" "))
    assert code == 2 and says in err and err.count("\n") == 1 and len(err) < 500, err


def test_the_version_is_shown(capsys):
    with pytest.raises(SystemExit) as end:
        parse(TrainConfig, ["--version"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "minitune" in shown and torch.__version__ in shown


WRONG_TYPED = [
    (["--batch-size", "0"], "batch_size is 0"),
    (["--batch-size", "-1"], "batch_size is -1"),
    (["--batch-size", "2.5"], "--batch-size"),
    (["--batch-size", "many"], "--batch-size"),
    (["--batch-size"], "--batch-size"),
    (["--batch", "2"], "--batch"),
    (["--no-such-option", "1"], "--no-such-option"),
    (["stray"], "stray"),
    (["--quantize", "int8"], "nf4-dq"),
    (["--schedule", "step"], "cosine"),
    (["--learning-rate", "0"], "learning_rate is 0"),
    (["--learning-rate", "-0.001"], "learning_rate is -0.001"),
    (["--learning-rate", "nan"], "learning_rate is nan"),
    (["--learning-rate", "inf"], "learning_rate is inf"),
    (["--epochs", "inf"], "epochs is inf"),
    (["--epochs", "-1"], "epochs is -1"),
    (["--max-steps", "0"], "max_steps is 0"),
    (["--lora-rank", str(10**23)], "expected a whole number from 0 to"),
    (["--warmup", "-0.1"], "warmup is -0.1"),
    (["--warmup", "1.5"], "warmup is 1.5"),
    (["--lora-dropout", "1"], "lora_dropout is 1"),
    (["--lora-dropout", "-0.1"], "lora_dropout is -0.1"),
    (["--adam-beta1", "1"], "adam_beta1 is 1"),
    (["--adam-beta2", "nan"], "adam_beta2 is nan"),
    (["--weight-decay", "-1"], "weight_decay is -1"),
    (["--spike-factor", "0.5"], "spike_factor is 0.5"),
    (["--seed", "-1"], "seed is -1"),
    (["--split-seed", "-1"], "split_seed is -1"),
    (["--seed", str(2**64)], "seed is"),
    (["--test-data", "x.json", "--test-size", "5"], "test_data and test_size"),
    (["--config", "no/such/file.json"], "no/such/file.json does not exist"),
    (["--config", ""], "--config is empty"),
    (["--data", ""], "data is empty"),
    (["--run", ""], "run is empty"),
]


@pytest.mark.parametrize("argv, says", WRONG_TYPED, ids=[" ".join(argv)[:40] for argv, _ in WRONG_TYPED])
def test_a_wrong_option_is_one_line_and_exit_2(script, argv, says):
    code, err = script(*argv, job=lambda config: pytest.fail("the job ran"))
    assert code == 2
    assert err.startswith("error: ") and says in err and err.count("\n") == 1, err


WRONG_STORED = [
    ({"batchsize": 2}, "batchsize"),
    ({"batch_size": "2"}, "batch_size is '2', expected a whole number"),
    ({"batch_size": 2.0}, "batch_size is 2.0, expected a whole number"),
    ({"batch_size": True}, "batch_size is True, expected a whole number"),
    ({"learning_rate": True}, "learning_rate is True, expected a finite number"),
    ({"learning_rate": float("inf")}, "learning_rate is inf, expected a finite number"),
    ({"learning_rate": float("nan")}, "learning_rate is nan, expected a finite number"),
    ({"group_by_length": 1}, "group_by_length is 1, expected true or false"),
    ({"seed": None}, "seed is None, expected a whole number"),
    ({"model": 5}, "model is 5, expected text"),
    ({"lora_targets": "q_proj"}, "lora_targets is 'q_proj', expected a list, each text"),
    ({"lora_targets": ["q_proj", 1]}, "lora_targets is"),
    ({"lora_targets": []}, "lora_targets is empty"),
    ({"schedule": "step"}, "schedule is 'step', expected one of constant, linear, cosine"),
    ({"schedule": ["linear"]}, "schedule is ['linear'], expected one of"),
    ({"batch_size": -3}, "batch_size is -3"),
]


@pytest.mark.parametrize("values, says", WRONG_STORED, ids=[json.dumps(values) for values, _ in WRONG_STORED])
def test_a_wrong_value_in_the_file_is_one_line_and_exit_2(script, tmp_path, values, says):
    code, err = script("--config", stored(tmp_path, **values), job=lambda config: pytest.fail("the job ran"))
    assert code == 2
    assert err.startswith("error: ") and says in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "line 1, column 1"),
        (b'{"seed": 1', "line 1, column 11"),
        (b"[1, 2]", "holds a list, expected an object"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(script, tmp_path, content, says):
    path = tmp_path / "options.json"
    path.write_bytes(content)
    code, err = script("--config", path)
    assert code == 2 and str(path) in err and says in err and err.count("\n") == 1, err


def test_a_path_through_a_file_is_one_line(script, tmp_path):
    (tmp_path / "file").write_text("")
    code, err = script("--config", tmp_path / "file" / "options.json")
    assert code == 2 and "cannot be read: Not a directory" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "values, says",
    [
        ({"schedule": "step"}, "schedule is 'step', expected one of"),
        ({"batch_size": 2.5}, "batch_size is 2.5, expected a whole number"),
        ({"lora_targets": "all-linear"}, "lora_targets is 'all-linear', expected a list"),
        ({"epochs": float("inf")}, "epochs is inf, expected a finite number"),
    ],
)
def test_python_code_gets_the_same_checks(values, says):
    with pytest.raises(ValueError, match="^" + says.replace("(", r"\(")):
        TrainConfig(**values)


def raising(error):
    def job(config):
        raise error

    return job


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:115] data. DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        OSError(errno.ENOMEM, "Cannot allocate memory", "f"),
    ],
    ids=repr,
)
def test_too_little_memory_is_one_line_with_what_to_change(script, error):
    code, err = script(job=raising(error))
    assert (code, err.count("\n")) == (1, 1) and err.startswith(
        "error: out of memory; lower --batch-size or --max-length, or"
    )


def test_exit_codes_of_a_script(script):
    assert script() == (0, "")
    assert script(job=raising(ValueError("bad input"))) == (2, "error: bad input\n")
    assert script(job=raising(FloatingPointError("step 3"))) == (1, "error: step 3\n")
    assert script(job=raising(BrokenPipeError())) == (0, "")
    assert script(job=raising(ValueError("a\n\x1b" + 9999 * "b")))[1].startswith(r"error: a \x1bbbb")
    assert len(script(job=raising(ValueError(9999 * "b")))[1]) < 500
    assert script(job=raising(OSError(28, "No space left")))[0] == 1
    assert script(job=raising(KeyboardInterrupt("after step 3"))) == (130, "stopped: after step 3\n")
    assert script(job=raising(KeyboardInterrupt())) == (130, "stopped: by Ctrl-C\n")
    with pytest.raises(ValueError, match="bad input"):
        script("--debug", job=raising(ValueError("bad input")))
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        script(job=lambda config: 1 / 0)


def test_sigterm_ends_a_script_as_ctrl_c_does_and_its_handler_goes_back(script):
    before, while_open = signal.getsignal(signal.SIGTERM), []

    def job(config):
        while_open.append(signal.getsignal(signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)

    assert script(job=job) == (130, "stopped: by SIGTERM\n")
    assert signal.getsignal(signal.SIGTERM) is before is not while_open[0]
    found = []
    thread = threading.Thread(target=lambda: found.append(script()))  # which may not take signals
    thread.start()
    thread.join()
    assert found == [(0, "")]


# --- files that appear whole or not at all


def test_write_whole_makes_the_folder_and_a_file_that_others_may_read(tmp_path):
    write_whole(tmp_path / "a" / "b" / "f", "tëxt")
    path = tmp_path / "a" / "b" / "f"
    assert path.read_bytes() == "tëxt".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~files.current_umask()
    assert [p.name for p in path.parent.iterdir()] == ["f"]


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_half(tmp_path, monkeypatch, call):
    write_whole(tmp_path / "f", "old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "f", "new")
    monkeypatch.undo()
    assert (tmp_path / "f").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_write_json_is_read_back_by_read_json(tmp_path):
    value = {"text": "ä\u2028\n", "list": [1, 2.5, None]}
    write_json(tmp_path / "f.json", value)
    assert read_json(tmp_path / "f.json") == value


WRONG_PATH, FULL_DISK = IsADirectoryError(21, "Is a directory", "out"), OSError(28, "No space left on device", "run/x")


@pytest.mark.parametrize(("error", "code"), [(WRONG_PATH, 2), (FULL_DISK, 1)], ids=["wrong path", "full disk"])
def test_a_path_that_is_wrong_is_exit_2_and_a_full_disk_is_exit_1(script, error, code):
    def job(config):
        raise error

    assert script(job=job) == (code, f"error: {error.filename}: {error.strerror}\n")


@pytest.mark.parametrize("name", ["cuda:99999999999999999999", "cuda:-1", "gpu", ""])
def test_a_device_that_cannot_be_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"device is {name!r}, expected auto, cpu, cuda or cuda:N"):
        choose_device(name)
