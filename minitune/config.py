"""Options: one frozen dataclass for each job, and the command line that is made from it. Defaults are written in these
dataclasses only."""

import argparse
import dataclasses
import difflib
import errno
import functools
import math
import os
import platform
import re
import sys
import textwrap
import types
import typing
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path

from minitune import schema, screen
from minitune.files import read_json
from minitune.interrupts import handled, leave, sigterm_as_ctrl_c
from minitune.schema import Number
from minitune.screen import printable, short, some


def arg(default, help, **extra):
    """A dataclass field with its help text. extra may have:

    choices=(...): the allowed values. low, high: bounds of a number (default for an int: 0 and 2^63 - 1).
    group="HEADING" or "HEADING: text": this field and the following ones stand under this heading in --help.
    positional=True: a list that is typed without --NAME, and shown in --help as metavar. aliases=(...): further names of the
    option. otherwise=...: default that --help shows in place of None. is_option=False: only Python code and files can set the
    field."""
    return field(default=default, metadata={"help": help, **extra})


SYNONYMS = {  # name of an option here -> its names in other tools, for "did you mean"
    "adapter": ("run", "lora", "peft", "adapter-path", "lora-path", "checkpoint"),
    "accumulation": ("gradient-accumulation-steps", "grad-accum", "gradient-accumulation", "accum"),
    "batch_size": ("bs", "per-device-train-batch-size", "micro-batch-size"),
    "checkpointing": ("gradient-checkpointing",),
    "data": ("dataset", "train-file", "data-path", "train-data"),
    "dtype": ("bf16", "fp16", "fp32", "precision", "torch-dtype"),
    "epochs": ("num-train-epochs", "num-epochs", "epoch"),
    "learning_rate": ("lr",),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "lora_rank": ("r", "rank", "lora-r"),
    "lora_targets": ("target-modules", "targets"),
    "max_length": ("max-seq-length", "max-seq-len", "cutoff-len", "seq-len", "block-size"),
    "max_new_tokens": ("max-tokens", "max-length", "tokens", "num-tokens", "n-predict", "length"),
    "max_steps": ("steps", "iters", "max-iters", "num-steps"),
    "model": ("base-model", "model-name-or-path", "base", "model-path", "checkpoint-dir", "pretrained"),
    "num_beams": ("beams", "beam", "beam-size"),
    "num_return_sequences": ("n", "num-samples", "samples"),
    "out": ("output", "output-file", "o"),
    "prompt": ("question", "text", "input", "instruction"),
    "prompts": ("questions", "prompt-file", "input-file", "file"),
    "quantize": ("bits", "load-in-4bit", "4bit", "nf4", "quantization", "qlora", "quant"),
    "run": ("output-dir", "out-dir", "run-dir", "output", "out"),
    "schedule": ("lr-scheduler-type", "scheduler", "lr-schedule"),
    "temperature": ("temp",),
    "warmup": ("warmup-ratio", "warmup-steps"),
}
KINDS = {int: "N", float: "X", str: "TEXT"}  # placeholder for a value in --help


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and suggest a similar option. names: names of the options, without --."""

    def __init__(self, names=(), **options):
        super().__init__(**options, allow_abbrev=False, usage="%(prog)s [options]")
        self.names = list(names)

    def error(self, message):
        """Print one line and exit with code 2. argparse would print the usage with every option first."""
        found = re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL)
        if found:
            wrong = next((word for word in found[1].split() if word.startswith("-")), None)
            if wrong is None:
                message = f"{short(found[1])} follows no option; put a text with spaces into quotes"
            else:
                name = wrong.split("=")[0]
                message = f"there is no option {printable(name)[:100]}{guess(name.lstrip('-'), self.names)}"
        screen.tell(f"error: {one_line(message)} (--help lists the options)")
        self.exit(2)


def guess(wrong, names):
    """ "; did you mean --NAME?" for the option in `names` that is closest to the text `wrong`; "" if none is close."""
    wrong = wrong.lower().replace("_", "-")
    names = {name.replace("_", "-"): name for name in names}
    known = {other: name for name, field in names.items() for other in SYNONYMS.get(field, ())}
    begun = [name for name in names if len(wrong) > 1 and name.startswith(wrong)]
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.7)
    found = known.get(wrong) or next(iter(begun + close), None)
    return f"; did you mean --{found}?" if found else ""


def one_line(text, most=480):
    """`text` as one line of at most `most` characters: its beginning and its end, if it is longer."""
    text = " ".join(printable(text).split("\n"))
    return text if len(text) <= most else f"{text[: most - 160]} ... {text[-140:]}"


def parse(cls, argv=None, description=None):
    """An instance of the dataclass `cls` from the command line. The field lora_rank becomes the option --lora-rank.

    argv: list of arguments; None for sys.argv. description: for --help. A typed option overrides the JSON file of --config,
    which overrides the recipe of the model (TrainConfig), which overrides the default. Exits with code 2 and one line on an
    unknown option or a value of the wrong type. Raises ValueError on a value that `cls` refuses."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = {f.name: f for f in fields(cls) if f.metadata.get("is_option", True)}
    values, shown = getattr(cls, "DEFAULTS", {}), description
    if {"-h", "--help"} & set(argv) and hasattr(cls, "recipe"):  # show the defaults of the --model that is given too
        values, _ = make_parser(cls, {}, add_help=False).parse_known_args(
            [a for a in argv if a not in ("-h", "--help")]
        )
        values = {name: value for name, value in vars(values).items() if name in options}
        values = cls.recipe(values)
        shown = f"{description}\n\nThe defaults below are those for this --model." if description else None
    parser = make_parser(cls, values, description=shown)
    typed = vars(parser.parse_intermixed_args(argv))  # positional arguments may stand before, between and after options
    path, _ = typed.pop("config"), typed.pop("debug")
    if path == "":
        parser.error("--config is empty; give a JSON file, or leave the option out")
    typed = {name: typed_value(parser, cls, options[name], value) for name, value in typed.items()}
    stored = from_file(cls, path) if path is not None else {}
    values = {**stored, **typed}
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def make_parser(cls, recipe, description=None, add_help=True):
    """The argparse parser of a dataclass. It leaves values as text; typed_value() converts them.

    recipe: {name of a field: default} to show in --help in place of the field's own default."""
    options = [f for f in fields(cls) if f.metadata.get("is_option", True)]
    names = [f.name for f in options if not f.metadata.get("positional")] + ["config", "debug", "version", "help"]
    layout = argparse.RawDescriptionHelpFormatter
    if description:
        description = "\n\n".join(textwrap.fill(part, 78) for part in description.split("\n\n"))
    parser = Parser(names, description=description, add_help=False, formatter_class=layout)
    group = parser
    for f in in_order(cls):
        if not f.metadata.get("is_option", True):
            continue
        if "group" in f.metadata:
            title, _, more = f.metadata["group"].partition(": ")
            group = parser.add_argument_group(title, textwrap.fill(more, 76) or None)
        flags = ["--" + name.replace("_", "-") for name in (f.name, *f.metadata.get("aliases", ()))]
        kind, is_list, _ = field_type(cls, f)
        choices = f.metadata.get("choices")
        meta = f"{{{','.join(choices)}}}" if are_short(choices, is_list) else f.metadata.get("metavar", KINDS.get(kind))
        common = {"default": argparse.SUPPRESS, "help": help_text(f, is_list, recipe)}
        if f.metadata.get("positional"):
            group.add_argument(f.name, nargs="*", metavar=f.metadata["metavar"], **common)
        elif kind is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, **common)
        else:
            group.add_argument(*flags, dest=f.name, nargs="+" if is_list else None, metavar=meta, **common)
    group = parser.add_argument_group("this command")
    group.add_argument("--config", metavar="FILE", help="JSON file with options, such as the config.json of a run")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if add_help:
        group.add_argument("-h", "--help", action="help", help="show this text")
    group.add_argument(
        "--version",
        action=Version,
        nargs=0,
        default=argparse.SUPPRESS,
        help="show the versions of minitune, torch and Python",
    )
    return parser


