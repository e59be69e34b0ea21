"""A grid over decoding options with one load of the model, or over training options with one run folder a point: the job of
scripts/sweep.py.

Every point is a folder with evaluation.json; sweep/sweep.json lists them, and is written after every point. What was done is
not done again: answers, scores and training runs are found by their settings, and so is a training that failed (failed.json)."""

import itertools
import json
from dataclasses import asdict, dataclass, fields, make_dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch

from minitune import schema, screen
from minitune.config import TrainConfig, arg, field_type, misfit, positive
from minitune.decoding.options import GenerateConfig
from minitune.evaluation import scoring
from minitune.evaluation.held_out import DecodeConfig, EvaluateConfig, Run, next_command, sealed, stopped
from minitune.evaluation.metrics import METRICS, Rows
from minitune.evaluation.scoring import ScoreConfig
from minitune.files import read_json, write_json
from minitune.generation_config import OPTIONS
from minitune.runs.folder import hold, read_options
from minitune.screen import table_lines, wrap
from minitune.study.names import CENTRE, STUDY, point_name, written
from minitune.train import train

FIXED = (
    "do_sample",
    "num_return_sequences",
    "stop",
    "lookup",
    "eos_ids",
)  # options of decoding that no axis is made of
AXES = [f for f in OPTIONS if f.name not in FIXED]
AXES.sort(key=lambda f: list(STUDY).index(f.name) if f.name in STUDY else len(STUDY))  # the study's first
Grid = make_dataclass(  # generate's options, with a list in place of each value
    "Grid",
    [
        (f.name, tuple[f.type, ...], arg((CENTRE.get(f.name, f.default),), **f.metadata, **heading))
        for f, heading in itertools.zip_longest(AXES, [{"group": "decoding: several values are varied"}], fillvalue={})
    ],
    frozen=True,
)
PREFIX_BYTES = 2**29  # of the keys and values of prompts, which all points share
KINDS = {"training", "decoding"}
MOST_POINTS = 10_000
ENTRY = {"value": (float, None), "low": (float, None), "high": (float, None), "n": schema.COUNT, "note?": (str, None)}
SYSTEM = {"name": str, "metrics": {str: ENTRY}, "examples": [{"scores": {str: float}}]}
POINT = {  # evaluation.json of a point
    "settings": {"decoding": dict, "facts": dict},
    "systems": {"tuned": SYSTEM, "base?": SYSTEM},
    "comparisons": dict,
    "check": str,
}
LISTED = {"points": [{"name": str, "options": dict, "folder": str, "metrics?": {str: ENTRY}}], "kind?": KINDS}
LISTED["other?"] = dict(LISTED)  # sweep.json
SHOWN = ("bleu", "rouge_l", "bertscore", "perplexity", "exact_match", "ended")  # columns of the table


@dataclass(frozen=True)
class SweepConfig(DecodeConfig, Grid):
    """What is varied. A list of one value holds for every point."""

    study: bool = arg(
        False,
        "the study's grid: top_k 30 40 50 60 80, num_beams 2 4 5 6, temperature 0 0.5 0.7 1, 11 points in all",
        group="grid",
    )
    grid: str = arg(
        "axes",
        "axes: vary one option at a time, with the others at their defaults (or the first of their list, where the default "
        "is not in it); full: every combination",
        choices=("axes", "full"),
    )
    do_sample: bool = arg(True, "draw tokens, within beam search too, as the study did; a temperature of 0 draws none")
    stop: tuple[str, ...] = arg((), "texts that end an answer")
    base: bool = arg(False, "let the base model answer at every point too")
    train: tuple[str, ...] = arg(
        (),
        "vary training instead: options of train.py as NAME=V1,V2 (+ between the parts of a list), a run folder for each "
        "point. The others are those of --run, where it is a run",
    )
    retry_failed: bool = arg(
        False, "with --train: train again, from the last state, what failed at an earlier start; else it is passed over"
    )

    def __post_init__(self):
        ScoreConfig.__post_init__(self)
        positive(self, "batch_size")
        if self.run is None:
            raise ValueError("give --run DIR, a run folder of train.py")
        lists = {f.name: getattr(self, f.name) for f in AXES}
        if empty := [name for name, values in lists.items() if not values]:
            raise ValueError(f"{empty[0]} is an empty list, expected one value or more")
        given = [name for name in STUDY if len(lists[name]) > 1 or lists[name][0] != CENTRE[name]]
        if self.study and (given or not self.do_sample or self.grid != "axes"):
            raise ValueError(
                "--study is a grid of its own; leave out --study, or --do-sample, --grid and the lists of it"
            )
        varied = self.study or any(len(set(values)) > 1 for values in lists.values())
        if not varied and not self.train:
            raise ValueError(
                "nothing is varied: give --study, or a list such as --top-k 30 50 80, or --train NAME=V1,V2"
            )
        if varied and self.train:
            raise ValueError(
                "--train varies training, and a list varies decoding; do one, then the other on the best run"
            )
        if self.retry_failed and not self.train:
            raise ValueError("--retry-failed is about trainings that failed; it belongs to --train")


