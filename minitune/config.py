"""Options: a frozen dataclass a job, and the command line made from it. The only place where a default is written."""

import argparse
import dataclasses
import errno
import math
import signal
import sys
import types
import typing
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

from minitune import schema, screen
from minitune.files import read_json
from minitune.schema import Number
from minitune.screen import short


def arg(default, help, **extra):
    """A dataclass field with its help text. extra: choices=(...), the values allowed; low and high, the bounds of a number
    (of a whole number 0 and 2^63 - 1, where nothing else is said); positional=True, a list that is typed without --name
    and shown as metavar; is_option=False, a field that only Python code and files set."""
    return field(default=default, metadata={"help": help, **extra})


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse's own prints every option first
        self.exit(2, f"error: {message} (--help lists the options)\n")


def parse(cls, argv=None, description=None):
    """Build `cls` from the command line: field `lora_rank` becomes option --lora-rank.

    Strength, weakest first: what `cls` gives a field that is not set (a recipe of TrainConfig, the default), the JSON
    file of --config, the options typed. Exits 2 with one line on an unknown option; --debug shows
    tracebacks. Raises ValueError on a value that `cls` refuses."""
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="JSON file with options, such as the config.json of a run")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for f in fields(cls):
        if not f.metadata.get("is_option", True):
            continue
        flag, (kind, is_list, _) = "--" + f.name.replace("_", "-"), field_type(cls, f)
        shown = (" ".join(map(str, f.default)) or None) if is_list and f.default is not None else f.default
        help_text = f.metadata["help"] + ("" if shown is None else f" (default: {shown})")
        help_text = help_text.replace("%", "%%")
        common = {"default": argparse.SUPPRESS, "help": help_text}
        if f.metadata.get("positional"):
            parser.add_argument(f.name, type=kind, nargs="*", metavar=f.metadata["metavar"], **common)
        elif kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif is_list:
            parser.add_argument(flag, type=kind, nargs="+", choices=f.metadata.get("choices"), **common)
        else:
            parser.add_argument(
                flag,
                type=kind,
                choices=f.metadata.get("choices"),
                metavar=kind.__name__.upper() if "choices" not in f.metadata else None,
                **common,
            )
    typed = vars(parser.parse_intermixed_args(argv))  # options before, between and after what has no name
    path, _ = typed.pop("config"), typed.pop("debug")
    if path == "":
        parser.error("--config is empty; give a JSON file, or leave the option out")
    stored = from_file(cls, path) if path is not None else {}
    values = {**stored, **typed}
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def run_script(cls, job, description):
    """What a script does: parse `cls` from the command line, run job(config), and end with the exit code.

    0: done. 2: the user's input was wrong, in one line on stderr. 1: the run itself failed. 130: stopped by Ctrl-C or
    SIGTERM, with what the job says of what is kept."""
    screen.prepare()
    try:
        with sigterm_as_ctrl_c():
            job(parse(cls, description=description))
    except (ValueError, FloatingPointError, OSError, KeyboardInterrupt) as error:
        if "--debug" in sys.argv:
            raise
        kinds = {FloatingPointError: 1, OSError: 2 if error_is_of_a_path(error) else 1, KeyboardInterrupt: 130}
        text = str(error) or "by Ctrl-C"
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        sys.stderr.write(f"{'stopped' if isinstance(error, KeyboardInterrupt) else 'error'}: {text}\n")
        sys.exit(next((code for kind, code in kinds.items() if isinstance(error, kind)), 2))


@contextmanager
def sigterm_as_ctrl_c():
    """While open, SIGTERM raises KeyboardInterrupt: a job that is ended by its time limit says what is kept too. A training
    takes both signals for itself while its loop runs (train.StopSignal), and gives them back."""

    def stop(number, frame):
        raise KeyboardInterrupt("by SIGTERM")

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever started it takes the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def error_is_of_a_path(error):
    """Whether an OSError says that a path of the user's is wrong, and not that the machine failed."""
    wrong = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
    return isinstance(error, OSError) and error.errno in wrong


def from_file(cls, path):
    """The options in the JSON file at `path`, as a dict. Raises ValueError on an unknown key or a value of the wrong
    type."""
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, expected an object with options of {cls.__name__}")
    known = {f.name: f for f in fields(cls)}
    if unknown := sorted(set(stored) - set(known)):
        raise ValueError(f"{path} has options that {cls.__name__} does not know: {', '.join(unknown)}; remove them")
    for name, value in stored.items():
        if expected := misfit(cls, known[name], value):
            raise ValueError(f"{path}: {name} is {short(value)}, expected {expected}")
    return stored


