"""What run folders and the study's files hold, read and checked for a report. Nothing is drawn or computed here.

A run folder has evaluation.json, sweep/*/evaluation.json, metrics.jsonl, environment.json, any of them; any other folder is
searched for run folders and for files of the study (see study_files.py)."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from minitune.files import read_json
from minitune.metrics.significance import Interval
from minitune.reports import study_files
from minitune.reports.study_files import PARAMETERS, Grades, need, number, show
from minitune.run_folder import read_lines

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


@dataclass
class System:
    """One model under one setting of decoding: what a line of the table or a point of the figure shows."""

    name: str
    role: str  # tuned, base, predictions, other; "published" for the study's files
    group: Path  # the run, or the study's folder
    source: Path  # the file that it was read from
    options: dict  # of decoding
    scores: dict = field(default_factory=dict)  # {metric: Interval}
    examples: list = field(
        default_factory=list
    )  # of {prompt, reference, answer, scores, ...}; prompt, reference may be None
    grades: Grades | None = None
    decoding: dict = field(default_factory=dict)  # all its options, where they are known

    def setting(self):
        return tuple(self.options.get(name) for name in PARAMETERS)

    def is_repeated(self, other):
        """Whether the other one answers the same prompts by the same options, but for the seed."""
        without_seed = [{k: v for k, v in s.decoding.items() if k != "seed"} for s in (self, other)]
        prompts = [[example["prompt"] for example in s.examples] for s in (self, other)]
        same = (self.name, self.role, self.setting()) == (other.name, other.role, other.setting())
        return same and without_seed[0] == without_seed[1] and (prompts[0] == prompts[1] or [] in prompts)


@dataclass
class Run:
    """A run folder beyond its systems."""

    folder: Path
    lines: list = field(default_factory=list)  # of metrics.jsonl
    environment: dict | None = None
    settings: dict | None = None  # of evaluation.json
    comparisons: dict = field(
        default_factory=dict
    )  # {metric: {difference, low, high, p_bootstrap, p_permutation, n, note}}


@dataclass
class Results:
    systems: list = field(default_factory=list)  # lines of the table
    points: list = field(default_factory=list)  # points of the sweeps
    runs: list = field(default_factory=list)
    notes: list = field(default_factory=list)  # what a reader must know, in sentences
    not_understood: list = field(default_factory=list)  # paths


class Line(NamedTuple):
    """A line of the sweep's figure: one model, one option moved at a time from the centre."""

    group: Path
    name: str
    role: str
    centre: dict
    points: dict  # {parameter: [System] in the order of its values}


def read_results(folders):
    """Read folders into Results. Raises ValueError, with the file and the row, on what cannot be read, and where there is
    nothing to report."""
    results = Results()
    for folder in dict.fromkeys(Path(name) for name in folders):
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is {'a file' if folder.exists() else 'not there'}, expected a folder of results"
            )
        before = len(results.systems) + len(results.points) + len(results.runs)
        read_folder(folder, results, prompts=None)
        if before == len(results.systems) + len(results.points) + len(results.runs):
            raise ValueError(
                f"{folder} has no results: expected a run folder (evaluation.json, sweep/, metrics.jsonl, environment.json), or "
                "files such as MODEL_topk50_nb5_t1_score.json, there or in a folder below"
            )
    for line in sweep_lines(results.points):  # a sweep without an evaluation of its own lends its centre to the table
        same = [s for s in results.systems if (s.name, s.role) == (line.name, line.role)]
        if not any(s.group == line.group or s.role == "published" for s in same):
            middle = [s for row in line.points.values() for s in row if line.centre.items() <= s.options.items()]
            results.systems += middle[:1]
    return results


