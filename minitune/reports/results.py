"""Reads and checks the files of run folders and of the study for a report. Nothing is drawn or computed here.

A folder with evaluation.json, sweep/, metrics.jsonl or environment.json is a run folder. Any other folder is searched for run
folders and for files of the study (see study/files.py). Scores of another adapter than the one in the run folder are left out,
with a note."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from minitune.files import fingerprint, paths_explained, read_json, to_json
from minitune.metrics.significance import Interval
from minitune.reports.commands import evaluate_again, sweep_again
from minitune.runs.folder import STEPS, adapter_fingerprint, adapter_folder, read_lines
from minitune.schema import COUNT, Number, check
from minitune.screen import short, some
from minitune.study import files as study_files
from minitune.study.files import SCORE, Grades
from minitune.study.names import PARAMETERS, parse_name

RUN_FILES = ("evaluation.json", "metrics.jsonl", "environment.json", "sweep")
KNOWN = {
    "config.json",
    "environment.json",
    "evaluation.json",
    "sweep.json",
    "failed.json",
    "minitune.json",
    "adapter_config.json",
}

# --- the shapes of files ---

MAYBE = (SCORE, None)
METRIC = {"value": MAYBE, "low?": MAYBE, "high?": MAYBE, "n?": (COUNT, None), "note?": (str, None)}
EXAMPLE = {
    "answer": str,
    **{f"{key}?": (str, None) for key in ("prompt", "input", "ended_by")},
    "reference?": (str, [str], None),
    "scores?": ({str: MAYBE}, None),
}
COMPARISON = {
    "difference": MAYBE,
    **{f"{key}?": MAYBE for key in ("low", "high")},
    **{key: (Number(0, 1), None) for key in ("p_bootstrap", "p_permutation")},
    "n?": (COUNT, None),
    "note?": (str, None),
}
EVALUATION = {
    "format?": COUNT,
    "settings": {
        "decoding": ({f"{name}?": MAYBE for name in PARAMETERS}, None),
        "facts?": ({"adapter (sha256)?": (str, None)}, None),
        **{f"{key}?": (str, None) for key in ("model", "data", "template", "judge", "encoder")},
        **{f"{key}?": (COUNT, None) for key in ("resamples", "seed", "limit")},
    },
    "systems": {str: {"name": str, "metrics": {str: METRIC}, "examples": [EXAMPLE]}},
    "comparisons": {str: COMPARISON},
    "environment?": (dict, None),
    "check?": str,
}
POINTS = {
    "points": [{"folder": str, "options": dict, "error?": str, "pending?": bool}],
    "kind?": (str, None),
    "grid?": (str, None),
}
SWEEP = {**POINTS, "other?": (POINTS, None)}  # sweep.json
STEP = {"loss?": MAYBE, "lr?": MAYBE, "eval_loss?": MAYBE}  # a line of metrics.jsonl, in addition to runs.folder.STEPS

NOT_COMPARED = {  # settings that say what is scored and not how, or that are shown elsewhere in the report
    *("model", "adapter", "data", "decoding", "facts", "metrics"),
    *("examples", "signatures", "resamples", "seed", "limit"),
    *("adapter (sha256)", "model files (sha256)", "held-out rows (sha256)"),
    *("lookup", "eos_ids", "num_return_sequences"),
}
# Options without effect if nothing is sampled.
OF_DRAWING = {"temperature", "top_k", "top_p", "min_p", "typical_p", "seed"}
OF_BEAMS = {"length_penalty", "early_stopping"}  # options without effect with one beam


@dataclass
class System:
    """One model with one setting of decoding: a row of the table or a point of the figure."""

    name: str
    role: str  # tuned, base, predictions or other in evaluation.json; "published" for the study's files
    group: Path  # the run folder, or the study's folder
    source: Path  # the file that it was read from
    options: dict  # {name: value} of decoding
    scores: dict = field(default_factory=dict)  # {metric: Interval}
    # [{"prompt", "reference", "answer", "scores", ...}]; prompt and reference may be None
    examples: list = field(default_factory=list)
    grades: Grades | None = None
    settings: dict = field(default_factory=dict)  # those in evaluation.json
    asked: str = ""  # identifies prompts and references; only systems with equal values can be compared

    @property
    def decoding(self):
        """All options of decoding, or {} if they are not known."""
        return self.settings.get("decoding") or {}

    def terms(self):
        """{name: value} of the settings of decoding and scoring, without those that have no effect."""
        decoding, idle = self.decoding, set()
        if decoding.get("do_sample") is False:
            idle |= OF_DRAWING
        if decoding.get("num_beams") == 1:
            idle |= OF_BEAMS
        found = {name: value for name, value in decoding.items() if name not in idle}
        found |= {**self.settings, **(self.settings.get("facts") or {})}
        return {name: value for name, value in found.items() if name not in NOT_COMPARED}

    def setting(self):
        """The values of the study's parameters, a tuple."""
        return tuple(self.options.get(name) for name in PARAMETERS)

    def is_repeated(self, other):
        """Whether `other`, a System, has the same prompts and the same options, except for the seed."""
        without_seed = [{k: v for k, v in s.decoding.items() if k != "seed"} for s in (self, other)]
        prompts = [[example["prompt"] for example in s.examples] for s in (self, other)]
        same = (self.name, self.role, self.setting()) == (other.name, other.role, other.setting())
        return same and without_seed[0] == without_seed[1] and (prompts[0] == prompts[1] or [] in prompts)


