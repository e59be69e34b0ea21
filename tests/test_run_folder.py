"""The folder of a run: lines that survive kills, folders that cannot be, disks that are full."""

import json
import math
import os
import re
import shutil
import zlib
from pathlib import Path

import pytest
from safetensors.torch import save_file
from small_runs import assert_no_halves, assert_same_end, quiet, snapshot

from minitune import checkpoint
from minitune.files import read_json
from minitune.models import build
from minitune.runs import folder as run_folder
from minitune.runs.folder import append_line, hold, keep_lines, read_lines
from minitune.session import Answerer, ModelConfig
from minitune.train import train

pytestmark = pytest.mark.usefixtures("quick")


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


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_every_job_takes_the_first_adapter_of_a_run_that_is_whole(missing, copied):
    """generate, evaluate and the report, where adapter/ lacks a file."""
    (copied / "adapter" / missing).unlink()
    assert run_folder.adapter_folder(copied) == run_folder.find_adapter(copied) == copied / "best"
    said = []
    assert Answerer(ModelConfig(adapter=str(copied)), said.append).adapter == copied / "best"
    assert said[0] == f"warning: {copied / 'adapter'} has no {missing}: {copied / 'best'} is used in its place"
    shutil.rmtree(copied / "adapter")
    Answerer(ModelConfig(adapter=str(copied)), said.append)
    assert f"{copied} did not end its training: {copied / 'best'} is used" in said
    shutil.rmtree(copied / "best")
    shutil.rmtree(copied / "last")
    assert run_folder.adapter_folder(copied) is None
    with pytest.raises(ValueError, match="of a run with adapter_config.json and adapter_model.safetensors"):
        run_folder.find_adapter(copied)


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
