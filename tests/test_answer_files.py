"""generate --out: the file of answers, whenever and however it was stopped."""

import errno
import json
import os
import signal
import time

import pytest
import torch

from minitune.files import write_json
from minitune.jobs.generate import AnswerConfig, answer
from minitune.runs import answers
from minitune.runs.answers import open_answers

QUIET = lambda line: None


# A file of questions: answers that survive a stop

KINDS = ("answers.jsonl", "answers.json")
MANY = [f"What is {a} + {b}?" for a in range(3, 8) for b in range(4)]


def entries(path):
    """The records of a file of answers, which must be valid as it is."""
    if path.suffix == ".jsonl":
        *lines, rest = path.read_text().split("\n")
        assert rest == ""
        return [json.loads(line) for line in lines]
    return json.loads(path.read_text())


@pytest.fixture
def many(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps(MANY))
    return tmp_path / "q.json"


@pytest.mark.parametrize(
    ("name", "how"),
    [("answers.jsonl", signal.SIGKILL), ("answers.json", signal.SIGTERM), ("answers.json", signal.SIGINT)],
)
def test_a_stopped_file_is_valid_and_a_second_start_gives_the_file_of_one_start(name, how, many, tmp_path, forks):
    """min_new_tokens makes every answer as long, so that there is time to stop."""
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "batch_size": 2, "num_return_sequences": 2}
    out, whole = tmp_path / name, tmp_path / ("whole" + name[7:])
    argv = [part for key, value in options.items() for part in ("--" + key.replace("_", "-"), str(value))]
    process = forks.script("generate.py", "--do-sample", "--prompts", many, "--out", out, *argv)
    deadline = time.monotonic() + 60
    while not out.exists() or out.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.err.read_text()
        time.sleep(0.002)
    process.send_signal(how)
    process.wait()
    errors = process.err.read_text()
    before = entries(out)
    assert 0 < len(before) < 2 * len(MANY)
    if how != signal.SIGKILL:
        assert errors.splitlines()[-1] == f"stopped: {out} has {len(before)} of 40 answers; the same command goes on"
    said, config = [], AnswerConfig(prompts=str(many), do_sample=True, out=str(out), **options)
    answer(config, said.append)
    assert f"{out} has {len(before)} of 40 answers; going on" in said and said[-1].startswith(
        f"{out} has 40 of 40 answers"
    )
    assert entries(out)[: len(before)] == before
    answer(AnswerConfig(prompts=str(many), do_sample=True, out=str(whole), **options), QUIET)
    assert out.read_bytes() == whole.read_bytes() and len(entries(whole)) == 40


def test_ctrl_c_while_answers_are_written_keeps_them_all(many, tmp_path, monkeypatch):
    out, real = tmp_path / "answers.json", answers.write_at

    def write_at(handle, content, offset):
        count = real(handle, content, offset)
        if content.count(b"\n") > 2:
            os.kill(os.getpid(), signal.SIGINT)
        return count

    monkeypatch.setattr(answers, "write_at", write_at)
    with pytest.raises(KeyboardInterrupt, match="has 4 of 20 answers"):
        answer(AnswerConfig(prompts=str(many), out=str(out), max_new_tokens=2, batch_size=4), QUIET)
    assert len(entries(out)) == 4


@pytest.mark.parametrize("name", KINDS)
def test_every_batch_is_in_the_file_when_the_next_one_begins(name, many, tmp_path, monkeypatch):
    import minitune.jobs.generate as module

    out, real, seen = tmp_path / name, module.decode, []

    def decode(*args, **options):
        seen.append(len(entries(out)))
        return real(*args, **options)

    monkeypatch.setattr(module, "decode", decode)
    answer(AnswerConfig(prompts=str(many), out=str(out), max_new_tokens=2, batch_size=6), QUIET)
    assert seen == [0, 6, 12, 18] and [entry["prompt"] for entry in entries(out)] == MANY


