"""scripts/evaluate.py on files of answers and references."""

import json

import numpy as np
import pytest

from minitune import hub
from minitune.checkpoint import load_model
from minitune.files import read_json, write_json
from minitune.jobs.evaluate import EvaluateConfig, evaluate
from minitune.metrics.bleu import sentence_bleu
from minitune.metrics.perplexity import judge_perplexity
from minitune.tokenizer import load_tokenizer

QUIET = lambda line: None


def test_an_empty_answer_counts_as_0_in_the_perplexity_of_the_study_and_is_said(tmp_path):
    write_json(tmp_path / "a.json", ["", "a red hat"])
    write_json(tmp_path / "r.json", ["a hat", "a red hat"])
    files = {"predictions": str(tmp_path / "a.json"), "references": str(tmp_path / "r.json")}
    metrics = evaluate(EvaluateConfig(**files, judge="tiny-llama"), QUIET)["systems"]["predictions"]["metrics"]
    one = judge_perplexity(load_model("tiny-llama"), load_tokenizer(hub.resolve("tiny-llama")), ["a red hat"])
    assert metrics["perplexity"]["value"] == pytest.approx(one["mean_perplexity"] / 2)
    assert "count as 0" in metrics["perplexity"]["note"]
    assert metrics["perplexity_tokens"]["n"] == 1 and "left out" in metrics["perplexity_tokens"]["note"]


# --- files that are read ---