def sweep(config, say=screen.say):
    """Do every point of the grid that is not done yet. Returns what sweep.json holds.

    Raises ValueError on bad input, KeyboardInterrupt, with what is kept, after Ctrl-C or SIGTERM."""
    points, centre = (training_points if config.train else decoding_points)(config)
    folder = Path(config.run) / "sweep"
    run = None if config.train else Run(config, say)
    with hold(folder):
        content = Content(config, points, centre, folder)
        try:
            do_points(config, points, folder, run, content, say)
        except KeyboardInterrupt:
            raise stopped(config, content.kept(run)) from None
    if not content.systems:
        raise ValueError(f"no point was finished; the first: {content.found[points[0][0]]['error']}")
    say("\n".join(table(content.written)))
    say(f"written: {folder / 'sweep.json'}")
    say(next_command(folder.parent))
    return content.written


def do_points(config, points, folder, run, content, say):
    """Every point, one after the other, into `content`. run: None where training is varied."""
    if run is not None:
        run.prefix_room = PREFIX_BYTES
        if config.resume == "auto":
            for name, _, point in points:  # before the first is decoded: the last may be hours away
                run.check_answers(point, folder / name, config.base, name)
    judges = scoring.Judges(config, say)
    for number, (name, _, point) in enumerate(points, 1):
        say(f"== {name}, point {number} of {len(points)} ==")
        content.working_on = name
        if run is None:
            result = train_point(point, folder / name, config, judges, say)
        else:
            result = evaluate_point(run, point, folder / name, config, judges, name)
        content.add(name, result)


class Content:
    """What sweep.json holds, written anew with every point from the first finished one on: a kill leaves what is done. A
    sweep over training and one over decoding keep each other's points, as "other"."""

    def __init__(self, config, points, centre, folder):
        self.config, self.points, self.centre, self.folder = config, points, centre, folder
        self.kind = "training" if config.train else "decoding"
        self.found = {}  # name -> entry of a point that is done, or failed
        self.systems = {}  # name -> its tuned system, with the examples
        self.stored = read_list(folder / "sweep.json")  # of a sweep before this one
        self.earlier = None  # name -> entry of it that stays
        self.written = None
        self.working_on = None  # the name of a point

    def add(self, name, result):
        """result: what evaluation.json of a point holds, or why it failed."""
        entry = {"name": name, "options": next(options for n, options, _ in self.points if n == name), "folder": name}
        if isinstance(result, str):
            self.found[name] = entry | {"error": result}
        else:
            self.systems[name] = result["systems"]["tuned"]
            self.found[name] = entry | {"metrics": self.systems[name]["metrics"]}
            if self.earlier is None:
                self.earlier = earlier_points(self.stored, self.folder, self.kind, self.found[name])
        if self.systems:
            self.write()

    def write(self):
        entries = {name: {"name": name, "options": options, "folder": name} for name, options, _ in self.points}
        entries = {name: entry | {"pending": True} for name, entry in entries.items()} | self.earlier | self.found
        for name, entry in entries.items():
            if name != self.centre and self.centre in self.systems and "metrics" in entry:
                if "against_centre" not in entry:
                    system = self.systems.get(name) or read_point(self.folder / entry["folder"])["systems"]["tuned"]
                    entry["against_centre"] = against(system, self.systems[self.centre], self.config.resamples)
        self.written = {"format": 1, "date": date.today().isoformat(), "run": str(self.config.run)}
        self.written |= {"grid": self.config.grid, "kind": self.kind, "centre": self.centre}
        self.written["points"] = list(entries.values())
        of_other_kind = self.stored if self.stored.get("kind", self.kind) != self.kind else self.stored.get("other")
        if of_other_kind:
            self.written["other"] = {name: value for name, value in of_other_kind.items() if name != "other"}
        write_json(self.folder / "sweep.json", self.written)

    def kept(self, run):
        """What a stop leaves, in words."""
        listed = (self.written or (self.stored if self.config.resume == "auto" else {})).get("points", ())
        done = {entry["name"] for entry in listed if "metrics" in entry} & {name for name, _, _ in self.points}
        words = f"{len(done)} of {len(self.points)} points are done"
        if run is not None:
            return f"{words}, {run.kept()}" if run.working_on else words
        last = self.folder / str(self.working_on) / "last"
        return f"{words}, the last state of {self.working_on} is in {last}" if last.is_dir() else words


