"""The job of scripts/evaluate.py: score the base model and the tuned one on the held-out rows of a run, or two files of
answers.

Answers are appended to generations/NAME.jsonl as they are decoded. A kill loses none of them, and a second start repeats
none. The metrics are in minitune/evaluation/scoring.py. The sweep does the same for each of its points, through Run."""

import os
from pathlib import Path

from minitune import data, files, schema, screen
from minitune.evaluation import scoring
from minitune.evaluation.held_out import EvaluateConfig as EvaluateConfig
from minitune.evaluation.held_out import Run, assess, next_command, score_settings, stopped
from minitune.files import prove_writable, write_json
from minitune.metrics.pairs import as_list
from minitune.schema import COUNT
from minitune.screen import short

ANSWER_KEYS = ("answer", "output", "completion", "text")  # of a row of predictions, the first that it has
REFERENCE_KEYS = ("reference", "references", "output", "completion", "answer", "text")


def evaluate(config, say=screen.say):
    """Decode or read answers, score them, write evaluation.json and print a table. Returns the content of evaluation.json.

    Raises ValueError on bad input, and KeyboardInterrupt after Ctrl-C or SIGTERM, with what is kept."""
    if config.out is not None:
        prove_writable(config.out)
    if config.run is None:
        return evaluate_files(config, say)
    run = Run(config, say)
    prove_writable(config.out or run.folder / "evaluation.json")
    try:
        return run.evaluate(config, run.folder, scoring.Judges(config, say), config.base, config.out, say)
    except KeyboardInterrupt:
        raise stopped(config, run.kept()) from None


def evaluate_files(config, say):
    systems, judges = read_systems(config), scoring.Judges(config, say)
    source = config.references[0] if len(config.references) == 1 else list(config.references)
    settings = {"model": None, "adapter": None, "data": source, "decoding": None}
    try:
        result = assess(systems, config, judges, settings | score_settings(config))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written; the same command starts again") from None
    say("\n".join(scoring.table(result["systems"], result["comparisons"])))
    if config.out is not None:
        write_json(config.out, result)
        say(f"written: {config.out}")
        if Path(config.out).name == "evaluation.json":
            say(next_command(Path(config.out).parent))
    return result


def read_systems(config):
    """{key: (name, records)} of --predictions and, if it is given, --other, with the references in the records."""
    paths = [path for path in (config.predictions, config.other) if path is not None]
    references = read_references(config.references, paths)
    systems = {}
    for key, path in zip(("predictions", "other"), paths, strict=False):
        found = read_texts(path, ANSWER_KEYS)
        check_length(len(found), path, "answers", references, config.references[0])
        records = []
        for number, (answer, row) in enumerate(found):
            reference, given = references[number]
            schema.check(row, {"tokens?": (COUNT, None), "ended_by?": (str, None)}, f"{path}, row {number}")
            asked = [r[k] for r in (given, row) for k in ("instruction", "prompt") if isinstance(r.get(k), str)]
            record = {"prompt": asked[0] if asked else None, "reference": reference, "answer": answer}
            record["input"] = given.get("input") if isinstance(given.get("input"), str) else None
            records.append(record | {"tokens": row.get("tokens"), "ended_by": row.get("ended_by")})
        if all(record["answer"] in as_list(record["reference"]) for record in records) and len(records) > 1:
            screen.warn(
                f"every answer in {path} is the same as in {' '.join(config.references)}: if one was made from the other, these "
                "scores say nothing"
            )
        name = Path(path).stem
        systems[key] = path if any(name == other for other, _ in systems.values()) else name, records[: config.limit]
    return systems


def read_references(paths, answered):
    """[(reference, row)] of one file. With several files a reference is the list of their texts.

    answered: the files of answers. Raises ValueError if a file of references holds a model's answers."""
    files_read = []
    for path in paths:
        for other in answered:
            if Path(path).exists() and Path(other).exists() and os.path.samefile(path, other):
                refuse(path, "is the file of answers itself")
        files_read.append(read_texts(path, REFERENCE_KEYS, several=True))
        if is_answered(Path(path), files_read[-1]):
            refuse(path, "holds answers of a model")
        check_length(len(files_read[-1]), path, "references", files_read[0], paths[0])
    if len(files_read) == 1:
        return files_read[0]
    side_by_side = zip(*files_read, strict=True)
    return [([text for reference, _ in row for text in as_list(reference)], row[0][1]) for row in side_by_side]


def check_length(count, path, what, references, first):
    if count != len(references):
        raise ValueError(
            f"{path} has {count} {what} and {first} has {len(references)} references, expected as many (a blank line of a .txt "
            "file counts)"
        )


def refuse(path, why):
    folder = Path(path).absolute().parent
    run = folder.parent if folder.name == "generations" else "RUN"
    raise ValueError(
        f"--references {path} {why}, not right answers: a system would be scored against itself. Give the right answers; "
        f"those to the questions of a run are in {run}/heldout.jsonl"
    )


def is_answered(path, found):
    """Whether minitune wrote a file of references as answers of a model. Its first line, its rows or a file beside it show
    that."""
    made_by = {"ended_by", "reference_loss"}
    if any("answer" in row and "reference" not in row and made_by & row.keys() for _, row in found):
        return True
    if files.expand(f"{path}.settings.json").is_file():  # of generate.py --out
        return True
    beside = path.with_suffix(".jsonl")
    if not beside.is_file() or path.suffix.lower() not in (".json", ".jsonl"):
        return False
    with open(beside, "rb") as file:
        return file.read(13) == b'{"settings": '


def read_texts(path, keys, several=False):
    """[(text, row)] of a file. row: the JSON object of the text, or {}. several: a row may have a list of texts.

    Raises ValueError with the file and the row."""
    path = files.expand(path)
    if path.suffix.lower() == ".txt":
        text = files.read_text(path)
        if not text:
            raise ValueError(f"{path} is empty, expected a text a line")
        return [(line.removesuffix("\r"), {}) for line in text.removesuffix("\n").split("\n")]
    rows = data.read_rows(path, of_texts=True, of_lists=several)
    first = 1 if isinstance(rows[0], dict) and set(rows[0]) == {"settings"} else 0  # the head of generations/*.jsonl
    if len(rows) == first:
        raise ValueError(f"{path} has no answers")
    found = []
    for number, row in enumerate(rows[first:], first):
        row = row if isinstance(row, dict) else {keys[0]: row}
        key = next((key for key in keys if key in row), None)
        if key is None:
            raise ValueError(f"{path}, row {number} has none of {', '.join(keys)}: {short(row)}")
        schema.check(row, {key: (str, [str]) if several else str}, f"{path}, row {number}")
        texts = as_list(row[key])
        if not texts:
            raise ValueError(f"{path}, row {number}: {key} is an empty list, expected a text or several")
        if any(screen.LONE_SURROGATE.search(text) for text in texts):
            raise ValueError(f"{path}, row {number}: {key} has half a character (a lone surrogate)")
        found.append((texts[0] if len(texts) == 1 else texts, row))
    return found
