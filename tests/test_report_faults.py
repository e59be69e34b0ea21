"""scripts/report.py on broken files, and on text that would change a page or control a terminal."""

import json
import math
import re
import shutil

import pytest
from small_reports import NASTY, check_page, put, tuned, write

from minitune.reports import page
from minitune.reports.results import read_results

pytestmark = pytest.mark.usefixtures("without_drawing")


@pytest.fixture
def run(scored_run):
    return scored_run


EVALUATION, LOSSES, GRADED = "evaluation.json", "metrics.jsonl", "generations/tiny_topk50_nb5_t1_HE.json"
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
    "no answers": ({"m_topk50_nb5_t1.json": []}, "m_topk50_nb5_t1.json", "at least one entry"),
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
