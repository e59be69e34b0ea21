"""Base beside tuned on the held-out rows of a run, or two files of answers: the job of scripts/evaluate.py.

Answers stream into generations/NAME.jsonl, so that a kill loses none that was written and a second start repeats none. The
metrics are those of minitune/scoring.py. Point by point, the sweep does the same through Run."""

import functools
import json
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path

from tqdm import tqdm

from minitune import data, hub, lora, scoring
from minitune.answer import Answerer, ModelConfig
from minitune.config import TrainConfig, arg, from_file, positive
from minitune.device import choose_device, choose_dtype, environment
from minitune.files import differences, prove_writable, read_json, write_json, write_whole
from minitune.generate import Prefix, decode, earlier_copies
from minitune.generation_config import DecodingOptions, settle
from minitune.metrics.perplexity import sequence_nll
from minitune.run_folder import adapter_fingerprint, append_line, hold, model_fingerprint, read_lines
from minitune.scoring import ScoreConfig
from minitune.tokenizer import load_tokenizer

ANSWER_KEYS = ("answer", "output", "completion", "text")  # of a row of predictions, the first that it has
GROUP = 16  # held-out rows whose loss is computed together
REFERENCE_KEYS = ("reference", "output", "completion", "answer", "text")


@dataclass(frozen=True)
class DecodeConfig(ScoreConfig):
    """What evaluate and sweep share where a run answers."""

    run: str | None = arg(None, "run folder of scripts/train.py", group="run")
    batch_size: int = arg(16, "questions that are decoded together; changes no answer")
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
    references: str | None = arg(None, "file of right answers, in the same order: the same kinds, such as Alpaca rows")
    other: str | None = arg(None, "file of the answers of another system, to compare with")
    out: str | None = arg(None, "JSON file for everything; not set: evaluation.json in the run folder")

    def __post_init__(self):
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


def evaluate(config, say=print):
    """Answer or read, score, write evaluation.json and print a table. Returns what evaluation.json holds.

    Raises ValueError on bad input, KeyboardInterrupt, with what is kept, after Ctrl-C or SIGTERM."""
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


def stopped(config, kept):
    """The KeyboardInterrupt that says what is kept, in words, and how to go on."""
    without = " without --resume never" if config.resume == "never" else ""
    return KeyboardInterrupt(f"{kept}; the same command{without} goes on from there")


def evaluate_files(config, say):
    systems, judges = read_systems(config), scoring.Judges(config, say)
    settings = {"model": None, "adapter": None, "data": config.references, "decoding": None}
    try:
        result = assess(systems, config, judges, settings | score_settings(config))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written; the same command starts again") from None
    say("\n".join(scoring.table(result["systems"], result["comparisons"])))
    if config.out is not None:
        write_json(config.out, result)
        say(f"written: {config.out}")
    return result


def assess(systems, config, judges, settings):
    """The content of evaluation.json. systems: {key: (name, records)}; settings: how they came about."""
    records = {key: records for key, (_, records) in systems.items()}
    names = scoring.choose_metrics(config, judges, records.values())
    metrics, comparisons = scoring.score(records, names, judges, config.resamples, config.seed)
    return {
        "format": 1,
        "date": date.today().isoformat(),
        "environment": environment(choose_device(config.device)),
        "settings": settings | {"metrics": names},
        "systems": {
            key: {"name": name, "metrics": metrics[key], "examples": [example(record) for record in records[key]]}
            for key, (name, _) in systems.items()
        },
        "comparisons": comparisons,
    }


