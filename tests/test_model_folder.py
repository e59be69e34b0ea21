"""A model's name is opened once: config.json is parsed once and the model built once, whatever a job asks of it."""

import json
from collections import Counter
from pathlib import Path

import pytest

from minitune import files, hub
from minitune.checkpoint import load_model
from minitune.config import TrainConfig
from minitune.jobs.evaluate import EvaluateConfig, evaluate
from minitune.jobs.generate import AnswerConfig, answer
from minitune.model_folder import ModelFolder
from minitune.models.mistral import MistralForCausalLM
from minitune.tokenizer import load_tokenizer
from minitune.train import train

TINY = hub.EMBEDDED_FOLDER / "tiny-mistral"
QUIET = lambda line: None


@pytest.fixture
def counted(monkeypatch):
    """Counter of what is parsed in the model's folder, by name, and of models built ("model")."""
    counts, read, build = Counter(), files.read_json, MistralForCausalLM.__init__

    def reading(path, *shape):
        counts.update([Path(path).name] if Path(path).parent.resolve() == TINY else [])
        return read(path, *shape)

    def building(self, config):
        counts.update(["model"])
        build(self, config)

    monkeypatch.setattr(files, "read_json", reading)
    monkeypatch.setattr(MistralForCausalLM, "__init__", building)
    return counts


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a run of one step on twelve rows, four of them held out."""
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    file.write_text(json.dumps(json.loads(hub.embedded_rows("train").read_text())[:12]))
    return {"model": "tiny-mistral", "data": str(file), "test_size": 4, "max_steps": 1, "samples": 1}


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    train(TrainConfig(run=str(run), **options), QUIET)
    return run


ONCE = {"config.json": 1, "generation_config.json": 1, "tokenizer_config.json": 1, "model": 1}


def test_a_qlora_run_reads_config_json_once_and_builds_the_model_once(options, counted, tmp_path):
    train(TrainConfig(run=str(tmp_path / "run"), quantize="nf4", **options), QUIET)
    assert counted == ONCE


def test_generate_reads_config_json_once_and_builds_the_model_once(counted, capsys):
    answer(AnswerConfig(prompt="What is 3 + 4?", max_new_tokens=2), QUIET)
    assert counted == ONCE


def test_evaluate_reads_config_json_once_and_builds_base_and_tuned_model_once(run, counted):
    evaluate(EvaluateConfig(run=str(run), max_new_tokens=2, limit=2, resamples=10), QUIET)
    assert counted["config.json"] == counted["tokenizer_config.json"] == 1 and counted["model"] <= 2


def test_a_folder_that_is_open_is_taken_as_it_is_and_gives_every_model_its_own_layers():
    folder = ModelFolder.open("tiny-mistral")
    assert ModelFolder.open(folder) is folder and folder.with_weights() is folder
    assert (
        folder.config["model_type"] == "mistral"
        and folder.eos_ids == (2,)
        and folder.vocab_size == folder.tokenizer.vocab_size
    )
    first, second = load_model(folder), load_model(folder)
    assert first.lm_head is not second.lm_head and not any(p.is_meta for p in second.parameters())
    assert folder.tokenizer.encode("one fact") == load_tokenizer(TINY).encode("one fact")


def test_a_folder_whose_files_changed_has_another_fingerprint(tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    before = ModelFolder(tmp_path).fingerprint
    assert ModelFolder(tmp_path).fingerprint == before
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert ModelFolder(tmp_path).fingerprint != before
