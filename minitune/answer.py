"""Prompts to answers, the job of scripts/generate.py: load model and adapter, wrap prompts as it was trained, decode, write."""

import json
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

from tqdm import tqdm

from minitune import checkpoint, data, hub
from minitune.config import arg, positive
from minitune.device import choose_device, choose_dtype
from minitune.files import prove_writable, read_json, write_json
from minitune.generate import GenerateConfig, decode
from minitune.prompts import ADAPTER_TEMPLATES, BOS, CHAT_TEMPLATES, EOS, alpaca_prompt, conversation
from minitune.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ModelConfig(GenerateConfig):
    """Which model answers, and how: the options that generate and chat share."""

    model: str = arg("tiny-mistral", "llama2, mistral, phi2, an embedded model, a hub id, or a folder")
    revision: str | None = arg(None, "branch, tag or commit of a hub id")
    adapter: str | None = arg(None, "folder of an adapter in PEFT's format, such as runs/NAME/adapter")
    template: str | None = arg(
        None, "how a question is wrapped; not set: as the adapter was trained, else plain", choices=CHAT_TEMPLATES
    )
    quantize: str = arg("none", "weights in 4 bit", choices=("none", "nf4", "nf4-dq"))
    dtype: str = arg(
        "auto", "compute dtype; auto chooses by the device and says why", choices=("auto", "fp32", "bf16", "fp16")
    )
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class AnswerConfig(ModelConfig):
    """What is asked, and what is written."""

    prompt: str | None = arg(None, "one question")
    prompts: str | None = arg(
        None, "file of questions: .txt, one a line; .json or .jsonl of texts, of Alpaca rows or of rows with prompt"
    )
    batch_size: int = arg(8, "questions that are decoded together")
    json: bool = arg(False, "print JSON: a list with prompt, answer, tokens, how it ended")
    logprobs: bool = arg(False, "with --json: the log-probability of each token too")
    out: str | None = arg(None, "JSON file for the answers, instead of the screen")

    def __post_init__(self):
        super().__post_init__()
        positive(self, "batch_size")
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give one of --prompt TEXT and --prompts FILE")
        if self.logprobs and not (self.json or self.out):
            raise ValueError("--logprobs needs --json or --out, where they are written")


class Answerer:
    """A loaded model with its tokenizer and template."""

    def __init__(self, config, say):
        self.config = config
        folder = hub.resolve(config.model, config.revision)
        if config.adapter is not None:
            checkpoint.read_adapter_config(config.adapter)  # a bad one is said before anything else
        self.tokenizer = load_tokenizer(folder)
        self.template = choose_template(config, say)
        device = choose_device(config.device)
        dtype, reason = choose_dtype(config.dtype, device)
        say(f"{config.model} on {device}, {str(dtype).removeprefix('torch.')} ({reason})")
        self.model = checkpoint.load_model(folder, dtype, device, config.quantize, config.adapter, say=say)
        self.decoding = decoding_of(config, self.tokenizer)

    def encode(self, pieces):
        """Token ids of a rendered conversation. Text from outside never becomes a special token."""
        tok, ids = self.tokenizer, []
        for piece in pieces:
            if piece is BOS:
                ids += [] if tok.bos_id is None else [tok.bos_id]
            elif piece is EOS:
                ids.append(tok.eos_id)
            else:
                ids += tok.encode(piece, add_bos=False, allow_special=False)
        return ids

    def text(self, answer):
        """The text of an Answer, cut at a stop text."""
        text = self.tokenizer.decode(answer.ids)
        cuts = [text.find(stop) for stop in self.decoding.stop if stop in text] if answer.ended_by == "stop" else []
        return text[: min(cuts)] if cuts else text


def decoding_of(config, tokenizer):
    """The GenerateConfig in the options of a job, with the tokenizer's end tokens where it names none."""
    values = {f.name: getattr(config, f.name) for f in fields(GenerateConfig)}
    return GenerateConfig(**values | ({"eos_ids": tuple(tokenizer.eos_ids)} if config.eos_ids is None else {}))


def choose_template(config, say):
    """The template of the options, of the adapter, or plain. Says where these do not agree."""
    trained = None
    if config.adapter is not None:
        facts = Path(config.adapter) / "minitune.json"
        facts = read_json(facts) if facts.is_file() else {}
        trained = ADAPTER_TEMPLATES.get(facts.get("template"))
        base = facts.get("base_model")
        if base is not None and Path(str(base)).name != Path(config.model).name:
            say(f"warning: the adapter was trained on {base}, not on {config.model}")
        if trained is None and config.template is None:
            say("the adapter does not say which template it was trained with: questions go in as they are (--template)")
    if trained and config.template and config.template != trained:
        say(f"warning: the adapter was trained with the template {trained}, and --template is {config.template}")
    return config.template or trained or "plain"