def test_finished_answers_are_not_decoded_again_and_more_questions_go_on(many, tmp_path, monkeypatch):
    out = tmp_path / "answers.jsonl"
    config = AnswerConfig(prompts=str(many), out=str(out), max_new_tokens=2)
    first = answer(config, QUIET)
    content = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("minitune.checkpoint.load_model", lambda *args, **options: pytest.fail("the model was loaded"))
        said = []
        assert answer(config, said.append) == first and f"{out} has 20 of 20 answers; nothing is left to do" in said
    many.write_text(json.dumps([*MANY, "Name a bird."]))
    assert answer(config, QUIET)[20]["prompt"] == "Name a bird."
    assert out.read_bytes().startswith(content) and len(entries(out)) == 21


def test_answers_of_other_settings_or_questions_are_refused_by_name_until_told_to_start_over(many, tmp_path):
    out = tmp_path / "answers.json"
    options = {"prompts": str(many), "out": str(out), "max_new_tokens": 2}
    answer(AnswerConfig(**options), QUIET)
    before = out.read_bytes()
    for other, message in (
        ({"repetition_penalty": 1.5}, "other settings: repetition_penalty 1.0 -> 1.5"),
        ({"template": "phi2"}, "other settings: template plain -> phi2"),
        ({"model": "tiny-llama"}, "other settings: model tiny-mistral -> tiny-llama, model files"),
        ({"logprobs": True}, "other settings: logprobs False -> True"),
    ):
        with pytest.raises(ValueError, match=message):
            answer(AnswerConfig(**options | other), QUIET)
    answer(AnswerConfig(**options, top_p=0.5, batch_size=3), QUIET)  # which change no answer
    many.write_text(json.dumps([MANY[0], "Another?", *MANY[2:]]))
    with pytest.raises(ValueError, match="answer 1 is not one to question 1 of the file"):
        answer(AnswerConfig(**options), QUIET)
    many.write_text(json.dumps(MANY[:3]))
    with pytest.raises(ValueError, match="has more than 3 answers, expected at most"):
        answer(AnswerConfig(**options), QUIET)
    with pytest.raises(ValueError, match="holds the answers to a file of questions"):
        answer(AnswerConfig(prompt="x", out=str(out)), QUIET)
    assert out.read_bytes() == before
    answer(AnswerConfig(**options, repetition_penalty=1.5, resume="never"), QUIET)
    assert [entry["prompt"] for entry in entries(out)] == MANY[:3]


def test_a_file_that_is_not_of_answers_is_never_written_over(many, tmp_path):
    out = tmp_path / "mine.jsonl"
    out.write_text('{"answer": "of mine"}\n')
    with pytest.raises(ValueError, match="is there, but not mine.jsonl.settings.json"):
        answer(AnswerConfig(prompts=str(many), out=str(out)), QUIET)
    for resume in ("auto", "never"):
        with pytest.raises(ValueError, match="--out is the file of --prompts"):
            answer(AnswerConfig(prompts=str(many), out=str(many), resume=resume), QUIET)
    assert out.read_text() == '{"answer": "of mine"}\n' and json.loads(many.read_text()) == MANY


QUESTIONS = [{"prompt": text} for text in ("a", "b\u2028\n", "c, ]", "d")]
ANSWERS = [question | {"answer": '"é😀"],\n'} for question in QUESTIONS]


@pytest.mark.parametrize("name", KINDS)
def test_a_file_cut_at_any_byte_goes_on_to_the_same_file(name, tmp_path):
    """As a crash of the machine may leave it."""
    path = tmp_path / name
    with open_answers(path, {"x": 1}, QUESTIONS, 1, True) as file:
        file.write(ANSWERS[:1])
        file.write(ANSWERS[1:])
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with open_answers(path, {"x": 1}, QUESTIONS, 1, False) as file:
            assert file.records == ANSWERS[: len(file.records)] == entries(path)
            file.write(ANSWERS[len(file.records) :]) if len(file.records) < 4 else None
        assert path.read_bytes() == whole


