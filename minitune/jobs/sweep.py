"""Evaluates a grid of decoding options, with the model loaded once, or of training options, with a run folder for each point: the
job of scripts/sweep.py.

Each point has a folder with evaluation.json. sweep/sweep.json lists the points and is written after each one. A rerun uses what
is there with the same settings: answers, scores, training runs, and the error of a training that failed (failed.json)."""

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

# Options of decoding that a sweep cannot vary.
FIXED = ("do_sample", "num_return_sequences", "stop", "lookup", "eos_ids")
AXES = [f for f in OPTIONS if f.name not in FIXED]
AXES.sort(key=lambda f: list(STUDY).index(f.name) if f.name in STUDY else len(STUDY))  # the study's options first
Grid = make_dataclass(  # the options of generate, with a list in place of each value
    "Grid",
    [
        (f.name, tuple[f.type, ...], arg((CENTRE.get(f.name, f.default),), **f.metadata, **heading))
        for f, heading in itertools.zip_longest(AXES, [{"group": "decoding: several values are varied"}], fillvalue={})
    ],
    frozen=True,
)
PREFIX_BYTES = 2**29  # most bytes for the prompts' keys and values, which all points share
KINDS = {"training", "decoding"}
MOST_POINTS = 10_000
ENTRY = {"value": (float, None), "low": (float, None), "high": (float, None), "n": schema.COUNT, "note?": (str, None)}
SYSTEM = {"name": str, "metrics": {str: ENTRY}, "examples": [{"scores": {str: float}}]}
POINT = {  # shape of a point's evaluation.json
    "settings": {"decoding": dict, "facts": dict},
    "systems": {"tuned": SYSTEM, "base?": SYSTEM},
    "comparisons": dict,
    "check": str,
}
# Shape of sweep.json.
LISTED = {"points": [{"name": str, "options": dict, "folder": str, "metrics?": {str: ENTRY}}], "kind?": KINDS}
LISTED["other?"] = dict(LISTED)
SHOWN = ("bleu", "rouge_l", "bertscore", "perplexity", "exact_match", "ended")  # columns of the table


@dataclass(frozen=True)
class SweepConfig(DecodeConfig, Grid):
    """The options of sweep.py. A list with one value applies to every point."""

    study: bool = arg(
        False,
        "use the study's grid: top_k 30 40 50 60 80, num_beams 2 4 5 6, temperature 0 0.5 0.7 1; 11 points",
        group="grid",
    )
    grid: str = arg(
        "axes",
        "axes: vary one option at a time, with the others at their defaults (or at the first value of their list, if the default "
        "is not in it); full: every combination",
        choices=("axes", "full"),
    )
    do_sample: bool = arg(
        True, "draw tokens, in beam search too, as in the study; points with temperature 0 do not sample"
    )
    stop: tuple[str, ...] = arg((), "texts that end an answer")
    base: bool = arg(False, "evaluate the base model at every point too")
    train: tuple[str, ...] = arg(
        (),
        "vary training instead: options of train.py as NAME=V1,V2 (with + between the items of a list), and a run folder for "
        "each point. Other options are taken from --run, if it is a run",
    )
    retry_failed: bool = arg(
        False, "with --train: train points that failed earlier again, from their last state; otherwise they are skipped"
    )

    def __post_init__(self):
        ScoreConfig.__post_init__(self)
        positive(self, "batch_size")
        if self.run is None:
            raise ValueError("give --run DIR, a run folder of train.py")
        lists = {f.name: getattr(self, f.name) for f in AXES}
        if empty := [name for name, values in lists.items() if not values]:
            raise ValueError(f"{empty[0]} is an empty list, expected at least one value")
        given = [name for name in STUDY if len(lists[name]) > 1 or lists[name][0] != CENTRE[name]]
        if self.study and (given or not self.do_sample or self.grid != "axes"):
            raise ValueError(
                "--study defines the whole grid; leave out --study, or leave out --do-sample, --grid and the lists of its options"
            )
        varied = self.study or any(len(set(values)) > 1 for values in lists.values())
        if not varied and not self.train:
            raise ValueError(
                "nothing is varied: give --study, or a list such as --top-k 30 50 80, or --train NAME=V1,V2"
            )
        if varied and self.train:
            raise ValueError(
                "--train varies training, and a list varies decoding; vary training first, then decoding on the best run"
            )
        if self.retry_failed and not self.train:
            raise ValueError("--retry-failed is for trainings that failed; use it with --train")


