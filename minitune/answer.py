"""Prompts to answers, the job of scripts/generate.py: load model and adapter, wrap prompts as it was trained, decode, write."""

import functools
import json
import math
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from minitune import checkpoint, data, hub, screen
from minitune.answer_file import open_answers, settings_path
from minitune.config import arg, is_out_of_memory
from minitune.device import DTYPES, choose_device, choose_dtype
from minitune.files import expand, prove_writable, read_json, to_json, write_json, write_whole
from minitune.generate import decode, earlier_copies
from minitune.generation_config import DecodingOptions, settle
from minitune.prompts import ADAPTER_TEMPLATES, BOS, CHAT_TEMPLATES, alpaca_prompt, conversation, for_tokenizer
from minitune.run_folder import adapter_fingerprint, model_fingerprint
from minitune.screen import short, some
from minitune.tokenizer import load_tokenizer

ADAPTER_CONFIG = checkpoint.ADAPTER_CONFIG
ADAPTERS = ("adapter", "best", "last")  # of a run folder, the first that is there
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
        """The options that the config.json of a training run in `folder` means here. options: what it holds."""
        if any((folder / name / ADAPTER_CONFIG).is_file() for name in ADAPTERS):
            return {"adapter": str(folder)}
        return {name: options[name] for name in ("model", "revision", "quantize", "dtype") if options.get(name)}


@dataclass(frozen=True)
class AnswerConfig(ModelConfig):
    """What is asked, and what is written."""

    prompt: str | None = arg(None, "one question", group="questions and answers")
    prompts: str | None = arg(
        None, "file of questions: .txt, one a line; .json or .jsonl of texts, of Alpaca rows or of rows with prompt"
    )
    batch_size: int = arg(8, "questions that are decoded together", low=1, high=2**16)
    json: bool = arg(False, "print JSON: a list with prompt, answer, tokens, how it ended")
    logprobs: bool = arg(False, "with --json or --out: the log-probability of each token too")
    out: str | None = arg(
        None,
        "file for the answers, instead of the screen: JSON lines where it ends with .jsonl, else a JSON list. Those to --prompts "
        "are written batch by batch, and a stopped run goes on",
    )
    resume: str = arg(
        "auto",
        "with --prompts and --out: auto goes on from the answers that are there, never writes over them",
        choices=("auto", "never"),
    )

    def __post_init__(self):
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give one of --prompt TEXT and --prompts FILE")
        if self.logprobs and not (self.json or self.out):
            raise ValueError("--logprobs needs --json or --out, where they are written")
        if self.out == "":
            raise ValueError("--out is empty; give a file, or leave the option out")


class Answerer:
    """A model, which loads when it is first asked for, with its tokenizer, template and decoding.

    config: a ModelConfig. weaker: defaults of decoding in place of GenerateConfig's, see generation_config.settle()."""

    def __init__(self, config, say, **weaker):
        self.config, self.say = config, say
        self.adapter = None if config.adapter is None else adapter_folder(config.adapter)
        trained = read_facts(self.adapter)  # a bad one is said before anything else
        self.name = config.model if config.model is not None else trained["base"] or "tiny-mistral"
        is_base = config.model is None or config.model == trained["base"]
        revision = config.revision or (trained["revision"] if is_base else None)
        try:
            self.folder = hub.resolve(self.name, revision)
        except ValueError as error:
            if config.model is not None or config.adapter is None:
                raise
            raise ValueError(
                f"{error} ({config.adapter} names this base; --model says where it is, or which other one to use)"
            ) from None
        self.tokenizer = load_tokenizer(self.folder)
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
        """Token ids of a rendered conversation. Text from outside becomes a special token only with special_text "tokens"."""
        pieces = for_tokenizer(pieces, self.tokenizer)
        if special_text == "tokens":
            pieces = data.read_special(pieces, self.tokenizer)
        return [token for ids in self.tokenizer.encode_pieces(pieces) for token in ids]

    def text(self, answer):
        """The text of an Answer, cut at a stop text."""
        text = self.tokenizer.decode(answer.ids)
        cuts = [text.find(stop) for stop in self.decoding.stop if stop in text] if answer.ended_by == "stop" else []
        return text[: min(cuts)] if cuts else text


