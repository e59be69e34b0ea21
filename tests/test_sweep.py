"""scripts/sweep.py on an embedded model: the study's points, one load, nothing done twice, training points, errors."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from minitune import hub, session
from minitune import train as training
from minitune.checkpoint import load_model
from minitune.config import TrainConfig, parse, sigterm_as_ctrl_c
from minitune.decoding.options import GenerateConfig
from minitune.evaluation import held_out as evaluating
from minitune.files import read_json, write_json
from minitune.generate import Decoder, generate
from minitune.jobs import sweep as module
from minitune.jobs.evaluate import EvaluateConfig, evaluate
from minitune.jobs.sweep import SweepConfig, decoding_points, sweep, table
from minitune.metrics.significance import paired_permutation
from minitune.reports.results import read_results
from minitune.runs.folder import hold, read_lines, read_options
from minitune.train import train

ROOT = Path(__file__).resolve().parents[1]
QUIET = lambda line: None
ROWS = 6
SHORT = {"max_new_tokens": (5,), "resamples": 50}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps on some of the embedded rows."""
    folder = tmp_path_factory.mktemp("runs")
    for part, count in (("train", 32), ("test", ROWS)):
        write_json(folder / f"{part}.json", read_json(hub.embedded_rows(part))[:count])
    argv = ["--run", str(folder / "run"), "--max-steps", "6", "--samples", "0", "--data", str(folder / "train.json")]
    return train(parse(TrainConfig, [*argv, "--test-data", str(folder / "test.json")]), say=QUIET)


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def decoded(monkeypatch):
    """The decoding options of every batch that goes through the model, and how often a model was loaded."""
    seen, decode, answerer = [], session.decode, evaluating.Answerer
    monkeypatch.setattr(
        session,
        "decode",
        lambda m, p, config, *args, **options: seen.append(config) or decode(m, p, config, *args, **options),
    )
    monkeypatch.setattr(evaluating, "Answerer", lambda *args: seen.append("load") or answerer(*args))
    return seen