def sweep(config, say=screen.say):
    """Evaluate all points of the grid that are not done yet. Returns the content of sweep.json.

    Raises ValueError on bad input, and KeyboardInterrupt, whose text says what is kept, after Ctrl-C or SIGTERM."""
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
        raise ValueError(f"no point was finished; the error of the first: {content.found[points[0][0]]['error']}")
    say("\n".join(table(content.written)))
    say(f"written: {folder / 'sweep.json'}")
    say(next_command(folder.parent))
    return content.written


def do_points(config, points, folder, run, content, say):
    """Evaluate the points one after another and add them to `content`.

    points: as returned by decoding_points() or training_points(). folder: of the sweep. run: the loaded Run, or None for a sweep
    over training."""
    if run is not None:
        run.prefix_room = PREFIX_BYTES
        if config.resume == "auto":
            for name, _, point in points:  # check all before decoding: the last point may be hours away
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
    """The content of sweep.json. It is written after each point, once one is finished, so that a kill loses nothing.

    A sweep over training and one over decoding keep each other's points, under "other"."""

    def __init__(self, config, points, centre, folder):
        self.config, self.points, self.centre, self.folder = config, points, centre, folder
        self.kind = "training" if config.train else "decoding"
        self.found = {}  # name -> entry of a point that is done or has failed
        self.systems = {}  # name -> the point's tuned system, with its examples
        self.stored = read_list(folder / "sweep.json")  # written by an earlier sweep
        self.earlier = None  # name -> entry of an earlier sweep that is kept
        self.written = None
        self.working_on = None  # name of the current point

    def add(self, name, result):
        """Add the result of a point: the content of its evaluation.json, or the error message of a point that failed."""
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
        """Write sweep.json: points that are done, failed, still pending, and kept from earlier sweeps."""
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
        """What is kept after a stop, in words. run: as in do_points()."""
        listed = (self.written or (self.stored if self.config.resume == "auto" else {})).get("points", ())
        done = {entry["name"] for entry in listed if "metrics" in entry} & {name for name, _, _ in self.points}
        words = f"{len(done)} of {len(self.points)} points are done"
        if run is not None:
            return f"{words}, {run.kept()}" if run.working_on else words
        last = self.folder / str(self.working_on) / "last"
        return f"{words}, the last state of {self.working_on} is in {last}" if last.is_dir() else words


def read_list(path):
    """The content of sweep.json, or {} if there is no file. Raises ValueError if it is not a list of points."""
    if not path.exists():
        return {}
    try:
        stored = read_json(path, LISTED)
    except ValueError as error:
        raise ValueError(
            f"{error}. It is not a list of points; remove it, since the results are in the folders of the points"
        ) from None
    for entry in [*stored["points"], *stored.get("other", {}).get("points", [])]:
        if Path(entry["folder"]).name != entry["folder"]:
            raise ValueError(
                f"{path}: the point {screen.short(entry['name'])} has the folder {screen.short(entry['folder'])}, expected a "
                "name without a path"
            )
    return stored


def read_point(folder):
    """The content of a point's evaluation.json. Raises ValueError if it is something else, or was changed after it was
    written."""
    path = folder / "evaluation.json"
    anew = "remove it, and the answers are scored again"
    try:
        stored = read_json(path, POINT)
    except ValueError as error:
        raise ValueError(f"{error}. It was not written by a sweep; {anew}") from None
    if stored != sealed(stored):
        raise ValueError(f"{path} was changed after it was written; {anew}")
    return stored


def earlier_points(stored, folder, kind, ours):
    """{name: entry} of the points of an earlier sweep that can be compared with this one: their settings differ from those of
    `ours`, an entry of this sweep, only in varied options. They are kept in sweep.json.

    stored: the earlier sweep.json. kind: "training" or "decoding"."""
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
    """(list of the points, the middle point), each {name: value}.

    lists: {name: values}. defaults: {name: value} of the middle point, if it is in the list. grid: as in SweepConfig."""
    lists = {name: list(dict.fromkeys(values)) for name, values in lists.items()}
    middle = {name: defaults[name] if defaults[name] in values else values[0] for name, values in lists.items()}
    if grid == "full":
        points = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    else:
        points = [middle | {name: value} for name, values in lists.items() for value in values]
    return list({json.dumps(point): point for point in points}.values()), middle


# --- decoding ---


def decoding_points(config):
    """([(name, varied options, EvaluateConfig), ...], name of the middle point). Raises ValueError on options that exclude each
    other."""
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
    """The EvaluateConfig of one point. decoding: {name: value} of its options of decoding.

    An option that was not given and is not in CENTRE is left to the checkpoint's generation_config.json."""
    shared = {f.name: getattr(config, f.name) for f in fields(DecodeConfig)}
    shared |= {"run": str(run), "base": config.base, "do_sample": config.do_sample, "stop": config.stop}
    left = {f.name for f in AXES if f.name not in CENTRE and getattr(config, f.name) == (f.default,)}
    return EvaluateConfig(**shared | {name: value for name, value in decoding.items() if name not in left})