@dataclass
class Run:
    """The files of a run folder, except for its systems."""

    folder: Path
    lines: list = field(default_factory=list)  # metrics.jsonl, a list of dicts
    environment: dict | None = None
    options: dict | None = None  # of training, from config.json
    settings: dict | None = None  # of evaluation.json
    # {metric: {difference, low, high, p_bootstrap, p_permutation, n, note}}
    comparisons: dict = field(default_factory=dict)


@dataclass
class Results:
    """Everything that was read for a report."""

    systems: list = field(default_factory=list)  # [System], the rows of the table
    points: list = field(default_factory=list)  # [System], the points of the sweeps
    runs: list = field(default_factory=list)  # [Run]
    notes: list = field(default_factory=list)  # sentences for the reader
    not_understood: list = field(default_factory=list)  # Paths
    commands: list = field(default_factory=list)  # commands that compute again what was left out
    read: dict = field(default_factory=dict)  # path of a folder that was read -> whether it has results itself


class Line(NamedTuple):
    """A line of the sweep's figure: one model, with one option at a time varied from the centre."""

    group: Path
    name: str
    role: str
    centre: dict  # {option: value}
    points: dict  # {parameter: [System], sorted by the value of the parameter}
    all_points: list  # [System], including those that are on no axis


def read_results(folders):
    """Read folders into Results. Raises ValueError with the file and the place if one cannot be read, and if a folder has no
    results."""
    results = Results()
    for folder in dict.fromkeys(Path(name) for name in folders):
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is {'a file' if folder.exists() else 'not there'}, expected a folder of results"
            )
        before = len(results.notes)
        if not read_folder(folder, results):
            if results.notes[before:]:
                raise ValueError(results.notes[before])
            raise ValueError(
                f"{folder} has no results: expected a run folder (evaluation.json, sweep/, metrics.jsonl, environment.json), or "
                "files such as MODEL_topk50_nb5_t1_score.json, there or in a folder below"
            )
    for line in sweep_lines(
        results.points
    ):  # if a run has a sweep but no evaluation, the table shows the sweep's centre
        same = [s for s in results.systems if (s.name, s.role) == (line.name, line.role)]
        if not any(s.group == line.group or s.role == "published" for s in same):
            middle = [s for row in line.points.values() for s in row if line.centre.items() <= s.options.items()]
            results.systems += middle[:1]
    return results