REFERENCES = ["a red hat", "", "naïve 猫 answer", "two words"]
ANSWERS = ["a red cat", "x", "naïve 猫 answer", ""]
KINDS = {
    "a.txt": "a red cat\nx\nnaïve 猫 answer\n\n",
    "a.json": json.dumps(ANSWERS),
    "rows.json": json.dumps([{"instruction": "q", "input": "i", "output": text} for text in ANSWERS]),
    "a.jsonl": "".join(json.dumps(text) + "\n" for text in ANSWERS),
    "g.jsonl": '{"settings": {}}\n'
    + "".join(json.dumps({"row": i, "answer": text, "ended_by": "eos"}) + "\n" for i, text in enumerate(ANSWERS)),
    "both.jsonl": "".join(json.dumps({"output": "no", "answer": text}) + "\n" for text in ANSWERS),
    "a.csv": 'output,other\na red cat,1\nx,2\nnaïve 猫 answer,3\n"",4\n',
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_scores_as_its_texts(name, tmp_path):
    (tmp_path / name).write_text(KINDS[name])
    write_json(tmp_path / "r.json", REFERENCES)
    files = {"predictions": str(tmp_path / name), "references": str(tmp_path / "r.json")}
    result = evaluate(EvaluateConfig(**files, resamples=20, out=str(tmp_path / "out.json")), QUIET)
    system = result["systems"]["predictions"]
    assert [e["answer"] for e in system["examples"]] == ANSWERS and result["comparisons"] == {}
    bleu = np.mean([sentence_bleu(r, a) for r, a in zip(REFERENCES, ANSWERS, strict=True)])
    assert system["metrics"]["bleu"]["value"] == pytest.approx(bleu, abs=1e-12)
    assert ("ended" in system["metrics"]) == (name == "g.jsonl") and "reference_perplexity" not in system["metrics"]
    assert read_json(tmp_path / "out.json") == result


def test_two_files_are_compared_example_by_example(data_dir):
    study = data_dir / "seed_results/data/section_2"
    files = [study / f"{model}-finetuned_topk50_nb5_t1.json" for model in ("phi-2", "Mistral-7B", "Llama-2-7b-hf")]
    options = dict(zip(("predictions", "other", "references"), map(str, files), strict=True))
    result = evaluate(EvaluateConfig(**options, metrics="rouge_l", resamples=100), QUIET)
    assert list(result["systems"]) == ["predictions", "other"]
    values = [result["systems"][key]["metrics"]["rouge_l"]["value"] for key in ("predictions", "other")]
    assert result["comparisons"]["rouge_l"]["difference"] == pytest.approx(values[0] - values[1])
    same = evaluate(EvaluateConfig(**options | {"other": options["predictions"]}, metrics="bleu", resamples=50), QUIET)
    assert same["comparisons"]["bleu"]["p_permutation"] == 1 and same["comparisons"]["bleu"]["difference"] == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", '["a", "b"]', "p.json has 2 answers and .*r.json has 4 references, expected as many"),
        ("p.json", '["a", "b", NaN, "d"]', "p.json, row 2 is a float, expected a text or an object: NaN"),
        ("p.json", '["a", "b", null, "d"]', "p.json, row 2 is a NoneType"),
        ("p.json", '[{"answer": "a"}, {"question": "b"}]', "p.json, row 1 has none of answer, output, .*question"),
        ("p.json", '[{"answer": "a"}, {"answer": NaN}]', "p.json, row 1: answer is nan, expected text"),
        ("p.json", '[{"answer": null}]', "p.json, row 0: answer is None, expected text"),
        ("p.json", "[]", "p.json has no rows"),
        ("p.json", "", "p.json is empty"),
        ("p.txt", "", "p.txt is empty"),
        ("p.txt", "\n\n", "p.txt has 2 answers and .*r.json has 4 references, expected as many .a blank line"),
        ("p.json", "{not json", "p.json is not valid JSON: line 1"),
        ("p.json", '{"a": 1}', "p.json holds a dict, expected a list"),
        ("p.jsonl", '"a"\n{"answer": \n', "p.jsonl, line 2 is not valid JSON: column"),
        ("p.jsonl", '{"settings": {}}\n', "p.jsonl has no answers"),
        ("p.png", "x", "p.png is a .png file"),
        ("p.json", None, "p.json does not exist"),
    ],
)
def test_a_wrong_file_is_one_line_with_the_file_and_the_row(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    write_json(tmp_path / "r.json", REFERENCES)
    with pytest.raises(ValueError, match=message) as error:
        evaluate(EvaluateConfig(predictions=str(tmp_path / name), references=str(tmp_path / "r.json")), QUIET)
    assert "\n" not in str(error.value)


def test_metrics_that_files_cannot_give_are_refused_by_name(tmp_path):
    write_json(tmp_path / "r.json", REFERENCES)
    write_json(tmp_path / "p.json", ANSWERS)
    for name, why in (("ended", "how each answer ended"), ("reference_perplexity", "--run only")):
        with pytest.raises(ValueError, match=f"{name} needs .*{why}"):
            files = {"predictions": str(tmp_path / "p.json"), "references": str(tmp_path / "r.json")}
            evaluate(EvaluateConfig(**files, metrics=name), QUIET)


BAD_FACTS = {"tokens": ('"tokens": NaN', "tokens is nan"), "ended_by": ('"ended_by": 5', "ended_by is 5")}


@pytest.mark.parametrize("name", BAD_FACTS)
def test_a_fact_of_another_kind_is_said_with_its_row(name, tmp_path):
    fact, message = BAD_FACTS[name]
    (tmp_path / "a.json").write_text('[{"answer": "x"}, {"answer": "y", ' + fact + "}]")
    (tmp_path / "r.json").write_text('["x", "y"]')
    config = EvaluateConfig(predictions=str(tmp_path / "a.json"), references=str(tmp_path / "r.json"))
    with pytest.raises(ValueError, match=f"a.json, row 1: {message}"):
        evaluate(config, lambda line: None)


def test_half_a_character_and_a_place_that_cannot_be_written_are_said_before_any_scoring(tmp_path):
    (tmp_path / "a.json").write_text('["x", "y \\ud800"]')
    (tmp_path / "r.json").write_text('["x", "y"]')
    files = {"predictions": str(tmp_path / "a.json"), "references": str(tmp_path / "r.json")}
    with pytest.raises(ValueError, match="a.json, row 1: answer has half a character"):
        evaluate(EvaluateConfig(**files), lambda line: None)
    with pytest.raises(ValueError, match="is a folder, expected a file to write"):
        evaluate(EvaluateConfig(**files, out=str(tmp_path)), lambda line: None)
