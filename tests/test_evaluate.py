"""scripts/evaluate.py on an embedded model and on files: scores of the pure functions, answers that survive a kill, errors."""

import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from minitune_kernels import ops

from minitune import data, hub, session
from minitune.adapters import lora
from minitune.checkpoint import load_model
from minitune.config import TrainConfig, parse
from minitune.decoding.options import GenerateConfig
from minitune.evaluation import held_out as module
from minitune.evaluation import metrics, scoring
from minitune.evaluation.held_out import Run
from minitune.files import read_json, write_json
from minitune.generate import generate
from minitune.jobs.evaluate import EvaluateConfig, evaluate
from minitune.loss import held_out_loss
from minitune.metrics.bleu import corpus_bleu, sentence_bleu
from minitune.metrics.chrf import corpus_chrf, segment_chrf
from minitune.metrics.exact_match import exact_match
from minitune.metrics.perplexity import judge_perplexity
from minitune.metrics.rouge import rouge_l, rouge_lsum, rouge_n
from minitune.metrics.significance import bootstrap_interval, paired_bootstrap, paired_permutation
from minitune.metrics.token_f1 import token_f1
from minitune.runs.folder import read_lines, read_options
from minitune.screen import cells
from minitune.tokenizer import load_tokenizer
from minitune.train import train

ROOT = Path(__file__).resolve().parents[1]
QUIET = lambda line: None
ROWS = 14


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps on some of the embedded rows."""
    folder = tmp_path_factory.mktemp("runs")
    for part, count in (("train", 32), ("test", ROWS)):
        write_json(folder / f"{part}.json", read_json(hub.embedded_rows(part))[:count])
    argv = ["--run", str(folder / "run"), "--max-steps", "8", "--samples", "0", "--data", str(folder / "train.json")]
    return train(parse(TrainConfig, [*argv, "--test-data", str(folder / "test.json")]), say=QUIET)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it that a test may write into."""
    return shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("generations", "evaluation.json"))


@pytest.fixture(scope="module")
def evaluated(trained):
    return evaluate(EvaluateConfig(run=str(trained), max_new_tokens=12, resamples=400), QUIET)


def answers_file(run, system="tiny-mistral-finetuned", point="greedy"):
    return Path(run) / "generations" / f"{system}_{point}.jsonl"


# --- numbers ---


def test_scores_are_those_of_the_pure_functions(evaluated):
    examples = evaluated["systems"]["tuned"]["examples"]
    references, answers = [e["reference"] for e in examples], [e["answer"] for e in examples]
    each = lambda function: [function(r, a) for r, a in zip(references, answers, strict=True)]
    expected = {
        "bleu": np.mean(each(sentence_bleu)),
        "corpus_bleu": corpus_bleu(references, answers),
        "chrf": corpus_chrf(references, answers),
        "rouge_1": np.mean(each(lambda r, a: rouge_n(r, a, 1)[2])),
        "rouge_2": np.mean(each(lambda r, a: rouge_n(r, a, 2)[2])),
        "rouge_l": np.mean(each(lambda r, a: rouge_l(r, a)[2])),
        "rouge_lsum": np.mean(each(lambda r, a: rouge_lsum(r, a)[2])),
        "exact_match": exact_match(references, answers),
        "token_f1": np.mean(each(token_f1)),
        "length_ratio": sum(len(a.split()) for a in answers) / sum(len(r.split()) for r in references),
        "ended": sum(e["ended_by"] == "eos" for e in examples) / len(examples),
    }
    found = evaluated["systems"]["tuned"]["metrics"]
    assert set(found) == {*expected, "reference_perplexity"} and len(examples) == ROWS
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, abs=1e-12), name
        assert found[name]["n"] == ROWS
    for e in examples:
        assert e["scores"]["bleu"] == sentence_bleu(e["reference"], e["answer"])
        assert e["scores"]["chrf"] == pytest.approx(segment_chrf(e["reference"], e["answer"]), abs=1e-12)