def read_list(path):
    """What sweep.json holds, {} where there is none. Raises ValueError where it is no list of points."""
    if not path.exists():
        return {}
    try:
        stored = read_json(path, LISTED)
    except ValueError as error:
        raise ValueError(
            f"{error}. It is no list of points; remove it: what was done is in the folders beside it"
        ) from None
    for entry in [*stored["points"], *stored.get("other", {}).get("points", [])]:
        if Path(entry["folder"]).name != entry["folder"]:
            raise ValueError(
                f"{path}: the point {screen.short(entry['name'])} has the folder {screen.short(entry['folder'])}"
            )
    return stored


def read_point(folder):
    """What evaluation.json of a point holds. Raises ValueError where it is none of a point, or was changed since."""
    path = folder / "evaluation.json"
    anew = "remove it: its answers are scored again"
    try:
        stored = read_json(path, POINT)
    except ValueError as error:
        raise ValueError(f"{error}. It is not what a sweep writes; {anew}") from None
    if stored != sealed(stored):
        raise ValueError(f"{path} was changed after it was written; {anew}")
    return stored


def earlier_points(stored, folder, kind, ours):
    """{name: entry} of the points of an earlier sweep that differ from ours, an entry of this one, in what was varied only:
    they stay in sweep.json, to be compared with the middle of this sweep."""
    kept = {}
    earlier = stored if stored.get("kind") == kind else stored.get("other") or {}
    settings = lambda entry: read_point(folder / entry["folder"])["settings"]
    for entry in earlier.get("points", ()):
        if "metrics" not in entry or not (folder / entry["folder"] / "evaluation.json").is_file():
            continue
        sides = settings(entry), settings(ours)
        varied = {*entry["options"], *ours["options"]}
        for side in sides:
            side["decoding"] = {name: value for name, value in side["decoding"].items() if name not in varied}
            side["adapter"] = side["metrics"] = None
            if kind == "training":
                side["facts"] = None
        if sides[0] == sides[1]:
            kept[entry["name"]] = {name: value for name, value in entry.items() if name != "against_centre"}
    return kept


def combinations(lists, defaults, grid):
    """(the points, the one in the middle), each {name: value}. lists: {name: values}, of which some have several."""
    lists = {name: list(dict.fromkeys(values)) for name, values in lists.items()}
    middle = {name: defaults[name] if defaults[name] in values else values[0] for name, values in lists.items()}
    if grid == "full":
        points = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    else:
        points = [middle | {name: value} for name, values in lists.items() for value in values]
    return list({json.dumps(point): point for point in points}.values()), middle


# --- decoding ---