def read_folder(folder, results, prompts):
    if any((folder / name).exists() for name in RUN_FILES):
        read_run(folder, results)
        return
    names = sorted(os.listdir(folder))
    for name in names:
        if study_files.PROMPTS.fullmatch(name) and (folder / name).is_file():
            prompts = folder / name
    studied = [name for name in names if study_files.parse_name(name) and (folder / name).is_file()]
    if studied:
        read_study(folder, studied, prompts, results)
    for name in names:
        path = folder / name
        if name.startswith(".") or path.is_symlink() and not path.is_file():
            continue  # a link could lead round in a circle
        if path.is_dir():
            read_folder(path, results, prompts)
        elif (
            name.endswith(".json") and path.is_file() and name not in studied and name not in KNOWN and path != prompts
        ):
            results.not_understood.append(path)


def read_study(folder, names, prompts, results):
    """Add the systems of one folder of the study's files: to the table where each model has one setting, else as a sweep."""
    found = {}
    for name in names:
        model, options, kind = study_files.parse_name(name)
        found.setdefault((model, tuple(options.values())), {})[kind] = folder / name
    texts = study_files.read_texts(prompts) if prompts else None
    systems = []
    for (model, setting), files in sorted(found.items(), key=lambda item: item[0]):
        options = dict(zip(PARAMETERS, setting, strict=True))
        source = next(files[kind] for kind in ("_score", "", "_HE", "_HE_score") if kind in files)
        system = System(model, "published", folder, source, options)
        if "_score" in files:
            scores = study_files.read_scores(files["_score"])
            note = "published as a mean only, without the values of the examples: no interval"
            system.scores = {metric: Interval(value, None, None, 0, note) for metric, value in scores.items()}
        if "" in files:
            answers = study_files.read_texts(files[""])
            if texts and len(texts) != len(answers):
                raise ValueError(
                    f"{files['']} has {len(answers)} answers and {prompts} {len(texts)} prompts, expected as many"
                )
            system.examples = [
                {"prompt": texts[i] if texts else None, "reference": None, "answer": answer, "scores": {}}
                for i, answer in enumerate(answers)
            ]
        if "_HE" in files:
            system.grades = grades_of(files["_HE"], system, files.get(""))
        elif "_HE_score" in files:
            results.notes.append(
                f"{files['_HE_score']} has averages, but the grades ({model}…_HE.json) are not beside it"
            )
        systems.append(system)
    most = max(Counter(system.name for system in systems).values())
    (results.points if most > 1 else results.systems).extend(systems)


def grades_of(path, system, answers):
    """The Grades in a _HE.json, one for each answer of a System."""
    grades = study_files.read_grades(path)
    if system.examples and len(grades.rows) != len(system.examples):
        raise ValueError(
            f"{path} has {len(grades.rows)} grades and {answers or system.source} {len(system.examples)} answers, "
            "expected as many"
        )
    return grades


def read_run(folder, results):
    """Add a run folder's systems, sweep, curves and environment."""
    run = Run(folder, read_metrics(folder / "metrics.jsonl"))
    if (folder / "environment.json").exists():
        run.environment = read_json(folder / "environment.json")
        need(run.environment, (), folder / "environment.json")
    if (folder / "evaluation.json").exists():
        systems, stored = read_evaluation(folder / "evaluation.json", folder)
        run.settings, run.comparisons = stored["settings"], stored["comparisons"]
        run.environment = run.environment or stored.get("environment")
        for path in [*sorted(folder.glob("*_HE.json")), *sorted((folder / "generations").glob("*_HE.json"))]:
            match_grades(path, systems, results)
        results.systems += systems
    results.runs.append(run)
    read_sweep(folder, results)


def read_sweep(run, results):
    """Add the points of a run's sweep: those that sweep/sweep.json lists, or every folder with an evaluation.json where there
    is no list. A point of a sweep over training is a run of its own."""
    folder = run / "sweep"
    if (path := folder / "sweep.json").exists():
        stored = read_json(path)
        read_points(run, stored, path, results)
        if stored.get("other") is not None:
            read_points(run, stored["other"], f"{path}: other", results)
        return
    for path in sorted(folder.glob("*/evaluation.json")):
        read_point(path.parent, {}, run, results, is_run=(path.parent / "adapter").is_dir())