def are_short(choices, is_list):
    """Whether the choices of an option are short enough to stand next to its name in --help, rather than in the text."""
    return bool(choices) and len(",".join(choices)) <= (15 if is_list else 40)


def in_order(cls):
    """The fields of a dataclass in the order of --help: those of the class itself before those of its bases."""
    order, bases = [], [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    for number, base in enumerate(bases):
        inherited = {f.name for other in bases[number + 1 :] if issubclass(base, other) for f in fields(other)}
        order += [f.name for f in fields(base) if f.name not in inherited]
    known = {f.name: f for f in fields(cls)}
    return [known[name] for name in dict.fromkeys(order)]


def help_text(f, is_list, recipe):
    """The help text of a field with its choices and its default."""
    value = recipe.get(f.name, f.metadata.get("otherwise", f.default))
    if is_list and value is not None:
        value = " ".join(map(str, value)) or None
    text, choices = f.metadata["help"], f.metadata.get("choices")
    if choices and not are_short(choices, is_list):
        text += f"; {'some' if is_list else 'one'} of {', '.join(choices)}"
    shown = f" (default: {value})" if value is not None else "" if "not set" in text.lower() else " (default: not set)"
    return f"{text}{shown}".replace("%", "%%")


class Version(argparse.Action):
    """--version: prints the versions and exits. The lookup is done only when the option is used."""

    def __call__(self, parser, *values):
        screen.say(f"minitune {version('minitune')}, torch {version('torch')}, Python {platform.python_version()}")
        parser.exit(0)


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def typed_value(parser, cls, f, value):
    """The value of a field from what was typed: a text, a list of texts or a bool.

    Exits with one line if it has the wrong type or is not among the choices."""
    kind, is_list, _ = field_type(cls, f)
    if kind is bool:
        return value
    items = [as_kind(item, kind) for item in (value if is_list else [value])]
    if kind in (int, float) and any(isinstance(item, str) for item in items) or not_a_choice(f, items):
        choices, name = f.metadata.get("choices"), f.name if f.metadata.get("positional") else "--" + f.name
        wrong = next(item for item in items if isinstance(item, str) and item not in (choices or ()))
        close = difflib.get_close_matches(wrong, choices or (), n=1, cutoff=0.5)
        expected = f"one of {', '.join(choices)}" if choices else schema.words(int if kind is int else float)
        hint = f"; did you mean {close[0]}?" if close else ""
        parser.error(f"{name.replace('_', '-')} is {short(wrong)}, expected {expected}{hint}")
    return items if is_list else items[0]


def not_a_choice(f, items):
    return "choices" in f.metadata and any(item not in f.metadata["choices"] for item in items)


def as_kind(text, kind):
    """The text as a number of type `kind`, or unchanged if it is not one."""
    try:
        return kind(text) if kind in (int, float) and len(text) <= 300 else text
    except ValueError:
        return text


OUT_OF_MEMORY = re.compile(  # messages of torch, the system and an interrupted import
    "out of memory|allocate memory|bad_alloc|memory object|start new thread|failed to map segment|return without exception set",
    re.IGNORECASE,
)
# Options that reduce the memory of a job when they are lowered.
SMALLER = ("batch_size", "max_length", "num_beams", "num_return_sequences", "max_new_tokens")


def run_script(cls, job, description):
    """Run a script: parse the dataclass `cls` from the command line, call job(config), and end with an exit code.

    0: done, or the reader of the output closed the pipe. 1: the run failed. 2: the user's input was wrong. 130: stopped by a
    signal. Errors are one line on stderr; a fault of the program keeps its traceback, and --debug shows every traceback."""
    screen.prepare()
    try:
        with sigterm_as_ctrl_c():
            job(parse(cls, description=description))
        return
    except BrokenPipeError:
        code, text = 0, None
    except (Exception, KeyboardInterrupt) as error:
        meant = ValueError, FloatingPointError, OSError, KeyboardInterrupt
        if "--debug" in sys.argv or not (isinstance(error, meant) or is_out_of_memory(error)):
            raise  # a bug: keep the traceback
        error.__traceback__ = None  # its frames keep the memory of the job alive
        code, text = code_and_text(cls, error)
    with handled(leave):
        if text is not None:
            screen.tell(one_line(text))
        sys.exit(code)


def is_out_of_memory(error):
    """Whether an exception of Python, torch or the system reports a lack of memory, of the machine or of a GPU."""
    if isinstance(error, (RuntimeError, OSError, ImportError, SystemError)):
        return bool(OUT_OF_MEMORY.search(str(error)))
    return isinstance(error, MemoryError)


def code_and_text(cls, error):
    """(exit code, line for stderr) of an exception that ended a job with options `cls`."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, f"stopped: {text or 'by Ctrl-C'}"
    if isinstance(error, OSError) and not is_out_of_memory(error):
        text = error.strerror or text
        where = f"{short(os.fspath(error.filename))[1:-1]}: " if isinstance(error.filename, str) else ""
        return 2 if error_is_of_a_path(error) else 1, f"error: {where}{text}"
    if is_out_of_memory(error):
        names = [f.name for f in fields(cls)]
        options = [f"--{name.replace('_', '-')}" for name in SMALLER if name in names]
        ways = [f"lower {' or '.join(options)}"] * bool(options) + ["use --quantize nf4"] * ("quantize" in names)
        hint = f"; {', or '.join(ways) or 'free some memory'}"
        return 1, f"error: {text if isinstance(error, MemoryError) and text else 'out of memory' + hint}"
    return 1 if isinstance(error, FloatingPointError) else 2, f"error: {text}"


def error_is_of_a_path(error):
    """Whether an OSError is about a wrong path, which is the user's input, and not about a failure of the machine."""
    wrong = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
    return isinstance(error, OSError) and error.errno in wrong


def from_file(cls, path):
    """The options of `cls` in the JSON file at `path`, as a dict. For a job that evaluates a run, the file may be the config.json
    of a training run. Raises ValueError on an unknown key or a value of the wrong type."""
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, expected an object with options of {cls.__name__}")
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(stored) - set(known))
    if unknown and hasattr(cls, "of_run") and {"lora_rank", "learning_rate", "loss_on"} <= set(stored):
        stored = cls.of_run(Path(path).parent, stored)
        screen.tell(
            f"{path} is the config of a training run; used from it: {', '.join(f'{k} {short(v)}' for k, v in stored.items())}"
        )
    elif unknown:
        hint = guess(unknown[0], known).replace("--", "").replace("-", "_")
        raise ValueError(f"{path} has options that {cls.__name__} does not know: {some(unknown)}; remove them{hint}")
    for name, value in stored.items():
        if expected := misfit(cls, known[name], value):
            raise ValueError(f"{path}: {name} is {short(value)}, expected {expected}")
    return stored