def test_intervals_and_tests_are_those_of_significance(evaluated):
    scores = {key: [e["scores"]["rouge_1"] for e in s["examples"]] for key, s in evaluated["systems"].items()}
    found = evaluated["systems"]["tuned"]["metrics"]["rouge_1"]
    expected = bootstrap_interval(scores["tuned"], resamples=400, seed=0)
    assert (found["low"], found["high"]) == (expected.low, expected.high)
    compared = evaluated["comparisons"]["rouge_1"]
    drawn = paired_bootstrap(scores["tuned"], scores["base"], resamples=400, seed=0)
    turned = paired_permutation(scores["tuned"], scores["base"], resamples=400, seed=0)
    assert (compared["difference"], compared["low"], compared["high"]) == drawn[:3]
    assert (compared["p_bootstrap"], compared["p_permutation"]) == (drawn.p_value, turned.p_value)
    assert set(compared) == {"difference", "low", "high", "p_bootstrap", "p_permutation", "n", "note"}


def test_the_perplexity_of_references_is_that_of_the_held_out_loss(trained, evaluated):
    options = read_options(trained)
    folder = hub.resolve(options.model)
    [test] = data.load_for(options, load_tokenizer(folder), ("test",))
    for key, adapter in (("tuned", trained / "adapter"), ("base", None)):
        loss = held_out_loss(load_model(folder, adapter=adapter), test.examples, 4, 0)
        # the two sum fp32 losses in another order
        found = evaluated["systems"][key]["metrics"]["reference_perplexity"]["value"]
        assert found == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 5}], ids=str)
def test_answers_are_those_of_the_model_with_and_without_its_adapter(run, options):
    result = evaluate(EvaluateConfig(run=str(run), max_new_tokens=8, limit=6, resamples=10, **options), QUIET)
    folder = hub.resolve("tiny-mistral")
    tokenizer = load_tokenizer(folder)
    [test] = data.load_for(read_options(run), tokenizer, ("test",))
    prompts = [e.ids[: e.prompt_length] for e in test.examples[:6]]
    decoding = GenerateConfig(max_new_tokens=8, eos_ids=tuple(tokenizer.eos_ids), **options)
    for key, adapter in (("tuned", run / "adapter"), ("base", None)):
        expected = generate(load_model(folder, adapter=adapter), prompts, decoding)
        assert [e["answer"] for e in result["systems"][key]["examples"]] == [tokenizer.decode(ids) for ids in expected]
    assert result["systems"]["tuned"]["examples"] != result["systems"]["base"]["examples"]


def test_an_adapter_that_is_switched_off_leaves_the_base_and_comes_back(trained):
    folder, ids = hub.resolve("tiny-mistral"), torch.arange(1, 20)[None]
    base, model = load_model(folder), load_model(folder, adapter=trained / "adapter")
    with torch.no_grad():
        tuned = model(ids)
        with pytest.raises(KeyboardInterrupt), lora.switched_off(model):
            assert torch.equal(model(ids), base(ids)) and not torch.equal(model(ids), tuned)
            raise KeyboardInterrupt
        assert torch.equal(model(ids), tuned)


def test_a_held_out_part_alone_is_the_one_of_both(trained):
    options = read_options(trained).replace(test_data=None, test_size=9, data=str(hub.embedded_rows("train")))
    tokenizer = load_tokenizer(hub.resolve("tiny-mistral"))
    [test] = data.load_for(options, tokenizer, ("test",))
    assert test == data.load_for(options, tokenizer)[1] and len(test) == 9


def test_the_judge_and_the_encoder_give_their_metrics(run, tmp_path):
    transformers = pytest.importorskip("transformers", reason="it writes the encoder")
    torch.manual_seed(0)
    texts = [row["output"] for row in json.loads(hub.embedded_rows("train").read_text())]
    words = sorted({word for text in texts for word in text.lower().split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=len(vocabulary), **sizes))
    encoder.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    options = {"judge": "tiny-llama", "encoder": str(tmp_path / "bert"), "encoder_layer": 2}
    config = EvaluateConfig(run=str(run), max_new_tokens=8, resamples=10, **options)
    result = evaluate(config, QUIET)["systems"]["tuned"]
    from minitune.checkpoint import load_encoder
    from minitune.metrics.bertscore import bert_score

    references, answers = zip(*((e["reference"], e["answer"]) for e in result["examples"]), strict=True)
    judged = judge_perplexity(load_model("tiny-llama"), load_tokenizer(hub.resolve("tiny-llama")), answers)
    assert result["metrics"]["perplexity"]["value"] == pytest.approx(judged["mean_perplexity"], rel=1e-6)
    assert result["metrics"]["perplexity_tokens"]["value"] == pytest.approx(judged["token_perplexity"], rel=1e-6)
    f1 = bert_score(references, answers, load_encoder(tmp_path / "bert"), load_tokenizer(tmp_path / "bert"), 2)[2]
    assert result["metrics"]["bertscore"]["value"] == pytest.approx(f1.double().mean().item(), abs=1e-12)
    scores = read_json(run / "generations" / "tiny-mistral-finetuned_greedy_score.json")
    assert scores["Perplexity"] == result["metrics"]["perplexity"]["value"]
    assert scores["BERTScore"] == result["metrics"]["bertscore"]["value"]