def say_idle(given, decoding, say):
    """Says which of the given options change nothing in a decoding, such as a temperature where nothing is drawn."""
    meaning, samples = decoding.meaning(), decoding.do_sample  # temperature 0 is known to make the others idle
    idle = [name for name in given if getattr(decoding, name) != getattr(meaning, name)]
    for option, named in (
        ("--num-beams", [name for name in idle if name in ("length_penalty", "early_stopping")]),
        ("--do-sample", [name for name in idle if name in ("temperature", "top_k", "top_p", "min_p") and not samples]),
    ):
        if named:
            flags = ", ".join("--" + name.replace("_", "-") for name in named)
            say(f"warning: without {option}, {flags} changes nothing")


def adapter_folder(path):
    """The folder of an adapter: `path`, or what a run folder of that name holds. Raises ValueError where there is none."""
    folder = expand(path)
    for inner in (folder, *(folder / name for name in ADAPTERS)):
        if (inner / ADAPTER_CONFIG).is_file():
            return inner
    raise ValueError(
        f"{short(str(path))} is not the folder of an adapter: it has no {ADAPTER_CONFIG}, and no {' or '.join(ADAPTERS)} of a run"
    )


def read_facts(adapter):
    """{"template", "base", "special_text", "revision", "dtype", "quantize"} that an adapter was trained with, None where its
    files do not say, or there is no adapter. A run of an older minitune has revision, dtype and quantize in its config.json.
    Raises ValueError where a value is not what minitune writes."""
    facts = dict.fromkeys(("template", "base", "special_text", "revision", "dtype", "quantize"))
    if adapter is None:
        return facts
    folder = Path(adapter)
    base = checkpoint.read_adapter_config(folder).get("base_model_name_or_path")
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
    """The template of the options, of the adapter, or plain. trained: of read_facts(). Says where these do not agree."""
    names = [Path(hub.MODELS.get(name, name)).name for name in (trained["base"], config.model) if name is not None]
    if len(set(names)) > 1:
        say(f"warning: the adapter was trained on {some([trained['base']])}, not on {config.model}")
    template = trained["template"]
    if config.adapter is not None and template is None and config.template is None:
        say("the adapter does not say which template it was trained with: questions go in as they are (--template)")
    if template and config.template and config.template != template:
        say(f"warning: the adapter was trained with the template {template}, and --template is {config.template}")
    return config.template or template or "plain"


def read_questions(config):
    """The questions as [(Alpaca's (instruction, input) pair, where it stands)]. Raises ValueError with the file and the place."""
    if config.prompt is not None:
        if not config.prompt.strip():
            raise ValueError("--prompt is empty; give a question")
        return [((config.prompt, ""), "--prompt")]
    path = expand(config.prompts)
    questions = []
    if path.suffix.lower() == ".txt":
        for number, line in enumerate(data.read_filled(path).split("\n"), 1):
            if line.strip():
                questions.append(((line.removesuffix("\r"), ""), f"{path}, line {number}"))
        return questions
    for number, row in enumerate(data.read_rows(path, of_texts=True)):
        instruction = row if isinstance(row, str) else row.get("instruction", row.get("prompt"))
        given = "" if isinstance(row, str) else row.get("input") or ""
        if not isinstance(instruction, str) or not isinstance(given, str):
            raise ValueError(f"{path}, row {number} has no text under instruction or prompt: {data.show(row)}")
        if not (instruction + given).strip():
            raise ValueError(f"{path}, row {number} is empty; expected a question")
        questions.append(((instruction, given), f"{path}, row {number}"))
    return questions


def answer(config, say=screen.tell):
    """Answer the questions of `config`. Returns the records, which are printed, or written to config.out."""
    questions = read_questions(config)
    if config.out:
        check_out(config)
    answerer = Answerer(config, say)
    prompts = [encode_question(answerer, question, place) for question, place in questions]
    places = [place for _, place in questions]
    questions = [{"prompt": text} | ({"input": given} if given else {}) for (text, given), _ in questions]
    each = answerer.decoding.num_return_sequences
    if config.out and config.prompts:
        settings = answer_settings(answerer)
        with open_answers(config.out, settings, questions, each, config.resume == "never") as file:
            if file.records:
                is_done = len(file.records) == file.total
                say(f"{file.progress()}; {'nothing is left to do' if is_done else 'going on'}")
            try:
                decode_batches(answerer, questions, prompts, file.write, len(file.records), say, places)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"{file.progress()}; the same command goes on") from None
            say(f"{file.progress()}; score them: scripts/evaluate.py --predictions {config.out} --references FILE")
            return file.records
    records = []
    with (nothing if config.out else print_json if config.json else print_text)(len(prompts) * each) as write:
        is_one = len(prompts) * each == answerer.decoding.num_beams == 1
        streams = is_one and not (config.json or config.out)
        writer = Writer(answerer.tokenizer, stop=answerer.decoding.stop) if streams else None

        def take(found):
            records.extend(found)
            if writer:
                writer.end(found[0]["answer"])
            else:
                write(found)

        try:
            decode_batches(answerer, questions, prompts, take, 0, say, places, writer)
        except BaseException:
            if writer and writer.shown:
                writer.end(writer.shown)  # what is said next gets a line of its own
            raise
    if config.out:
        write_document(expand(config.out), records)
    return records