def read_folder(folder, results):
    """Read `folder` if it is a run folder, else all run folders and files of the study in it and below it. Returns whether there
    are results, including those that were read before."""
    has_results, named = False, folder
    waiting = [(folder, None)]  # (folder, file of prompts that applies to it)
    while waiting:
        folder, prompts = waiting.pop()
        if (place := os.path.realpath(folder)) in results.read:
            has_results = has_results or results.read[place]
            continue
        results.read[place] = True
        if any((folder / name).exists() for name in RUN_FILES):
            if folder == named:
                read_run(folder, results)
                has_results = True
            else:
                results.read[place] = read_unnamed_run(folder, results)
                has_results = has_results or results.read[place]
            continue
        with paths_explained(folder):
            names = sorted(os.listdir(folder))
        for name in names:
            if study_files.PROMPTS.fullmatch(name) and (folder / name).is_file():
                prompts = folder / name
        studied = [name for name in names if parse_name(name) and (folder / name).is_file()]
        results.read[place] = bool(studied)
        if studied:
            read_study(folder, studied, prompts, results)
            has_results = True
        paths = [folder / name for name in names if not name.startswith(".") and name not in studied]
        # Links to folders are not followed: they could form a cycle.
        waiting += [(path, prompts) for path in reversed(paths) if path.is_dir() and not path.is_symlink()]
        results.not_understood += [
            p for p in paths if p.suffix == ".json" and p.is_file() and p.name not in KNOWN and p != prompts
        ]
    return has_results


def read_unnamed_run(folder, results):
    """Add a run folder that was found below the folder on the command line. A damaged one is left out with a note. Returns
    whether it was added."""
    run = Results()
    try:
        read_run(folder, run)
    except ValueError as error:
        results.notes.append(f"{error}. {folder} is left out: repair that file, or remove the folder")
        return False
    for kind in ("systems", "points", "runs", "notes", "commands"):
        getattr(results, kind).extend(getattr(run, kind))
    return True


def read_study(folder, names, prompts, results):
    """Add the systems of one folder of the study's files. They go to the table if each model has one setting, else to the sweep.

    names: names of the files. prompts: Path of the file of prompts, or None."""
    found = {}
    for name in names:
        model, options, kind = parse_name(name)
        found.setdefault((model, tuple(options.values())), {})[kind] = folder / name
    texts = study_files.read_texts(prompts) if prompts else None
    systems = []
    for (model, setting), files in sorted(found.items(), key=lambda item: item[0]):
        options = dict(zip(PARAMETERS, setting, strict=True))
        source = next(files[kind] for kind in ("_score", "", "_HE", "_HE_score") if kind in files)
        asked = fingerprint(texts) if texts else str(folder)
        system = System(model, "published", folder, source, options, asked=asked)
        if "_score" in files:
            scores = study_files.read_scores(files["_score"])
            note = "published as a mean only, without the values of the examples, so there is no interval"
            system.scores = {metric: Interval(value, None, None, 0, note) for metric, value in scores.items()}
        if "" in files:
            answers = study_files.read_texts(files[""])
            if texts and len(texts) != len(answers):
                raise ValueError(
                    f"{files['']} has {len(answers)} answers and {prompts} {len(texts)} prompts, expected equal numbers"
                )
            system.examples = [
                {"prompt": texts[i] if texts else None, "reference": None, "answer": answer, "scores": {}}
                for i, answer in enumerate(answers)
            ]
        if "_HE" in files:
            system.grades = grades_of(files["_HE"], system, files.get(""))
        elif "_HE_score" in files:
            results.notes.append(
                f"{files['_HE_score']} has averages, but the file of the grades ({model}…_HE.json) is missing"
            )
        systems.append(system)
    most = max(Counter(system.name for system in systems).values())
    (results.points if most > 1 else results.systems).extend(systems)


def grades_of(path, system, answers):
    """The Grades in a _HE.json, one for each answer of a System. answers: file of the answers, for the message. Raises ValueError
    if the numbers differ."""
    grades = study_files.read_grades(path)
    if system.examples and len(grades.rows) != len(system.examples):
        raise ValueError(
            f"{path} has {len(grades.rows)} grades and {answers or system.source} {len(system.examples)} answers, "
            "expected equal numbers"
        )
    return grades