def read_questions(config):
    """The questions as Alpaca's (instruction, input) pairs. Raises ValueError with the file and the place."""
    if config.prompt is not None:
        if not config.prompt.strip():
            raise ValueError("--prompt is empty; give a question")
        return [(config.prompt, "")]
    path = Path(config.prompts)
    if path.suffix == ".txt":
        questions = [(line, "") for line in data.read_text(path).splitlines() if line.strip()]
    else:
        questions = []
        for number, row in enumerate(data.read_rows(path, of_texts=True)):
            instruction = row if isinstance(row, str) else row.get("instruction", row.get("prompt"))
            given = "" if isinstance(row, str) else row.get("input") or ""
            if not isinstance(instruction, str) or not isinstance(given, str):
                raise ValueError(f"{path}, row {number} has no text under instruction or prompt: {data.show(row)}")
            if not (instruction + given).strip():
                raise ValueError(f"{path}, row {number} is empty; expected a question")
            questions.append((instruction, given))
    if not questions:
        raise ValueError(f"{path} has no questions")
    return questions


def answer(config, say=lambda line: print(line, file=sys.stderr)):
    """Answer the questions of `config`. Returns the records, which are printed, or written to config.out."""
    questions = read_questions(config)
    if config.out:
        prove_writable(config.out)
    answerer = Answerer(config, say)
    prompts = []
    for instruction, given in questions:
        is_alpaca = answerer.template == "alpaca"
        pieces = [BOS, alpaca_prompt(instruction, given)] if is_alpaca else None
        question = instruction + (f"\n\n{given}" if given else "")
        prompts.append(answerer.encode(pieces or conversation([question], answerer.template)))
    context, longest = answerer.model.config.max_position_embeddings, max(map(len, prompts)) + config.max_new_tokens
    if longest > context:
        say(
            f"warning: prompt and answer may come to {longest} tokens; the model was trained on {context}, and gets worse beyond"
        )
    streams = len(prompts) == 1 and config.num_beams == 1 and config.num_return_sequences == 1 and not config.stop
    streams = streams and not (config.json or config.out)
    records, counts, started = [], [], time.perf_counter()
    bar = tqdm(total=len(prompts), unit="prompt", disable=None if len(prompts) > 1 else True, file=sys.stderr)
    with bar:
        for start in range(0, len(prompts), config.batch_size):
            batch = prompts[start : start + config.batch_size]
            writer = Writer(answerer.tokenizer) if streams else None
            answers, counted = decode(answerer.model, batch, answerer.decoding, answerer.tokenizer, writer)
            if writer:
                writer.end()
            counts.append(counted)
            for i, found in enumerate(answers):
                prompt = start + i // config.num_return_sequences
                records.append(record(found, answerer, questions[prompt], len(prompts[prompt]), config.logprobs))
            bar.update(len(batch))
    seconds = time.perf_counter() - started
    tokens = sum(entry["tokens"] for entry in records)
    guessed = sum(counted.guessed for counted in counts)
    share = f"; lookup guessed {guessed}, of which {sum(c.accepted for c in counts)} were right" if guessed else ""
    say(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s{share}")
    if config.out:
        write_json(config.out, records)
    elif config.json:
        print(json.dumps(records, indent=2, ensure_ascii=False))
    elif not streams:
        for i, entry in enumerate(records):
            print(("\n" if i else "") + (f"> {entry['prompt']}\n" if len(records) > 1 else "") + entry["answer"])
    return records


def record(found, answerer, question, prompt_tokens, with_logprobs):
    instruction, given = question
    entry = {"prompt": instruction} | ({"input": given} if given else {})
    entry |= {"answer": answerer.text(found), "prompt_tokens": prompt_tokens, "tokens": len(found.ids)}
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
        self.stream.write(text[len(self.shown) :])
        self.stream.flush()
        self.shown = max(self.shown, text, key=len)

    def end(self, text=None):
        """Write the rest: of `text`, the whole answer, or of all tokens."""
        self.write(self.tokenizer.decode(self.ids) if text is None else text)
        self.stream.write("\n")
        self.stream.flush()


def certain(text, stop):
    """How much of `text` is before any stop text, whole or begun at its end."""
    ends = [len(text)]
    for wanted in stop:
        found = text.find(wanted)
        begun = [len(text) - n for n in range(1, len(wanted)) if text.endswith(wanted[:n])]
        ends += [found] if found >= 0 else begun
    return min(ends)
