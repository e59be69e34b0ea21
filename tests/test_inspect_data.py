"""The page that shows how training sees its rows."""

import html
import json
from html.parser import HTMLParser

import pytest

from minitune import data
from minitune.jobs.inspect_data import InspectConfig, inspect_data, token_kinds


class Spans(HTMLParser):
    """(class, title, text) of every token of the page, and its tags."""

    def __init__(self, text):
        super().__init__()
        self.spans, self.tags, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        if tag == "span" and "title" in found:
            self.inside = True
            self.spans.append([found["class"], found["title"], ""])

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "span"

    def handle_data(self, text):
        if self.inside:
            self.spans[-1][2] += text


@pytest.fixture
def page(tmp_path, tokenizer):
    rows = [
        {"instruction": "x" * i + '<script>alert(1)</script> & "x" ${y} <|eos|>', "output": "a b\n\tc\r\u0007"}
        for i in range(7)
    ]
    config = InspectConfig(
        model=str(tokenizer.folder),
        data=str(tmp_path / "a.json"),
        test_size=1,
        rows=3,
        batch_size=2,
        out=str(tmp_path / "page.html"),
    )
    (tmp_path / "a.json").write_text(json.dumps(rows))
    said = []
    return config, inspect_data(config, say=said.append).read_text(), said


def test_the_page_colours_every_token_of_the_micro_batches_that_training_sees(page, tokenizer):
    config, text, said = page
    train, _ = data.load(config.data, tokenizer, test_size=1)
    seen = list(data.batches(train.examples, 2, config.seed, 0, pad_id=tokenizer.pad_id))[:2]  # 3 rows, rounded up
    spans = Spans(text).spans
    assert [kind for kind, _, _ in spans] == [kind for batch in seen for kind in token_kinds(batch)]
    ids = [i for batch in seen for i in batch.input_ids[0].tolist()]
    assert all(f"  id {i}  position " in title for i, (_, title, _) in zip(ids, spans, strict=True))
    counts = {kind: sum(s[0] == kind for s in spans) for kind in "psx"}
    assert counts["s"] == sum(b.supervised for b in seen) == 4 * (len("a b\n\tc\r\a") + 1) and counts["x"] > 0
    assert all(f"{count:,} tokens, " in text for count in counts.values())
    assert train.describe() in said and html.escape(train.describe()) in text


def test_the_page_escapes_rows_shows_white_space_and_loads_nothing(page):
    _, text, _ = page
    parsed = Spans(text)
    assert parsed.tags.count("script") == 1 and "alert(1)" not in text  # one token a character
    answer = "".join(t for kind, _, t in parsed.spans if kind == "s")
    assert answer == "a·b↵\n⇥\tc\\rU+0007<|eos|>" * 4
    prompt = "".join(t for kind, _, t in parsed.spans if kind == "p")
    assert prompt.count('<script>alert(1)</script>·&·"x"·${y}·<|eos|>') == 4
    assert not {"link", "img", "iframe"} & set(parsed.tags)
    assert "http" not in text and "src=" not in text and "@import" not in text


def test_inspect_data_is_a_command_with_one_clear_line_on_bad_input(tmp_path, tokenizer, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = script("inspect_data.py", "--model", tokenizer.folder, "--data", tmp_path / "no.json")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no.json does not exist" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_page_takes_rows_and_batches_from_the_recipe_of_a_short_name():
    assert InspectConfig.recipe({"model": "mistral"})["group_by_length"] is True
    assert "lora_rank" not in InspectConfig.recipe({"model": "mistral"})
    for bad in ({"rows": 0}, {"batch_size": 0}, {"epoch": -1}):
        with pytest.raises(ValueError, match="expected"):
            InspectConfig(**bad)


def test_the_page_of_held_out_rows_needs_some(tmp_path, tokenizer):
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "a", "completion": "b"}]')
    with pytest.raises(ValueError, match="no test rows to show"):
        inspect_data(InspectConfig(model=str(tokenizer.folder), data=str(path), test_size=0, part="test"))