def misfit(cls, f, value):
    """What was expected, in words, where `value` is not of the type, the choices or the bounds of a field; None where it
    fits."""
    kind, is_list, optional = field_type(cls, f)
    if value is None and optional:
        return None
    choices = f.metadata.get("choices")
    one = frozenset(choices) if choices else bounds(f, kind) or kind
    is_nested = typing.get_origin(kind) is tuple  # a list of lists
    if is_nested:
        one = [bounds(f, typing.get_args(kind)[0])]
    items = value if is_list and isinstance(value, (list, tuple)) else [value]
    if is_list == isinstance(value, (list, tuple)):
        if not any(schema.misfit(list(item) if is_nested else item, one, "") for item in items):
            return None
    if kind is int and not all(type(item) is int for item in items):
        one = int  # the bounds are not what was wrong
    return f"one of {', '.join(choices)}" if choices else schema.words([one] if is_list else one)


def bounds(f, kind):
    """The schema.Number of a field that holds numbers, None of another."""
    if kind is int:
        return Number(f.metadata.get("low", 0), f.metadata.get("high", 2**63 - 1), is_whole=True)
    return Number(f.metadata.get("low", -math.inf), f.metadata.get("high", math.inf)) if kind is float else None


def field_type(cls, f):
    """(type of one value, whether the field holds several, whether None is allowed) of a dataclass field."""
    hint = typing.get_type_hints(cls)[f.name]
    alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    optional = type(None) in alternatives
    hint = next(a for a in alternatives if a is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


def check_types(config):
    """Raises ValueError where a field is not of its type or its choices: Python code builds configs too."""
    for f in fields(config):
        if expected := misfit(type(config), f, getattr(config, f.name)):
            raise ValueError(f"{f.name} is {short(getattr(config, f.name))}, expected {expected}")


def not_empty(config):
    """Raises ValueError where a field is an empty text, of a shell variable that is: it must not mean 'not set'."""
    for f in fields(config):
        value = getattr(config, f.name)
        if value == "" or isinstance(value, tuple) and "" in value:
            raise ValueError(f"{f.name} is empty; give a value, or leave the option out")


def positive(config, *names):
    """Raises ValueError where one of these fields is not above 0 (None passes: it means 'not set')."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}, expected a number above 0")


STUDY = {"quantize": "nf4", "lora_alpha": 16.0, "learning_rate": 2e-4, "batch_size": 2}
LLAMA_STUDY = {
    **STUDY,
    "lora_rank": 64,
    "lora_dropout": 0.1,
    "lora_targets": ("q_proj", "v_proj"),
    "schedule": "constant",
    "warmup": 0.03,
    "weight_decay": 0.001,
    "max_grad_norm": 0.3,
    "group_by_length": True,
}
TINY = {  # fp32: at this size it is faster than bf16, also on a CPU with bf16 units
    "lora_rank": 16,
    "lora_alpha": 32.0,
    "lora_targets": ("all-linear",),
    "dtype": "fp32",
    "epochs": 2.0,
    "batch_size": 16,
    "learning_rate": 3e-3,
    "warmup": 0.05,
    "max_length": 256,
    "sample_tokens": 24,
}
RECIPES = {  # what --model NAME means beyond the weights: the study's settings, and ours for the embedded models
    "llama2": {**LLAMA_STUDY, "accumulation": 8},
    "mistral": {**LLAMA_STUDY, "accumulation": 16},
    "phi2": {
        **STUDY,
        "lora_rank": 16,
        "lora_dropout": 0.05,
        "schedule": "linear",
        "max_grad_norm": 1.0,
        "max_length": 2048,
        "lora_targets": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    },
    "tiny-mistral": TINY,
    "tiny-llama": TINY,
    "tiny-phi": TINY,
}


@dataclass(frozen=True, init=False)
class TrainConfig:
    """Everything that a training run depends on. A run's config.json holds these fields and is a valid --config.

    What is not given has the value of the model's recipe (RECIPES), else the default below."""

    model: str = arg(
        "tiny-mistral",
        "llama2, mistral, phi2, an embedded model (tiny-mistral, tiny-llama, tiny-phi), a hub id, "
        "or a folder with config.json and *.safetensors. The short names and the embedded models bring settings of their "
        "own, which go before the defaults shown here: see RECIPES in minitune/config.py",
    )
    revision: str | None = arg(None, "branch, tag or commit of a hub id")
    data: str | None = arg(
        None,
        "JSON, JSONL or CSV file; 'alpaca' (52,002 rows, downloaded) or 'embedded'. "
        "Not set: embedded for an embedded model, else alpaca",
    )
    test_data: str | None = arg(None, "file with held-out rows; not set: they are split from --data")
    test_size: float | None = arg(
        None,
        "held-out part of --data: a share below 1 (rounded up) or a number of rows, 0 for none. "
        "Not set: 0.0005 for alpaca, 0.05 for a file",
    )
    split_seed: int = arg(42, "seed of the split into training and held-out rows")
    run: str | None = arg(None, "run folder; not set: runs/MODEL-lora or runs/MODEL-qlora")
    resume: str = arg(
        "auto", "auto: go on from the state in --run, if there is one; never: start again", choices=("auto", "never")
    )

    max_length: int = arg(512, "longest row in tokens")
    over_length: str = arg(
        "truncate", "a longer row: cut the end of its answer, drop it, or stop", choices=("truncate", "drop", "stop")
    )
    loss_on: str = arg("answer", "tokens that are supervised", choices=("answer", "all"))
    special_text: str = arg(
        "text",
        "what the text of a special token in a row (<s>, <|im_start|>) is: text like any, or the token, for rows that a chat "
        "template made",
        choices=("text", "tokens"),
    )

    lora_rank: int = arg(16, "rank r of the adapter")
    lora_alpha: float = arg(16.0, "the adapter is scaled by alpha / r")
    lora_dropout: float = arg(0.0, "dropout on the input of the adapter, 0 to 1")
    lora_targets: tuple[str, ...] | None = arg(
        None, "names of the linear layers that get an adapter, or all-linear; not set: PEFT's for the architecture"
    )
    use_rslora: bool = arg(False, "scale by alpha / sqrt(r) (rsLoRA)")
    quantize: str = arg(
        "none",
        "frozen weights: as they are, 4-bit NF4, or NF4 with double quantisation",
        choices=("none", "nf4", "nf4-dq"),
    )
    dtype: str = arg(
        "auto", "compute dtype; auto chooses by the device and says why", choices=("auto", "fp32", "bf16", "fp16")
    )
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")

    epochs: float = arg(1.0, "passes over the training rows")
    max_steps: int | None = arg(None, "optimizer steps; overrides --epochs")
    batch_size: int = arg(4, "rows in a micro-batch")
    accumulation: int = arg(1, "micro-batches in an optimizer step")
    group_by_length: bool = arg(False, "put rows of similar length into a micro-batch")
    learning_rate: float = arg(2e-4, "peak learning rate")
    schedule: str = arg("cosine", "learning rate after warm-up", choices=("constant", "linear", "cosine"))
    warmup: float = arg(0.0, "warm-up: a share of the steps below 1, or a number of steps")
    weight_decay: float = arg(0.0, "AdamW weight decay of the matrices")
    adam_beta1: float = arg(0.9, "AdamW beta1")
    adam_beta2: float = arg(0.999, "AdamW beta2")
    adam_eps: float = arg(1e-8, "AdamW epsilon")
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm; 0: not clipped")
    checkpointing: bool = arg(False, "recompute activations in the backward pass: less memory, a third more time")
    spike_factor: float = arg(
        3.0,
        "stop when a step's loss is this many times the median of the last 16 steps, and 2 nats above "
        "it; 0: only a loss that is not finite stops",
    )

    log_every: int = arg(1, "steps between lines of metrics.jsonl")
    eval_every: int | None = arg(None, "steps between held-out losses; not set: ten times in a run")
    save_every: int | None = arg(None, "steps between saved states; not set: as --eval-every")
    save_minutes: float = arg(5.0, "minutes after which the state is saved too, whatever --save-every says")
    patience: int | None = arg(None, "stop after this many held-out losses without a new best; not set: never")
    keep: str = arg(
        "best", "what adapter/ holds in the end: the best held-out loss, or the last step", choices=("best", "last")
    )
    samples: int = arg(3, "held-out prompts that are answered, greedily, at every evaluation")
    sample_tokens: int = arg(64, "longest sample answer, in tokens")
    seed: int = arg(42, "seed of the adapter's start, the order of the rows and the dropout")

    @staticmethod
    def recipe(values):
        """The defaults that come with a model's short name."""
        model = values.get("model", TrainConfig.model)
        return RECIPES.get(model, {}) if isinstance(model, str) else {}

    def __init__(self, **given):
        if unknown := given.keys() - {f.name for f in fields(self)}:
            raise TypeError(f"TrainConfig has no option {screen.some(sorted(unknown))}")
        for name, value in ({f.name: f.default for f in fields(self)} | self.recipe(given) | given).items():
            object.__setattr__(self, name, value)
        check_types(self)
        not_empty(self)
        positive(
            self,
            "max_length",
            "lora_rank",
            "lora_alpha",
            "epochs",
            "max_steps",
            "batch_size",
            "accumulation",
            "learning_rate",
            "log_every",
            "eval_every",
            "save_every",
            "save_minutes",
            "patience",
            "sample_tokens",
            "adam_eps",
        )
        for name in ("warmup", "weight_decay", "max_grad_norm", "samples", "spike_factor", "test_size"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ValueError(f"{name} is {value}, expected 0 or more")
        for name in ("lora_dropout", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more and below 1")
        if self.lora_rank > 2**16:
            raise ValueError(f"lora_rank is {self.lora_rank}, expected at most 65536; 8 to 64 are usual")
        for name in ("seed", "split_seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a whole number from 0 to 2^63 - 1")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup is {self.warmup}, expected a share below 1 or a whole number of steps")
        if self.lora_targets is not None and not self.lora_targets:
            raise ValueError("lora_targets is empty, expected names of linear layers or all-linear")
        if self.test_data and self.test_size:
            raise ValueError(f"test_data and test_size={self.test_size} are both given; use one of them")
        if self.spike_factor and self.spike_factor <= 1:
            raise ValueError(f"spike_factor is {self.spike_factor}, expected more than 1, or 0 for none")

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)
