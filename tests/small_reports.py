"""A run folder with everything that a report reads, and the page of a report: what tests of the report share."""

import json
import re
from html.parser import HTMLParser

import pytest

from minitune.jobs.report import ReportConfig, report
from minitune.metrics.significance import bootstrap_interval
from minitune.reports import figures
from minitune.study.files import GRADES

INLINE_SVG = figures.inline_svg
PNG = b"\x89PNG\r\n\x1a\n"
NASTY = '<script>alert(1)</script><img src="https://example.org/x.png" onerror=alert(2)> & | ` \u202e \x07 \ud800 ```'


tuned = lambda stored: stored["systems"]["tuned"]
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
    """The text as a Page. Asserts that it is well-formed, loads nothing, and has no id twice."""
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


@pytest.fixture
def without_drawing(monkeypatch):
    """Draw nothing, which takes two seconds for a report: a PNG file is its first bytes, and a chart on the page is empty."""
    monkeypatch.setattr(figures, "png", lambda figure: PNG)
    monkeypatch.setattr(figures, "inline_svg", lambda figure, prefix, alt: f'<svg role="img" aria-label="{alt}"></svg>')


@pytest.fixture
def drawn_charts(without_drawing, monkeypatch):
    """Draw the charts on the page all the same."""
    monkeypatch.setattr(figures, "inline_svg", INLINE_SVG)


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
def scored_run(tmp_path):
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