def score_settings(config):
    names = ("resamples", "seed", "judge", "encoder", *scoring.ENCODER_OPTIONS, "limit")
    return {name: getattr(config, name) for name in names}


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
        self.model_folder = hub.resolve(self.options.model, self.options.revision)
        self.tokenizer = load_tokenizer(self.model_folder)
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
        dtype, _ = choose_dtype(config.dtype or self.options.dtype, device)
        self.facts = {
            "model files (sha256)": model_fingerprint(self.model_folder),
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
                dtype=self.config.dtype or options.dtype,
                device=self.config.device,
                generation_config="none",  # what it asks for is said by decoding()
            ),
            self.say,
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

    def evaluate(self, config, folder, judges, with_base, out=None, say=print, point=None):
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
        return result

    def settings(self, config):
        """How the answers and scores of `config` come about: the same settings, the same evaluation."""
        return {
            "model": self.options.model,
            "adapter": str(self.adapter),
            "data": self.test.source,
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
        if self.config.resume == "never":
            file.unlink(missing_ok=True)
        found = self.known.setdefault((is_tuned, decoding.meaning()), {})
        done = read_answers(file, settings, len(self.test.examples))
        if not done:
            write_whole(file, json.dumps({"settings": settings}, ensure_ascii=False) + "\n")
        self.working_on = file
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
        bar = tqdm(
            total=len(self.examples), initial=done, unit="answer", desc=file.stem, disable=None, dynamic_ncols=True
        )
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
                        found[row] |= {"ended_by": answer.ended_by, "reference_loss": loss}
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
    """adapter/, which train.py writes in the end; of a run that did not end best/ or last/, and says so."""
    for name in ("adapter", "best", "last"):
        if (folder / name / "adapter_model.safetensors").is_file():
            if name != "adapter":
                say(f"{folder} did not end its training: {folder / name} is evaluated")
            return folder / name
    raise ValueError(f"{folder} has no adapter/, best/ or last/ with weights; train it first: scripts/train.py")


def read_answers(file, settings, rows):
    """{row: answer} of a file that an earlier start wrote. Raises ValueError where it holds those of other settings."""
    first, *records = read_lines(file) or [None]
    if first is None:
        return {}
    stored = first.get("settings") if isinstance(first, dict) else None
    if not isinstance(stored, dict):
        raise ValueError(f"{file}, line 1 has no settings: it is not a file of answers; move it, or use --resume never")
    if changed := changes(stored, settings):
        raise ValueError(
            f"{file} holds answers of other settings: {'; '.join(changed)}. Use --resume never to answer again"
        )
    found = {}
    for number, record in enumerate(records, 2):
        try:
            is_good = 0 <= record["row"] < rows and isinstance(record["answer"], str) and record["row"] not in found
            record["tokens"], record["ended_by"], record["reference_loss"]
        except (KeyError, TypeError):
            is_good = False
        if not is_good:
            raise ValueError(f"{file}, line {number} is no answer, or one that is there twice; use --resume never")
        found[record["row"]] = record
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (first, *records))
    if file.read_bytes() != content.encode():  # a torn last line, which the next one would be glued to
        write_whole(file, content)
    return found


def changes(stored, settings):
    """What differs, in words: {name: value}, of which `decoding` is another one."""
    flat = [{k: v for k, v in s.items() if k != "decoding"} | (s.get("decoding") or {}) for s in (stored, settings)]
    return differences(*flat)


SHORT = {"top_k": "topk", "num_beams": "nb", "temperature": "t"}


def point_name(config, others=()):
    """The study's name of a decoding, topk50_nb5_t1, with further options that are varied behind it: _topp0.9."""
    names = [*SHORT, *(name for name in others if name not in SHORT)]
    return "_".join(f"{SHORT.get(name, name.replace('_', ''))}{written(getattr(config, name))}" for name in names)


def written(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- files ---


def read_systems(config):
    """{key: (name, records)} of --predictions, and of --other where there is one, beside --references."""
    references = read_texts(config.references, REFERENCE_KEYS)
    systems = {}
    for key, path in (("predictions", config.predictions), ("other", config.other)):
        if path is None:
            continue
        found = read_texts(path, ANSWER_KEYS)
        if len(found) != len(references):
            raise ValueError(
                f"{path} has {len(found)} answers and {config.references} has {len(references)} references, expected as many"
            )
        records = []
        for (answer, row), (reference, given) in zip(found, references, strict=True):
            prompt = next(
                (r[k] for r in (given, row) for k in ("instruction", "prompt") if isinstance(r.get(k), str)), None
            )
            record = {"prompt": prompt, "input": given.get("input"), "reference": reference, "answer": answer}
            for fact, kind in (("tokens", int), ("ended_by", str)):
                if not isinstance(row.get(fact), kind | None) or isinstance(row.get(fact), bool):
                    raise ValueError(
                        f"{path}, row {len(records)}: {fact} is {row[fact]!r}, expected {kind.__name__} or null"
                    )
            records.append(record | {"tokens": row.get("tokens"), "ended_by": row.get("ended_by")})
        name = Path(path).stem
        systems[key] = path if any(name == other for other, _ in systems.values()) else name, records[: config.limit]
    return systems


def read_texts(path, keys):
    """[(text, row)] of a file; row: the object that the text is of, or {}. Raises ValueError with the file and the row."""
    path = Path(path)
    if path.suffix.lower() == ".txt":
        return [(line.removesuffix("\r"), {}) for line in data.read_filled(path).removesuffix("\n").split("\n")]
    rows = data.read_rows(path, of_texts=True)
    first = 1 if isinstance(rows[0], dict) and set(rows[0]) == {"settings"} else 0  # the head of generations/*.jsonl
    if len(rows) == first:
        raise ValueError(f"{path} has no answers")
    found = []
    for number, row in enumerate(rows[first:], first):
        row = row if isinstance(row, dict) else {keys[0]: row}
        key = next((key for key in keys if key in row), None)
        if key is None:
            raise ValueError(f"{path}, row {number} has none of {', '.join(keys)}: {data.show(row)}")
        if not isinstance(row[key], str):
            raise ValueError(f"{path}, row {number}: {key} is {data.show(row[key])}, expected a text")
        try:
            row[key].encode()
        except UnicodeEncodeError:
            raise ValueError(f"{path}, row {number}: {key} has half a character (a lone surrogate)") from None
        found.append((row[key], row))
    return found