def decode_batches(answerer, questions, prompts, write, done, say, places, writer=None):
    """Decode the prompts, and call write(records) after each batch. done: answers that are there, of the first prompts; a batch
    is the same one whatever is there, and so are its answers. places: where the questions stand."""
    config, each = answerer.config, answerer.decoding.num_return_sequences
    if done == len(prompts) * each:
        return
    size = 1 if config.lookup else config.batch_size
    check_lengths(answerer, prompts, places, say)  # which loads the model: not a part of the time that is measured
    tokens = guessed = accepted = 0
    copies = earlier_copies(prompts)
    started = time.perf_counter()
    with screen.progress(
        len(prompts), "prompt", initial=done // each, disable=None if len(prompts) > 1 else True
    ) as bar:
        for start in range(0, len(prompts), size):
            batch = range(start, min(start + size, len(prompts)))
            if batch.stop * each <= done:
                continue
            with out_of_memory_explained(answerer.decoding, len(batch)):
                answers, counts = decode(
                    answerer.model,
                    [prompts[i] for i in batch],
                    answerer.decoding,
                    answerer.tokenizer,
                    writer,
                    copies=[copies[i] for i in batch],
                )
            records = [
                record(found, answerer, questions[i], len(prompts[i]), config.logprobs)
                for i, found in zip((i for i in batch for _ in range(each)), answers, strict=True)
            ]
            tokens += sum(entry["tokens"] for entry in records)
            guessed, accepted = guessed + counts.guessed, accepted + counts.accepted
            write(records[max(0, done - start * each) :])
            bar.set_postfix(tokens_per_s=f"{tokens / (time.perf_counter() - started):.0f}", refresh=False)
            bar.update(batch.stop - max(start, done // each))
    seconds = time.perf_counter() - started
    share = f"; lookup guessed {guessed}, of which {accepted} were right" if guessed else ""
    say(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s{share}")


@contextmanager
def out_of_memory_explained(decoding, prompts):
    """Turns what torch raises where memory is short, of a GPU and of the CPU, into a MemoryError that names the options."""
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


def encode_question(answerer, question, place):
    """The token ids of an (instruction, input) pair. Raises ValueError with the place where it is not Unicode text."""
    instruction, given = question
    if answerer.template == "alpaca":
        pieces = [BOS, alpaca_prompt(instruction, given)]
    else:
        pieces = conversation([instruction + (f"\n\n{given}" if given else "")], answerer.template)
    try:
        return answerer.encode(pieces, answerer.special_text)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def check_lengths(answerer, prompts, places, say):
    """Before anything is decoded: raises ValueError where a prompt leaves no room, and says where an answer may not have it."""
    context, longest = answerer.model.config.max_position_embeddings, max(map(len, prompts))
    if longest >= context:
        i = next(i for i, prompt in enumerate(prompts) if len(prompt) >= context)
        raise ValueError(
            f"{places[i]} has {len(prompts[i])} tokens, but the model's context is {context}, answer included; shorten it"
        )
    asked, both = answerer.decoding.max_new_tokens, answerer.decoding.max_length or 2**63
    if longest >= both:
        i = next(i for i, prompt in enumerate(prompts) if len(prompt) >= both)
        raise ValueError(
            f"{places[i]} has {len(prompts[i])} tokens, but max_length in the model's files is {both}, answer included; give "
            "--max-new-tokens, or shorten it"
        )
    if asked > context:
        say(f"an answer has at most {context} tokens, the model's context, and not {asked:,}")
    if (total := min(longest + min(asked, context), both)) > context:
        say(
            f"warning: prompt and answer may come to {total} tokens; the model was trained on {context}, and gets worse beyond"
        )


def answer_settings(answerer):
    """{what: value} that the answers depend on beside the questions."""
    config = answerer.config
    settings = {
        "model": answerer.name,
        "model files (sha256)": model_fingerprint(answerer.folder),
        "adapter (sha256)": adapter_fingerprint(answerer.adapter),
        "template": answerer.template,
        **({} if answerer.special_text == "text" else {"special text": answerer.special_text}),
        "quantize": answerer.quantize,
        "compute dtype": str(answerer.dtype).removeprefix("torch."),
        "logprobs": config.logprobs,
    }
    return json.loads(json.dumps(settings | asdict(answerer.decoding.meaning())))


# --- where answers go ---


def speaks_unicode():
    return (sys.stdout.encoding or "utf-8").lower().startswith("utf")


def check_out(config):
    """Raises ValueError where config.out is no place for the answers."""
    out = expand(config.out)
    prove_writable(out)
    if config.prompts is not None and out.exists() and out.samefile(expand(config.prompts)):
        raise ValueError(f"--out is the file of --prompts, {out}; choose another one for the answers")
    if config.prompts is None and settings_path(out).exists() and config.resume == "auto":
        raise ValueError(
            f"{out} holds the answers to a file of questions; choose another --out, or write over it with --resume never"
        )


def write_document(path, records):
    """The answers to one question, whole or not at all."""
    settings_path(path).unlink(missing_ok=True)
    if path.suffix == ".jsonl":
        write_whole(path, "".join(to_json(entry) + "\n" for entry in records))
    else:
        write_json(path, records)


@contextmanager
def print_text(total):
    """write(records) that prints answers, each behind its question where there are several."""
    count = 0

    def write(records):
        nonlocal count
        for entry in records:
            question = f"> {entry['prompt']}\n" if total > 1 else ""
            screen.show(sys.stdout, ("\n" if count else "") + question + entry["answer"] + "\n")
            count += 1

    yield write


@contextmanager
def print_json(total):
    """write(records) that prints one JSON list, batch by batch. It is closed where the decoding stops, too."""
    count = 0

    def write(records):
        nonlocal count
        text = json_for_a_screen(records).removeprefix("[").removesuffix("\n]")
        screen.show(sys.stdout, ("," if count else "[") + text)
        count += len(records)

    try:
        yield write
    finally:
        screen.show(sys.stdout, "\n]\n" if count else "[]\n")


def json_for_a_screen(value):
    """Indented JSON text. What would steer a terminal, or what the screen lacks, is an escape of JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=not speaks_unicode())
    return screen.UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@contextmanager
def nothing(total):
    yield lambda records: None


def record(found, answerer, question, prompt_tokens, with_logprobs):
    """What is written of an Answer. question: {"prompt": ..., "input": ...}."""
    entry = question | {"answer": answerer.text(found), "prompt_tokens": prompt_tokens, "tokens": len(found.ids)}
    entry |= {"ended_by": found.ended_by}
    if found.score is not None:
        entry["score"] = found.score if math.isfinite(found.score) else None  # JSON has no infinity
    if with_logprobs:
        tok = answerer.tokenizer
        entry["logprobs"] = [
            {"id": i, "token": tok.piece(i), "logprob": logprob}
            for i, logprob in zip(found.ids, found.logprobs, strict=False)
        ]
    return entry


class Writer:
    """Called with each token of an answer: writes the text that has become certain. A token may hold half a character, and text
    that may begin one of the `stop` texts waits."""

    def __init__(self, tokenizer, stream=None, stop=()):
        self.tokenizer, self.stream, self.stop = tokenizer, stream or sys.stdout, stop
        self.ids, self.shown = [], ""

    def __call__(self, token):
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):
            self.write(text[: certain(text, self.stop)])

    def write(self, text):
        screen.show(self.stream, text[len(self.shown) :])
        self.shown = max(self.shown, text, key=len)

    def end(self, text=None):
        """Write the rest: of `text`, the whole answer, or of all tokens."""
        self.write(self.tokenizer.decode(self.ids) if text is None else text)
        screen.show(self.stream, "\n")


def certain(text, stop):
    """How much of `text` is before any stop text, whole or begun at its end."""
    ends = [len(text)]
    for wanted in stop:
        found = text.find(wanted)
        begun = [len(text) - n for n in range(1, len(wanted)) if text.endswith(wanted[:n])]
        ends += [found] if found >= 0 else begun
    return min(ends)
