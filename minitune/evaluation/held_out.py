"""A run's answers to its held-out rows, and their scores."""

import functools
import json
import math
import os
import shlex
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path

from minitune import data, hub, schema, screen
from minitune.adapters import lora
from minitune.config import TrainConfig, arg, from_file, positive
from minitune.device import choose_device, choose_dtype, environment
from minitune.evaluation import scoring
from minitune.evaluation.scoring import ScoreConfig
from minitune.files import differences, fingerprint, prove_writable, read_json, to_json, write_json, write_whole
from minitune.generate import Prefix, decode, earlier_copies
from minitune.generation_config import DecodingOptions, settle
from minitune.metrics.perplexity import sequence_nll
from minitune.model_folder import ModelFolder
from minitune.runs.folder import adapter_fingerprint, adapter_folder, append_line, hold, read_lines
from minitune.schema import COUNT
from minitune.screen import short
from minitune.session import Answerer, ModelConfig, read_facts
from minitune.study.names import point_name

GROUP = 16  # held-out rows whose loss is computed together
ANSWER = {  # a line of generations/NAME.jsonl behind its first, which is {"settings": {...}}
    "row": COUNT,
    "answer": str,
    "tokens": COUNT,
    "ended_by": {"eos", "stop", "length"},
    "reference_loss": [(float, None)],
    "check": str,
}


@dataclass(frozen=True)
class DecodeConfig(ScoreConfig):
    """What evaluate and sweep share where a run answers."""

    run: str | None = arg(None, "run folder of scripts/train.py", group="run")
    batch_size: int = arg(16, "questions that are decoded together; changes no answer", low=1, high=65_536)
    dtype: str | None = arg(
        None, "compute dtype; not set: as the run was trained", choices=("auto", "fp32", "bf16", "fp16")
    )
    resume: str = arg(
        "auto", "auto: go on from the answers that are there; never: answer again", choices=("auto", "never")
    )
    name: str | None = arg(None, "what tables and files call the tuned model; not set: MODEL-finetuned")

    @staticmethod
    def of_run(folder, options):
        """The options that the config.json of a training run in `folder` means here. options: what it holds."""
        return {"run": str(folder)}


@dataclass(frozen=True)
class EvaluateConfig(DecodeConfig, DecodingOptions):
    """What is evaluated: a run, or files."""

    base: bool = arg(True, "answer with the base model too, and compare", group="what is scored")
    predictions: str | None = arg(
        None, "file of answers: .txt, one a line; .json or .jsonl of texts, or of rows with answer or output"
    )
    references: tuple[str, ...] | None = arg(
        None,
        "file of right answers, in the same order: the same kinds, such as heldout.jsonl of a run. A list of texts in place of "
        "one, or several files, give each answer several right ones",
    )
    other: str | None = arg(None, "file of the answers of another system, to compare with")
    out: str | None = arg(None, "JSON file for everything; not set: evaluation.json in the run folder")

    def __post_init__(self):
        if isinstance(self.references, (str, os.PathLike)):
            object.__setattr__(self, "references", (str(self.references),))
        DecodingOptions.__post_init__(self)
        ScoreConfig.__post_init__(self)
        positive(self, "batch_size")
        if (self.run is None) == (self.predictions is None):
            raise ValueError("give one of --run DIR and --predictions FILE")
        if (self.predictions is None) != (self.references is None):
            raise ValueError("--predictions FILE and --references FILE belong together")
        if self.other is not None and self.predictions is None:
            raise ValueError("--other FILE is compared with --predictions FILE, which is not given")
        if self.num_return_sequences not in (None, 1):
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}, but one answer a question is scored"
            )
        decoding = [f.name for f in fields(DecodingOptions) if f.name != "seed" and getattr(self, f.name) != f.default]
        if self.predictions is not None and decoding:
            raise ValueError(f"{decoding[0]} is about decoding, and files are scored as they are; leave it out")


def next_command(folder):
    """The last line of a job that scored something: what to do next."""
    return f"next: python scripts/report.py {shlex.quote(str(folder))} --out {shlex.quote(str(folder / 'report.html'))}"


# --- files ---


def stopped(config, kept):
    """The KeyboardInterrupt that says what is kept, in words, and how to go on."""
    without = " without --resume never" if config.resume == "never" else ""
    return KeyboardInterrupt(f"{kept}; the same command{without} goes on from there")