def read_run(folder, results):
    """Add a run folder's systems, sweep, curves, options and environment."""
    run = Run(folder, read_metrics(folder / "metrics.jsonl"))
    adapter = adapter_fingerprint(adapter_folder(folder))
    if (folder / "environment.json").exists():
        run.environment = read_json(folder / "environment.json", dict)
    if (folder / "config.json").exists():
        run.options = read_json(folder / "config.json", dict)
    systems = []
    if (path := folder / "evaluation.json").exists():
        systems, stored = read_evaluation(path, folder, results)
        if is_out_of_date(stored, adapter):
            note(results, f"{path} was computed with another adapter", evaluate_again(folder, stored))
            systems = []
        else:
            run.settings, run.comparisons = stored["settings"], stored["comparisons"]
            run.environment = run.environment or stored.get("environment")
            note_unproved(path, stored, adapter, folder, results)
    for path in [*sorted(folder.glob("*_HE.json")), *sorted((folder / "generations").glob("*_HE.json"))]:
        match_grades(path, systems, results)
    results.systems += systems
    results.runs.append(run)
    read_sweep(folder, adapter, results)


def is_out_of_date(stored, adapter):
    """Whether an evaluation.json was computed with another adapter than the one with the fingerprint `adapter`. False if one of
    the two fingerprints is not known."""
    made_of = (stored["settings"].get("facts") or {}).get("adapter (sha256)")
    return None not in (made_of, adapter) and made_of != adapter


def note(results, what, command):
    """Add a note that something is left out because its adapter was replaced, with the command that computes it again."""
    results.notes.append(f"{what} than the run folder holds now, so it is left out. To compute it again: `{command}`")
    results.commands.append(command)


def note_unproved(path, stored, adapter, folder, results):
    """Add a note if it is not known whether an evaluation was computed with the adapter in the run folder."""
    settings = stored["settings"]
    if (settings.get("facts") or {}).get("adapter (sha256)") is None:
        if adapter is not None and settings.get("model") is not None:
            results.notes.append(
                f"{path} does not name its adapter, so it may be older than the one in {folder}. To be sure: "
                f"`{evaluate_again(folder, stored)}`"
            )
    elif adapter is None:
        results.notes.append(
            f"{folder} has no adapter, so it is not known whether the scores in {path.name} are its own."
        )


def read_sweep(run, adapter, results):
    """Add the points of a run's sweep: those in sweep/sweep.json, or without that file every folder with an evaluation.json.
    Each point of a sweep over training options is read as a run."""
    folder = run / "sweep"
    if (path := folder / "sweep.json").exists():
        stored = read_json(path, SWEEP)
        read_points(run, adapter, stored, path, results)
        if stored.get("other") is not None:
            read_points(run, adapter, stored["other"], f"{path}: other", results)
        return
    points = [path.parent for path in sorted(folder.glob("*/evaluation.json"))]
    is_run = [(point / "adapter").is_dir() for point in points]
    for point in (point for point, yes in zip(points, is_run, strict=True) if yes):
        read_run(point, results)
    add_points([(point, {}) for point, yes in zip(points, is_run, strict=True) if not yes], run, adapter, {}, results)


def read_points(run, adapter, stored, where, results):
    """Add the points that one list of a sweep.json names. stored: {"points": [...], ...}; where: its place, for messages."""
    done, failed = [], []
    for row, point in enumerate(stored["points"]):
        if not is_plain(point["folder"]):
            raise ValueError(f"{where}: points[{row}].folder is {short(point['folder'])}, expected a name, not a path")
        if odd := [name for name in point["options"] if not (name.isidentifier() and len(name) <= 40)]:
            raise ValueError(f"{where}: points[{row}].options has {short(odd[0])}, expected names of options")
        if "error" in point:
            failed.append(f"{some([point['folder']])} failed ({some([point['error'].removesuffix('.')])})")
        elif not point.get("pending") and (run / "sweep" / point["folder"] / "evaluation.json").exists():
            done.append((run / "sweep" / point["folder"], point["options"]))
    if len(done) < len(stored["points"]):
        words = [f"{len(done)} of the {len(stored['points'])} points of the sweep in {run} are done", *failed[:10]]
        results.notes.append(f"{'; '.join(words)}.")
    if stored.get("kind") == "training":
        for folder, _ in done:
            read_run(folder, results)
    else:
        add_points(done, run, adapter, stored, results)