# --- files that are written ---


def test_the_files_have_the_names_and_keys_of_the_study(evaluated, trained, data_dir):
    study = data_dir / "seed_results/data/section_3"
    generations = trained / "generations"
    for key, name in (("tuned", "tiny-mistral-finetuned"), ("base", "tiny-mistral")):
        assert evaluated["systems"][key]["name"] == name
        answers = [e["answer"] for e in evaluated["systems"][key]["examples"]]
        assert read_json(generations / f"{name}_greedy.json") == answers
        scores = read_json(generations / f"{name}_greedy_score.json")
        assert list(scores) == list(read_json(study / "phi-2-finetuned_topk50_nb5_t1_score.json"))
        assert scores["BLEU"] == evaluated["systems"][key]["metrics"]["bleu"]["value"] and scores["BERTScore"] is None
    assert read_json(trained / "evaluation.json") == evaluated
    assert json.loads((trained / "evaluation.json").read_text(), parse_constant=pytest.fail) == evaluated


def test_a_kill_in_the_middle_and_a_second_start_give_the_files_of_one_start(run, tmp_path, forks):
    """min-new-tokens makes every answer as long, so that there is time to kill."""
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "batch_size": 2, "resamples": 50}
    whole = shutil.copytree(run, tmp_path / "whole")
    theirs = evaluate(EvaluateConfig(run=str(whole), do_sample=True, **options), QUIET)
    argv = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    process = forks.script("evaluate.py", "--run", run, "--do-sample", *argv)
    file = answers_file(run, point="topk50_nb1_t1_minnewtokens40")
    deadline = time.monotonic() + 60
    while not file.exists() or len(file.read_bytes().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = file.read_bytes()
    assert 4 <= len(before.splitlines()) < 1 + ROWS and not (run / "evaluation.json").exists()
    ours = evaluate(EvaluateConfig(run=str(run), do_sample=True, **options), QUIET)
    assert file.read_bytes().startswith(before)
    for path in sorted((whole / "generations").iterdir()):
        assert (run / "generations" / path.name).read_bytes() == path.read_bytes(), path.name
    assert ours["systems"] == theirs["systems"] and ours["comparisons"] == theirs["comparisons"]


def test_finished_answers_are_not_decoded_again_and_no_model_loads(run, monkeypatch):
    config = EvaluateConfig(run=str(run), max_new_tokens=6, resamples=20)
    first = evaluate(config, QUIET)
    monkeypatch.setattr(module, "Answerer", lambda *args: pytest.fail("the model was loaded"))
    assert evaluate(config, QUIET) == first
    assert evaluate(replace(config, metrics="bleu"), QUIET)["settings"]["metrics"] == ["bleu"]


def test_one_seed_gives_one_file_and_another_seed_other_answers(run):
    config = EvaluateConfig(run=str(run), max_new_tokens=6, do_sample=True, seed=3, resamples=50, base=False, limit=8)
    first = evaluate(config, QUIET)
    assert evaluate(replace(config, resume="never", batch_size=3), QUIET) == first
    other = evaluate(replace(config, resume="never", seed=4), QUIET)
    assert [e["answer"] for e in other["systems"]["tuned"]["examples"]] != [
        e["answer"] for e in first["systems"]["tuned"]["examples"]
    ]


def test_more_rows_go_on_from_fewer(run):
    config = EvaluateConfig(run=str(run), max_new_tokens=6, resamples=20, base=False, limit=3)
    evaluate(config, QUIET)
    few = answers_file(run).read_bytes()
    evaluate(replace(config, limit=None), QUIET)
    assert answers_file(run).read_bytes().startswith(few)
    assert [record["row"] for record in read_lines(answers_file(run))[1:]] == list(range(ROWS))
    assert len(evaluate(config, QUIET)["systems"]["tuned"]["examples"]) == 3


def test_other_settings_are_refused_by_name_and_resume_never_answers_again(run, monkeypatch):
    config = EvaluateConfig(run=str(run), max_new_tokens=6, resamples=20, base=False, limit=3)
    evaluate(config, QUIET)
    with pytest.raises(ValueError, match=r"other settings: max_new_tokens 6 -> 7; use --resume never"):
        evaluate(replace(config, max_new_tokens=7), QUIET)
    with monkeypatch.context() as edit:
        edit.setattr(ops, "formulas_fingerprint", lambda: "edited")
        with pytest.raises(ValueError, match=r"other settings: formulas \(sha256\) .* -> edited; use --resume never"):
            evaluate(config, QUIET)
    evaluate(replace(config, max_new_tokens=7, resume="never"), QUIET)
    evaluate(replace(config, max_new_tokens=7, top_p=0.5), QUIET)  # which greedy decoding does not read
    shutil.rmtree(run / "adapter")
    train(read_options(run).replace(max_steps=9, run=str(run), resume="never"), QUIET)
    with pytest.raises(
        ValueError, match="answers of another adapter, or of one that was trained again since; use --resume never"
    ):
        evaluate(replace(config, max_new_tokens=7), QUIET)
    head, *rest = answers_file(run).read_text().split("\n", 1)
    for missing in ("quantize", "adapter (sha256)", "decoding"):  # also where its value would be none
        settings = json.loads(head)["settings"]
        del settings[missing]
        answers_file(run).write_text("\n".join([json.dumps({"settings": settings}), *rest]))
        with pytest.raises(ValueError, match="other settings|another adapter"):
            evaluate(replace(config, max_new_tokens=7), QUIET)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"row": 0, "answer": "a", "tokens": 1, "ended_by": "eos", "reference_loss": [1.0, 2]}\n' * 2,
            "line 2: check is missing, expected text",
        ),
        (b'{"row": 0}\n', "line 2: answer is missing"),
        (b'{"row": -1}\n', "line 2: row is -1, expected a whole number"),
        (b"[1]\n", r"line 2: it is \[1\], expected an object"),
        (b"[" * 100_000 + b"\n1\n", "line 2 is no answer"),
        (b'{"row": \n[1]\n', "line 2 is no answer"),
    ],
)
def test_a_damaged_file_of_answers_is_said_with_its_line(run, content, message):
    config = EvaluateConfig(run=str(run), max_new_tokens=6, resamples=20, base=False, limit=3)
    evaluate(config, QUIET)
    head = answers_file(run).read_bytes().splitlines(keepends=True)[0]
    answers_file(run).write_bytes(head + content)
    with pytest.raises(ValueError, match=message):
        evaluate(config, QUIET)


