"""The answers of a run to its held-out rows, and their scores."""

import functools
import json
import math
import os
import shlex
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path

from minitune_kernels import ops

from minitune import data, hub, screen
from minitune.adapters import lora
from minitune.config import arg, positive
from minitune.device import choose_device, choose_dtype, environment
from minitune.evaluation import scoring
from minitune.evaluation.scoring import ScoreConfig
from minitune.files import fingerprint, write_json
from minitune.generate import Prefix
from minitune.generation_config import DecodingOptions, settle
from minitune.metrics.perplexity import sequence_nll
from minitune.model_folder import ModelFolder
from minitune.runs.answers import ADAPTER, FORMULAS, open_row_answers
from minitune.runs.folder import adapter_fingerprint, adapter_folder, hold, read_options, unfinished
from minitune.session import Answerer, ModelConfig, read_facts
from minitune.study.names import point_name

GROUP = 16  # rows in a batch of the held-out loss


@dataclass(frozen=True)
class DecodeConfig(ScoreConfig):
    """The options for decoding held-out rows that evaluate and sweep share."""

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
    """The options of evaluate.py."""

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
    """The last line of a job that scored something: the command that comes next."""
    return f"next: python scripts/report.py {shlex.quote(str(folder))} --out {shlex.quote(str(folder / 'report.html'))}"


# --- files ---


def stopped(config, kept):
    """A KeyboardInterrupt that says what is kept and how to resume. kept: in words."""
    without = " without --resume never" if config.resume == "never" else ""
    return KeyboardInterrupt(f"{kept}; the same command{without} goes on from there")


def assess(systems, config, judges, settings):
    """The content of evaluation.json. systems: {key: (name, records)}. settings: see Run.settings()."""
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
    """`content` with a checksum of itself under "check", which no longer matches once a number in the file was edited."""
    rest = {key: value for key, value in content.items() if key != "check"}
    return rest | {"check": fingerprint(rest)}


SCORING = ("bleu_tokenize", "bleu_order", "bleu_weights", "rouge_tokenize")


def score_settings(config):
    names = ("resamples", "seed", "judge", "encoder", *scoring.ENCODER_OPTIONS, *SCORING, "limit")
    return json.loads(json.dumps({name: getattr(config, name) for name in names}))


def example(record):
    """A record as it stands in evaluation.json."""
    keys = ("prompt", "input", "reference", "answer", "tokens", "ended_by", "scores")
    return {key: record[key] for key in keys if key != "input" or record.get("input")}


# --- a run ---