def files(folder):
    """{path: bytes} of the answers and scores of all points."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.glob("sweep/*/generations/*"))}


def test_decodings_with_one_meaning_have_the_same_answers():
    greedy = GenerateConfig(max_new_tokens=5)
    assert replace(greedy, top_k=3, temperature=0.5, seed=4, length_penalty=2.0).meaning() == greedy.meaning()
    assert replace(greedy, do_sample=True, temperature=0.0).meaning() == greedy.meaning()
    drawn = replace(greedy, do_sample=True)
    assert drawn.meaning() != greedy.meaning() and replace(drawn, top_k=3).meaning() != drawn.meaning()
    assert replace(greedy, num_beams=2, length_penalty=2.0).meaning() != replace(greedy, num_beams=2).meaning()
    model, prompts = load_model("tiny-mistral"), [[1, 5, 9], [1, 7]]
    for config in (replace(drawn, num_beams=2, temperature=0.0, top_k=3), replace(drawn, length_penalty=2.0, top_k=9)):
        assert config.meaning() != config
        assert generate(model, prompts, config.meaning()) == generate(model, prompts, config)


# --- points ---


def test_every_point_is_what_evaluate_gives_for_its_options(run, tmp_path):
    result = sweep(SweepConfig(run=str(run), num_beams=(2, 3), temperature=(0.7, 1.0), **SHORT), QUIET)
    assert [point["name"] for point in result["points"]] == ["topk50_nb2_t1", "topk50_nb3_t1", "topk50_nb2_t0.7"]
    assert read_json(run / "sweep" / "sweep.json") == result
    for point in result["points"]:
        folder = run / "sweep" / point["folder"]
        options = {
            "max_new_tokens": 5,
            "resamples": 50,
            "base": False,
            "do_sample": True,
            "out": str(tmp_path / "e.json"),
        }
        expected = evaluate(EvaluateConfig(run=str(run), **options, **point["options"]), QUIET)
        assert read_json(folder / "evaluation.json") == expected
        assert point["metrics"] == expected["systems"]["tuned"]["metrics"]
        name = f"tiny-mistral-finetuned_{point['name']}"
        assert (folder / "generations" / f"{name}_score.json").is_file()
        answers = [example["answer"] for example in expected["systems"]["tuned"]["examples"]]
        assert read_json(folder / "generations" / f"{name}.json") == answers


def test_one_load_serves_all_points_and_equal_decodings_are_decoded_once(run, decoded):
    config = SweepConfig(
        run=str(run), top_k=(30, 50, 80), temperature=(0.5, 1.0), num_beams=(1, 2), do_sample=False, **SHORT
    )
    sweep(config, QUIET)
    assert decoded[0] == "load" and [config.num_beams for config in decoded[1:]] == [1, 2]
    lines = [path.read_bytes() for path in run.glob("sweep/greedy*/generations/*.jsonl")]
    assert len(lines) == 4 and len(set(lines)) == 1


@pytest.mark.parametrize("room", [0, 400_000, 2**29], ids=["none", "for some batches", "for all"])
def test_prompts_are_read_once_for_all_points_while_there_is_room(room, run, monkeypatch):
    """Three points, each with three batches of prompts. Some of the batches fit into 400 kB."""
    read, calls = Decoder.read, []

    def counted(decoder, *args):
        calls.append(decoder.prefix is None or decoder.prefix.parts is None)
        return read(decoder, *args)

    monkeypatch.setattr(Decoder, "read", counted)
    monkeypatch.setattr(module, "PREFIX_BYTES", room)
    sweep(SweepConfig(run=str(run), num_beams=(1, 2, 3), batch_size=2, **SHORT), QUIET)
    assert len(calls) == 9 and sum(calls) == (9 if room == 0 else 3 if room == 2**29 else sum(calls))
    if room == 400_000:
        assert 3 < sum(calls) < 9
    found = {p.name: p.read_bytes() for p in run.glob("sweep/*/generations/*.jsonl")}
    shutil.rmtree(run / "sweep")
    for beams in (1, 2, 3):  # each by itself
        config = EvaluateConfig(
            run=str(run), num_beams=beams, do_sample=True, max_new_tokens=5, resamples=50, batch_size=2, base=False,
            resume="never",
        )  # fmt: skip
        evaluate(config, QUIET)
        [path] = run.glob(f"generations/*_nb{beams}_*.jsonl")
        assert path.read_bytes() == found[path.name]


def test_the_base_answers_beside_every_point_where_asked(run):
    sweep(SweepConfig(run=str(run), top_k=(30, 50), num_beams=(1,), base=True, **SHORT), QUIET)
    point = read_json(run / "sweep" / "topk30_nb1_t1" / "evaluation.json")
    assert list(point["systems"]) == ["tuned", "base"] and point["comparisons"]["bleu"]["n"] == ROWS


def test_a_second_sweep_does_nothing_again_and_keeps_the_points_of_the_first(run, decoded):
    first = sweep(SweepConfig(run=str(run), top_k=(30, 50), num_beams=(1,), **SHORT), QUIET)
    before, loads = files(run), len(decoded)
    assert sweep(SweepConfig(run=str(run), top_k=(30, 50), num_beams=(1,), **SHORT), QUIET) == first
    assert files(run) == before and len(decoded) == loads
    second = sweep(SweepConfig(run=str(run), temperature=(0.5, 1.0), num_beams=(1,), **SHORT), QUIET)
    assert {p["name"] for p in second["points"]} == {"topk30_nb1_t1", "topk50_nb1_t1", "topk50_nb1_t0.5"}
    other = sweep(SweepConfig(run=str(run), num_beams=(2, 3), max_new_tokens=(4,), resamples=50), QUIET)
    assert {p["name"] for p in other["points"]} == {"topk50_nb2_t1", "topk50_nb3_t1"}  # answers of another length


def test_a_point_is_scored_again_where_the_scoring_changed_and_answered_again_where_asked(run, decoded):
    config = SweepConfig(run=str(run), top_k=(30, 50), num_beams=(1,), **SHORT)
    sweep(config, QUIET)
    loads = len(decoded)
    for change in ({"resamples": 60}, {"limit": 4}, {"metrics": "bleu"}, {"base": True}):
        points = sweep(replace(config, **change), QUIET)["points"]
        stored = read_json(run / "sweep" / "topk30_nb1_t1" / "evaluation.json")
        assert points[0]["metrics"] == stored["systems"]["tuned"]["metrics"]
        settings = stored["settings"] | {"base": "base" in stored["systems"]}
        assert {name: settings[name] for name in change} in (change, {"metrics": ["bleu"]})
        assert (len(decoded) > loads) == ("base" in change)
    loads = len(decoded)
    sweep(replace(config, resume="never"), QUIET)
    assert len(decoded) > loads


def test_a_kill_in_the_middle_and_a_second_start_give_the_files_of_one_start(run, tmp_path, forks):
    options = {
        "max_new_tokens": (30,),
        "min_new_tokens": (30,),
        "num_beams": (2, 3, 4),
        "resamples": 50,
        "batch_size": 2,
    }
    whole = shutil.copytree(run, tmp_path / "whole")
    sweep(SweepConfig(run=str(whole), **options), QUIET)
    argv = ["--run", run, "--max-new-tokens", 30, "--min-new-tokens", 30, "--num-beams", 2, 3, 4, "--resamples", 50]
    process = forks.script("sweep.py", *argv, "--batch-size", 2)
    deadline = time.monotonic() + 60
    while not list(run.glob("sweep/topk50_nb3_t1_minnewtokens30/generations/*.jsonl")):  # of the second point
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = files(run)
    assert len(before) < len(files(whole))
    listed = read_json(run / "sweep" / "sweep.json")["points"]
    assert ["metrics" in point for point in listed] == [True, False, False]
    sweep(SweepConfig(run=str(run), **options), QUIET)
    assert files(run) == files(whole)


def test_sigterm_says_how_many_points_are_done_and_the_same_command_goes_on(run, forks):
    argv = ["--run", run, "--max-new-tokens", 30, "--min-new-tokens", 30, "--num-beams", 1, 2, 3, "--resamples", 50]
    process = forks.script("sweep.py", *argv, "--batch-size", 2)
    point = "topk50_nb2_t1_minnewtokens30"
    file = run / f"sweep/{point}/generations/tiny-mistral-finetuned_{point}.jsonl"
    deadline = time.monotonic() + 60
    while not file.exists() or len(file.read_bytes().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    process.wait()
    errors, answers = process.err.read_text(), len(read_lines(file)) - 1
    words = f"stopped: 1 of 3 points are done, {file} has {answers} answers; the same command goes on from there"
    assert process.returncode == 130 and errors.splitlines()[-1] == words


def test_a_stop_in_a_training_says_where_its_state_is_and_takes_no_signal_for_good(run, monkeypatch):
    def signalled(options, say):
        if options.lora_rank == 2:
            return train(options, say)
        append = training.append_line

        def stop(path, record):
            append(path, record)
            if record["step"] == 1:  # within the loop, which ends its step and saves
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(training, "append_line", stop)
        return train(options, say)

    monkeypatch.setattr(module, "train", signalled)
    axes = ("lora_rank=2,4", "max_steps=3", "samples=0", "eval_every=3")
    config = SweepConfig(run=str(run), train=axes, num_beams=(1,), limit=2, **SHORT)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    words = (
        "^1 of 2 points are done, the last state of lora_rank4 is in .*lora_rank4/last; the same command goes on from"
    )
    with sigterm_as_ctrl_c(), pytest.raises(KeyboardInterrupt, match=words):
        sweep(config, QUIET)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    monkeypatch.undo()
    assert all("metrics" in point for point in sweep(config, QUIET)["points"])


def test_every_point_is_in_the_list_as_soon_as_it_is_done_and_the_report_says_how_many_are(run, monkeypatch):
    config = SweepConfig(run=str(run), num_beams=(1, 2, 3), **SHORT)
    whole = sweep(config, QUIET)
    shutil.rmtree(run / "sweep")
    evaluate_point, lists = module.evaluate_point, []

    def watched(*args):
        lists.append(read_json(run / "sweep" / "sweep.json")["points"] if lists else None)
        if len(lists) == 3:
            raise OSError("the power went")
        return evaluate_point(*args)

    monkeypatch.setattr(module, "evaluate_point", watched)
    with pytest.raises(OSError, match="the power went"):
        sweep(config, QUIET)
    points = read_json(run / "sweep" / "sweep.json")["points"]
    assert lists[1:] == [points[:1] + [p | {"pending": True} for p in stripped(points[1:])], points]
    assert points[:2] == whole["points"][:2] and points[2]["pending"] and "metrics" not in points[2]
    notes = read_results([str(run)]).notes
    assert notes == [f"2 of the 3 points of the sweep in {run} are done."]
    monkeypatch.undo()
    assert sweep(config, QUIET)["points"] == whole["points"]
    assert read_results([str(run)]).notes == []


def stripped(points):
    return [{key: point[key] for key in ("name", "options", "folder")} for point in points]


def test_a_second_start_that_is_killed_early_loses_no_point_of_the_list(run, monkeypatch):
    config = SweepConfig(run=str(run), num_beams=(1, 2, 3), **SHORT)
    whole = sweep(config, QUIET)
    evaluate_point, calls = module.evaluate_point, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("the power went")
        return evaluate_point(*args)

    monkeypatch.setattr(module, "evaluate_point", killed)
    with pytest.raises(OSError, match="the power went"):
        sweep(config, QUIET)
    assert read_json(run / "sweep" / "sweep.json") == whole


def test_points_of_an_earlier_sweep_are_compared_with_the_middle_of_this_one(run):
    options = {"run": str(run), "top_k": (50,), "max_new_tokens": (12,), "resamples": 50}
    first = sweep(SweepConfig(num_beams=(1, 2), **options), QUIET)
    second = sweep(SweepConfig(num_beams=(3, 4), **options), QUIET)
    assert (first["centre"], second["centre"]) == ("topk50_nb1_t1", "topk50_nb3_t1")
    middle = module.read_point(run / "sweep" / second["centre"])["systems"]["tuned"]
    assert len(second["points"]) == 4
    for point in second["points"]:
        if point["name"] != second["centre"]:
            system = module.read_point(run / "sweep" / point["folder"])["systems"]["tuned"]
            assert point["against_centre"] == module.against(system, middle, 50)


def test_sweeps_over_decoding_and_over_training_keep_the_points_of_each_other(run):
    decoding = SweepConfig(run=str(run), num_beams=(1, 2), limit=2, **SHORT)
    training = SweepConfig(
        run=str(run), num_beams=(1,), limit=2, train=("lora_rank=2,4", "max_steps=1", "samples=0"), **SHORT
    )
    for order in ((decoding, training, decoding), (training, decoding, training)):
        for config in order:
            sweep(config, QUIET)
        results = read_results([str(run)])
        assert len(results.points) == 2 and {r.folder.name for r in results.runs} == {"run", "lora_rank2", "lora_rank4"}
        shutil.rmtree(run / "sweep")


def test_two_sweeps_of_one_run_do_not_work_at_once(run):
    with hold(run / "sweep"), pytest.raises(ValueError, match="another process works in .*sweep; wait for it"):
        sweep(SweepConfig(run=str(run), num_beams=(1, 2), **SHORT), QUIET)


def test_points_are_compared_with_the_middle_and_the_table_marks_them(run):
    result = sweep(SweepConfig(run=str(run), num_beams=(1, 2), max_new_tokens=(1, 12), resamples=50), QUIET)
    assert result["centre"] == "topk50_nb1_t1_maxnewtokens1"
    middle, other = result["points"][0], result["points"][2]
    assert middle["name"] == result["centre"] and "against_centre" not in middle
    examples = [
        read_json(run / "sweep" / p["folder"] / "evaluation.json")["systems"]["tuned"]["examples"]
        for p in (other, middle)
    ]
    ended = [[e["scores"]["ended"] for e in side] for side in examples]
    assert other["against_centre"]["ended"]["p_permutation"] == paired_permutation(*ended, resamples=50).p_value
    other["against_centre"]["ended"]["p_permutation"] = 0.01
    lines = table(result, 200)
    assert [line.split()[0] for line in lines[1:4]] == [point["name"] for point in result["points"]]
    assert lines[3].endswith("*") and not lines[1].endswith("*") and "expected by chance" in lines[-1]


# --- training ---


def test_training_points_are_ordinary_runs_and_nothing_is_done_again(run, monkeypatch):
    axes = ("lora_rank=2,4", "max_steps=3", "eval_every=3")
    config = SweepConfig(run=str(run), train=axes, num_beams=(1,), **SHORT)
    result = sweep(config, QUIET)
    assert [point["name"] for point in result["points"]] == ["lora_rank2", "lora_rank4"]
    for point, rank in zip(result["points"], (2, 4), strict=True):
        folder = run / "sweep" / point["folder"]
        assert read_json(folder / "config.json")["lora_rank"] == rank
        assert read_json(folder / "config.json")["test_data"] == read_json(run / "config.json")["test_data"]
        assert read_json(folder / "adapter" / "adapter_config.json")["r"] == rank
        alone = evaluate(
            EvaluateConfig(run=str(folder), max_new_tokens=5, do_sample=True, resamples=50, base=False), QUIET
        )
        assert alone["systems"]["tuned"]["metrics"] == point["metrics"]
    monkeypatch.setattr(module, "train", lambda *args: pytest.fail("trained again"))
    assert sweep(config, QUIET)["points"] == result["points"]


def test_a_training_point_that_fails_is_listed_and_the_others_are_done(run, monkeypatch):
    def fail_at_rank_2(options, say):
        if options.lora_rank == 2:
            raise FloatingPointError("step 1: the loss is nan")
        return train(options, say)

    monkeypatch.setattr(module, "train", fail_at_rank_2)
    result = sweep(SweepConfig(run=str(run), train=("lora_rank=2,4", "max_steps=1"), num_beams=(1,), **SHORT), QUIET)
    failed, done = result["points"]
    assert failed["error"] == "step 1: the loss is nan" and "metrics" not in failed and "metrics" in done
    assert any("failed" in line for line in table(result))


@pytest.fixture
def diverging(run, monkeypatch):
    """A sweep of two ranks, of which the first fails; how often each was trained; what was said."""
    trained, said = [], []

    def counted(options, say):
        trained.append(options.lora_rank)
        if options.lora_rank == 2 and options.max_steps == 1:
            raise FloatingPointError("step 1: the loss is nan")
        return train(options, say)

    monkeypatch.setattr(module, "train", counted)
    axes = ("lora_rank=2,4", "max_steps=1", "samples=0")
    config = SweepConfig(run=str(run), train=axes, num_beams=(1,), limit=2, **SHORT)
    return config, trained, said


def test_a_training_that_failed_is_passed_over_with_its_error_until_it_is_asked_for(diverging, run):
    config, trained, said = diverging
    first = sweep(config, QUIET)
    assert trained == [2, 4] and first["points"][0]["error"] == "step 1: the loss is nan"
    again = sweep(config, said.append)
    assert trained == [2, 4] and again["points"] == first["points"]
    [line] = [line for line in said if "skipped, because it failed earlier" in line]
    file = run / "sweep" / "lora_rank2" / "failed.json"
    assert "the loss is nan" in line and "--retry-failed trains it again" in line and f"remove {file}" in line
    sweep(replace(config, retry_failed=True), QUIET)
    assert trained == [2, 4, 2] and file.exists()
    file.unlink()
    sweep(config, QUIET)
    assert trained == [2, 4, 2, 2]


def test_a_training_with_other_options_is_another_one_that_did_not_fail(diverging, run):
    config, trained, _ = diverging
    sweep(config, QUIET)
    shutil.rmtree(run / "sweep" / "lora_rank4")
    points = sweep(replace(config, train=("lora_rank=2,4", "max_steps=2", "samples=0")), QUIET)["points"]
    assert trained == [2, 4, 2, 4] and all("metrics" in point for point in points)
    assert not (run / "sweep" / "lora_rank2" / "failed.json").exists()


def test_a_damaged_note_of_a_failure_is_said(diverging, run):
    config = diverging[0]
    sweep(config, QUIET)
    for content in ("[]", '{"error": 5}'):
        (run / "sweep" / "lora_rank2" / "failed.json").write_text(content)
        with pytest.raises(ValueError, match="failed.json has no error message; remove it"):
            sweep(config, QUIET)


def test_what_is_refused_before_it_trains_is_looked_at_again(tmp_path):
    missing = tmp_path / "rows.json"
    axes = (f"data={missing}", "lora_rank=2,4", "max_steps=1", "samples=0", "model=tiny-llama", "test_size=2")
    config = SweepConfig(run=str(tmp_path / "run"), train=axes, limit=2, max_new_tokens=(2,), num_beams=(1,))
    with pytest.raises(ValueError, match="no point was finished; the error of the first: .*rows.json does not exist"):
        sweep(config, QUIET)
    write_json(missing, read_json(hub.embedded_rows("train"))[:20])
    assert all("metrics" in point for point in sweep(config, QUIET)["points"])


def test_a_sweep_over_training_needs_no_run_before_it(tmp_path):
    axes = ("model=tiny-phi", "learning_rate=1e-3,2e-3", "use_rslora=true", "lora_targets=q_proj+v_proj", "lora_rank=8")
    points, middle = module.training_points(SweepConfig(run=str(tmp_path / "new"), train=axes))
    assert [name for name, _, _ in points] == ["learning_rate0.001", "learning_rate0.002"] and middle == points[0][0]
    options = points[1][2]
    assert (options.model, options.learning_rate, options.use_rslora) == ("tiny-phi", 2e-3, True)
    assert options.lora_targets == ("q_proj", "v_proj") and options.dtype == "fp32"  # the last of the model's recipe


# --- what is refused ---

GOOD_POINT = {"name": "x", "options": {}, "folder": "x"}


@pytest.mark.parametrize(
    "content",
    ["[]", "5", '{"points": 5}', '{"points": [1]}', '{"points": [{"name": "x"}]}', {"points": [], "other": 1},
     {"points": [GOOD_POINT], "other": {"points": [GOOD_POINT, {}]}}],
    ids=str,
)  # fmt: skip
def test_a_damaged_list_of_points_is_said_before_anything_is_decoded(run, decoded, content):
    (run / "sweep").mkdir()
    (run / "sweep" / "sweep.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match="sweep.json: .*. It is not a list of points; remove it"):
        sweep(SweepConfig(run=str(run), num_beams=(1, 2), **SHORT), QUIET)
    assert not decoded


@pytest.mark.parametrize(
    "content",
    ["[]", "5", "{}", '{"systems": 5}', '{"systems": {"tuned": {}}, "settings": 5}',
     '{"systems": {"tuned": {"metrics": {}, "examples": []}}, "settings": {"decoding": {}}}',
     '{"systems": {"tuned": {"metrics": {}, "examples": [{"scores": {}}]}}, "settings": {"decoding": null}}'],
)  # fmt: skip
def test_a_damaged_point_is_said_with_its_file_and_scored_again_once_that_is_removed(run, decoded, content):
    config = SweepConfig(run=str(run), num_beams=(1, 2), limit=2, **SHORT)
    whole = sweep(config, QUIET)
    loads, path = len(decoded), run / "sweep" / "topk50_nb2_t1" / "evaluation.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="nb2_t1/evaluation.json: .*. It was not written by a sweep; remove it"):
        sweep(config, QUIET)
    path.unlink()
    assert sweep(config, QUIET) == whole and len(decoded) == loads


def test_two_points_of_one_name_are_refused_and_a_name_is_one_folder(tmp_path):
    with pytest.raises(ValueError, match="two points have the name topk50_nb5_t0.7"):
        decoding_points(SweepConfig(run="x", temperature=(0.7, 0.7000000001)))
    axis = ("learning_rate=0.001,0.00100000001",)
    with pytest.raises(ValueError, match="two points have the name learning_rate0.001"):
        module.training_points(SweepConfig(run=str(tmp_path), train=axis))
    points, _ = module.training_points(SweepConfig(run=str(tmp_path), train=("data=a/b.json,/c/d.json",)))
    assert [name for name, _, _ in points] == ["dataa-b.json", "data-c-d.json"]
    assert [config.run for _, _, config in points] == [str(tmp_path / "sweep" / name) for name, _, _ in points]


def test_a_point_that_cannot_be_decoded_is_said_before_a_model_loads(run, decoded):
    with pytest.raises(ValueError, match="top_p is 2.0, expected a number above 0"):
        sweep(SweepConfig(run=str(run), top_p=(0.5, 2.0), **SHORT), QUIET)
    assert not decoded


def test_answers_of_other_settings_are_said_before_the_first_point_is_decoded(run, decoded):
    options = {"run": str(run), "num_beams": (1,), "temperature": (1.0,), "limit": 2, "base": False, "resamples": 50}
    sweep(SweepConfig(**options, top_k=(50, 60), max_new_tokens=(3,)), QUIET)
    decoded.clear()
    with pytest.raises(ValueError, match="max_new_tokens 3 -> 4"):
        sweep(SweepConfig(**options, top_k=(10, 50), max_new_tokens=(4,)), QUIET)
    assert not decoded


def test_a_training_point_with_a_wrong_option_leaves_the_others_their_table(tmp_path):
    axis = ("lora_targets=q_proj,nope", "max_steps=1", "samples=0", "model=tiny-llama")
    config = SweepConfig(
        run=str(tmp_path / "run"), train=axis, limit=2, max_new_tokens=(2,), num_beams=(1,), resamples=50
    )
    points = sweep(config, QUIET)["points"]
    assert ["metrics" in point for point in points] == [True, False] and "nope" in points[1]["error"]
    config = replace(config, train=("lora_targets=nope,none", *axis[1:]))
    with pytest.raises(ValueError, match="no point was finished"):
        sweep(config, QUIET)


def test_a_sweep_takes_what_it_does_not_set_from_the_checkpoint(run, tmp_path, monkeypatch):
    options = read_options(run)
    model = shutil.copytree(hub.resolve(options.model), tmp_path / "model")
    write_json(model / "generation_config.json", {"eos_token_id": 2, "repetition_penalty": 1.5, "temperature": 0.2})
    write_json(run / "config.json", read_json(run / "config.json") | {"model": str(model)})
    said = []
    sweep(SweepConfig(run=str(run), num_beams=(1, 2), **SHORT), said.append)
    for path in run.glob("sweep/*/evaluation.json"):
        decoding = read_json(path)["settings"]["decoding"]
        assert decoding["repetition_penalty"] == 1.5 and decoding["temperature"] == 1.0  # the study's centre
    assert sum("repetition_penalty 1.5" in line for line in said) == 1
    shutil.rmtree(run / "sweep")
    sweep(SweepConfig(run=str(run), num_beams=(1, 2), repetition_penalty=(1.2,), **SHORT), QUIET)
    assert {
        read_json(p)["settings"]["decoding"]["repetition_penalty"] for p in run.glob("sweep/*/evaluation.json")
    } == {1.2}
