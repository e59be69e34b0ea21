"""The JSON files of the study that this project grew from: answers, scores, human grades. Reading only; nothing is scored.

    MODEL_topk50_nb5_t1.json           list of answers
    MODEL_topk50_nb5_t1_score.json     {"Perplexity", "BLEU", "ROUGE-L", "BERTScore"}: means, no value an example
    MODEL_topk50_nb5_t1_HE.json        list of {"index", the three of GRADES, "comment"}
    MODEL_topk50_nb5_t1_HE_score.json  the averages of these grades
    instructions27.json                list of prompts, one for each answer of every file below its folder
The name is the only place where these files keep the decoding options, so it is read strictly."""

import re
from dataclasses import dataclass
from pathlib import Path

from minitune.files import read_json

NAME = re.compile(
    r"(?P<model>.+)_topk(?P<top_k>\d+)_nb(?P<num_beams>\d+)_t(?P<temperature>\d+(?:\.\d+)?)(?P<kind>|_score|_HE|_HE_score)\.json"
)
PROMPTS = re.compile(r"instructions\d*\.json")
SCORES = {"Perplexity": "perplexity", "BLEU": "bleu", "ROUGE-L": "rouge_l", "BERTScore": "bertscore"}
PARAMETERS = ("top_k", "num_beams", "temperature")
GRADES = ("grammatical_correctness", "coherence", "correctness_of_answer")
AVERAGES = tuple(f"average_{name}" for name in GRADES) + ("human_evaluation_average",)


@dataclass
class Grades:
    """Human grades of one model's answers, in their order."""

    path: Path
    rows: list  # of {grade: number}
    comments: list  # of str, empty where there is none
    published: dict | None = None  # what _HE_score.json says, by AVERAGES

    def averages(self):
        """{name of AVERAGES: float}: the mean of each grade, and the mean of these three, in the study's order of sums."""
        means = [sum(row[name] for row in self.rows) / len(self.rows) for name in GRADES]
        return dict(zip(AVERAGES, [*means, sum(means) / len(means)], strict=True))

    def of_examples(self):
        """The mean of the three grades of each answer, (n,)."""
        return [sum(row[name] for name in GRADES) / len(GRADES) for row in self.rows]


def parse_name(name):
    """(model, {top_k, num_beams, temperature}, kind) of a file name, kind one of "", _score, _HE, _HE_score; None where it
    is no name of the study's."""
    found = NAME.fullmatch(name)
    if not found:
        return None
    options = {
        "top_k": int(found["top_k"]),
        "num_beams": int(found["num_beams"]),
        "temperature": float(found["temperature"]),
    }
    return found["model"], options, found["kind"]


def number(value, where):
    """value as it is. Raises ValueError, with `where`, unless it is a finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) < 1e300:  # JSON's whole numbers have no end
        raise ValueError(f"{where} is {show(value)}, expected a finite number")
    return value


def need(record, keys, where):
    """Raises ValueError unless `record` is an object with these keys."""
    if not isinstance(record, dict):
        raise ValueError(
            f"{where} is a {type(record).__name__}, expected an object{' with ' * bool(keys)}{', '.join(keys)}"
        )
    if missing := [key for key in keys if key not in record]:
        raise ValueError(f"{where} has no {', '.join(missing)}; it has {', '.join(record) or 'no keys'}")


def read_texts(path):
    """The list of texts in a JSON file: answers or prompts."""
    texts = read_json(path)
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{path} holds {show(texts)}, expected a list of texts, one at least")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{path}, row {row} is {show(text)}, expected a text")
    return texts


def read_scores(path):
    """{metric: float} of a _score.json, by minitune's names, without those that are null: they were not computed."""
    stored = read_json(path)
    need(stored, SCORES, path)
    return {name: number(stored[key], f"{path}: {key}") for key, name in SCORES.items() if stored[key] is not None}


def read_grades(path):
    """The Grades in a _HE.json, with what the _HE_score.json beside it publishes. The index counts up by 1 from any number:
    two files of the study start at 1 and one at 0."""
    path = Path(path)
    stored = read_json(path)
    if not isinstance(stored, list) or not stored:
        raise ValueError(f"{path} holds {show(stored)}, expected a list of grades, one at least")
    for row, record in enumerate(stored):
        where = f"{path}, row {row}"
        need(record, ("index", *GRADES), where)
        for name in ("index", *GRADES):
            number(record[name], f"{where}: {name}")
        if record["index"] != stored[0]["index"] + row:
            expected = stored[0]["index"] + row
            raise ValueError(
                f"{where} has the index {record['index']}, expected {expected}: one grade an answer, in order"
            )
    rows = [{name: record[name] for name in GRADES} for record in stored]
    comments = [record["comment"] if isinstance(record.get("comment"), str) else "" for record in stored]
    beside, published = path.with_name(path.name.replace("_HE.json", "_HE_score.json")), None
    if beside.exists():
        published = read_json(beside)
        need(published, AVERAGES, beside)
        published = {name: number(published[name], f"{beside}: {name}") for name in AVERAGES}
    return Grades(path, rows, comments, published)


def show(value):
    """A value in one short line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
