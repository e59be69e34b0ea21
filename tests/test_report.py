"""scripts/report.py: the study's numbers to the last digit, run folders, one page that opens offline, bad input in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from small_reports import PNG, Page, check_page, evaluation, examples, put, tuned, write

from minitune.files import fingerprint
from minitune.jobs.report import ReportConfig, default_out
from minitune.metrics.correlation import correlate
from minitune.metrics.significance import bootstrap_interval, paired_bootstrap
from minitune.reports import page
from minitune.reports.results import read_results, sweep_lines
from minitune.reports.runs import repeated_words
from minitune.reports.scores import scores_section
from minitune.runs.folder import adapter_fingerprint
from minitune.study.names import parse_name

pytestmark = pytest.mark.usefixtures("without_drawing")


@pytest.fixture
def run(scored_run):
    return scored_run


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def study(data_dir):
    return data_dir / "seed_results"


@pytest.fixture(scope="session")
def study_report(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, *write([study], folder)


def test_the_table_holds_the_numbers_of_the_study_and_human_averages_to_the_last_digit(study, study_report):
    _, text, markdown, _ = study_report
    values = Page(text).values
    published = sorted((study / "data" / "section_2").glob("*_score.json"))
    assert len(published) == 6
    for path in published:
        for key, value in json.loads(path.read_text()).items():
            assert value in values, (path.name, key)
            if key == "human_evaluation_average":
                assert repr(value) in markdown
    for path in (study / "data" / "section_3").glob("*_score.json"):
        assert set(json.loads(path.read_text()).values()) <= set(values), path.name
    assert text.count("equal the published ones to the last digit") == 3
    assert "| phi-2-finetuned | 0.470 | 0.605 | 0.931 | 19.01 | 0.895<br>" in markdown


def test_the_figure_moves_one_option_at_a_time_through_the_published_scores(study, study_report):
    folder = study_report[0]
    lines = sweep_lines(read_results([study]).points)
    assert [line.name for line in lines] == ["Llama-2-7b-hf-finetuned", "Mistral-7B-finetuned", "phi-2-finetuned"]
    for line in lines:
        assert line.centre == {"top_k": 50, "num_beams": 5, "temperature": 1.0}
        along = {name: [p.options[name] for p in row] for name, row in line.points.items()}
        assert along == {"top_k": [30, 40, 50, 60, 80], "num_beams": [2, 4, 5, 6], "temperature": [0, 0.5, 0.7, 1]}
        for point in (p for row in line.points.values() for p in row):
            k, b, t = point.setting()
            stored = json.loads((study / f"data/section_3/{line.name}_topk{k}_nb{b}_t{t:g}_score.json").read_text())
            assert [point.scores[n].value for n in ("perplexity", "bleu", "rouge_l", "bertscore")] == list(
                stored.values()
            )
            assert point.scores["bleu"].low is None
    for name in ("table", "figure"):
        assert (folder / "out" / f"r_{name}.png").read_bytes()[:8] == PNG


def test_the_page_of_the_study_opens_offline_and_is_well_formed(study_report):
    _, text, markdown, _ = study_report
    found = check_page(text)
    assert len([t for t, a in found.tags if t == "svg" and a.get("class") != "key"]) == 3
    for tag, attributes in found.tags:
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert "Training curves" in markdown.split("## Not in this report")[1]
    assert "sweep.py" not in text  # there is one


def test_human_intervals_and_differences_are_those_of_significance(study, study_report):
    values, graded = Page(study_report[1]).values, [s.grades.of_examples() for s in read_results([study]).systems]
    assert paired_bootstrap(graded[0], graded[1], resamples=300).difference in values
    found = bootstrap_interval(graded[2], resamples=300)
    assert f"[{found.low:.3f}, {found.high:.3f}]" in study_report[1]


def test_a_published_average_that_is_wrong_is_said(study, tmp_path):
    for path in (study / "data" / "section_2").glob("phi-2*"):
        shutil.copy(path, tmp_path)
    path = next(tmp_path.glob("*_HE_score.json"))
    path.write_text(path.read_text().replace("0.8950617283950617", "0.8950617283950618"))
    (tmp_path / "phi-2_topk50_nb5.json").write_text("[]")
    text, markdown, lines = write([tmp_path], tmp_path)
    assert "is 0.8950617283950617, published as 0.8950617283950618" in text
    assert "phi-2_topk50_nb5.json" in text and any(
        "files of an unknown kind" in line and "phi-2_topk50_nb5.json" in line for line in lines
    )


def test_names_of_the_study_are_read_strictly():
    options = {"top_k": 50, "num_beams": 5, "temperature": 0.7}
    assert parse_name("Llama-2-7b_topk9_x_topk50_nb5_t0.7_HE_score.json") == (
        "Llama-2-7b_topk9_x",
        options,
        "_HE_score",
    )
    assert parse_name("m_topk50_nb5_t0.7.json") == ("m", options, "")
    for name in ("m_topk50_nb5.json", "m_topk50_nb5_t0.7_scores.json", "_topk50_nb5_t1.json", "m_topk5.5_nb5_t1.json",
                 "m_topk50_nb5_t1.json.bak", "m_topk50_nb5_t1_he.json", "m_topk50_nb5_t.json"):  # fmt: skip
        assert parse_name(name) is None, name


def test_a_run_folder_gives_every_section(run, tmp_path, drawn_charts):
    text, markdown, lines = write([run], tmp_path)
    found = check_page(text)
    sections = re.findall(r"^## (.*)", markdown, re.M)
    assert sections == ["Scores", "Human evaluation", "Tuned against base", "Decoding options", "Training",
                        "Best and worst answers", "Metrics beside human grades", "Environment and sources",
                        "Not in this report"]  # fmt: skip
    assert re.search(r"ROUGE-L, BERTScore: `python scripts/evaluate.py --run \S+ --encoder DIR`", markdown)
    assert {7.25, 0.2} <= set(found.values) and "base 0.125" in text and "[6.50, 8.12]" in text
    assert "&lt; 0.001" in text and "0.012" in text and "+0.200" in text
    assert "All 8 examples agree." in text and "300 draws, seed 4" in text
    assert any("5 of the 6 points" in line for line in lines) and "2.13" in text and "a CPU" in text
    assert (
        len([t for t, a in found.tags if t == "svg" and a.get("class") != "key"]) == 4
    )  # three options, one run's curves
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["r.html", "r.md", "r_curves_1.png", "r_figure.png", "r_table.png"]
    assert all(f"(<{name}>)" in markdown for name in names if name.endswith("png") and "table" not in name)


def test_correlation_with_human_grades_is_that_of_correlation(run, tmp_path):
    values = Page(write([run], tmp_path)[0]).values
    bleu, human = [e["scores"]["bleu"] for e in examples(8, 0.2)], [(i % 4) / 4 for i in range(8)]
    rouge = [e["scores"]["rouge_l"] for e in examples(8)]
    for method in ("spearman", "kendall"):
        assert correlate(bleu, human, method).value in values and correlate(rouge, human, method).value in values


def test_answers_cannot_become_markup(run, tmp_path):
    text, markdown, _ = write([run], tmp_path)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "tiny &lt;b&gt;" in text
    assert "\u202e" not in text and "\x07" not in text and r"\x07" in text
    inside = markdown.split("````text\n")  # the answer holds three backticks, so its fence has four
    assert len(inside) > 1 and inside[1].startswith("<script>") and "<script>" not in inside[0]


def test_best_and_worst_answers_follow_the_grades_or_a_metric(run, tmp_path):
    text, markdown, _ = write([run], tmp_path, answers=1)
    best, worst = (re.search(rf"#### {which}\n\n\*\*row (\d+)", markdown)[1] for which in ("Best", "Worst"))
    assert (best, worst) == ("3", "4") and "Ordered by the human grade. 2 of 8 answers have the best value" in text
    shutil.rmtree(run / "generations")
    text, markdown, _ = write([run], tmp_path, answers=1)
    assert "Ordered by ROUGE-L." in text and re.search(r"#### Best\n\n\*\*row 1\b|#### Best\n\n\*\*row 7\b", markdown)
    assert "Best and worst" not in write([run], tmp_path, answers=0)[1]


def test_a_folder_of_runs_and_a_sweep_without_an_evaluation(run, tmp_path):
    (run / "evaluation.json").unlink()
    shutil.rmtree(run / "generations")
    other = run.parent / "other"
    shutil.copytree(run, other)
    text, markdown, _ = write([run.parent], tmp_path)
    assert "(mine)" in text and "(other)" in text and "4 evaluated models, 20 sweep points, 2 run folders" in text
    found = [s for s in read_results([run]).systems if s.role == "tuned"]
    assert [s.setting() for s in found] == [(50, 5, 1.0)]  # the centre of the sweep


def test_a_sweep_is_what_its_list_says(run, tmp_path):
    options = [{"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 1.0, "early_stopping": "yes"}]
    points = [{"folder": f"point{i}", "options": {"top_k": 50, **o}} for i, o in enumerate(options)]
    put(
        run / "sweep" / "sweep.json",
        {"kind": "decoding", "points": [*points, {"folder": "gone", "options": {}, "error": "no"}]},
    )
    for i in range(3):
        put(
            run / "sweep" / f"point{i}" / "evaluation.json",
            evaluation({"top_k": 50, "num_beams": 5, "temperature": 1.0}),
        )
    results = read_results([run])
    assert any("3 of the 4 points of the sweep in" in n and "are done; gone failed (no)." in n for n in results.notes)
    assert [p.options["top_p"] for line in sweep_lines(results.points) for p in line.points["top_p"]] == [
        0.5,
        0.9,
        1.0,
    ] * 2
    assert "Against <code>top_p</code>" in write([run], tmp_path)[0]


def test_a_sweep_over_training_is_a_line_a_run(run, tmp_path):
    for name in ("lr1", "lr2"):
        shutil.copytree(run, run / "sweep" / name, ignore=shutil.ignore_patterns("sweep"))
    points = [{"folder": name, "options": {"learning_rate": 0.1}} for name in ("lr1", "lr2")]
    put(run / "sweep" / "sweep.json", {"kind": "training", "points": points})
    text, markdown, _ = write([run], tmp_path)
    assert all(f"tiny &lt;b&gt; ({name})" in text for name in ("mine", "lr1", "lr2"))
    assert "6 evaluated models, 3 run folders" in text and "sweep.py --run" in markdown


def test_a_setting_is_called_decoded_twice_only_where_the_same_prompts_were_answered_by_the_same_options(run):
    path = run / "sweep" / "point4" / "evaluation.json"
    stored = json.loads(path.read_text())
    said = lambda: bool(repeated_words(read_results([run])))
    assert said()
    for name, value, is_the_same in (("seed", 9, True), ("max_new_tokens", 7, False)):
        changed = json.loads(json.dumps(stored))
        changed["settings"]["decoding"][name] = value
        put(path, changed)
        assert said() == is_the_same, name
    for system in stored["systems"].values():
        del system["examples"][5:]
    put(path, stored)
    assert not said()


def test_intervals_of_other_draws_are_one_sentence_and_a_perplexity_of_0_is_on_no_card(run, tmp_path):
    other = evaluation({"top_k": 50}) | {"comparisons": {}}
    other["settings"]["resamples"] = 700
    tuned(other)["examples"][0]["scores"] |= {"perplexity": 0.0}
    tuned(other)["examples"][2]["scores"] |= {"perplexity": 3.5}
    put(run.parent / "other" / "evaluation.json", other)
    text = write([run.parent], tmp_path, answers=8)[0]
    assert "as evaluation.json gives them (300 draws, seed 4; 700 draws, seed 4)." in text
    assert "<span>Perplexity 3.50</span>" in text and "<span>Perplexity 0.00</span>" not in text


def test_two_files_that_were_compared_are_told_their_own_command_and_share_their_notes(run, tmp_path):
    stored = evaluation({})
    stored["settings"] |= {"model": None, "decoding": None}
    agree = {"difference": 0.0, "low": None, "high": None, "p_bootstrap": 1.0, "p_permutation": 1.0, "n": 8}
    stored["comparisons"] = {name: agree | {"note": "the two are alike"} for name in ("bleu", "chrf")}
    put(tmp_path / "files" / "evaluation.json", stored)
    markdown = write([tmp_path / "files"], tmp_path)[1]
    assert "`python scripts/evaluate.py --predictions FILE --references FILE --encoder DIR`" in markdown
    assert "--run DIR" in markdown and f"--run {tmp_path}" not in markdown
    assert "The two are alike: BLEU, chrF." in markdown
    spaced = run.rename(run.parent / "my run")
    assert f"evaluate.py --run '{spaced}' --encoder DIR" in write([spaced], tmp_path)[1]


def test_scores_that_were_not_computed_are_left_out(run, tmp_path):
    stored = evaluation({})
    stored["settings"]["decoding"] = None  # two files were compared
    stored["comparisons"]["bleu"].update(difference=None, p_bootstrap=None, p_permutation=None, note="nothing in both")
    tuned(stored)["metrics"]["perplexity"]["value"] = None
    put(run / "evaluation.json", stored)
    text, markdown, _ = write([run], tmp_path)
    assert "| BLEU ↑ | – | – | – | 8 |" in markdown.replace("\u00a0", " ") and "Nothing in both: BLEU." in text
    put(
        tmp_path / "in" / "m_topk50_nb5_t1_score.json",
        {"Perplexity": None, "BLEU": 0.25, "ROUGE-L": None, "BERTScore": None},
    )
    assert Page(write([tmp_path / "in"], tmp_path)[0]).values == [0.25]


def test_what_has_no_data_is_a_line_that_says_what_to_run(run, tmp_path):
    for path in (run / "evaluation.json", run / "metrics.jsonl"):
        path.unlink()
    shutil.rmtree(run / "sweep")
    text, markdown, _ = write([run], tmp_path)
    assert re.findall(r"^## (.*)", markdown, re.M) == ["Environment and sources", "Not in this report"]
    for command in ("evaluate.py --run", "sweep.py --run", "train.py --run"):
        assert command in markdown
    assert str(run) in markdown.split("## Not in this report")[1]
    assert not list((tmp_path / "out").glob("*.png"))


def test_the_script_takes_folders_before_and_after_its_options_and_exits_2_on_bad_input(run, tmp_path, script):
    out = tmp_path / "made" / "page.html"
    call = lambda *argv: script("report.py", *argv)
    shutil.rmtree(run / "sweep")
    done = call(run, "--out", out, "--resamples", 50, run.parent)
    assert done.returncode == 0 and out.exists() and str(out) in done.stdout, done.stderr
    wrong = call("--out", out, tmp_path / "absent")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "absent" in wrong.stderr
    assert call().returncode == 2
    assert "folders is empty" in call("").stderr


# What may be compared, and what is out of date


def train_again(folder, content=b"weights"):
    """An adapter in a run folder."""
    put(folder / "adapter" / "adapter_config.json", {"r": 8})
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(content)


def mark(path, changes, **settings):
    """Change the settings of an evaluation.json: its facts, or others."""
    stored = json.loads(path.read_text())
    stored["settings"] |= settings
    stored["settings"].setdefault("facts", {}).update(changes)
    put(path, stored)


def of_adapter(run):
    """Have everything in a run folder made from the adapter that is in it."""
    for path in [run / "evaluation.json", *run.glob("sweep/*/evaluation.json")]:
        mark(path, {"adapter (sha256)": adapter_fingerprint(run / "adapter")})


def test_what_was_made_from_another_adapter_is_left_out_with_the_command_that_makes_it_anew(run, tmp_path):
    train_again(run)
    of_adapter(run)
    text, _, lines = write([run], tmp_path)
    assert "another adapter" not in text and "7.25" in text
    train_again(run, b"other weights")
    text, markdown, lines = write([run], tmp_path)
    said = [line for line in lines if "was computed with another adapter than the run folder holds now" in line]
    assert len(said) == 2 and f"evaluate.py --run {run}" in said[0] and "--num-beams 5" in said[0]
    assert f"sweep.py --run {run}" in said[1] and all("--resume never" in line for line in said)
    assert "7.25" not in text and "Decoding options" not in markdown and "Training" in markdown
    assert lines[-1].startswith("next: open ") and f"evaluate.py --run {run}" in lines[-1]
    path = run / "sweep" / "point3" / "evaluation.json"  # one point was made anew
    mark(path, {"adapter (sha256)": adapter_fingerprint(run / "adapter")})
    found = read_results([run])
    assert any("4 of the 5 points of the sweep in" in note for note in found.notes)
    assert [p.source for p in found.points] == [path, path]


def test_where_nothing_says_which_adapter_it_was_that_is_said_and_shown(run):
    assert not read_results([run]).notes[1:], "no adapter, no fingerprint: a folder of results"
    train_again(run)
    assert any("does not name its adapter" in note for note in read_results([run]).notes)
    of_adapter(run)
    shutil.rmtree(run / "adapter")
    (run / "best").mkdir()
    found = read_results([run])
    assert (
        any("has no adapter, so it is not known whether the scores" in note for note in found.notes)
        and len(found.systems) == 2
    )


def test_a_folder_that_is_named_twice_is_read_once(run, tmp_path):
    once = read_results([run])
    for folders in ([run, run.parent], [run.parent, run], [run, run / ".." / run.name], [run.parent, run.parent]):
        found = read_results(folders)
        assert (len(found.systems), len(found.points), len(found.runs)) == (2, len(once.points), 1), folders


def test_an_edited_evaluation_is_said(run):
    stored = json.loads((run / "evaluation.json").read_text())
    whole = stored | {"check": fingerprint(stored)}
    put(run / "evaluation.json", whole)
    assert not any("was changed" in note for note in read_results([run]).notes)
    whole["systems"]["tuned"]["metrics"]["perplexity"]["value"] = 1.5
    put(run / "evaluation.json", whole)
    assert any("evaluation.json was changed after minitune wrote it" in note for note in read_results([run]).notes)


def other_run(run, count=8, **settings):
    """A run beside `run`, evaluated on `count` prompts."""
    stored = evaluation({"top_k": 50, "num_beams": 5, "temperature": 1.0, "seed": 0}, count)
    stored["settings"] |= settings
    put(run.parent / "other" / "evaluation.json", stored)
    return run.parent


def tables_of_scores(folder):
    section = scores_section(read_results([folder]), ReportConfig((str(folder),), resamples=50), [])
    return [block for block in section.blocks if isinstance(block, page.Table) and block.picture]


def test_models_that_answered_other_prompts_have_tables_of_their_own(run, tmp_path):
    assert len(tables_of_scores(other_run(run))) == 1
    markdown = write([other_run(run, 5)], tmp_path)[1]
    tables = re.findall(r"^Scores of the answers to (.*?) \\\(|^Scores of the answers to (.*?) \(", markdown, re.M)
    assert len(tables) == 2 and "8 prompts" in tables[0][1] and "5 prompts" in tables[1][1]
    assert "do not compare scores across tables" in markdown
    assert (tmp_path / "out" / "r_table_2.png").exists()
    stored = json.loads((run.parent / "other" / "evaluation.json").read_text())
    for system in stored["systems"].values():
        system["examples"] = examples(8)
        system["examples"][7]["reference"] = "another one"
    put(run.parent / "other" / "evaluation.json", stored)  # as many prompts, one with another answer
    assert "of rows.json, set 2" in tables_of_scores(run.parent)[1].caption


@pytest.mark.parametrize(
    "change, word",
    [
        ({"judge": "gpt2"}, "judge gpt2"),
        ({"bleu_tokenize": "char"}, "bleu_tokenize char"),
        ({"template": "llama2"}, "template llama2"),
        ({"facts": {"compute dtype": "float16"}}, "compute dtype float16"),
        ({"facts": {"quantize": "nf4"}}, "quantize nf4"),
        (
            {"decoding": {"top_k": 50, "num_beams": 5, "temperature": 1.0, "repetition_penalty": 1.5}},
            "repetition_penalty 1.5",
        ),
        ({"decoding": {"top_k": 50, "num_beams": 5, "temperature": 1.0, "max_new_tokens": 7}}, "max_new_tokens 7"),
    ],
)
def test_a_row_says_what_sets_it_apart(change, word, run):
    [table] = tables_of_scores(other_run(run, **change))
    cells = [row[0] for row in table.rows]
    assert any(word in line for line in cells[1].below) and len(cells) == 2, cells
    assert "give settings of decoding and scoring" in table.note


def test_points_of_other_prompts_are_no_line_of_one_sweep(run, tmp_path):
    put(run / "sweep" / "point3" / "evaluation.json", evaluation({"top_k": 50, "num_beams": 5, "temperature": 0.0}, 5))
    shutil.copytree(run, run.parent / "other")
    for path in (run.parent / "other").glob("sweep/*/evaluation.json"):
        moved = json.loads(path.read_text())["settings"]["decoding"]
        put(path, evaluation(moved, 5))
    lines = sweep_lines(read_results([run]).points)
    assert all(len(p.examples) == 8 for line in lines for p in line.all_points)
    markdown = write([run.parent], tmp_path)[1]
    assert "Not all lines have the same prompts" in markdown and "(other), 5 prompts of rows.json" in markdown


def test_a_table_says_which_options_of_training_differ(run, tmp_path):
    put(run / "config.json", {"model": "tiny", "lora_rank": 16, "learning_rate": 1e-3, "run": "a"})
    put(other_run(run) / "other" / "config.json", {"model": "tiny", "lora_rank": 4, "learning_rate": 1e-3, "run": "b"})
    markdown = write([run.parent], tmp_path)[1]
    assert "| Run | lora\\_rank |" in markdown and "| mine | 16 |" in markdown and "| other | 4 |" in markdown
    put(run.parent / "other" / "config.json", {"model": "tiny", "lora_rank": 16, "learning_rate": 1e-3})
    shutil.copy(run / "environment.json", run.parent / "other")
    assert "The 2 runs were trained with the same options" in write([run.parent], tmp_path)[1]


@pytest.mark.parametrize("name", ["r.html", "r.md", "r_table.png"])
def test_no_device_is_written_over(name, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to("/dev/null")
    with pytest.raises(ValueError, match="is a device"):
        write([run], tmp_path)
    assert not any(path.is_file() for path in (tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="ends with .html"):
        ReportConfig((str(run),), "/dev/null")


def test_long_names_and_large_numbers_are_shown_short(run, tmp_path):
    stored = evaluation({"top_k": 50})
    tuned(stored)["name"] = "n" * 100_000
    tuned(stored)["metrics"]["bleu"] |= {"value": 1e99, "low": None, "high": None}
    stored["settings"]["data"] = "d" * 100_000
    put(run / "evaluation.json", stored)
    text, markdown, lines = write([run], tmp_path)
    assert "n" * 61 not in text and "1e+99" in text and len(markdown) < 100_000
    assert all(len(line) < 500 for line in lines)


def test_a_report_of_one_run_lies_in_it_and_one_of_several_in_the_working_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_out([str(run)]) == run / "report.html"
    assert default_out([str(run), str(run)]) == default_out([str(run.parent)]) == Path("report.html")