def test_answers_and_losses_that_were_edited_are_refused(run):
    config = EvaluateConfig(run=str(run), max_new_tokens=6, resamples=20, base=False, limit=3)
    evaluate(config, QUIET)
    lines = read_lines(answers_file(run))
    changes = ({"answer": "a better one"}, {"reference_loss": [0.1, 3]}, {"row": 2}, {"more": 1})
    for changed in changes:
        edited = [*lines[:1], lines[1] | changed, *lines[2:]]
        answers_file(run).write_text("".join(json.dumps(line) + "\n" for line in edited))
        with pytest.raises(ValueError, match="line 2 was changed after it was written; use --resume never"):
            evaluate(config, QUIET)
    twice = [*lines[:2], lines[1]]
    answers_file(run).write_text("".join(json.dumps(line) + "\n" for line in twice))
    with pytest.raises(ValueError, match="line 3 answers row 0 again"):
        evaluate(config, QUIET)


def test_a_pipe_in_place_of_a_file_is_refused_and_stays(run):
    answers_file(run).parent.mkdir(exist_ok=True)
    os.mkfifo(answers_file(run))
    with pytest.raises(ValueError, match="is a pipe, expected a regular file"):
        evaluate(EvaluateConfig(run=str(run), limit=1), QUIET)
    assert answers_file(run).is_fifo()