def read_points(run, stored, where, results):
    """Add the points that one list of a sweep.json names, `where` it is."""
    need(stored, ("points",), where)
    if not isinstance(stored["points"], list):
        raise ValueError(f"{where}: points is {show(stored['points'])}, expected a list")
    done, failed = [], []
    for row, point in enumerate(stored["points"]):
        need(point, ("folder", "options"), f"{where}, row {row}")
        need(point["options"], (), f"{where}, row {row}: options")
        if "error" in point:
            failed.append(f"{point['folder']} failed ({shortened(point['error'])})")
        elif not point.get("pending") and (run / "sweep" / str(point["folder"]) / "evaluation.json").exists():
            done.append(point)
    if len(done) < len(stored["points"]):
        words = [f"{len(done)} of the {len(stored['points'])} points of the sweep in {run} are done", *failed]
        results.notes.append(f"{'; '.join(words)}.")
    for point in done:
        folder = run / "sweep" / str(point["folder"])
        read_point(folder, point["options"], run, results, is_run=stored.get("kind") == "training")


def shortened(error):
    """The beginning of an error, without its last full stop."""
    text = str(error)
    return text.removesuffix(".") if len(text) <= 100 else f"{text[:99]}…"


def read_point(folder, options, run, results, is_run):
    if is_run:
        read_run(folder, results)
        return
    for system in read_evaluation(folder / "evaluation.json", run)[0]:
        varied = {name: system.options[name] for name in PARAMETERS if name in system.options}
        system.options = varied | options
        results.points.append(system)


def read_metrics(path):
    """The lines of metrics.jsonl that the curves are drawn from; an absent file has none."""
    lines = read_lines(path)
    if path.exists() and not lines:
        raise ValueError(f"{path} is empty, expected one JSON line a logged step")
    for row, line in enumerate(lines):
        need(line, ("step",), f"{path}, row {row}")
        for key in ("step", "loss", "lr", "eval_loss"):
            if key in line and line[key] is not None:  # null: not finite when it was written
                number(line[key], f"{path}, row {row}: {key}")
        if line.get("loss") is not None:
            need(line, ("lr",), f"{path}, row {row}")
    return [{key: value for key, value in line.items() if value is not None} for line in lines]


def read_evaluation(path, group):
    """([System], the whole object) of an evaluation.json."""
    stored = read_json(path)
    need(stored, ("settings", "systems", "comparisons"), path)
    if stored.get("format", 1) != 1:
        raise ValueError(f"{path} has the format {show(stored['format'])}, expected 1; a newer minitune may read it")
    need(stored["settings"], ("decoding",), f"{path}: settings")
    options = stored["settings"]["decoding"] or {}
    need(options, (), f"{path}: settings.decoding")
    need(stored["systems"], (), f"{path}: systems")
    if not stored["systems"]:
        raise ValueError(f"{path}: systems is empty, expected one at least")
    for name in PARAMETERS:
        if options.get(name) is not None:
            number(options[name], f"{path}: settings.decoding.{name}")
    systems, sizes = [], {}
    for role, record in stored["systems"].items():
        where = f"{path}: {role}"
        need(record, ("name", "metrics", "examples"), where)
        need(record["metrics"], (), f"{where}: metrics")
        scores = {name: read_interval(value, f"{where}: {name}") for name, value in record["metrics"].items()}
        if not isinstance(record["examples"], list):
            raise ValueError(f"{where}: examples is {show(record['examples'])}, expected a list")
        examples = [read_example(e, f"{where}, row {row}") for row, e in enumerate(record["examples"])]
        sizes[role] = len(examples)
        named = {name: value for name, value in scores.items() if value}
        systems.append(System(str(record["name"]), role, group, path, options, named, examples, decoding=options))
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{role} {n}" for role, n in sizes.items())
        raise ValueError(f"{path}: the systems have different numbers of examples ({counts}), expected as many")
    need(stored["comparisons"], (), f"{path}: comparisons")
    for name, record in stored["comparisons"].items():
        need(record, ("difference", "p_bootstrap", "p_permutation"), f"{path}: comparisons.{name}")
        for key in ("difference", "low", "high", "p_bootstrap", "p_permutation", "n"):
            if record.get(key) is not None:
                number(record[key], f"{path}: comparisons.{name}.{key}")
    return systems, stored