def decoding_points(config):
    """([(name, options, EvaluateConfig)], name of the middle one). Raises ValueError on options that do not go together."""
    lists = {f.name: getattr(config, f.name) for f in AXES} | (STUDY if config.study else {})
    defaults = {f.name: CENTRE.get(f.name, f.default) for f in AXES}
    points, middle = combinations(lists, defaults, config.grid)
    varied = [name for name, values in lists.items() if len(set(values)) > 1]
    made = []
    for point in points:
        options = evaluate_config(config, config.run, point)
        shown = {name: point[name] for name in dict.fromkeys(("top_k", "num_beams", "temperature", *varied))}
        made.append((point_name(GenerateConfig(**options.given()), varied), shown, options))
    return distinct(made), point_name(GenerateConfig(**evaluate_config(config, config.run, middle).given()), varied)


def evaluate_config(config, run, decoding):
    """The EvaluateConfig of one point: what a sweep shares, with the decoding options of the point. An option that was not
    given, and is none of the study's, is left to the checkpoint's generation_config.json."""
    shared = {f.name: getattr(config, f.name) for f in fields(DecodeConfig)}
    shared |= {"run": str(run), "base": config.base, "do_sample": config.do_sample, "stop": config.stop}
    left = {f.name for f in AXES if f.name not in CENTRE and getattr(config, f.name) == (f.default,)}
    return EvaluateConfig(**shared | {name: value for name, value in decoding.items() if name not in left})


def evaluate_point(run, point, folder, config, judges, name=None):
    """What evaluation.json of a point holds: that on disk where nothing has changed, else answered and scored."""
    if (stored := stored_result(run, point, folder, config)) is not None:
        return stored
    return run.evaluate(point, folder, judges, config.base, say=lambda line: None, point=name)


def stored_result(run, point, folder, config):
    """The evaluation.json of a point that was finished with these settings, or None."""
    path = folder / "evaluation.json"
    if config.resume == "never" or not path.is_file():
        return None
    stored = read_point(folder)
    now = run.settings(point)
    systems = ["tuned", "base"][: 1 + config.base]
    names = scoring.asked_metrics(point)
    same = list(stored["systems"]) == systems and {key: stored["settings"].get(key) for key in now} == now
    return stored if same and names in (None, stored["settings"].get("metrics")) else None


# --- training ---


def training_points(config):
    """([(name, options, TrainConfig)], name of the middle one)."""
    folder = Path(config.run)
    stored = {}
    if (folder / "config.json").is_file():
        options = read_options(folder)
        stored = {f.name: getattr(options, f.name) for f in fields(TrainConfig)}
    lists = {}
    for text in config.train:
        name, values = read_axis(text)
        lists[name] = values
    fixed = {name: values[0] for name, values in lists.items() if len(values) == 1}
    lists = {name: values for name, values in lists.items() if len(values) > 1}
    if not lists:
        raise ValueError("--train varies nothing: give one option several values, such as learning_rate=1e-4,2e-4")
    base = TrainConfig(**stored | fixed)
    points, middle = combinations(lists, {name: getattr(base, name) for name in lists}, config.grid)
    name_of = lambda point: "_".join(  # a folder: the / of a file or a hub id is none of its own
        f"{name}{'+'.join(v) if isinstance(v, tuple) else written(v)}".replace("/", "-") for name, v in point.items()
    )
    made = []
    for point in points:
        run = {"run": str(folder / "sweep" / name_of(point)), "resume": config.resume}
        made.append((name_of(point), point, base.replace(**point, **run)))
    return distinct(made), name_of(middle)


def distinct(points):
    """The points as they are. Raises ValueError where two have one name, which is that of their folder."""
    names = [name for name, _, _ in points]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"two points have the name {twice[0]}, but each has a folder of its own; leave one of them out"
        )
    return points


def read_axis(text):
    """(name, values) of NAME=V1,V2, an option of training."""
    name, is_given, values = text.partition("=")
    known = {f.name: f for f in fields(TrainConfig) if f.name not in ("run", "resume")}
    if not is_given or name not in known:
        raise ValueError(
            f"--train {text}: expected NAME=V1,V2 with an option of train.py, such as learning_rate=1e-4,2e-4"
        )
    kind, is_list, _ = field_type(TrainConfig, known[name])
    read = []
    for value in values.split(","):
        try:
            one = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise ValueError(f"--train {text}: {value!r} is no {kind.__name__}, which {name} is") from None
        one = tuple(value.split("+")) if is_list else one
        if expected := misfit(TrainConfig, known[name], one):
            raise ValueError(f"--train {text}: {value!r} is not {expected}")
        read.append(one)
    return name, list(dict.fromkeys(read))