def assess(systems, config, judges, settings):
    """The content of evaluation.json. systems: {key: (name, records)}; settings: how they came about."""
    records = {key: records for key, (_, records) in systems.items()}
    names = scoring.choose_metrics(config, judges, records.values())
    metrics, comparisons = scoring.score(records, names, judges, config.resamples, config.seed)
    first = next(iter(records.values()))
    made = {"metrics": names, "examples": len(first), "signatures": scoring.signatures(first, names, config)}
    return sealed(
        {
            "format": 1,
            "date": date.today().isoformat(),
            "environment": environment(choose_device(config.device)),
            "settings": settings | made,
            "systems": {
                key: {"name": name, "metrics": metrics[key], "examples": [example(record) for record in records[key]]}
                for key, (name, _) in systems.items()
            },
            "comparisons": comparisons,
        }
    )


def sealed(content):
    """A dict with a check: the fingerprint of the rest of it. Who edits a number in the file breaks it."""
    rest = {key: value for key, value in content.items() if key != "check"}
    return rest | {"check": fingerprint(rest)}


SCORING = ("bleu_tokenize", "bleu_order", "bleu_weights", "rouge_tokenize")


def score_settings(config):
    names = ("resamples", "seed", "judge", "encoder", *scoring.ENCODER_OPTIONS, *SCORING, "limit")
    return json.loads(json.dumps({name: getattr(config, name) for name in names}))


def example(record):
    """A record as evaluation.json holds it."""
    keys = ("prompt", "input", "reference", "answer", "tokens", "ended_by", "scores")
    return {key: record[key] for key in keys if key != "input" or record.get("input")}


# --- a run ---