@pytest.mark.parametrize("name", KINDS)
def test_a_full_disk_leaves_the_answers_before(name, tmp_path, monkeypatch):
    path, real = tmp_path / name, answers.write_at
    with open_answers(path, {}, QUESTIONS, 1, False) as file:
        file.write(ANSWERS[:2])
        before = path.read_bytes()
        short = iter([9])
        monkeypatch.setattr(answers, "write_at", lambda fd, data, at: real(fd, data[: next(short, None)], at))
        with pytest.raises(OSError) as error:
            file.write(ANSWERS[2:])
        assert error.value.errno == errno.ENOSPC and path.read_bytes() == before
        file.write(ANSWERS[2:])
    assert entries(path) == ANSWERS


@pytest.mark.parametrize("name", KINDS)
def test_an_edited_answer_is_refused_and_one_without_a_checksum_said(name, tmp_path, capsys):
    path = tmp_path / name
    with open_answers(path, {}, QUESTIONS, 1, False) as file:
        file.write(ANSWERS[:2])
        file.write(ANSWERS[2:])
    whole = path.read_text()
    for edited in (whole.replace("é", "e", 1), whole.replace('"answer": ', '"answer":  ', 1)):
        path.write_text(edited)
        with pytest.raises(ValueError, match="line . was changed after it was written; use --resume never"):
            with open_answers(path, {}, QUESTIONS, 1, False):
                pass
    path.write_text(whole.replace('"answer"', '"tokens": -1, "answer"', 1))
    with pytest.raises(ValueError, match=r"line .: tokens is -1"), open_answers(path, {}, QUESTIONS, 1, False):
        pass
    path.write_text(whole)
    write_json(answers.settings_path(path), {})
    with open_answers(path, {}, QUESTIONS, 1, False) as file:
        assert file.records == ANSWERS and "no checksums" in capsys.readouterr().err


def test_a_damaged_line_is_named_and_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    with open_answers(path, {}, QUESTIONS, 1, False) as file:
        file.write(ANSWERS)
        with pytest.raises(ValueError, match="another process writes"), open_answers(path, {}, QUESTIONS, 1, False):
            pass
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], "{", *lines[2:]]))
    with pytest.raises(ValueError, match="line 2 is no answer"), open_answers(path, {}, QUESTIONS, 1, False):
        pass
    path.write_text("[1]\n")
    with (
        pytest.raises(ValueError, match=r"line 1: it is \[1\], expected an object; use --resume never"),
        open_answers(path, {}, QUESTIONS, 1, False),
    ):
        pass
    answers.settings_path(path).write_text("{}")
    with (
        pytest.raises(ValueError, match="other settings: x None -> 1"),
        open_answers(path, {"x": 1}, QUESTIONS, 1, False),
    ):
        pass


def test_what_is_printed_of_a_file_comes_batch_by_batch_and_a_stopped_list_is_closed(many, capsys, monkeypatch):
    import minitune.jobs.generate as module

    real, calls = module.decode, []

    def decode(*args, **options):
        calls.append(capsys.readouterr().out)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "decode", decode)
    for options, check in (
        ({}, lambda text: text.count("> What is")),
        ({"json": True}, lambda text: len(json.loads(text))),
    ):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            answer(AnswerConfig(prompts=str(many), max_new_tokens=2, batch_size=5, **options), QUIET)
        assert all("What is" in text for text in calls[1:])
        assert check("".join(calls) + capsys.readouterr().out) == 10


def test_out_of_memory_names_the_options_and_keeps_the_answers_before(many, tmp_path, monkeypatch):
    import minitune.jobs.generate as module

    real, calls, out = module.decode, [], tmp_path / "answers.jsonl"

    def decode(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            return torch.empty(2**60)  # torch's own error
        return real(*args, **options)

    monkeypatch.setattr(module, "decode", decode)
    options = {"prompts": str(many), "out": str(out), "max_new_tokens": 2}
    with pytest.raises(MemoryError, match="out of memory with 6 questions of 1 sequences .*: lower --batch-size"):
        answer(AnswerConfig(**options, batch_size=6), QUIET)
    assert len(entries(out)) == 12
    answer(AnswerConfig(**options, batch_size=1), QUIET)
    assert [entry["prompt"] for entry in entries(out)] == MANY