def train_point(options, folder, config, judges, say):
    """Train one run, or find it trained, and evaluate it. Returns what evaluation.json holds, or why the training failed,
    which failed.json keeps where it was found by training: what is refused before that costs nothing to look at again."""
    decoding = {f.name: getattr(config, f.name)[0] for f in AXES}
    point = evaluate_config(config, folder, decoding)
    if config.resume == "auto" and (folder / "evaluation.json").is_file() and (folder / "adapter").is_dir():
        run = Run(point, lambda line: None)
        if run.options == options.replace(resume="auto"):
            if (stored := stored_result(run, point, folder, config)) is not None:
                return stored
    failed = folder / "failed.json"
    if config.resume == "auto" and not config.retry_failed and (error := stored_failure(failed, options)) is not None:
        say(
            f"passed over, as it failed at an earlier start: {error}. --retry-failed trains it again (or remove {failed})"
        )
        return error
    failed.unlink(missing_ok=True)
    try:
        train(options, say)
    except (FloatingPointError, ValueError) as error:  # too high a rate, a target that is none: others may do well
        say(f"{folder.name} failed: {error}")
        if isinstance(error, FloatingPointError) or isinstance(error.__cause__, torch.OutOfMemoryError):
            write_json(failed, {"error": str(error), "date": date.today().isoformat(), "options": what_trains(options)})
        return str(error)
    return evaluate_point(Run(point, say), point, folder, config, judges)


def stored_failure(path, options):
    """Why a training with these options failed, or None where none did."""
    if not path.is_file():
        return None
    stored = read_json(path)
    if not isinstance(stored, dict) or not isinstance(stored.get("error"), str):
        raise ValueError(f"{path} does not say what failed; remove it, and the point is trained again")
    return stored["error"] if stored.get("options") == what_trains(options) else None


def what_trains(options):
    """A TrainConfig as JSON holds it, without where it is written."""
    stored = json.loads(json.dumps(asdict(options)))
    return {name: value for name, value in stored.items() if name not in ("run", "resume")}


# --- the table ---


def against(system, middle, resamples):
    """Each metric that is a mean, compared example by example with the middle point. Returns {name: comparison}."""
    found = {}
    for name in system["metrics"]:
        values = [[example["scores"].get(name) for example in side["examples"]] for side in (system, middle)]
        if METRICS[name].is_mean and None not in values[0] + values[1]:
            found[name] = scoring.compare(*(Rows(np.array(side)) for side in values), resamples, seed=0)
    return found


def table(content, width=None):
    """Lines of text: a point a line. width: as for screen.table_lines()."""
    done = [point for point in content["points"] if "metrics" in point]
    if not done:
        return ["no point was finished"]
    shown = (*SHOWN, "reference_perplexity") if content["kind"] == "training" else SHOWN  # decoding does not change it
    names = [name for name in shown if name in done[0]["metrics"]] or list(done[0]["metrics"])
    rows, tests = [["", *(METRICS[name].title for name in names)]], 0
    for point in content["points"]:
        row = [point["name"]]
        for name in names:
            entry = point.get("metrics", {}).get(name)
            test = point.get("against_centre", {}).get(name)
            tests += test is not None
            mark = "*" if test and test["p_permutation"] is not None and test["p_permutation"] < 0.05 else " "
            row.append(
                "failed " if entry is None else scoring.shown(*(entry[k] for k in ("value", "low", "high"))) + mark
            )
        rows.append(row)
    n = next(iter(done[0]["metrics"].values()))["n"]
    foot = [f"{n} examples. In brackets: 95 % bootstrap interval over them."]
    if tests:
        foot.append(f"*: differs from {content['centre']} with p < 0.05 (paired permutation test).")
        chance = f"{tests / 20:.1f}".removesuffix(".0")
        foot.append(
            f"With {tests} test{'s' * (tests > 1)}, about {chance} false alarm{'s' * (chance != '1')} are expected by chance."
        )
    return table_lines(rows, width) + [line for text in foot for line in wrap(text, width)]
