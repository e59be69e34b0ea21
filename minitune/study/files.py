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
from minitune.schema import Number
from minitune.screen import short
from minitune.study.names import SCORES

PROMPTS = re.compile(r"instructions\d*\.json")
SCORE = Number(-1e100, 1e100)  # a score or a grade: its square is finite too
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


def read_texts(path):
    """The list of texts in a JSON file: answers or prompts, one at least."""
    return not_empty(read_json(path, [str]), path)


def not_empty(values, path):
    if not values:
        raise ValueError(f"{path} is an empty list, expected one entry at least")
    return values


def read_scores(path):
    """{metric: float} of a _score.json, by minitune's names, without those that are null: they were not computed."""
    stored = read_json(path, {key: (SCORE, None) for key in SCORES})
    return {name: stored[key] for key, name in SCORES.items() if stored[key] is not None}


def read_grades(path):
    """The Grades in a _HE.json, with what the _HE_score.json beside it publishes. The index counts up by 1 from any number:
    two files of the study start at 1 and one at 0."""
    path = Path(path)
    stored = not_empty(read_json(path, [{"index": SCORE, **dict.fromkeys(GRADES, SCORE)}]), path)
    for row, record in enumerate(stored):
        expected = stored[0]["index"] + row
        if record["index"] != expected:
            raise ValueError(
                f"{path}: [{row}].index is {short(record['index'])}, expected {short(expected)}: one grade an answer, in order"
            )
    rows = [{name: record[name] for name in GRADES} for record in stored]
    comments = [record["comment"] if isinstance(record.get("comment"), str) else "" for record in stored]
    beside, published = path.with_name(path.name.replace("_HE.json", "_HE_score.json")), None
    if beside.exists():
        found = read_json(beside, dict.fromkeys(AVERAGES, SCORE))
        published = {name: found[name] for name in AVERAGES}
    return Grades(path, rows, comments, published)
