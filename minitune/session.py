"""A loaded model that answers: model and adapter with their tokenizer, template and decoding. generate, chat and evaluate
share it."""

import functools
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minitune import checkpoint, hub, screen
from minitune.adapters import peft_files
from minitune.config import arg, is_out_of_memory
from minitune.data import labels
from minitune.device import DTYPES, choose_device, choose_dtype
from minitune.files import expand, read_json
from minitune.formats.templates import ADAPTER_TEMPLATES, CHAT_TEMPLATES, for_tokenizer
from minitune.generate import decode, earlier_copies
from minitune.generation_config import DecodingOptions, settle
from minitune.model_folder import ModelFolder
from minitune.runs.folder import ADAPTERS, find_adapter, unfinished
from minitune.screen import short, some

ADAPTER_CONFIG = peft_files.ADAPTER_CONFIG
TEXT = (None, str)
FACTS = {  # minitune.json of an adapter
    "template?": TEXT,
    "base_model?": TEXT,
    "revision?": TEXT,
    "special_text?": (None, {"text", "tokens"}),
    "dtype?": (None, {"auto", *DTYPES}),
    "quantize?": (None, {"none", "nf4", "nf4-dq"}),
}


@dataclass(frozen=True)
class ModelConfig(DecodingOptions):
    """Which model answers, and how: the options that generate and chat share."""

    model: str | None = arg(
        None,
        "llama2, mistral, phi2, an embedded model, a hub id, or a folder; not set: what the adapter was trained on, else "
        "tiny-mistral",
        group="model",
    )
    revision: str | None = arg(None, "branch, tag or commit of a hub id")
    adapter: str | None = arg(
        None,
        "a run folder, or the folder of an adapter in PEFT's format, such as runs/NAME/adapter; template, --quantize and "
        "--dtype are then those of the run",
        aliases=("run",),
    )
    template: str | None = arg(
        None, "how a question is wrapped; not set: as the adapter was trained, else plain", choices=CHAT_TEMPLATES
    )
    special_text: str | None = arg(
        None,
        "what the text of a special token in a question is: text, or tokens; not set: as the adapter was trained, else text",
        choices=("text", "tokens"),
    )
    quantize: str | None = arg(
        None, "weights in 4 bit; not set: as the adapter was trained, else none", choices=("none", "nf4", "nf4-dq")
    )
    dtype: str | None = arg(
        None,
        "compute dtype; auto chooses by the device and says why; not set: as the adapter was trained, else auto",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")

    @staticmethod
    def of_run(folder, options):
        """The options that a training run's config.json stands for when it is given as --config. folder: of the run;
        options: its content."""
        if any((folder / name / ADAPTER_CONFIG).is_file() for name in ADAPTERS):
            return {"adapter": str(folder)}
        return {name: options[name] for name in ("model", "revision", "quantize", "dtype") if options.get(name)}


@contextmanager
def no_prefix(batch):
    yield None


class Answerer:
    """A model with its tokenizer, template and decoding options. The weights are loaded at the first use of `model`.

    config: a ModelConfig. folder: its ModelFolder, if that is open already. weaker: defaults for decoding that replace those
    of GenerateConfig, see generation_config.settle()."""

    def __init__(self, config, say, folder=None, **weaker):
        self.config, self.say = config, say
        self.adapter = None
        if config.adapter is not None:
            self.adapter = find_adapter(config.adapter)
            if self.adapter != expand(config.adapter) and (line := unfinished(self.adapter)):
                say(line)
        trained = read_facts(self.adapter)  # first, so that bad values are reported before anything is loaded
        self.name = config.model if config.model is not None else trained["base"] or "tiny-mistral"
        is_base = config.model is None or config.model == trained["base"]
        revision = config.revision or (trained["revision"] if is_base else None)
        try:
            self.folder = folder or ModelFolder.open(self.name, revision)
        except ValueError as error:
            if config.model is not None or config.adapter is None:
                raise
            raise ValueError(
                f"{error} ({config.adapter} names this base; --model says where it is, or which other one to use)"
            ) from None
        self.tokenizer = self.folder.tokenizer
        self.template = choose_template(config, trained, say)
        self.special_text = config.special_text or trained["special_text"] or "text"
        self.device = choose_device(config.device)
        self.dtype, self.reason = choose_dtype(config.dtype or trained["dtype"] or "auto", self.device)
        self.quantize = config.quantize or trained["quantize"] or "none"
        if config.dtype is None and trained["dtype"] not in (None, "auto"):
            self.reason = "as the adapter was trained"
        for name in ("quantize", "dtype"):
            if trained[name] not in (None, "auto") and getattr(config, name) not in (None, trained[name]):
                say(
                    f"warning: the adapter was trained with --{name} {trained[name]}; answers with {getattr(config, name)} may "
                    "differ from those of the evaluation"
                )
        self.decoding = settle(config, self.folder, self.tokenizer, say, **weaker)
        say_idle(config.given(), self.decoding, say)

    @functools.cached_property
    def model(self):
        dtype = str(self.dtype).removeprefix("torch.")
        weights = "" if self.quantize == "none" else f", weights in {self.quantize}"
        adapter = "" if self.adapter is None else f", with {self.adapter}"
        self.say(f"{self.name} on {self.device}, {dtype} ({self.reason}){weights}{adapter}")
        return checkpoint.load_model(self.folder, self.dtype, self.device, self.quantize, self.adapter, say=self.say)

    def encode(self, pieces, special_text="text"):
        """Token ids of a rendered conversation. Text from outside becomes a special token only if special_text is "tokens"."""
        pieces = for_tokenizer(pieces, self.tokenizer)
        if special_text == "tokens":
            pieces = labels.read_special(pieces, self.tokenizer)
        return [token for ids in self.tokenizer.encode_pieces(pieces) for token in ids]

    def decode_batches(self, prompts, size, is_done, take, unit="prompt", label="", on_token=None, prefix_of=no_prefix):
        """Decode prompts in batches, and call take(batch, answers) after each. Batches whose prompts are all done are skipped.
        The grouping does not depend on what is done, so the answers do not either.

        prompts: token ids of each. size: prompts in a batch. is_done(i): whether prompt i has its answers. batch: a range of
        indices of prompts. answers: their Answers, in order. unit, label: names of a prompt and of the whole job on the screen.
        on_token: see decode(). prefix_of(batch): a context manager that gives the prefix for decode()."""
        missing = [i for i in range(len(prompts)) if not is_done(i)]
        if not missing:
            return
        model, decoding = self.model, self.decoding  # loads the model, before the clock starts
        size = 1 if decoding.lookup else size
        copies = earlier_copies(prompts)
        tokens = guessed = accepted = 0
        started = time.perf_counter()
        bar = screen.progress(
            len(prompts),
            unit,
            initial=len(prompts) - len(missing),
            desc=label or None,
            disable=len(prompts) == 1 or None,
        )
        with bar:
            for first in sorted({i // size * size for i in missing}):
                batch = range(first, min(first + size, len(prompts)))
                asked, copied = [prompts[i] for i in batch], [copies[i] for i in batch]
                try:
                    with out_of_memory_explained(decoding, len(batch)), prefix_of(batch) as prefix:
                        answers, counts = decode(
                            model, asked, decoding, self.tokenizer, on_token, prefix=prefix, copies=copied
                        )
                except ValueError as error:
                    raise ValueError(f"{unit}s {batch[0]} to {batch[-1]}: {error}") from None
                before = sum(map(is_done, batch))
                take(batch, answers)
                tokens += sum(len(answer.ids) for answer in answers)
                guessed, accepted = guessed + counts.guessed, accepted + counts.accepted
                bar.set_postfix(tokens_per_s=f"{tokens / (time.perf_counter() - started):.0f}", refresh=False)
                bar.update(len(batch) - before)
        seconds = time.perf_counter() - started
        share = f"; lookup guessed {guessed}, of which {accepted} were right" if guessed else ""
        self.say(
            f"{label}{': ' if label else ''}{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s{share}"
        )

    def text(self, answer):
        """The text of an Answer, cut before the stop text that ended it."""
        text = self.tokenizer.decode(answer.ids)
        cuts = [text.find(stop) for stop in self.decoding.stop if stop in text] if answer.ended_by == "stop" else []
        return text[: min(cuts)] if cuts else text


def say_idle(given, decoding, say):
    """Warn of options that have no effect, such as a temperature without sampling."""
    meaning = decoding.meaning()
    samples = decoding.do_sample  # at temperature 0 too, where users expect no other option to matter
    idle = [name for name in given if getattr(decoding, name) != getattr(meaning, name)]
    for option, named in (
        ("--num-beams", [name for name in idle if name in ("length_penalty", "early_stopping")]),
        ("--do-sample", [name for name in idle if name in ("temperature", "top_k", "top_p", "min_p") and not samples]),
    ):
        if named:
            flags = ", ".join("--" + name.replace("_", "-") for name in named)
            say(f"warning: without {option}, {flags} changes nothing")


def read_facts(adapter):
    """The settings that an adapter was trained with: {"template", "base", "special_text", "revision", "dtype", "quantize"}.
    A value is None if the files do not have it, or `adapter` is None.

    Runs of an older minitune have revision, dtype and quantize in config.json only. Raises ValueError on a value that
    minitune does not write."""
    facts = dict.fromkeys(("template", "base", "special_text", "revision", "dtype", "quantize"))
    if adapter is None:
        return facts
    folder = Path(adapter)
    base = peft_files.read_adapter_config(folder).get("base_model_name_or_path")
    file, run = folder / "minitune.json", folder.parent / "config.json"
    stored = read_json(file, FACTS) if file.is_file() else {}
    rows = stored.get("template")
    if rows is not None and rows not in tuple(ADAPTER_TEMPLATES):
        raise ValueError(
            f"{file}: template is {short(rows)}, expected one of {', '.join(ADAPTER_TEMPLATES)}; is it of a newer minitune?"
        )
    if stored and "dtype" not in stored and run.is_file():
        stored = read_json(run, FACTS) | stored
    base = stored.get("base_model", base)
    facts |= {name: stored.get(name) for name in ("special_text", "revision", "dtype", "quantize")}
    return facts | {"template": ADAPTER_TEMPLATES.get(rows), "base": base if isinstance(base, str) and base else None}


def choose_template(config, trained, say):
    """The template that the options ask for, else the adapter's, else plain. Warns if they differ. trained: see
    read_facts()."""
    names = [Path(hub.MODELS.get(name, name)).name for name in (trained["base"], config.model) if name is not None]
    if len(set(names)) > 1:
        say(f"warning: the adapter was trained on {some([trained['base']])}, not on {config.model}")
    template = trained["template"]
    if config.adapter is not None and template is None and config.template is None:
        say("the adapter does not say which template it was trained with: questions go in as they are (--template)")
    if template and config.template and config.template != template:
        say(f"warning: the adapter was trained with the template {template}, and --template is {config.template}")
    return config.template or template or "plain"


@contextmanager
def out_of_memory_explained(decoding, prompts):
    """Turn an out-of-memory error of the CPU or a GPU into a MemoryError that names the options to change."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        sequences = max(decoding.num_beams, decoding.num_return_sequences)
        raise MemoryError(
            f"out of memory with {prompts} questions of {sequences} sequences and {decoding.max_new_tokens} tokens each: lower "
            "--batch-size, --num-beams, --num-return-sequences or --max-new-tokens, or use --quantize nf4"
        ) from error