class Run:
    """A run folder whose held-out rows are answered. The model is loaded when the first answer is decoded."""

    def __init__(self, config, say):
        self.config, self.say, self.folder = config, say, Path(config.run)
        self.options = read_options(self.folder)
        self.adapter = self.find_adapter()
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
        self.working_on = None  # the RowAnswers that were asked for last

    def find_adapter(self):
        """The folder of the run's adapter. Reports if it is not the one that training writes at its end."""
        found = adapter_folder(self.folder)
        if found is None:
            raise ValueError(
                f"{self.folder} has no adapter/, best/ or last/ with weights; train it first: scripts/train.py"
            )
        if line := unfinished(found):
            self.say(line)
        return found

    @functools.cached_property
    def answerer(self):
        """The model with its adapter, loaded once for all decodings."""
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
        """The GenerateConfig of an EvaluateConfig, with one answer a question. Options that the checkpoint sets are reported
        once."""

        def say_once(line):
            if line not in self.said:
                self.said.add(line)
                self.say(line)

        return replace(settle(config, self.model_folder, self.tokenizer, say_once), num_return_sequences=1)

    def name(self, is_tuned):
        base = Path(hub.MODELS.get(self.options.model, self.options.model)).name
        return (self.config.name or f"{base}-finetuned") if is_tuned else base

    def evaluate(self, config, folder, judges, with_base, out=None, say=screen.say, point=None):
        """Decode with the options of `config`, score, and write to `folder` or `out`. Returns the content of
        evaluation.json.

        point: suffix of the file names, as in the study. None: made from the options."""
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
        """{setting: value} of all that the answers and scores of `config` depend on."""
        return {
            "model": self.options.model,
            "adapter": str(self.adapter),
            "data": self.test.source,
            "template": self.test.row_format,
            "decoding": json.loads(json.dumps(asdict(self.decoding(config)))),
            **score_settings(config),
            "facts": self.facts | {ADAPTER: self.adapter_sha256},
        }

    def answer_settings(self, is_tuned, decoding):
        """{setting: value} of all that the answers of one system depend on."""
        settings = self.facts | {
            ADAPTER: self.adapter_sha256 if is_tuned else None,
            FORMULAS: ops.formulas_fingerprint(),
        }
        return settings | {"decoding": json.loads(json.dumps(asdict(decoding.meaning())))}

    def check_answers(self, config, folder, with_base, point):
        """Raises ValueError if `folder` has answers of other settings than evaluate() would write."""
        decoding = self.decoding(config)
        for is_tuned in (True, False)[: 1 + with_base]:
            path = folder / "generations" / f"{self.name(is_tuned)}_{point}.jsonl"
            if path.exists():
                with open_row_answers(path, self.answer_settings(is_tuned, decoding), len(self.test.examples), False):
                    pass

    def answers(self, is_tuned, decoding, path):
        """The records of one system in the order of the rows: those in the file `path`, and the others, which are decoded
        and appended."""
        settings = self.answer_settings(is_tuned, decoding)
        found = self.known.setdefault((is_tuned, decoding.meaning()), {})
        with open_row_answers(path, settings, len(self.test.examples), self.config.resume == "never") as file:
            self.working_on = file
            file.write([found[row] for row in sorted(found.keys() - file.rows.keys())])
            found |= file.rows
            if any(row not in found for row in range(len(self.examples))):
                self.decode_rows(is_tuned, decoding, file, found)
        return [self.record(row, found[row]) for row in range(len(self.examples))]

    def kept(self):
        """What remains after a stop, in words."""
        if self.working_on is None:
            return "what was answered is kept"
        number = len(self.working_on.records)
        return f"{self.working_on.path} has {number} answer{'s' * (number != 1)}"

    def decode_rows(self, is_tuned, decoding, file, found):
        """Decode the rows that are not in `found`, and add their answers to the RowAnswers and to `found`."""
        answerer = self.answerer
        answerer.decoding = decoding

        def take(batch, answers):
            records = []
            for row, answer, loss in zip(batch, answers, self.reference_losses(is_tuned, batch), strict=True):
                records.append(
                    {
                        "row": row,
                        "answer": answerer.text(answer),
                        "tokens": len(answer.ids),
                        "ended_by": answer.ended_by,
                        "reference_loss": [value if math.isfinite(value) else None for value in loss],
                    }
                )
            file.write([record for record in records if record["row"] not in found])
            found.update(file.rows)

        prompts = [example.ids[: example.prompt_length] for example in self.examples]
        with nullcontext() if is_tuned else lora.switched_off(answerer.model):
            answerer.decode_batches(
                prompts,
                self.config.batch_size,
                found.__contains__,
                take,
                unit="held-out row",
                label=file.path.stem,
                prefix_of=functools.partial(self.prefix_of, is_tuned),
            )

    @contextmanager
    def prefix_of(self, is_tuned, batch):
        """The Prefix of a batch, which is kept for its next decoding while there is memory. None if there is not."""
        key = is_tuned, tuple(batch)
        prefix = self.prefixes.get(key) or (Prefix() if self.prefix_room else None)
        yield prefix
        if prefix is not None and key not in self.prefixes and prefix.bytes() <= self.prefix_room:
            self.prefixes[key] = prefix
            self.prefix_room -= prefix.bytes()

    def reference_losses(self, is_tuned, batch):
        """[nats, tokens] of the held-out answer of each row, with its end token, as in the held-out loss of training. Rows
        are computed in groups of fixed size, so the bits do not depend on any option."""
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