def test_a_torn_last_line_is_answered_again(run):
    config = EvaluateConfig(run=str(run), max_new_tokens=6, resamples=20, base=False, limit=5)
    evaluate(config, QUIET)
    whole = answers_file(run).read_bytes()
    for length in (len(whole) - 30, len(whole) - 1):
        answers_file(run).write_bytes(whole[:length])
        evaluate(config, QUIET)
        assert answers_file(run).read_bytes() == whole


@pytest.mark.parametrize("name", ["a/b", "tiny-mistral"])
def test_a_name_that_cannot_be_of_a_file_of_its_own_is_refused(name, run):
    with pytest.raises(ValueError, match="name is .*expected one without / that is not the base's tiny-mistral"):
        Run(EvaluateConfig(run=str(run), name=name), QUIET)
    assert Run(EvaluateConfig(run=str(run), name="mine"), QUIET).name(True) == "mine"


def test_prompt_completion_rows_are_asked_as_they_were_trained(run, tmp_path):
    rows = [{"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "2 + 2 =", "completion": " 4"}]
    write_json(tmp_path / "rows.json", rows)
    write_json(run / "config.json", read_json(run / "config.json") | {"test_data": str(tmp_path / "rows.json")})
    result = evaluate(EvaluateConfig(run=str(run), max_new_tokens=4, resamples=10, base=False), QUIET)
    examples = result["systems"]["tuned"]["examples"]
    assert [(e["prompt"], e["reference"]) for e in examples] == [(r["prompt"], r["completion"]) for r in rows]
    tokenizer = load_tokenizer(hub.resolve("tiny-mistral"))
    model = load_model("tiny-mistral", adapter=run / "adapter")
    decoding = GenerateConfig(max_new_tokens=4, eos_ids=tuple(tokenizer.eos_ids))
    [ids] = generate(model, [tokenizer.encode(rows[0]["prompt"])], decoding)
    assert examples[0]["answer"] == tokenizer.decode(ids)


def test_ctrl_c_says_what_is_there_and_a_prompt_without_room_its_rows(run, monkeypatch):
    config = EvaluateConfig(run=str(run), max_new_tokens=4, batch_size=4)
    decode, calls = session.decode, []

    def fail_at_the_second(error):
        def failing(*args, **options):
            calls.append(1)
            if len(calls) == 2:
                raise error
            return decode(*args, **options)

        return failing

    monkeypatch.setattr(session, "decode", fail_at_the_second(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt, match="jsonl has 4 answers; the same command goes on"):
        evaluate(config, QUIET)
    calls.clear()
    monkeypatch.setattr(session, "decode", fail_at_the_second(ValueError("prompt 0 has 999 tokens")))
    with pytest.raises(ValueError, match="held-out rows 8 to 11: prompt 0 has 999 tokens"):
        evaluate(config, QUIET)


def test_sigterm_says_how_many_answers_are_kept_and_the_same_command_goes_on(run, forks):
    argv = ["--run", run, "--max-new-tokens", 40, "--min-new-tokens", 40, "--batch-size", 2, "--resamples", 50]
    process = forks.script("evaluate.py", *argv)
    file, deadline = answers_file(run, point="greedy_minnewtokens40"), time.monotonic() + 60
    while not file.exists() or len(file.read_bytes().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    process.wait()
    errors, answers = process.err.read_text(), len(read_lines(file)) - 1
    assert process.returncode == 130 and 3 <= answers < ROWS and "Traceback" not in errors
    assert errors.splitlines()[-1] == f"stopped: {file} has {answers} answers; the same command goes on from there"
    before = file.read_bytes()
    result = evaluate(
        EvaluateConfig(run=str(run), max_new_tokens=40, min_new_tokens=40, batch_size=2, resamples=50), QUIET
    )
    assert file.read_bytes().startswith(before) and len(result["systems"]["tuned"]["examples"]) == ROWS


def test_a_stop_outside_of_decoding_says_what_is_kept_too(run, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    config = EvaluateConfig(run=str(run), max_new_tokens=4, limit=3, resamples=10, base=False)
    monkeypatch.setattr(module, "Answerer", stop)
    with pytest.raises(KeyboardInterrupt, match=r"jsonl has 0 answers; the same command goes on from there$"):
        evaluate(config, QUIET)
    monkeypatch.undo()
    monkeypatch.setattr(scoring, "score", stop)
    words = r"jsonl has 3 answers; the same command without --resume never goes on from there$"
    with pytest.raises(KeyboardInterrupt, match=words):
        evaluate(replace(config, resume="never"), QUIET)
    monkeypatch.setattr(scoring, "Judges", stop)
    with pytest.raises(KeyboardInterrupt, match="^what was answered is kept; the same command goes on"):
        evaluate(config, QUIET)
    monkeypatch.undo()
    monkeypatch.setattr(scoring, "score", stop)
    write_json(tmp_path / "a.json", ["a"])
    write_json(tmp_path / "r.json", ["a"])
    with pytest.raises(KeyboardInterrupt, match="^nothing was written; the same command starts again"):
        evaluate(EvaluateConfig(predictions=str(tmp_path / "a.json"), references=str(tmp_path / "r.json")), QUIET)


def test_a_value_that_is_not_finite_is_null_with_a_note():
    rows = metrics.Rows(np.array([1.0, math.inf, 2.0]))
    found = scoring.measure(rows, 10, 0)
    assert found == {"value": None, "low": None, "high": None, "n": 3, "note": "not finite in 1 of 3 examples"}
    assert scoring.compare(rows, rows, 10, 0)["note"] == "not finite in every example"
    assert scoring.scores_of_example({"perplexity": rows}, 1) == {}


# --- runs that are not as they should be ---


def test_a_run_that_did_not_end_is_evaluated_at_its_best_and_says_so(run):
    shutil.rmtree(run / "adapter")
    said = []
    assert Run(EvaluateConfig(run=str(run)), said.append).adapter == run / "best" and "did not end" in said[0]
    shutil.rmtree(run / "best"), shutil.rmtree(run / "last")
    with pytest.raises(ValueError, match="no adapter/, best/ or last/ with weights; train it first"):
        Run(EvaluateConfig(run=str(run)), QUIET)


def test_a_run_without_questions_is_refused(run, tmp_path):
    options = read_json(run / "config.json")
    write_json(run / "config.json", options | {"test_data": None, "test_size": 0})
    with pytest.raises(ValueError, match="no held-out rows"):
        Run(EvaluateConfig(run=str(run)), QUIET)
    write_json(tmp_path / "text.json", [{"text": "a story"}])
    write_json(run / "config.json", options | {"test_data": str(tmp_path / "text.json")})
    with pytest.raises(ValueError, match="there is nothing to answer"):
        Run(EvaluateConfig(run=str(run)), QUIET)
    with pytest.raises(ValueError, match="has no config.json; expected a run folder"):
        Run(EvaluateConfig(run=str(tmp_path)), QUIET)
    with pytest.raises(ValueError, match="is the folder of a model"):
        Run(EvaluateConfig(run=str(hub.resolve("tiny-mistral"))), QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of --run DIR and --predictions FILE"),
        ({"run": "a", "predictions": "b", "references": "c"}, "give one of"),
        ({"predictions": "b"}, "belong together"),
        ({"run": "a", "other": "b"}, "--other FILE is compared with"),
        ({"predictions": "b", "references": "c", "num_beams": 2}, "num_beams is about decoding"),
        ({"run": ""}, "run is empty; give a value, or leave the option out"),
        ({"run": "a", "metrics": ""}, "metrics is empty"),
        ({"run": "a", "metrics": "bleu,blue"}, "there is no 'blue'; expected some of bleu, corpus_bleu"),
        ({"run": "a", "metrics": "perplexity"}, "perplexity needs --judge, a GPT-2"),
        ({"run": "a", "metrics": "bertscore"}, "bertscore needs --encoder, a RoBERTa or BERT"),
        (
            {"run": "a", "encoder_layer": 2},
            "encoder_layer is an option of BERTScore, which needs --encoder, a RoBERTa or BERT",
        ),
        (
            {"run": "a", "encoder_prefix_space": True},
            "encoder_prefix_space is an option of BERTScore, which needs --encoder",
        ),
        (
            {"run": "a", "encoder_baseline": "b.tsv"},
            "encoder_baseline is an option of BERTScore, which needs --encoder",
        ),
        ({"run": "a", "resamples": 1}, "resamples is 1, expected 10 to 1,000,000"),
        ({"run": "a", "resamples": 2**63 - 1}, "resamples is 9223372036854775807, expected 10 to 1,000,000"),
        ({"run": "a", "batch_size": 2**63 - 1}, "batch_size is 9223372036854775807"),
        ({"run": "a", "bleu_order": 0}, "n-grams of 0 orders is not possible, expected 1 to 20"),
        ({"run": "a", "bleu_order": 2**63 - 1}, "expected 1 to 20 orders"),
        ({"run": "a", "bleu_weights": (0.5, -0.5)}, "expected numbers from 0 to 1"),
        ({"run": "a", "bleu_weights": (0.5, 0.5), "bleu_order": 3}, "bleu_weights has 2 weights and bleu_order is 3"),
        ({"run": "a", "bleu_tokenize": "flores101"}, "needs sacrebleu's model: download https://.* to "),
        ({"run": "a", "num_return_sequences": 2, "num_beams": 2}, "one answer a question"),
        ({"run": "a", "limit": 0}, "limit is 0, expected a number above 0"),
        ({"run": "a", "temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**options)


def test_a_judge_or_an_encoder_that_is_not_there_is_said_before_anything_is_decoded(run, monkeypatch):
    monkeypatch.setattr(session, "decode", lambda *args: pytest.fail("decoded"))
    for options in ({"judge": "/nowhere"}, {"encoder": "/nowhere"}):
        with pytest.raises(ValueError, match="the folder /nowhere does not exist; expected"):
            evaluate(EvaluateConfig(run=str(run), **options), QUIET)


def test_the_script_ends_with_2_and_one_line_on_bad_input(tmp_path, script):
    write_json(tmp_path / "r.json", ["a red hat", "two words"])
    (tmp_path / "bad.json").write_text('["a", 1]')
    files = ("--predictions", tmp_path / "bad.json", "--references", tmp_path / "r.json")
    bad = script("evaluate.py", *files)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "bad.json, row 1" in bad.stderr


def test_the_table_has_a_line_for_each_metric_with_intervals_and_p(evaluated):
    lines = scoring.table(evaluated["systems"], evaluated["comparisons"], 200)
    assert all(name in lines[0] for name in ("tiny-mistral-finetuned", "tiny-mistral", "difference", "p"))
    [line] = [line for line in lines if line.startswith("ROUGE-1")]
    metric, compared = (evaluated["systems"]["tuned"]["metrics"]["rouge_1"], evaluated["comparisons"]["rouge_1"])
    assert f"{metric['value']:.4f} [{metric['low']:.4f}, {metric['high']:.4f}]" in line
    assert line.endswith(f"{compared['p_permutation']:.4f}") and f"{compared['difference']:+.4f}" in line
    assert any("Every example has the same score, so there is no interval: " in line for line in lines)
    for width in (40, 60, 80, 120):
        found = scoring.table(evaluated["systems"], evaluated["comparisons"], width)
        assert max(map(cells, found)) <= width and sum("difference" in line.split() for line in found) == 1


def test_a_note_of_many_values_names_the_first_of_them(tmp_path):
    write_json(tmp_path / "a.json", ["a", "b"])
    write_json(tmp_path / "r.json", ["a", "b"])
    files = {"predictions": str(tmp_path / "a.json"), "references": str(tmp_path / "r.json")}
    system = evaluate(EvaluateConfig(**files), QUIET)["systems"]
    [line] = [line for line in scoring.table(system, {}, 200) if line.startswith("Every example")]
    assert line.endswith("BLEU, sentences (0-1), BLEU, corpus (0-100), chrF (0-100), ROUGE-1 (0-1) and 6 more.")


def test_an_evaluation_that_could_not_be_written_is_said_before_anything_is_decoded(run, monkeypatch):
    (run / "evaluation.json").mkdir()
    monkeypatch.setattr(session, "decode", lambda *args, **options: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="evaluation.json is a folder, expected a file to write"):
        evaluate(EvaluateConfig(run=str(run)), QUIET)


def test_another_scaling_in_the_adapters_config_is_another_model(run):
    config = EvaluateConfig(run=str(run), max_new_tokens=4, limit=2, base=False, resamples=100)
    evaluate(config, QUIET)
    path = run / "adapter" / "adapter_config.json"
    write_json(path, read_json(path) | {"lora_alpha": 1})
    with pytest.raises(ValueError, match="answers of another adapter"):
        evaluate(config, QUIET)