class Run:
    """A run folder opened for answering: its held-out rows, and its model, which loads when the first answer is needed."""

    def __init__(self, config, say):
        self.config, self.say, self.folder = config, say, Path(config.run)
        self.options = read_options(self.folder)
        self.adapter = find_adapter(self.folder, say)
        self.model_folder = ModelFolder.open(self.options.model, self.options.revision)
        self.tokenizer = self.model_folder.tokenizer
        [self.test] = data.load_for(self.options, self.tokenizer, ("test",))
        if not self.test.examples:
            raise ValueError(f"{self.folder} has no held-out rows (test_size {self.options.test_size}) to answer")
        if self.test.row_format == "text":
            raise ValueError(f"{self.folder} was trained on text rows, which ask nothing: there is nothing to answer")
        self.examples = self.test.examples[: config.limit]
        if "/" in self.name(True) or self.name(True) == self.name(False):
            raise ValueError(
                f"name is {config.name!r}, expected one without / that is not the base's {self.name(False)}"
            )
        device = choose_device(config.device)
        self.dtype = config.dtype or read_facts(self.adapter)["dtype"] or self.options.dtype
        dtype, _ = choose_dtype(self.dtype, device)
        self.facts = {
            "model files (sha256)": self.model_folder.fingerprint,
            "held-out rows (sha256)": self.test.fingerprint,
            "quantize": self.options.quantize,
            "compute dtype": str(dtype).removeprefix("torch."),
        }
        self.adapter_sha256 = adapter_fingerprint(self.adapter)
        self.losses = {}  # (is_tuned, row) -> [nats, tokens] of the reference
        self.prefixes, self.prefix_room = {}, 0  # (is_tuned, rows) -> Prefix, and the bytes that they may still take
        self.known = {}  # (is_tuned, meaning of a decoding) -> {row: its answer}: what another point need not decode again
        self.said = set()  # lines about decodings
        self.working_on = None  # the file of the answers that were asked for last
        self.settings_check = None  # what it was made with

    @functools.cached_property
    def answerer(self):
        """The model with its adapter: loaded once, whatever the number of decodings."""
        options = self.options
        return Answerer(
            ModelConfig(
                model=options.model,
                revision=options.revision,
                adapter=str(self.adapter),
                quantize=options.quantize,
                dtype=self.dtype,
                device=self.config.device,
                generation_config="none",  # what it asks for is said by decoding()
            ),
            self.say,
            self.model_folder,
        )

    def decoding(self, config):
        """The GenerateConfig of an EvaluateConfig, with one answer a question. What the checkpoint asks for is said once."""

        def say_once(line):
            if line not in self.said:
                self.said.add(line)
                self.say(line)

        return replace(settle(config, self.model_folder, self.tokenizer, say_once), num_return_sequences=1)

    def name(self, is_tuned):
        base = Path(hub.MODELS.get(self.options.model, self.options.model)).name
        return (self.config.name or f"{base}-finetuned") if is_tuned else base

    def evaluate(self, config, folder, judges, with_base, out=None, say=screen.say, point=None):
        """Answer by the decoding options of `config`, score, and write `folder` or `out`. Returns what evaluation.json holds.

        point: the end of the names of the files, as in the study; None: made from the options."""
        decoding = self.decoding(config)
        point = point or point_name(decoding)
        generations = folder / "generations"
        systems = {}
        with hold(generations):
            for key, is_tuned in (("tuned", True), ("base", False))[: 1 + with_base]:
                file = generations / f"{self.name(is_tuned)}_{point}.jsonl"
                systems[key] = self.name(is_tuned), self.answers(is_tuned, decoding, file)
            result = assess(systems, config, judges, self.settings(config))
            for key, (name, records) in systems.items():
                write_json(generations / f"{name}_{point}.json", [record["answer"] for record in records])
                scores = scoring.study_scores(result["systems"][key]["metrics"])
                write_json(generations / f"{name}_{point}_score.json", scores)
            write_json(out or folder / "evaluation.json", result)
        say("\n".join(scoring.table(result["systems"], result["comparisons"])))
        say(f"written: {out or folder / 'evaluation.json'}; answers: {generations}")
        if out is None:
            say(next_command(folder))
        return result

    def settings(self, config):
        """How the answers and scores of `config` come about: the same settings, the same evaluation."""
        return {
            "model": self.options.model,
            "adapter": str(self.adapter),
            "data": self.test.source,
            "template": self.test.row_format,
            "decoding": json.loads(json.dumps(asdict(self.decoding(config)))),
            **score_settings(config),
            "facts": self.facts | {"adapter (sha256)": self.adapter_sha256},
        }

    def answer_settings(self, is_tuned, decoding):
        """The same for the answers alone, of one system."""
        settings = self.facts | {"adapter (sha256)": self.adapter_sha256 if is_tuned else None}
        return settings | {"decoding": json.loads(json.dumps(asdict(decoding.meaning())))}

    def check_answers(self, config, folder, with_base, point):
        """Raises ValueError where `folder` holds answers of other settings than evaluate() would give."""
        decoding = self.decoding(config)
        for is_tuned in (True, False)[: 1 + with_base]:
            file = folder / "generations" / f"{self.name(is_tuned)}_{point}.jsonl"
            read_answers(file, self.answer_settings(is_tuned, decoding), len(self.test.examples))

    def answers(self, is_tuned, decoding, file):
        """The records of one system, in order: those in `file`, and the others decoded and appended to it."""
        settings = self.answer_settings(is_tuned, decoding)
        prove_writable(file)
        if self.config.resume == "never":
            file.unlink(missing_ok=True)
        found = self.known.setdefault((is_tuned, decoding.meaning()), {})
        done = read_answers(file, settings, len(self.test.examples))
        if not done:
            write_whole(file, to_json({"settings": settings}) + "\n")
        self.working_on, self.settings_check = file, fingerprint(settings)
        for row in sorted(found.keys() - done.keys()):
            append_line(file, done.setdefault(row, found[row]))
        found |= done
        size = 1 if decoding.lookup else self.config.batch_size
        rows = range(len(self.examples))
        missing = [row for row in rows if row not in found]
        if missing:
            self.decode_batches(
                [rows[i : i + size] for i in range(0, len(rows), size)], is_tuned, decoding, file, found
            )
        return [self.record(row, found[row]) for row in rows]

    def kept(self):
        """What a stop leaves, in words."""
        if self.working_on is None:
            return "what was answered is kept"
        number = len(read_lines(self.working_on)) - 1  # without its settings
        return f"{self.working_on} has {number} answer{'s' * (number != 1)}"

    def decode_batches(self, batches, is_tuned, decoding, file, found):
        """Decode the batches that have a row which is not `found`. A batch is the same one after a kill: so are its answers."""
        answerer, tokens = self.answerer, 0
        answerer.decoding = decoding
        model = answerer.model  # which loads: not a part of the time that is measured
        started = time.perf_counter()
        done = sum(row in found for batch in batches for row in batch)
        every = [example.ids[: example.prompt_length] for example in self.examples]
        earlier = earlier_copies(every)
        bar = screen.progress(len(self.examples), "answer", initial=done, desc=file.stem)
        with nullcontext() if is_tuned else lora.switched_off(model), bar:
            for batch in batches:
                if all(row in found for row in batch):
                    continue
                prompts, copies = [every[row] for row in batch], [earlier[row] for row in batch]
                try:
                    with self.prefix_of(is_tuned, batch) as prefix:
                        answers, _ = decode(model, prompts, decoding, answerer.tokenizer, prefix=prefix, copies=copies)
                except ValueError as error:
                    raise ValueError(f"held-out rows {batch[0]} to {batch[-1]}: {error}") from None
                losses = self.reference_losses(is_tuned, batch)
                for row, answer, loss in zip(batch, answers, losses, strict=True):
                    tokens += len(answer.ids)
                    if row not in found:
                        found[row] = {"row": row, "answer": answerer.text(answer), "tokens": len(answer.ids)}
                        loss = [value if math.isfinite(value) else None for value in loss]
                        found[row] |= {"ended_by": answer.ended_by, "reference_loss": loss}
                        found[row] |= {"check": check_of(found[row], self.settings_check)}
                        append_line(file, found[row])
                        bar.update()
                seconds = time.perf_counter() - started
                bar.set_postfix(tokens_per_s=f"{tokens / seconds:.0f}", refresh=False)
        self.say(f"{file.stem}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s")

    @contextmanager
    def prefix_of(self, is_tuned, batch):
        """The Prefix of a batch, kept for the next decoding of it while there is room; None where none is kept."""
        key = is_tuned, tuple(batch)
        prefix = self.prefixes.get(key) or (Prefix() if self.prefix_room else None)
        yield prefix
        if prefix is not None and key not in self.prefixes and prefix.bytes() <= self.prefix_room:
            self.prefixes[key] = prefix
            self.prefix_room -= prefix.bytes()

    def reference_losses(self, is_tuned, batch):
        """[nats, tokens] of the held-out answer of each row, end token included as in the held-out loss of training. Rows are
        read in groups that no option changes, so that no bit depends on them."""
        for group in sorted({row // GROUP for row in batch if (is_tuned, row) not in self.losses}):
            examples = self.test.examples[group * GROUP : (group + 1) * GROUP]
            found = sequence_nll(self.answerer.model, [e.ids for e in examples], [e.prompt_length for e in examples])
            self.losses |= {(is_tuned, group * GROUP + i): list(loss) for i, loss in enumerate(found)}
        return [self.losses[is_tuned, row] for row in batch]

    def record(self, row, answer):
        given = self.test.rows[row]
        is_alpaca = self.test.row_format == "alpaca"
        return {
            "prompt": given["instruction" if is_alpaca else "prompt"],
            "input": (given.get("input") or None) if is_alpaca else None,
            "reference": given["output" if is_alpaca else "completion"],
            **answer,
        }


def read_options(folder):
    """The TrainConfig in a run folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; expected a run folder of scripts/train.py")
    stored = read_json(path)
    if isinstance(stored, dict) and "model_type" in stored:
        raise ValueError(f"{folder} is the folder of a model; expected a run folder of scripts/train.py")
    stored = from_file(TrainConfig, path)
    return TrainConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()})


def find_adapter(folder, say):
    """The folder of a run's adapter. Says where the run did not end."""
    found = adapter_folder(folder)
    if found is None:
        raise ValueError(f"{folder} has no adapter/, best/ or last/ with weights; train it first: scripts/train.py")
    if found.name != "adapter":
        say(f"{folder} did not end its training: {found} is evaluated")
    return found


def read_answers(file, settings, rows):
    """{row: answer} of a file that an earlier start wrote. Raises ValueError where it holds those of other settings, or was
    changed since."""
    first, *records = read_lines(file) or [None]
    if first is None:
        return {}
    stored = first.get("settings") if isinstance(first, dict) else None
    if not isinstance(stored, dict):
        raise ValueError(f"{file}, line 1 has no settings: it is not a file of answers; move it, or use --resume never")
    if stored != settings:
        raise ValueError(other_settings(file, stored, settings))
    found, settings_check = {}, fingerprint(settings)
    for number, record in enumerate(records, 2):
        where = f"{file}, line {number}"
        schema.check(record, ANSWER, where)
        if not record["row"] < rows or record["row"] in found:
            raise ValueError(f"{where} answers row {short(record['row'])} again, or there is no such row. {ANEW}")
        if record["check"] != check_of(record, settings_check):
            raise ValueError(f"{where} was changed after it was written. {ANEW}")
        found[record["row"]] = record
    content = "".join(to_json(line) + "\n" for line in (first, *records))
    if file.read_bytes() != content.encode():  # a torn last line, which the next one would be glued to
        write_whole(file, content)
    return found


ANEW = "Use --resume never to answer again"


def check_of(record, settings_check):
    """What a line of answers says of the rest of it, and of the settings that it was made with."""
    rest = {key: value for key, value in record.items() if key != "check"}
    return fingerprint([rest, settings_check])[:16]


def other_settings(file, stored, settings):
    """What is wrong with answers of other settings, in words."""
    key = "adapter (sha256)"
    if stored.get(key) != settings[key] and {**stored, key: None} == {**settings, key: None}:
        return f"{file} holds answers of another adapter: the run was trained again since. {ANEW}"
    flat = [{k: v for k, v in s.items() if k != "decoding"} | dict(s.get("decoding") or {}) for s in (stored, settings)]
    return f"{file} holds answers of other settings: {screen.some(differences(*flat)) or 'a field is missing'}. {ANEW}"
