"""A conversation with a model on the terminal, the job of scripts/chat.py."""

import signal
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from minitune.answer import Answerer, ModelConfig, Writer
from minitune.config import arg
from minitune.files import write_json
from minitune.generate import decode
from minitune.models.cache import Memory
from minitune.prompts import conversation

HELP = "/reset forgets the conversation, /save FILE writes it as JSON, /quit or Ctrl-D ends, Ctrl-C stops an answer"


@dataclass(frozen=True)
class ChatConfig(ModelConfig):
    """How a conversation is held."""

    max_new_tokens: int = arg(512, "longest answer, in tokens")
    system: str | None = arg(None, "text before the conversation")

    def __post_init__(self):
        super().__post_init__()
        if self.num_beams > 1 or self.num_return_sequences > 1:
            raise ValueError("a chat streams one answer: beams and several answers are for scripts/generate.py")


class Stopped(Exception):
    """Ctrl-C while an answer was being written."""


def chat(config, ask=input, say=print):
    """Read questions and write answers until the input ends. Returns the turns [question, answer, ...]."""
    answerer = Answerer(config, lambda line: print(line, file=sys.stderr))
    answerer.model  # noqa: B018 - loads now, not while the first answer is awaited
    say(f"template {answerer.template}. {HELP}")
    turns, memory = [], Memory()
    while True:
        try:
            question = ask("> ").strip()
        except EOFError:
            say("")
            return turns
        except KeyboardInterrupt:
            say("\n(Ctrl-D or /quit ends)")
            continue
        command, _, rest = question.partition(" ")
        if command == "/quit":
            return turns
        if command == "/reset":
            turns = []
            say("(forgotten)")
        elif command == "/save":
            save(turns, rest, say)
        elif command == "/help":
            say(HELP)
        elif question.startswith("/"):
            say(f"there is no {command}. {HELP}")
        elif question:
            try:
                turns += [question, reply(answerer, [*turns, question], config.system, memory)]
            except (ValueError, FloatingPointError) as error:  # a conversation beyond the context, for one
                say(f"error: {error} (/reset forgets the conversation)")


def reply(answerer, turns, system, memory):
    """Write the answer to the last question as it comes, and return it. Ctrl-C keeps what was written. memory: of the turns
    before, which are not read again."""
    writer, stopped = Writer(answerer.tokenizer, stop=answerer.decoding.stop), threading.Event()

    def on_token(token):
        if stopped.is_set():
            raise Stopped
        writer(token)

    ids = answerer.encode(conversation(turns, answerer.template, system))
    room = max(1, answerer.model.config.max_position_embeddings - len(ids))  # without any, decode() says so
    decoding = answerer.decoding
    decoding = replace(
        decoding,
        max_new_tokens=min(room, decoding.max_new_tokens),
        min_new_tokens=min(room, decoding.min_new_tokens),
    )
    with until_ctrl_c(stopped):
        try:
            [answer], _ = decode(answerer.model, [ids], decoding, answerer.tokenizer, on_token, memory)
            text = answerer.text(answer)
        except Stopped:
            text = writer.shown
    writer.end(text)
    return text.strip()


class until_ctrl_c:
    """While open, Ctrl-C sets the event instead of ending the program."""

    def __init__(self, event):
        self.event = event

    def __enter__(self):
        try:
            self.previous = signal.signal(signal.SIGINT, lambda number, frame: self.event.set())
        except ValueError:  # not the main thread, which alone gets signals
            self.previous = None

    def __exit__(self, *error):
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)


def save(turns, path, say):
    """Write the conversation in the messages format."""
    if not path:
        say("give a file: /save conversation.json")
        return
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    try:
        write_json(Path(path).expanduser(), {"messages": messages})
    except OSError as error:
        say(f"error: {path}: {error.strerror}")
    else:
        say(f"{len(turns)} turns in {path}")
