"""generate --out: the file of answers, whenever and however it was stopped."""

import errno
import json
import os
import re
import signal
import time
import zlib
from types import MappingProxyType

import pytest
import torch

from minitune.files import write_json
from minitune.jobs.generate import AnswerConfig, answer
from minitune.runs import answers
from minitune.runs.answers import open_answers, open_row_answers

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
    import minitune.session as module

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
ROWS = [
    {"row": row, "answer": text, "tokens": 1, "ended_by": "eos", "reference_loss": [0.5, 2.0]}
    for row, text in ((2, "a"), (0, "b\u2028\n"), (3, "é"), (1, ""))
]
LAYOUTS = (*KINDS, "rows.jsonl")


def opening(path, settings=MappingProxyType({"x": 1}), start_over=False):
    """A file of one of the LAYOUTS, by its name."""
    if path.name == "rows.jsonl":
        return open_row_answers(path, dict(settings), len(ROWS), start_over)
    return open_answers(path, dict(settings), QUESTIONS, 1, start_over)


def wanted(path):
    return ROWS if path.name == "rows.jsonl" else ANSWERS


def plain(records):
    """Records without their checksums."""
    return [{key: value for key, value in record.items() if key != "check"} for record in records]


def stored(path):
    """The answers in a file, which must be valid as it is."""
    return plain(entries(path)[path.name == "rows.jsonl" :])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_cut_at_any_byte_goes_on_to_the_same_file(name, tmp_path):
    """As a crash of the machine may leave it."""
    path = tmp_path / name
    with opening(path, start_over=True) as file:
        file.write(wanted(path)[:1])
        file.write(wanted(path)[1:])
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with opening(path) as file:
            count = len(file.records)
            assert plain(file.records) == wanted(path)[:count] == stored(path)
            file.write(wanted(path)[count:])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_full_disk_leaves_the_answers_before(name, tmp_path, monkeypatch):
    path, real = tmp_path / name, answers.write_at
    with opening(path) as file:
        file.write(wanted(path)[:2])
        before = path.read_bytes()
        short = iter([9])
        monkeypatch.setattr(answers, "write_at", lambda fd, data, at: real(fd, data[: next(short, None)], at))
        with pytest.raises(OSError) as error:
            file.write(wanted(path)[2:])
        assert error.value.errno == errno.ENOSPC and path.read_bytes() == before
        file.write(wanted(path)[2:])
    assert stored(path) == wanted(path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_edited_answer_is_refused(name, tmp_path):
    path = tmp_path / name
    with opening(path) as file:
        file.write(wanted(path)[:2])
        file.write(wanted(path)[2:])
    whole = path.read_text()
    path.write_text(whole.replace("é", "e", 1))
    with pytest.raises(ValueError, match="line . was changed after it was written; use --resume never"), opening(path):
        pass
    path.write_text(whole.replace('"answer"', '"tokens": -1, "answer"', 1).replace('"tokens": 1,', ""))
    with pytest.raises(ValueError, match=r"line .: tokens is -1"), opening(path):
        pass
    path.write_text(whole)
    with opening(path) as file:
        assert plain(file.records) == wanted(path)


def test_answers_of_a_minitune_without_checksums_are_taken_and_that_is_said(tmp_path, capsys):
    path = tmp_path / "answers.json"
    with opening(path) as file:
        file.write(ANSWERS)
    write_json(answers.settings_path(path), {"x": 1})
    with opening(path) as file:
        assert file.records == ANSWERS and "no checksums" in capsys.readouterr().err


OLD_ROWS = """{"settings": {"quantize": "none", "adapter (sha256)": null, "decoding": {"num_beams": 5}}}
{"row": 1, "answer": "Paris é", "tokens": 3, "ended_by": "eos", "reference_loss": [0.5, null], "check": "17779ca6a4742353"}
"""


def test_files_of_earlier_commits_are_gone_on_with_and_those_without_a_check_refused(tmp_path):
    """OLD_ROWS is what commit 933dd78 wrote. Commit 162902e wrote no check."""
    path = tmp_path / "rows.jsonl"
    settings = {"quantize": "none", "adapter (sha256)": None, "decoding": {"num_beams": 5}}
    path.write_text(OLD_ROWS)
    before = path.read_bytes()
    for more in ({}, {"a new setting": None, "formulas (sha256)": "1"}):
        with opening(path, settings | more) as file:
            assert [record["answer"] for record in file.records] == ["Paris é"]
    with opening(path, settings | more) as file:
        file.write(ROWS[:2])
    assert path.read_bytes().startswith(before)
    with opening(path, settings | more) as file:
        assert sorted(file.rows) == [0, 1, 2]
    with pytest.raises(ValueError, match="other settings: num_beams 5 -> 4; use --resume never"):
        with opening(path, settings | {"decoding": {"num_beams": 4}}):
            pass
    with pytest.raises(ValueError, match="another adapter"), opening(path, settings | {"adapter (sha256)": "1"}):
        pass

    path.write_text(re.sub(', "check": "[^"]*"', "", OLD_ROWS))
    with pytest.raises(ValueError, match="line 2: check is missing, expected text; use --resume never"):
        with opening(path, settings):
            pass

    path = tmp_path / "answers.json"
    path.write_text('[\n{"prompt": "a", "answer": "b"}\n]\n')
    sums = [zlib.crc32(b'{"prompt": "a", "answer": "b"}')]
    answers.settings_path(path).write_text(json.dumps({"x": 1, "checksums (crc32)": sums}))
    with opening(path) as file:
        file.write(ANSWERS[1:])
    assert stored(path) == [{"prompt": "a", "answer": "b"}, *ANSWERS[1:]]


@pytest.mark.parametrize("name", ["answers.jsonl", "rows.jsonl"])
def test_a_damaged_line_is_named_and_two_processes_do_not_write_one_file(name, tmp_path):
    path = tmp_path / name
    with opening(path) as file:
        file.write(wanted(path))
        with pytest.raises(ValueError, match="another process writes"), opening(path):
            pass
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], "{", *lines[2:]]))
    with pytest.raises(ValueError, match="line 2 is no answer"), opening(path):
        pass
    path.write_text("\n".join([lines[0], "[1]", *lines[2:]]))
    with pytest.raises(ValueError, match=r"line 2: it is \[1\], expected an object; use --resume never"), opening(path):
        pass
    with pytest.raises(ValueError, match="other settings: x 1 -> 2"), opening(path, {"x": 2}):
        pass


def test_a_file_of_rows_refuses_what_it_did_not_write(tmp_path):
    path = tmp_path / "rows.jsonl"
    for content in ("mine", '{"row": 1}\n', "[1]\n", '{"settings": 3}\n', '{"settings": {"decoding": 1}}\n', "\xff\n"):
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match="line 1 has no settings: it is not a file of answers"), opening(path):
            pass
        assert path.read_bytes() == content.encode("latin-1")
    with opening(path, start_over=True) as file:
        file.write(ROWS)
    path.write_text(path.read_text() + path.read_text().split("\n")[1] + "\n")
    with pytest.raises(ValueError, match="line 6 answers row 2 again, or there is no such row"), opening(path):
        pass


def test_what_is_printed_of_a_file_comes_batch_by_batch_and_a_stopped_list_is_closed(many, capsys, monkeypatch):
    import minitune.session as module

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
    import minitune.session as module

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