def evaluate_point(run, point, folder, config, judges, name=None):
    """The content of a point's evaluation.json: the stored one if its settings are the same, else computed."""
    if (stored := stored_result(run, point, folder, config)) is not None:
        return stored
    return run.evaluate(point, folder, judges, config.base, say=lambda line: None, point=name)


def stored_result(run, point, folder, config):
    """The content of the evaluation.json of a point that was finished with these settings, or None."""
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
    """([(name, varied options, TrainConfig), ...], name of the middle point). Raises ValueError on bad options."""
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
    name_of = lambda point: "_".join(  # used as the name of a folder, so it must not contain a /
        f"{name}{'+'.join(v) if isinstance(v, tuple) else written(v)}".replace("/", "-") for name, v in point.items()
    )
    made = []
    for point in points:
        run = {"run": str(folder / "sweep" / name_of(point)), "resume": config.resume}
        made.append((name_of(point), point, base.replace(**point, **run)))
    return distinct(made), name_of(middle)


def distinct(points):
    """`points`, unchanged. Raises ValueError if two have the same name, because the name is also the folder."""
    names = [name for name, _, _ in points]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two points have the name {twice[0]}, but each needs its own folder; leave one of them out")
    return points


def read_axis(text):
    """(name, list of values) of the text NAME=V1,V2, an option of training. Raises ValueError if it is something else."""
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
            raise ValueError(f"--train {text}: {value!r} is not {schema.words(kind)}, which {name} takes") from None
        one = tuple(value.split("+")) if is_list else one
        if expected := misfit(TrainConfig, known[name], one):
            raise ValueError(f"--train {text}: {value!r} is not {expected}")
        read.append(one)
    return name, list(dict.fromkeys(read))


def train_point(options, folder, config, judges, say):
    """Train one run, unless it is trained already, and evaluate it. Returns the content of evaluation.json, or the error message
    if the training failed.

    failed.json keeps the error if it came from the training itself. Options that are refused before are simply tried again."""
    decoding = {f.name: getattr(config, f.name)[0] for f in AXES}
    point = evaluate_config(config, folder, decoding)
    if config.resume == "auto" and (folder / "evaluation.json").is_file() and (folder / "adapter").is_dir():
        run = Run(point, lambda line: None)
        if run.options == options.replace(resume="auto"):
            if (stored := stored_result(run, point, folder, config)) is not None:
                return stored
    failed = folder / "failed.json"
    if config.resume == "auto" and not config.retry_failed and (error := stored_failure(failed, options)) is not None:
        say(f"skipped, because it failed earlier: {error}. --retry-failed trains it again (or remove {failed})")
        return error
    failed.unlink(missing_ok=True)
    try:
        train(options, say)
    except (FloatingPointError, ValueError) as error:  # such as a learning rate that is too high: other points may work
        say(f"{folder.name} failed: {error}")
        if isinstance(error, FloatingPointError) or isinstance(error.__cause__, torch.OutOfMemoryError):
            write_json(failed, {"error": str(error), "date": date.today().isoformat(), "options": what_trains(options)})
        return str(error)
    return evaluate_point(Run(point, say), point, folder, config, judges)


def stored_failure(path, options):
    """The stored error of a training with these options, or None."""
    if not path.is_file():
        return None
    stored = read_json(path)
    if not isinstance(stored, dict) or not isinstance(stored.get("error"), str):
        raise ValueError(f"{path} has no error message; remove it, and the point is trained again")
    return stored["error"] if stored.get("options") == what_trains(options) else None


def what_trains(options):
    """A TrainConfig as a JSON value, without the run folder and --resume."""
    stored = json.loads(json.dumps(asdict(options)))
    return {name: value for name, value in stored.items() if name not in ("run", "resume")}


# --- the table ---


def against(system, middle, resamples):
    """{metric: comparison} of a point with the middle point, for metrics that are means. Both are compared example by example."""
    found = {}
    for name in system["metrics"]:
        values = [[example["scores"].get(name) for example in side["examples"]] for side in (system, middle)]
        if METRICS[name].is_mean and None not in values[0] + values[1]:
            found[name] = scoring.compare(*(Rows(np.array(side)) for side in values), resamples, seed=0)
    return found


def table(content, width=None):
    """The table of points as lines of text. content: that of sweep.json. width: as in screen.table_lines()."""
    done = [point for point in content["points"] if "metrics" in point]
    if not done:
        return ["no point was finished"]
    # Decoding does not change the perplexity of the references.
    shown = (*SHOWN, "reference_perplexity") if content["kind"] == "training" else SHOWN
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
