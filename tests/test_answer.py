"""scripts/generate.py and scripts/chat.py on the embedded models: what a person types, reads and gets in a file."""

import io
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minitune import screen
from minitune.config import TrainConfig, parse, run_script, sigterm_as_ctrl_c
from minitune.decoding import sampling
from minitune.files import read_json, write_json
from minitune.formats.templates import BOS, CHAT_TEMPLATES, EOS, conversation
from minitune.hub import resolve
from minitune.jobs.chat import ChatConfig, chat
from minitune.jobs.evaluate import EvaluateConfig, evaluate
from minitune.jobs.generate import AnswerConfig, answer, print_json, print_text, read_questions
from minitune.runs.folder import find_adapter
from minitune.screen import Writer
from minitune.session import Answerer, choose_template, read_facts
from minitune.tokenizer import load_tokenizer
from minitune.train import train

ROOT = Path(__file__).resolve().parents[1]
QUIET = lambda line: None


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A tiny adapter on the embedded Mistral, trained for a few steps on Alpaca rows."""
    run = tmp_path_factory.mktemp("run") / "tiny"
    argv = ["--run", str(run), "--max-steps", "3", "--samples", "0", "--test-size", "0"]
    train(parse(TrainConfig, argv), say=QUIET)
    return run / "adapter"


def test_a_question_is_answered_and_the_speed_is_said(adapter, script):
    done = script("generate.py", "--adapter", adapter, "--prompt", "What is 3 + 4?", "--max-new-tokens", 8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "tokens/s" in done.stderr and "Traceback" not in done.stderr


def test_json_holds_every_token_with_its_logprob(adapter, script):
    done = script(
        "generate.py", "--adapter", adapter, "--prompt", "Name a bird.", "--json", "--logprobs", "--max-new-tokens", 6,
        "--num-beams", 3, "--num-return-sequences", 2,
    )  # fmt: skip
    first, second = json.loads(done.stdout)
    assert first["prompt"] == "Name a bird." and first["score"] >= second["score"]
    assert len(first["logprobs"]) == first["tokens"] and all(entry["logprob"] <= 0 for entry in first["logprobs"])
    tokenizer = load_tokenizer(resolve("tiny-mistral"))
    assert tokenizer.decode([entry["id"] for entry in first["logprobs"]]) == first["answer"]


def test_an_adapter_answers_as_its_run_was_evaluated_token_for_token(tmp_path, capsys):
    rows = [{"instruction": f"What is {a} + 2?", "input": "", "output": str(a + 2)} for a in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run, questions = tmp_path / "run", tmp_path / "q.json"
    options = {"data": str(tmp_path / "rows.json"), "test_size": 8, "dtype": "bf16", "quantize": "nf4", "max_steps": 1}
    train(TrainConfig(run=str(run), samples=0, batch_size=2, max_length=64, **options), QUIET)
    config = EvaluateConfig(run=str(run), base=False, metrics="exact_match", resamples=20, max_new_tokens=16)
    expected = evaluate(config, QUIET)["systems"]["tuned"]["examples"]
    questions.write_text(json.dumps([{"instruction": example["prompt"]} for example in expected]))
    asked = {"prompts": str(questions), "max_new_tokens": 16, "json": True}

    def answers(said=None, **more):
        found = answer(AnswerConfig(**asked | more), (said if said is not None else []).append)
        return [entry["answer"] for entry in found] == [example["answer"] for example in expected]

    for folder in (run, run / "adapter", run / "last"):
        assert answers(said := [], adapter=str(folder))
        assert "bfloat16 (as the adapter was trained), weights in nf4" in said[0]
    assert answers(**vars_of(parse(AnswerConfig, ["--config", str(run / "config.json"), "--prompts", str(questions)])))
    write_json(
        run / "adapter" / "minitune.json", {"template": "alpaca", "base_model": "tiny-mistral"}
    )  # of an older run
    assert answers(adapter=str(run))
    assert not answers(said := [], adapter=str(run), dtype="fp32", quantize="none")
    assert "--quantize nf4" in said[0] and "--dtype bf16" in said[1]


def vars_of(config):
    return {"adapter": config.adapter, "dtype": config.dtype, "quantize": config.quantize}


def test_control_characters_reach_no_terminal(monkeypatch, capsys):
    """A question and an answer with an escape, a C1 control, marks that change the direction of text, and half a surrogate."""
    text = "a\x1b[2J\x9b1m\u202ex\udc80é"
    with print_text(2) as write:
        write([{"prompt": text, "answer": text}])
    with print_json(1) as write:
        write([{"prompt": text, "answer": text}])
    writer = Writer(None)
    writer.end(text)
    shown, _ = capsys.readouterr()
    assert not screen.UNSAFE.search(shown) and r"a\x1b[2J\x9b1m\u202ex" in shown and "é" in shown
    assert json.loads(shown[shown.index("[\n") : shown.rindex("]") + 1]) == [{"prompt": text, "answer": text}]


QUESTION_FILES = {
    "q.txt": "What is 3 + 4?\n\nName a bird.\n",
    "q.json": json.dumps(["What is 3 + 4?", "Name a bird."]),
    "q.jsonl": '{"instruction": "What is 3 + 4?", "input": "", "output": "7"}\n{"prompt": "Name a bird."}\n',
}


@pytest.mark.parametrize("name", QUESTION_FILES)
def test_questions_come_from_files_and_equal_those_asked_alone(name, adapter, tmp_path):
    (tmp_path / name).write_text(QUESTION_FILES[name])
    options = {"adapter": str(adapter), "max_new_tokens": 8}
    out = tmp_path / "answers.json"
    answer(AnswerConfig(prompts=str(tmp_path / name), out=str(out), **options), QUIET)
    written = read_json(out)
    assert [entry["prompt"] for entry in written] == ["What is 3 + 4?", "Name a bird."]
    for entry in written:
        [alone] = answer(AnswerConfig(prompt=entry["prompt"], json=True, **options), QUIET)
        assert alone["answer"] == entry["answer"]


# Templates and prompts


def test_the_template_travels_with_the_adapter_and_a_mismatch_is_said(adapter, tmp_path):
    said, trained = [], read_facts(str(adapter))
    config = AnswerConfig(prompt="x", adapter=str(adapter))
    assert choose_template(config, trained, said.append) == "alpaca" and not said
    assert choose_template(replace(config, template="plain"), trained, said.append) == "plain"
    assert "trained with the template alpaca, and --template is plain" in said.pop()
    choose_template(replace(config, model="tiny-llama"), trained, said.append)
    assert "the adapter was trained on tiny-mistral, not on tiny-llama" in said.pop()
    choose_template(replace(config, model="mistral"), trained | {"base": "mistralai/Mistral-7B-v0.1"}, said.append)
    assert not said, "two names of one model"
    assert choose_template(config, {"template": None, "base": None}, said.append) == "plain"
    assert "does not say which template" in said.pop()


def test_the_model_is_the_one_that_the_adapter_was_trained_on(adapter, tmp_path):
    said, other = [], shutil.copytree(adapter, tmp_path / "adapter")
    for base in ("tiny-llama", "tiny-phi"):
        write_json(other / "minitune.json", {"template": "alpaca", "base_model": base})
        assert Answerer(AnswerConfig(prompt="x", adapter=str(other)), said.append).name == base and not said
    assert (
        Answerer(AnswerConfig(prompt="x", adapter=str(other), model="tiny-mistral"), said.append).name == "tiny-mistral"
    )
    assert "trained on tiny-phi, not on tiny-mistral" in said.pop()
    (other / "minitune.json").unlink()  # as PEFT leaves it
    assert Answerer(AnswerConfig(prompt="x", adapter=str(other)), said.append).name == "tiny-mistral"
    assert "does not say which template" in said.pop()
    for facts, message in (
        (
            {"template": "alpaca", "base_model": "./gone"},
            r"gone does not exist; .* names this base; --model says where",
        ),
        ({"template": "of tomorrow"}, "template is 'of tomorrow', expected one of alpaca"),
        ({"template": ["alpaca"]}, r"template is \['alpaca'\], expected null or text"),
        ([], r"minitune.json: it is \[\], expected an object"),
    ):
        write_json(other / "minitune.json", facts)
        with pytest.raises(ValueError, match=message):
            Answerer(AnswerConfig(prompt="x", adapter=str(other)), said.append)
    assert find_adapter(tmp_path) == other
    with pytest.raises(ValueError, match="has no adapter_config.json, and no adapter or best or last of a run"):
        find_adapter(tmp_path / "gone")


def test_the_prompt_is_the_one_of_training_to_the_last_token(adapter):
    answerer = Answerer(AnswerConfig(prompt="x", adapter=str(adapter), device="cpu"), QUIET)
    from minitune.data.labels import encode_row

    row = {"instruction": "Add.", "input": "", "output": "7"}
    trained = encode_row(row, answerer.tokenizer, "alpaca")
    assert answerer.encode(conversation(["Add."], "alpaca")) == trained.ids[: trained.prompt_length]


def render(pieces):
    return "".join("<s>" if p is BOS else "</s>" if p is EOS else p for p in pieces)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("llama2", "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]"),
        ("mistral-v1", "<s>[INST] Be kind.\n\na [/INST] b</s> [INST] c [/INST]"),
        ("mistral-v3", "<s>[INST] a[/INST] b</s>[INST] Be kind.\n\nc[/INST]"),
        ("mistral-tekken", "<s>[INST]a[/INST]b</s>[INST]Be kind.\n\nc[/INST]"),
        ("phi2", "<s>Be kind.\n\nInstruct: a\nOutput: b</s>\nInstruct: c\nOutput:"),
        ("plain", "<s>Be kind.\n\nab\nc"),
    ],
)
def test_conversations_are_rendered_as_their_models_were_trained(template, expected):
    assert render(conversation(["a", "b", "c"], template, "Be kind.")) == expected


@pytest.mark.parametrize("template", [name for name in CHAT_TEMPLATES if name not in ("mistral-v3", "mistral-tekken")])
def test_a_conversation_has_one_begin_token_for_each_that_its_template_has(template, adapter):
    answerer = Answerer(AnswerConfig(prompt="x", adapter=str(adapter), device="cpu"), QUIET)
    ids = answerer.encode(
        conversation(["<s>a</s>", "b", "c"], template)
    )  # what a user types never becomes a special token
    assert ids.count(answerer.tokenizer.bos_id) == (2 if template == "llama2" else 1)
    assert ids.count(answerer.tokenizer.eos_id) == (0 if template == "plain" else 1)


def test_a_character_is_shown_when_all_of_its_bytes_are_there():
    class Bytes:
        decode = staticmethod(lambda ids: bytes(ids).decode(errors="replace"))

    stream = io.StringIO()
    writer, shown = Writer(Bytes, stream), []
    for byte in "aé😀".encode():
        writer(byte)
        shown.append(stream.getvalue())
    assert shown == ["a", "a", "aé", "aé", "aé", "aé", "aé😀"]


def talk(lines, **options):
    """What a chat says to these lines of input, and the turns that it returns."""
    said, lines = [], iter(lines)

    def ask(prompt):
        line = next(lines, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return line

    return chat(ChatConfig(max_new_tokens=5, **options), ask, said.append), said


def test_a_chat_keeps_resets_and_saves_the_conversation(adapter, tmp_path, capsys):
    turns, _ = talk(["Name a bird.", "Another.", f"/save {tmp_path / 'c.json'}"], adapter=str(adapter))
    assert turns[::2] == ["Name a bird.", "Another."] and len(turns) == 4
    messages = read_json(tmp_path / "c.json")["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 and [m["content"] for m in messages] == turns
    assert turns[1] in capsys.readouterr().out
    turns, said = talk(["Name a bird.", "/reset", "/nothing", "/save", "/quit", "not read"], adapter=str(adapter))
    assert turns == [] and "(forgotten)" in said and any("there is no '/nothing'" in line for line in said)
    assert any("give a file" in line for line in said)


def test_a_conversation_beyond_the_context_is_one_line_and_the_chat_goes_on(adapter):
    turns, said = talk(["word " * 3000, "Name a bird."], adapter=str(adapter))
    assert any(line.startswith("error: the conversation has 3") for line in said) and turns[0] == "Name a bird."


def test_ctrl_c_stops_the_answer_and_not_the_program(adapter, tmp_path, forks):
    os.mkfifo(tmp_path / "typed")
    argv = ["--adapter", adapter, "--max-new-tokens", 4000, "--eos-ids", 0]
    process = forks.script("chat.py", *argv, stdin=tmp_path / "typed")
    with open(tmp_path / "typed", "w") as typed:
        print("Name a bird.", file=typed, flush=True)
        deadline = time.monotonic() + 60
        while len(process.out.read_text().partition("> ")[2]) < 40 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        while process.out.read_text().count("> ") < 2 and time.monotonic() < deadline:  # it asks again
            time.sleep(0.01)
        assert process.poll() is None, process.err.read_text()
        print("/save\n/quit", file=typed, flush=True)
        code, errors = process.wait(), process.err.read_text()
    assert code == 0 and "give a file" in process.out.read_text() and "Traceback" not in errors


def test_what_goes_wrong_in_a_chat_is_one_line_and_the_conversation_is_kept(adapter, tmp_path):
    """A name that is none, bytes that are no text, a question in no encoding, /save with the text before the conversation."""
    (tmp_path / "file").write_text("")
    lines = [
        "Name a bird.",
        "\udcff",
        "/save ~nobody-of-this-name/c.json",
        "/save a\0b",
        f"/save {tmp_path / 'file' / 'c'}",
    ]
    lines += [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), KeyboardInterrupt(), f"/save {tmp_path / 'c d.json'}"]
    turns, said = talk(lines, adapter=str(adapter), system="Be kind.")
    messages = read_json(tmp_path / "c d.json")["messages"]
    assert len(turns) == 2 and messages[0] == {"role": "system", "content": "Be kind."} and len(messages) == 3
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 5 and not any("\n" in line for line in errors)
    for error, part in zip(errors, ("surrogate", "nobody-of", "null byte", "file/c", "not utf-8"), strict=True):
        assert part in error


def test_an_answer_that_the_context_cuts_is_said(adapter):
    turns, said = talk(["word " * 470], adapter=str(adapter), min_new_tokens=5)
    assert len(turns) == 2 and "(cut: --max-new-tokens)" in said
    turns, said = talk(["word " * 475], adapter=str(adapter), min_new_tokens=5)
    assert len(turns) == 2 and any("context of 512 tokens is full" in line for line in said)


@pytest.mark.parametrize("when", ["before the answer", "between the tokens", "while a step runs", "after the answer"])
def test_ctrl_c_at_any_moment_keeps_the_chat_and_the_turns_before(when, adapter, monkeypatch):
    import minitune.jobs.chat as module

    real, question = module.decode, iter([1, 2, 3])

    def decode(model, prompts, config, tokenizer, on_token, memory):
        number = next(question)
        if number == 2 and when == "while a step runs":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        if number == 2 and when == "between the tokens":
            write = lambda token: (on_token(token), signal.raise_signal(signal.SIGINT))
            return real(model, prompts, config, tokenizer, write, memory)
        return real(model, prompts, config, tokenizer, on_token, memory)

    monkeypatch.setattr(module, "decode", decode)
    count = iter(range(9))
    if when == "before the answer":
        encode = Answerer.encode
        monkeypatch.setattr(
            Answerer, "encode", lambda *a: signal.raise_signal(signal.SIGINT) if next(count) == 1 else encode(*a)
        )
        next(question)
    if when == "after the answer":
        end = Writer.end
        monkeypatch.setattr(
            Writer, "end", lambda *a: signal.raise_signal(signal.SIGINT) if next(count) == 1 else end(*a)
        )
    turns, said = talk(["Name a bird.", "And?", "Another."], adapter=str(adapter), min_new_tokens=5)
    asked = ["Name a bird.", "Another."] if when != "between the tokens" else ["Name a bird.", "And?", "Another."]
    assert turns[::2] == asked
    assert any("stopped" in line for line in said) == (when != "between the tokens")


def test_options_that_change_nothing_are_said():
    said = []
    Answerer(AnswerConfig(prompt="x", temperature=0.7, top_p=0.9, length_penalty=2.0, seed=3), said.append)
    assert said == [
        "warning: without --num-beams, --length-penalty changes nothing",
        "warning: without --do-sample, --temperature, --top-p changes nothing",
    ]
    said.clear()
    Answerer(AnswerConfig(prompt="x", do_sample=True, temperature=0.0, num_beams=2, length_penalty=2.0), said.append)
    Answerer(AnswerConfig(prompt="x", do_sample=True, temperature=0.5, top_k=9), said.append)
    assert not said


def test_letters_that_the_screen_does_not_have_are_escaped(adapter, monkeypatch):
    options = {"adapter": str(adapter), "prompt": "né 😀", "max_new_tokens": 2}
    for others, shown in (
        ({"json": True}, r"n\u00e9 \ud83d\ude00"),
        ({"do_sample": True, "num_return_sequences": 2}, r"> n\xe9 \U0001f600"),
    ):
        screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", screen)
        answer(AnswerConfig(**options, **others), QUIET)
        screen.flush()
        assert shown in screen.buffer.getvalue().decode("ascii")


def test_a_question_beyond_the_context_is_named_before_anything_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("minitune.session.decode", lambda *args, **options: pytest.fail("something was decoded"))
    for name, text, place in (
        ("q.json", json.dumps(["a", "word " * 600]), "row 1"),
        ("q.txt", "a\n\n" + "word " * 600, "line 3"),
        ("q.json", json.dumps(["a", "\ud83d"]), "row 1: the text has half a surrogate pair"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}, {place}"):
            answer(AnswerConfig(prompts=str(tmp_path / name), out=str(tmp_path / "answers.json")), QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.json", "q.txt"]


def test_what_is_said_after_a_stopped_answer_has_its_own_line(adapter, capsys, monkeypatch):
    class Cut(Writer):
        def __call__(self, token):
            super().__call__(token)
            if len(self.ids) == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr("minitune.jobs.generate.Writer", Cut)
    with pytest.raises(KeyboardInterrupt):
        answer(AnswerConfig(prompt="x", adapter=str(adapter), min_new_tokens=6), QUIET)
    text = capsys.readouterr().out
    assert text.strip() and text.endswith("\n") and text.count("\n") == text.rstrip("\n").count("\n") + 1


def test_where_every_token_is_banned_that_is_said():
    scores = torch.full((2, 5), -torch.inf)
    scores[0] = 0
    with pytest.raises(FloatingPointError, match="every token is banned"):
        sampling.draw(scores, torch.tensor([0.5, 0.5]))
    with pytest.raises(FloatingPointError, match="are NaN"):
        sampling.draw(torch.full((1, 5), torch.nan), torch.tensor([0.5]))


def test_sigterm_ends_a_chat_at_its_prompt_where_ctrl_c_does_not():
    said, typed = [], [KeyboardInterrupt(), EOFError()]

    def ask(prompt):
        raise typed.pop(0)

    chat(ChatConfig(model="tiny-llama"), ask=ask, say=said.append)
    assert said[-2:] == ["\n(Ctrl-D or /quit ends)", ""]
    with pytest.raises(KeyboardInterrupt, match="by SIGTERM"), sigterm_as_ctrl_c():
        chat(ChatConfig(model="tiny-llama"), ask=lambda prompt: os.kill(os.getpid(), signal.SIGTERM), say=QUIET)


BAD = {
    "empty prompt": (["--prompt", "  "], "--prompt is empty"),
    "tiny temperature": (["--prompt", "x", "--temperature", "1e-40"], "temperature is 1e-40"),
    "no question": ([], "give one of --prompt TEXT and --prompts FILE"),
    "both": (["--prompt", "x", "--prompts", "y"], "give one of --prompt TEXT and --prompts FILE"),
    "no such file": (["--prompts", "none.txt"], "none.txt"),
    "logprobs to nowhere": (["--prompt", "x", "--logprobs"], "--logprobs needs --json or --out"),
    "top p": (["--prompt", "x", "--top-p", "0"], "top_p is 0.0, expected"),
    "no name": (["--prompt", "x", "--out", ""], "--out is empty"),
    "no file": (["--prompt", "x", "--out", "/dev/null"], "/dev/null is a device"),
    "no adapter": (["--prompt", "x", "--adapter", "none"], "'none' is not the folder of an adapter"),
    "beams and lookup": (["--prompt", "x", "--num-beams", "2", "--lookup", "3"], "lookup is for greedy decoding"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_call_is_one_line_and_exit_2(name, monkeypatch, capsys):
    argv, message = BAD[name]
    monkeypatch.setattr(sys, "argv", ["generate.py", *argv])
    with pytest.raises(SystemExit) as stop:
        run_script(AnswerConfig, answer, "")
    _, errors = capsys.readouterr()
    assert stop.value.code == 2 and message in errors and errors.count("\n") == 1, errors


def test_rows_without_a_question_are_named(tmp_path):
    write_json(tmp_path / "q.json", [{"prompt": "a"}, {"output": "b"}])
    with pytest.raises(ValueError, match=r"q.json, row 1 has no text under instruction or prompt"):
        read_questions(AnswerConfig(prompts=str(tmp_path / "q.json")))


def test_a_stop_text_is_not_written_and_text_that_may_begin_one_is_held_back():
    class Letters:
        decode = staticmethod("".join)

    for text, stop, expected in (("one END two", ("END",), "one "), ("one EN two", ("END",), "one EN two")):
        stream = io.StringIO()
        writer, seen = Writer(Letters, stream, stop), []
        for letter in text:
            writer(letter)
            seen.append(stream.getvalue())
        assert all("E" not in shown or "EN " in shown for shown in seen)
        writer.end(expected)
        assert stream.getvalue() == expected + "\n"


def test_a_place_that_cannot_be_written_is_said_before_the_model_is_loaded(tmp_path, script):
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "answers.json"):
        done = script("generate.py", "--prompt", "x", "--model", "no-such-model", "--out", str(out))
        assert done.returncode == 2 and str(out) in done.stderr and "no-such-model" not in done.stderr
        assert done.stderr.count("\n") == 1
