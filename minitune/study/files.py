"""Reads the JSON files of the study that minitune grew from: answers, scores, human grades. Nothing is computed here.

    MODEL_topk50_nb5_t1.json           list of answers
    MODEL_topk50_nb5_t1_score.json     {"Perplexity", "BLEU", "ROUGE-L", "BERTScore"}: means, without values of the examples
    MODEL_topk50_nb5_t1_HE.json        list of {"index", the three of GRADES, "comment"}
    MODEL_topk50_nb5_t1_HE_score.json  averages of these grades
    instructions27.json                list of prompts, for the answer files in its folder and below
The decoding options are only in the name of a file, so names are read strictly."""

import re
from dataclasses import dataclass
from pathlib import Path

from minitune.files import read_json
from minitune.schema import Number
from minitune.screen import short
from minitune.study.names import SCORES

PROMPTS = re.compile(r"instructions\d*\.json")
SCORE = Number(-1e100, 1e100)  # a score or a grade, bounded so that its square is finite
GRADES = ("grammatical_correctness", "coherence", "correctness_of_answer")
AVERAGES = tuple(f"average_{name}" for name in GRADES) + ("human_evaluation_average",)


@dataclass
class Grades:
    """Human grades of the answers of one model, in the order of the answers."""

    path: Path
    rows: list  # [{name in GRADES: number}, ...]
    comments: list  # [str, ...], "" for no comment
    published: dict | None = None  # {name in AVERAGES: number} of _HE_score.json, if there is one

    def averages(self):
        """{name in AVERAGES: float}: the mean of each grade and the mean of the three means, summed in the study's order."""
        means = [sum(row[name] for row in self.rows) / len(self.rows) for name in GRADES]
        return dict(zip(AVERAGES, [*means, sum(means) / len(means)], strict=True))

    def of_examples(self):
        """The mean of the three grades of each answer, a list."""
        return [sum(row[name] for name in GRADES) / len(GRADES) for row in self.rows]


def read_texts(path):
    """The list of texts in a JSON file, answers or prompts. Raises ValueError if it is empty or not such a list."""
    return not_empty(read_json(path, [str]), path)


def not_empty(values, path):
    if not values:
        raise ValueError(f"{path} is an empty list, expected at least one entry")
    return values


def read_scores(path):
    """{minitune's name of a metric: float} of a _score.json, without metrics that are null (not computed)."""
    stored = read_json(path, {key: (SCORE, None) for key in SCORES})
    return {name: stored[key] for key, name in SCORES.items() if stored[key] is not None}


def read_grades(path):
    """The Grades in a _HE.json, with the averages in the _HE_score.json of the same folder.

    The indices must count up by 1, from any number: two files of the study start at 1 and one at 0. Raises ValueError if the
    files are wrong."""
    path = Path(path)
    stored = not_empty(read_json(path, [{"index": SCORE, **dict.fromkeys(GRADES, SCORE)}]), path)
    for row, record in enumerate(stored):
        expected = stored[0]["index"] + row
        if record["index"] != expected:
            raise ValueError(
                f"{path}: [{row}].index is {short(record['index'])}, expected {short(expected)}: one grade for each answer, in "
                "their order"
            )
    rows = [{name: record[name] for name in GRADES} for record in stored]
    comments = [record["comment"] if isinstance(record.get("comment"), str) else "" for record in stored]
    beside, published = path.with_name(path.name.replace("_HE.json", "_HE_score.json")), None
    if beside.exists():
        found = read_json(beside, dict.fromkeys(AVERAGES, SCORE))
        published = {name: found[name] for name in AVERAGES}
    return Grades(path, rows, comments, published)