def read_interval(record, where):
    """The Interval of a metric, None where it has no value."""
    need(record, ("value",), where)
    if record["value"] is None:
        return None
    parts = {key: record.get(key) for key in ("value", "low", "high")}
    for key, value in parts.items():
        if value is not None:
            number(value, f"{where}.{key}")
    return Interval(**parts, n=record.get("n") or 0, note=record.get("note") or "")


def read_example(record, where):
    need(record, ("answer",), where)
    for key in ("prompt", "input", "reference", "answer"):
        if not isinstance(record.get(key), (str, type(None))) and not (
            key == "reference" and isinstance(record[key], list)
        ):
            raise ValueError(f"{where}: {key} is {show(record[key])}, expected a text")
    if record["answer"] is None:
        raise ValueError(f"{where}: answer is null, expected a text")
    scores = record.get("scores") or {}
    need(scores, (), f"{where}: scores")
    kept = {name: number(value, f"{where}: {name}") for name, value in scores.items() if value is not None}
    reference = record.get("reference")
    reference = "\n".join(map(str, reference)) if isinstance(reference, list) else reference
    return {"prompt": None, **record, "reference": reference, "scores": kept}


def match_grades(path, systems, results):
    """Give the grades of NAME_HE.json to the system whose answers are those in NAME.json beside it."""
    beside = path.with_name(path.name.replace("_HE.json", ".json"))
    answers = study_files.read_texts(beside)
    owner = next((s for s in systems if [e["answer"] for e in s.examples] == answers), None)
    if owner is None:
        results.notes.append(f"{path} grades answers that evaluation.json does not have; it is left out.")
    else:
        owner.grades = grades_of(path, owner, beside)


def sweep_lines(points):
    """The Lines of the figure: of each model in each group, the points that differ from the centre in one option at most.

    The centre has the most frequent value of every option."""
    lines = []
    for key in dict.fromkeys((p.group, p.name, p.role) for p in points):
        own = [p for p in points if (p.group, p.name, p.role) == key]
        axes = [*PARAMETERS, *dict.fromkeys(name for p in own for name in p.options if name not in PARAMETERS)]
        axes = [name for name in axes if all(is_number(p.options.get(name)) for p in own)]
        centre = {name: Counter(p.options[name] for p in own).most_common(1)[0][0] for name in axes}
        along = {}
        for name in axes:
            others = [other for other in axes if other != name]
            row = [p for p in own if all(p.options[other] == centre[other] for other in others)]
            along[name] = sorted(row, key=lambda p: p.options[name])
        if any(len(row) > 1 for row in along.values()):
            lines.append(Line(*key, centre, along))
    return lines


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def table_lines(systems):
    """[(label, System, its base or None)]: a tuned model has its base beside it, every other has a line of its own."""
    lines = []
    for system in systems:
        beside = [s for s in systems if s.source == system.source and s.role == "tuned"]
        if system.role == "base" and beside:
            continue
        bases = [s for s in systems if s.source == system.source and s.role == "base"]
        lines.append([system.name, system, bases[0] if system.role == "tuned" and bases else None])
    names = [label for label, _, _ in lines]
    for line in lines:
        if names.count(line[0]) > 1:
            line[0] += f" ({line[1].group.name})"
    return [tuple(line) for line in lines]
