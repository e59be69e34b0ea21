"""The job of scripts/generate.py: load a model and an adapter, wrap the questions in the adapter's template, decode, write
the answers."""

import json
import math
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from minitune_kernels import ops

from minitune import data, screen
from minitune.config import arg
from minitune.files import expand, prove_writable, to_json, write_json, write_whole
from minitune.formats import files as row_files
from minitune.formats.templates import BOS, alpaca_prompt, conversation
from minitune.runs.answers import ADAPTER, FORMULAS, open_answers, settings_path
from minitune.runs.folder import adapter_fingerprint
from minitune.screen import Writer, speaks_unicode
from minitune.session import Answerer, ModelConfig


@dataclass(frozen=True)
class AnswerConfig(ModelConfig):
    """The options of generate.py."""

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


def read_questions(config):
    """[((instruction, input), place)] of the questions, as in Alpaca. Raises ValueError with file and line of a bad one."""
    if config.prompt is not None:
        if not config.prompt.strip():
            raise ValueError("--prompt is empty; give a question")
        return [((config.prompt, ""), "--prompt")]
    path = expand(config.prompts)
    questions = []
    if path.suffix.lower() == ".txt":
        for number, line in enumerate(row_files.read_filled(path).split("\n"), 1):
            if line.strip():
                questions.append(((line.removesuffix("\r"), ""), f"{path}, line {number}"))
        return questions
    for number, row in enumerate(data.read_rows(path, of_texts=True)):
        instruction = row if isinstance(row, str) else row.get("instruction", row.get("prompt"))
        given = "" if isinstance(row, str) else row.get("input") or ""
        if not isinstance(instruction, str) or not isinstance(given, str):
            raise ValueError(f"{path}, row {number} has no text under instruction or prompt: {row_files.show(row)}")
        if not (instruction + given).strip():
            raise ValueError(f"{path}, row {number} is empty; expected a question")
        questions.append(((instruction, given), f"{path}, row {number}"))
    return questions


def answer(config, say=screen.tell):
    """Answer the questions of `config`. Returns the records, which are printed or written to config.out."""
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
                decode_questions(answerer, questions, prompts, places, file.write, len(file.records))
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
            decode_questions(answerer, questions, prompts, places, take, on_token=writer)
        except BaseException:
            if writer and writer.shown:
                writer.end(writer.shown)  # so that the next message starts on a new line
            raise
    if config.out:
        write_document(expand(config.out), records)
    return records


def decode_questions(answerer, questions, prompts, places, write, done=0, on_token=None):
    """Decode the prompts, and call write(records) after each batch.

    done: number of answers that exist already, those to the first prompts. places: file and line of each question, for
    messages."""
    config, each = answerer.config, answerer.decoding.num_return_sequences
    if done == len(prompts) * each:
        return
    check_lengths(answerer, prompts, places)

    def take(batch, answers):
        numbers = (i for i in batch for _ in range(each))
        records = [
            record(found, answerer, questions[i], len(prompts[i]), config.logprobs)
            for i, found in zip(numbers, answers, strict=True)
        ]
        write(records[max(0, done - batch.start * each) :])

    is_done = lambda i: (i + 1) * each <= done
    answerer.decode_batches(prompts, config.batch_size, is_done, take, on_token=on_token)


def encode_question(answerer, question, place):
    """Token ids of a question (instruction, input) in its template. Raises ValueError with the place if it is not Unicode
    text."""
    instruction, given = question
    if answerer.template == "alpaca":
        pieces = [BOS, alpaca_prompt(instruction, given)]
    else:
        pieces = conversation([instruction + (f"\n\n{given}" if given else "")], answerer.template)
    try:
        return answerer.encode(pieces, answerer.special_text)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def check_lengths(answerer, prompts, places):
    """Raises ValueError, before decoding, if a prompt fills the context. Warns if an answer may not fit."""
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
        answerer.say(f"an answer has at most {context} tokens, the model's context, and not {asked:,}")
    if (total := min(longest + min(asked, context), both)) > context:
        answerer.say(
            f"warning: prompt and answer may come to {total} tokens; the model was trained on {context}, and gets worse beyond"
        )


def answer_settings(answerer):
    """{setting: value} of all that the answers depend on, apart from the questions."""
    config = answerer.config
    settings = {
        "model": answerer.name,
        "model files (sha256)": answerer.folder.fingerprint,
        ADAPTER: adapter_fingerprint(answerer.adapter),
        FORMULAS: ops.formulas_fingerprint(),
        "template": answerer.template,
        **({} if answerer.special_text == "text" else {"special text": answerer.special_text}),
        "quantize": answerer.quantize,
        "compute dtype": str(answerer.dtype).removeprefix("torch."),
        "logprobs": config.logprobs,
    }
    return json.loads(json.dumps(settings | asdict(answerer.decoding.meaning())))


def check_out(config):
    """Raises ValueError if the answers cannot be written to config.out."""
    out = expand(config.out)
    prove_writable(out)
    if config.prompts is not None and out.exists() and out.samefile(expand(config.prompts)):
        raise ValueError(f"--out is the file of --prompts, {out}; choose another one for the answers")
    if config.prompts is None and settings_path(out).exists() and config.resume == "auto":
        raise ValueError(
            f"{out} holds the answers to a file of questions; choose another --out, or write over it with --resume never"
        )


def write_document(path, records):
    """Write the answers to one question, whole or not at all."""
    settings_path(path).unlink(missing_ok=True)
    if path.suffix == ".jsonl":
        write_whole(path, "".join(to_json(entry) + "\n" for entry in records))
    else:
        write_json(path, records)


@contextmanager
def print_text(total):
    """Gives write(records), which prints answers, each below its question if there are several."""
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
    """Gives write(records), which prints one JSON list in parts. The list is closed if decoding stops, too."""
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
    """Indented JSON text. Control characters, and characters that the screen cannot show, are JSON escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=not speaks_unicode())
    return screen.UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@contextmanager
def nothing(total):
    yield lambda records: None


def record(found, answerer, question, prompt_tokens, with_logprobs):
    """The record of an Answer in the output. question: {"prompt": ..., "input": ...}."""
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