def misfit(cls, f, value):
    """If `value` does not have the type, choices or bounds of a field: what was expected, in words. Else None."""
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
        one = int  # the type is wrong, so the message does not name the bounds
    return f"one of {', '.join(choices)}" if choices else schema.words([one] if is_list else one)


def bounds(f, kind):
    """The schema.Number for a field of type `kind`, or None if it is not a number."""
    if kind is int:
        return Number(f.metadata.get("low", 0), f.metadata.get("high", 2**63 - 1), is_whole=True)
    return Number(f.metadata.get("low", -math.inf), f.metadata.get("high", math.inf)) if kind is float else None


type_hints = functools.cache(typing.get_type_hints)  # cached, because it evaluates every annotation


def field_type(cls, f):
    """(type of one value, whether the field is a list, whether None is allowed) of a dataclass field."""
    hint = type_hints(cls)[f.name]
    alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    optional = type(None) in alternatives
    hint = next(a for a in alternatives if a is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


def check_types(config):
    """Raises ValueError if a field does not have its type, choices or bounds. Configs built in Python code are checked too."""
    for f in fields(config):
        if expected := misfit(type(config), f, getattr(config, f.name)):
            raise ValueError(f"{f.name} is {short(getattr(config, f.name))}, expected {expected}")


def not_empty(config):
    """Raises ValueError if a field is an empty text, as an unset shell variable gives: that must not mean 'not set'."""
    for f in fields(config):
        value = getattr(config, f.name)
        if value == "" or isinstance(value, tuple) and "" in value:
            raise ValueError(f"{f.name} is empty; give a value, or leave the option out")


def positive(config, *names):
    """Raises ValueError if one of these fields is not above 0. None ('not set') is accepted."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}, expected a number above 0")


# Settings of the study that minitune grew from, for the recipes below.
STUDY_RECIPE = {"quantize": "nf4", "lora_alpha": 16.0, "learning_rate": 2e-4, "batch_size": 2}
LLAMA_RECIPE = {
    **STUDY_RECIPE,
    "lora_rank": 64,
    "lora_dropout": 0.1,
    "lora_targets": ("q_proj", "v_proj"),
    "schedule": "constant",
    "warmup": 0.03,
    "weight_decay": 0.001,
    "max_grad_norm": 0.3,
    "group_by_length": True,
}
TINY = {  # fp32, because at this size it is faster than bf16 even on a CPU with bf16 instructions
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
RECIPES = {  # short name of a model -> options that it sets: those of the study, and ours for the embedded models
    "llama2": {**LLAMA_RECIPE, "accumulation": 8},
    "mistral": {**LLAMA_RECIPE, "accumulation": 16},
    "phi2": {
        **STUDY_RECIPE,
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
    """All options of a training run. The config.json of a run has these fields and is a valid --config.

    An option that is not given has the value in the model's recipe (RECIPES), else the default below."""

    model: str = arg(
        "tiny-mistral",
        "llama2, mistral, phi2, an embedded model (tiny-mistral, tiny-llama, tiny-phi), a hub id, "
        "or a folder with config.json and *.safetensors. The short names and the embedded models have recipes, which override "
        "the defaults; --model NAME --help shows them",
        group="model and rows",
    )
    revision: str | None = arg(None, "branch, tag or commit of a hub id")
    data: str | None = arg(
        None,
        "JSON, JSONL or CSV file; 'alpaca' (52,002 rows, downloaded) or 'embedded'. "
        "Not set: embedded for an embedded model, else alpaca",
    )
    test_data: str | None = arg(None, "file with held-out rows; not set: split from --data")
    test_size: float | None = arg(
        None,
        "held-out part of --data: a share below 1 (rounded up) or a number of rows; 0: none. "
        "Not set: 0.0005 for alpaca, 0.05 for a file",
    )
    split_seed: int = arg(42, "seed of the split into training and held-out rows")
    run: str | None = arg(None, "run folder; not set: runs/MODEL-lora or runs/MODEL-qlora")
    resume: str = arg(
        "auto", "auto: continue from the state in --run, if there is one; never: start again", choices=("auto", "never")
    )

    max_length: int = arg(512, "longest row in tokens", group="rows as tokens")
    over_length: str = arg(
        "truncate",
        "what to do with a longer row: truncate the end of its answer, drop the row, or stop with an error",
        choices=("truncate", "drop", "stop"),
    )
    loss_on: str = arg(
        "answer", "supervised tokens: those of the answer, or all with the prompt", choices=("answer", "all")
    )
    special_text: str = arg(
        "text",
        "how to read the name of a special token (<s>, <|im_start|>) in a row: as ordinary text, or as the token itself, for "
        "rows that a chat template wrote",
        choices=("text", "tokens"),
    )

    lora_rank: int = arg(16, "rank r of the adapter", group="adapter")
    lora_alpha: float = arg(16.0, "scale of the adapter, which is multiplied by alpha / r")
    lora_dropout: float = arg(0.0, "dropout rate on the input of the adapter, 0 to below 1")
    lora_targets: tuple[str, ...] | None = arg(
        None,
        "names of the linear layers that get an adapter, or all-linear; not set: PEFT's default for the architecture",
    )
    use_rslora: bool = arg(False, "scale by alpha / sqrt(r) (rsLoRA)")
    quantize: str = arg(
        "none",
        "frozen weights: not quantised, 4-bit NF4, or NF4 with double quantisation",
        choices=("none", "nf4", "nf4-dq"),
        group="weights and device",
    )
    dtype: str = arg(
        "auto",
        "compute dtype; auto: chosen for the device, and the reason is printed",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")

    epochs: float = arg(1.0, "passes over the training rows", group="optimizer")
    max_steps: int | None = arg(None, "number of optimizer steps; overrides --epochs")
    batch_size: int = arg(4, "rows in a micro-batch")
    accumulation: int = arg(1, "micro-batches in an optimizer step")
    group_by_length: bool = arg(False, "put rows of similar length into the same micro-batch")
    learning_rate: float = arg(2e-4, "peak learning rate")
    schedule: str = arg("cosine", "learning rate after the warm-up", choices=("constant", "linear", "cosine"))
    warmup: float = arg(0.0, "linear warm-up: a share of the steps, if below 1, or a number of steps")
    weight_decay: float = arg(0.0, "AdamW weight decay, for matrices only")
    adam_beta1: float = arg(0.9, "AdamW beta1")
    adam_beta2: float = arg(0.999, "AdamW beta2")
    adam_eps: float = arg(1e-8, "AdamW epsilon")
    max_grad_norm: float = arg(1.0, "clip gradients to this norm; 0: no clipping")
    checkpointing: bool = arg(False, "recompute activations in the backward pass: less memory, a third more time")
    spike_factor: float = arg(
        3.0,
        "stop if the loss of a step is more than this many times the median of the last 16 steps, and at least 2 nats above "
        "it; 0: stop only if the loss is not finite",
    )

    log_every: int = arg(1, "steps between lines of metrics.jsonl", group="logs, saved states and samples")
    eval_every: int | None = arg(None, "steps between evaluations of the held-out loss; not set: a tenth of the run")
    save_every: int | None = arg(None, "steps between saved states; not set: as --eval-every")
    save_minutes: float = arg(5.0, "longest time between saved states, in minutes; applies beside --save-every")
    patience: int | None = arg(
        None, "stop after this many evaluations without a new best held-out loss; not set: never"
    )
    keep: str = arg(
        "best",
        "weights that adapter/ holds in the end: those of the best held-out loss, or of the last step",
        choices=("best", "last"),
    )
    samples: int = arg(3, "number of held-out prompts to answer, greedily, at every evaluation")
    sample_tokens: int = arg(64, "longest sample answer, in tokens")
    seed: int = arg(42, "random seed of the adapter's initial weights, the order of the rows and the dropout")

    @staticmethod
    def recipe(values):
        """The recipe of values["model"], {option: default}; {} for a model without one."""
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
            raise ValueError(f"spike_factor is {self.spike_factor}, expected more than 1, or 0 for no check")

    def replace(self, **changes):
        """A copy with other values, checked again."""
        return dataclasses.replace(self, **changes)
