"""scripts/report.py: the study's numbers to the last digit, run folders, one page that opens offline, bad input in one line."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minitune.files import fingerprint
from minitune.jobs.report import ReportConfig, default_out, report
from minitune.metrics.correlation import correlate
from minitune.metrics.significance import bootstrap_interval, paired_bootstrap
from minitune.reports import figures, page
from minitune.reports.results import read_results, sweep_lines
from minitune.reports.runs import repeated_words
from minitune.reports.scores import scores_section
from minitune.runs.folder import adapter_fingerprint
from minitune.study.files import GRADES
from minitune.study.names import parse_name

ROOT = Path(__file__).resolve().parents[1]
PNG = b"\x89PNG\r\n\x1a\n"
NASTY = '<script>alert(1)</script><img src="https://example.org/x.png" onerror=alert(2)> & | ` \u202e \x07 \ud800 ```'
VOID = {"meta", "br", "wbr", "img", "input", "hr", "link"}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps the ids, the values of <data> and every attribute that names a resource."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.values, self.targets, self.tags, self.words = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.note(tag, dict(attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.note(tag, dict(attributes))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)

    def note(self, tag, attributes):
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.values += [float(attributes["value"])] if tag == "data" else []
        self.targets += [
            v for k, v in attributes.items() if k in ("src", "href", "xlink:href", "data", "action", "srcset")
        ]


def check_page(text):
    """A Page that is whole, opens offline and names no id twice."""
    found = Page(text)
    assert text.startswith("<!doctype html>") and all(target.startswith("#") for target in found.targets)
    assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in found.tags}
    style = " ".join(re.findall(r"<style>(.*?)</style>", text, re.S)) + " ".join(
        a.get("style") or "" for _, a in found.tags
    )
    assert "@import" not in style and not re.search(r"url\((?!#)", style)
    assert len(found.ids) == len(set(found.ids)) and {t[1:] for t in found.targets} <= set(found.ids)
    charts = [a for tag, a in found.tags if tag == "svg" and a.get("class") != "key"]
    assert all(a["role"] == "img" and a["aria-label"] for a in charts)
    return found


@pytest.fixture(autouse=True)
def without_drawing(monkeypatch):
    """PNG files are only begun, but in the report of the study, which is made once: a report draws for a second."""
    monkeypatch.setattr(figures, "png", lambda figure: PNG)


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def examples(count, shift=0.0):
    return [
        {
            "prompt": f"question {i}",
            "reference": f"answer {i}",
            "answer": NASTY if i == 4 else f"answer {i + (i % 3 == 0)}" * (1 + i),
            "tokens": 4,
            "ended_by": "eos",
            "scores": {"bleu": (i % 4) / 5 + shift, "rouge_l": (7 * i % count) / count, "exact_match": None},
        }
        for i in range(count)
    ]


def evaluation(decoding, count=8, shift=0.2):
    found = bootstrap_interval([e["scores"]["bleu"] for e in examples(count, shift)])
    bleu = {"value": found.value, "low": found.low, "high": found.high, "n": count, "note": None}
    alone = {"value": 0.5, "low": None, "high": None, "n": count, "note": "all 8 examples agree"}
    tuned = {
        "bleu": bleu,
        "perplexity": {"value": 7.25, "low": 6.5, "high": 8.125, "n": count, "note": None},
        "ended": alone,
    }
    return {
        "format": 1,
        "date": "2026-11-24",
        "environment": {"python": "3.11", "packages": {"torch": "2.13"}},
        "settings": {"model": "tiny-mistral", "adapter": "adapter", "data": "rows.json", "metrics": ["bleu"],
                     "decoding": decoding, "resamples": 300, "seed": 4, "judge": None, "encoder": None},
        "systems": {
            "tuned": {"name": "tiny <b>", "metrics": tuned, "examples": examples(count, shift)},
            "base": {"name": "tiny <b>", "metrics": {"bleu": {**bleu, "value": 0.125}}, "examples": examples(count)},
        },
        "comparisons": {"bleu": {"difference": 0.2, "low": 0.1, "high": 0.3, "p_bootstrap": 0.0005, "p_permutation": 0.0123,
                                 "n": count, "note": None}},
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run folder as training, evaluation, a sweep and human grading leave it."""
    folder = tmp_path / "runs" / "mine"
    options = {"top_k": 50, "num_beams": 5, "temperature": 1.0, "seed": 0}
    put(folder / "evaluation.json", evaluation(options))
    moved = [{"top_k": 30}, {"top_k": 80}, {"num_beams": 2}, {"temperature": 0.0}, {}]
    for i, change in enumerate(moved):
        put(folder / "sweep" / f"point{i}" / "evaluation.json", evaluation({**options, **change}, shift=0.1 * i))
    put(folder / "sweep" / "sweep.json", {"points": [{"folder": f"point{i}", "options": {}} for i in range(6)]})
    put(folder / "environment.json", {"device": "a CPU", "packages": {"torch": "2.13", "cuda": None}})
    lines = [{"step": i, "loss": 3.0 / i, "lr": 1e-3} for i in range(1, 9)] + [
        {"step": 8, "eval_loss": 0.75, "loss": None}
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    put(folder / "generations" / "tiny_topk50_nb5_t1.json", [e["answer"] for e in examples(8, 0.2)])
    grades = [{"index": i + 1, **dict.fromkeys(GRADES, (i % 4) / 4), "comment": "fine"} for i in range(8)]
    put(folder / "generations" / "tiny_topk50_nb5_t1_HE.json", grades)
    return folder


def write(folders, tmp_path, **changes):
    lines, out = [], tmp_path / "out" / "r.html"
    config = ReportConfig(tuple(map(str, folders)), str(out), **{"resamples": 300, **changes})
    assert report(config, lines.append) == out
    return out.read_text(encoding="utf-8"), out.with_suffix(".md").read_text(encoding="utf-8"), lines


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
    assert "is 0.8950617283950617, published is 0.8950617283950618" in text
    assert "phi-2_topk50_nb5.json" in text and any(
        "not understood" in line and "phi-2_topk50_nb5.json" in line for line in lines
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


def test_a_run_folder_gives_every_section(run, tmp_path):
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
    assert (best, worst) == ("3", "4") and "Ordered by the human grade. 2 of 8 answers share the best value" in text
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
    put(tmp_path / "in" / SCORED, {"Perplexity": None, "BLEU": 0.25, "ROUGE-L": None, "BERTScore": None})
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


EVALUATION, LOSSES, GRADED = "evaluation.json", "metrics.jsonl", "generations/tiny_topk50_nb5_t1_HE.json"
tuned = lambda stored: stored["systems"]["tuned"]
base = lambda stored: stored["systems"]["base"]
BAD_RUNS = {  # the file, its new text or how its value is spoiled, words of the error
    "an empty file": (EVALUATION, "", "evaluation.json", "line 1"),
    "not JSON": (EVALUATION, '{"systems": ', "evaluation.json", "not valid JSON"),
    "a list": (EVALUATION, "[]", "evaluation.json", "expected an object"),
    "no systems": (EVALUATION, lambda e: e.pop("systems"), "evaluation.json", "systems"),
    "no system": (EVALUATION, lambda e: e["systems"].clear(), "evaluation.json", "systems is empty"),
    "no answer": (
        EVALUATION,
        lambda e: base(e)["examples"][3].pop("answer"),
        "systems.'base'.examples[3].answer is missing",
    ),
    "NaN in a metric": (
        EVALUATION,
        lambda e: tuned(e)["metrics"]["bleu"].update(low=math.nan),
        "systems.'tuned'.metrics.'bleu'.low",
        "nan",
    ),
    "NaN in a row": (
        EVALUATION,
        lambda e: tuned(e)["examples"][2]["scores"].update(bleu=math.nan),
        "systems.'tuned'.examples[2].scores.'bleu'",
        "nan",
    ),
    "text for a score": (
        EVALUATION,
        lambda e: tuned(e)["examples"][2]["scores"].update(bleu="high"),
        "examples[2].scores.'bleu'",
        "'high'",
    ),
    "other prompts": (EVALUATION, lambda e: base(e)["examples"][1].update(prompt="another"), "different prompts"),
    "other lengths": (EVALUATION, lambda e: base(e)["examples"].pop(), "tuned 8, base 7", "evaluation.json"),
    "a comparison": (
        EVALUATION,
        lambda e: e["comparisons"]["bleu"].pop("p_bootstrap"),
        "comparisons.'bleu'.p_bootstrap is missing",
    ),
    "another format": (EVALUATION, lambda e: e.update(format=2), "evaluation.json", "format 2"),
    "a point": ("sweep/point1/evaluation.json", "{}", "point1", "settings"),
    "no step": (LOSSES, '{"step": 1}\n{"loss": 2}\n', "metrics.jsonl, line 2", "step"),
    "infinite loss": (LOSSES, '{"step": 1, "loss": Infinity, "lr": 1}\n', "line 1", "loss", "inf"),
    "no losses": (LOSSES, "", "metrics.jsonl", "empty"),
    "fewer grades": (GRADED, lambda grades: grades.pop(), "7 grades", "8 answers"),
    "a grade missing": (GRADED, lambda grades: grades[5].pop("coherence"), "[5].coherence is missing"),
    "a grade twice": (GRADED, lambda grades: grades[5].update(index=5), "[5].index", "expected 6"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_broken_run_is_one_line_with_file_and_row(case, run, tmp_path):
    name, spoil, *words = BAD_RUNS[case]
    if callable(spoil):
        stored = json.loads((run / name).read_text())
        spoil(stored)
        put(run / name, stored)
    else:
        (run / name).write_text(spoil)
    with pytest.raises(ValueError) as error:
        write([run], tmp_path)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "out").exists()


def test_a_broken_run_is_left_out_where_it_was_not_named(run, tmp_path):
    (tmp_path / "several").mkdir()
    for name in ("bad", "good"):
        shutil.copytree(run, tmp_path / "several" / name)
    (tmp_path / "several" / "bad" / "metrics.jsonl").write_text("[]\n")
    found = read_results([tmp_path / "several"])
    assert [one.folder.name for one in found.runs] == ["good"] and {s.group.name for s in found.systems} == {"good"}
    [note] = [note for note in found.notes if "bad" in note]
    assert "metrics.jsonl, line 1" in note and f"{tmp_path}/several/bad is left out" in note
    (tmp_path / "several" / "good" / "metrics.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match=r"bad/metrics.jsonl, line 1.* is left out"):
        read_results([tmp_path / "several"])


SCORED = "m_topk50_nb5_t1_score.json"
BAD_STUDIES = {
    "a missing score": ({SCORED: {"BLEU": 0.1}}, "m_topk50_nb5_t1_score.json", "Perplexity is missing"),
    "NaN": ({SCORED: {"Perplexity": math.nan, "BLEU": 0.1, "ROUGE-L": 0, "BERTScore": 0}}, "Perplexity is nan"),
    "an answer that is a number": ({"m_topk50_nb5_t1.json": ["a", 3]}, "m_topk50_nb5_t1.json", "[1] is 3"),
    "no answers": ({"m_topk50_nb5_t1.json": []}, "m_topk50_nb5_t1.json", "one entry at least"),
    "other prompts": ({"m_topk50_nb5_t1.json": ["a", "b"], "instructions3.json": ["a", "b", "c"]}, "2 answers", "3 prompts"),
    "nothing": ({}, "has no results", "evaluation.json"),
    "nothing understood": ({"other.json": {}}, "has no results", "_score.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STUDIES)
def test_a_broken_study_is_one_line_with_file_and_row(case, tmp_path):
    files, *words = BAD_STUDIES[case]
    (tmp_path / "in").mkdir()
    for name, value in files.items():
        (tmp_path / "in" / name).write_text(json.dumps(value))
    with pytest.raises(ValueError) as error:
        write([tmp_path / "in"], tmp_path)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


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
    said = [line for line in lines if "is of another adapter than the one that the run folder holds now" in line]
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
    assert any("does not say which adapter" in note for note in read_results([run]).notes)
    of_adapter(run)
    shutil.rmtree(run / "adapter")
    (run / "best").mkdir()
    found = read_results([run])
    assert any("has no adapter that the scores" in note for note in found.notes) and len(found.systems) == 2


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
    assert any("evaluation.json was changed after it was written" in note for note in read_results([run]).notes)


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
    assert "do not compare a score of one with a score of another" in markdown
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
    assert "say how it was answered or scored" in table.note


def test_points_of_other_prompts_are_no_line_of_one_sweep(run, tmp_path):
    put(run / "sweep" / "point3" / "evaluation.json", evaluation({"top_k": 50, "num_beams": 5, "temperature": 0.0}, 5))
    shutil.copytree(run, run.parent / "other")
    for path in (run.parent / "other").glob("sweep/*/evaluation.json"):
        moved = json.loads(path.read_text())["settings"]["decoding"]
        put(path, evaluation(moved, 5))
    lines = sweep_lines(read_results([run]).points)
    assert all(len(p.examples) == 8 for line in lines for p in line.all_points)
    markdown = write([run.parent], tmp_path)[1]
    assert "Not all lines answer the same prompts" in markdown and "(other), 5 prompts of rows.json" in markdown


def test_a_table_says_which_options_of_training_differ(run, tmp_path):
    put(run / "config.json", {"model": "tiny", "lora_rank": 16, "learning_rate": 1e-3, "run": "a"})
    put(other_run(run) / "other" / "config.json", {"model": "tiny", "lora_rank": 4, "learning_rate": 1e-3, "run": "b"})
    markdown = write([run.parent], tmp_path)[1]
    assert "| Run | lora\\_rank |" in markdown and "| mine | 16 |" in markdown and "| other | 4 |" in markdown
    put(run.parent / "other" / "config.json", {"model": "tiny", "lora_rank": 16, "learning_rate": 1e-3})
    shutil.copy(run / "environment.json", run.parent / "other")
    assert "The 2 runs were trained with the same options" in write([run.parent], tmp_path)[1]


# Files and paths that are not what they should be

DEEP = "[" * 150 + "]" * 150
ODD_FILES = {  # the file, its text
    "config.json": "[]",
    "environment.json": "5",
    "sweep/sweep.json": '{"points": [{"folder": "../..", "options": {}}]}',
    "sweep/sweep.json ": '{"points": [{"folder": "point1", "options": {"a\\n": 1}}]}',
    "sweep/sweep.json  ": '{"points": 5, "other": 5}',
    "evaluation.json": '{"settings": {"decoding": null}, "systems": {"t": {"name": "x"}}, "comparisons": {}}',
    "evaluation.json ": f'{{"settings": {DEEP}}}',
    "metrics.jsonl": '{"step": 2, "loss": 1, "lr": 1}\n{"step": 1, "loss": 1, "lr": 1}\n',
    "metrics.jsonl ": '{"step": 1, "loss": 1}\n{"step": 2}\n',
    "metrics.jsonl  ": '{"step": 1, "loss": 1e200, "lr": 1}\n{"step": 2}\n',
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_file_of_another_shape_is_one_line_that_names_it(name, run, tmp_path):
    (run / name.strip()).write_text(ODD_FILES[name])
    with pytest.raises(ValueError) as error:
        write([run], tmp_path)
    assert "\n" not in str(error.value) and name.strip() in str(error.value) and len(str(error.value)) < 500


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


CONTROLS = "\x1b[31mred\x1b[0m \x00 \x08 `code\x1b|\x00\n\x7f` \x9b \u202e \ud800 \x1c ` odd"
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def spoiled(value):
    """value with CONTROLS behind every text in it."""
    if isinstance(value, dict):
        return {key: spoiled(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return list(map(spoiled, value))
    return value + CONTROLS if isinstance(value, str) else value


def test_no_control_character_of_any_text_reaches_the_page_the_markdown_or_the_terminal(run, tmp_path):
    for path in [run / "evaluation.json", run / "environment.json", *run.glob("sweep/*/evaluation.json")]:
        put(path, spoiled(json.loads(path.read_text())))
    answers = run / "generations" / "tiny_topk50_nb5_t1.json"
    put(answers, spoiled(json.loads(answers.read_text())))
    points = json.loads((run / "sweep" / "sweep.json").read_text())["points"]
    put(run / "sweep" / "sweep.json", {"points": [*points, {"folder": "x\x1b", "options": {}, "error": CONTROLS}]})
    other = tmp_path / "ot\x1bher"
    put(other / SCORED, {"Perplexity": None, "BLEU": 0.25, "ROUGE-L": None, "BERTScore": None})
    put(other / "no\x1b.json", {})
    text, markdown, lines = write([run, other], tmp_path)
    check_page(text)
    for written in (text, markdown, *lines):
        assert not UNSEEN.search(written)
    assert r"\x1b[31mred\x1b[0m \x00 \x08" in text and r"\x1b\[31mred" in markdown.replace("\\\\", "\\")
    for rows in re.findall(r"(?:^\|.*\n)+", markdown, re.M):  # a bar within a cell would make one more
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()}) == 1, rows


def test_visible_keeps_what_can_be_written():
    assert page.visible("a\r\n\tb\x00\ud800\u2066é漢😀") == "a\n\tb\\x00\\ud800\\u2066é漢😀"
    page.escape(NASTY).encode()


def test_a_report_of_one_run_lies_in_it_and_one_of_several_in_the_working_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_out([str(run)]) == run / "report.html"
    assert default_out([str(run), str(run)]) == default_out([str(run.parent)]) == Path("report.html")