def is_plain(name):
    """Whether `name` can be the name of a file or folder, without a path."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name and len(os.fsencode(name)) <= 255


def add_points(points, run, adapter, listed, results):
    """Add the points of a sweep over decoding: [(folder, options that were varied), ...]. listed: the content of sweep.json."""
    left_out = []
    for folder, options in points:
        systems, stored = read_evaluation(folder / "evaluation.json", run, results)
        if is_out_of_date(stored, adapter):
            left_out.append((options, stored))
            continue
        for system in systems:
            system.options = {name: system.options[name] for name in PARAMETERS if name in system.options} | options
            results.points.append(system)
    if left_out:
        which = (
            "The sweep" if len(left_out) == len(points) else f"{len(left_out)} of the {len(points)} points of the sweep"
        )
        note(
            results,
            f"{which} in {run / 'sweep'} was computed with another adapter",
            sweep_again(run, left_out, listed),
        )


def read_metrics(path):
    """The lines of metrics.jsonl as dicts, [] if there is no file. Raises ValueError if a line is wrong."""
    lines, last = read_lines(path, STEPS), 0
    if path.exists() and not lines:
        raise ValueError(f"{path} is empty, expected one JSON line for each logged step")
    for number, line in enumerate(lines, 1):
        has_loss = line.get("loss") is not None
        check(line, {**STEP, "lr": SCORE} if has_loss else STEP, f"{path}, line {number}")
        if line["step"] < last:
            raise ValueError(f"{path}, line {number}: step is {line['step']} after step {last}, expected a later one")
        last = line["step"]
    return [{key: value for key, value in line.items() if value is not None} for line in lines]


def read_evaluation(path, group, results):
    """([System], the parsed file) of an evaluation.json. group: the run folder. Raises ValueError if its content is wrong."""
    stored = read_json(path, {"format?": COUNT})
    if stored.get("format", 1) != 1:
        raise ValueError(f"{path} has the format {stored['format']}, expected 1; a newer minitune may read it")
    check(stored, EVALUATION, path)
    if not stored["systems"]:
        raise ValueError(f"{path}: systems is empty, expected at least one")
    if "check" in stored and stored["check"] != fingerprint({k: v for k, v in stored.items() if k != "check"}):
        results.notes.append(f"{path} was changed after minitune wrote it; the changed numbers are shown.")
    settings, systems = stored["settings"], []
    for role, record in stored["systems"].items():
        scores = {clipped(name): read_interval(value) for name, value in record["metrics"].items()}
        scores = {name: value for name, value in scores.items() if value}
        examples = list(map(read_example, record["examples"]))
        options, asked = settings["decoding"] or {}, asked_of(examples, group)
        name = clipped(record["name"])
        systems.append(System(name, role, group, path, options, scores, examples, settings=settings, asked=asked))
    if len({len(system.examples) for system in systems}) > 1:
        counts = some(f"{system.role} {len(system.examples)}" for system in systems)
        raise ValueError(f"{path}: the systems have different numbers of examples ({counts}), expected equal numbers")
    if len({system.asked for system in systems}) > 1:
        raise ValueError(f"{path}: the systems have different prompts or references, expected the same for each")
    return systems, stored


def clipped(name):
    """A name, shortened to 80 characters for a table."""
    return name if len(name) <= 80 else f"{name[:60]}…{name[-15:]}"


def asked_of(examples, group):
    """A text that is equal for equal prompts and references. Without both, it is made from the folder of the answers."""
    rows = [[example.get(key) or None for key in ("prompt", "input", "reference")] for example in examples]
    return fingerprint(rows) if any(part for row in rows for part in row) else f"{len(rows)} in {group}"


def read_interval(record):
    """The Interval of a metric in evaluation.json, or None if it has no value."""
    if record["value"] is None:
        return None
    return Interval(
        record["value"], record.get("low"), record.get("high"), n=record.get("n") or 0, note=record.get("note") or ""
    )


def read_example(record):
    scores = {clipped(name): value for name, value in (record.get("scores") or {}).items() if value is not None}
    reference = record.get("reference")
    reference = "\n".join(reference) if isinstance(reference, list) else reference
    return {"prompt": None, **record, "reference": reference, "scores": scores}


def match_grades(path, systems, results):
    """Assign the grades in NAME_HE.json to the System whose answers are those in NAME.json."""
    beside = path.with_name(path.name.replace("_HE.json", ".json"))
    answers = study_files.read_texts(beside)
    owner = next((s for s in systems if [e["answer"] for e in s.examples] == answers), None)
    if owner is None:
        results.notes.append(
            f"{path} has grades for answers that belong to no evaluation in this report; it is left out."
        )
    else:
        owner.grades = grades_of(path, owner, beside)


def sweep_lines(points):
    """The Lines of the figure: for each model in each group, the points that differ from the centre in at most one option.

    The centre has the most frequent value of each option."""
    lines = []
    found = {}
    for point in points:
        found.setdefault((point.group, point.name, point.role, conditions(point)), []).append(point)
    for key, own in found.items():
        axes = [*PARAMETERS, *dict.fromkeys(name for p in own for name in p.options if name not in PARAMETERS)]
        axes = [name for name in axes if all(is_number(p.options.get(name)) for p in own)]
        centre = {name: Counter(p.options[name] for p in own).most_common(1)[0][0] for name in axes}
        along = {}
        for name in axes:
            others = [other for other in axes if other != name]
            row = [p for p in own if all(p.options[other] == centre[other] for other in others)]
            along[name] = sorted(row, key=lambda p: p.options[name])
        if any(len(row) > 1 for row in along.values()):
            lines.append(Line(*key[:3], centre, along, own))
    return lines


def conditions(point):
    """A text that is equal for points of a sweep that can be compared: with the same prompts and the same scoring."""
    return to_json([point.asked, fixed_terms(point)])


def fixed_terms(point):
    """System.terms() of a point, without the options of decoding that a sweep varies."""
    varied = {*point.options, *point.decoding} - ({"max_new_tokens"} - point.options.keys())
    return {name: value for name, value in point.terms().items() if name not in varied}


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def table_lines(systems):
    """The rows of the table: [(label, System, its base or None), ...]. A base model is shown with its tuned model, not alone."""
    lines = []
    for system in systems:
        beside = [s for s in systems if s.source == system.source and s.role == "tuned"]
        if system.role == "base" and beside:
            continue
        bases = [s for s in systems if s.source == system.source and s.role == "base"]
        lines.append((system.name, system, bases[0] if system.role == "tuned" and bases else None))
    names, places = Counter(label for label, _, _ in lines), short_places([system.group for system in systems])
    return [
        (f"{label} ({places[system.group]})" if names[label] > 1 else label, system, base)
        for label, system, base in lines
    ]


def short_places(folders):
    """{folder: label}: its name, or its whole path if two have the same name."""
    names = {folder: folder.resolve().name for folder in folders}
    count = Counter(names.values())
    return {folder: name if count[name] == 1 else str(folder) for folder, name in names.items()}


def by_prompts(lines):
    """[(the prompts in words, rows of table_lines())]: the rows with the same prompts, which may share a table."""
    groups = {}
    for line in lines:
        groups.setdefault(line[1].asked, []).append(line)
    words = [prompts_words([system for _, system, _ in own]) for own in groups.values()]
    twice = Counter(words)
    return [
        (f"{text}, set {number}" if twice[text] > 1 else text, own)
        for number, (text, own) in enumerate(zip(words, groups.values(), strict=True), 1)
    ]


def prompts_words(systems):
    """The prompts of these systems, which have the same ones, in words."""
    sizes = {len(system.examples) for system in systems if system.examples}
    data = next((system.settings["data"] for system in systems if system.settings.get("data")), None)
    number = f"{sizes.pop()} prompts" if len(sizes) == 1 else "the held-out prompts"
    return f"{number} of {data}" if data else f"{number} of the study" if systems[0].role == "published" else number
