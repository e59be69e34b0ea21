"""A conversation with a model on the terminal, the job of scripts/chat.py."""

import contextlib
import importlib
import signal
import sys
import threading
from dataclasses import dataclass, replace

from minitune import screen
from minitune.config import arg
from minitune.files import write_json
from minitune.formats.templates import conversation
from minitune.generate import decode
from minitune.models.cache import Memory
from minitune.screen import Writer, short
from minitune.session import Answerer, ModelConfig, out_of_memory_explained

HELP = (
    "/reset forgets the conversation, /save FILE writes it as JSON, /help, /quit or Ctrl-D ends, Ctrl-C stops an answer"
)


@dataclass(frozen=True)
class ChatConfig(ModelConfig):
    """The options of chat.py. DEFAULTS: for decoding, in place of those of GenerateConfig."""

    DEFAULTS = {"max_new_tokens": 512}

    system: str | None = arg(None, "text before the conversation", group="conversation")

    def __post_init__(self):
        super().__post_init__()
        if (self.num_beams or 1) > 1 or (self.num_return_sequences or 1) > 1:
            raise ValueError("a chat streams one answer: beams and several answers are for scripts/generate.py")


class Stopped(Exception):
    """Raised by Ctrl-C while an answer is written."""


def chat(config, ask=input, say=screen.say):
    """Read questions and write answers until the input ends. Returns the turns [question, answer, ...]."""
    answerer = Answerer(config, screen.tell, **config.DEFAULTS)
    if answerer.decoding.num_beams > 1 or answerer.decoding.num_return_sequences > 1:
        screen.tell("a chat streams one answer: num_beams and num_return_sequences of the model's files are not used")
        answerer.decoding = replace(answerer.decoding, num_beams=1, num_return_sequences=1)
    _ = answerer.model  # loads it now, not at the first question
    if ask is input and sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not on every system
            importlib.import_module("readline")  # arrow keys, and lines beyond the 4095 bytes that a terminal takes
    say(f"template {answerer.template}. {HELP}")
    turns, memory = [], Memory()
    while True:
        try:
            question = ask("> ").strip()
        except EOFError:
            say("")
            return turns
        except KeyboardInterrupt as stop:
            if str(stop):  # of SIGTERM, which ends a chat: only Ctrl-C has no words
                raise
            say("\n(Ctrl-D or /quit ends)")
            continue
        except UnicodeDecodeError as error:
            say(f"error: the line is not {error.encoding} text; type it again")
            continue
        command, _, rest = question.partition(" ")
        if command == "/quit":
            return turns
        try:
            if command == "/reset":
                turns = []
                say("(forgotten)")
            elif command == "/save":
                save(turns, config.system, rest.strip(), say)
            elif command == "/help":
                say(HELP)
            elif question.startswith("/"):
                say(f"there is no {short(command)}. {HELP}")
            elif question:
                turns = [*turns, question, reply(answerer, [*turns, question], config.system, memory, say)]
        except (ValueError, FloatingPointError, MemoryError) as error:  # such as a conversation beyond the context
            say(f"error: {error} (/reset forgets the conversation)")
        except Stopped as stopped:
            say(str(stopped))
        except KeyboardInterrupt as stop:  # Ctrl-C before or after the answer was written
            if str(stop):
                raise
            say("(stopped)")


def reply(answerer, turns, system, memory, say):
    """Write the answer to the last question token by token, and return it. Ctrl-C keeps what was written so far. Raises
    Stopped if that is nothing. memory: keys and values of the earlier turns."""
    writer, stopped = Writer(answerer.tokenizer, stop=answerer.decoding.stop), threading.Event()

    def on_token(token):
        if stopped.is_set():
            raise Stopped
        writer(token)

    ids = answerer.encode(conversation(turns, answerer.template, system), answerer.special_text)
    context = answerer.model.config.max_position_embeddings
    if len(ids) >= context:
        raise ValueError(
            f"the conversation has {len(ids)} tokens, but the model's context is {context}, answer included"
        )
    room, decoding = context - len(ids), answerer.decoding
    decoding = replace(
        decoding,
        max_new_tokens=min(room, decoding.max_new_tokens),
        min_new_tokens=min(room, decoding.min_new_tokens),
    )
    try:
        with until_ctrl_c(stopped), out_of_memory_explained(decoding, 1):
            [answer], _ = decode(answerer.model, [ids], decoding, answerer.tokenizer, on_token, memory)
    except Stopped as how:
        if how.args:  # in the middle of a step
            memory.forget()
        if not writer.shown:
            raise Stopped("(stopped before the answer began; the question is forgotten)") from None
        writer.end(writer.shown)
        return writer.shown.strip()
    text = answerer.text(answer)
    writer.end(text)
    if answer.ended_by == "length":
        is_full = decoding.max_new_tokens == room
        say(f"(cut: the context of {context} tokens is full, /reset)" if is_full else "(cut: --max-new-tokens)")
    return text.strip()


class until_ctrl_c:
    """A context in which the first Ctrl-C sets the event, and the second raises Stopped at once, as reading a long prompt
    checks no event."""

    def __init__(self, event):
        self.event = event

    def __enter__(self):
        try:
            self.previous = signal.signal(signal.SIGINT, self.stop)
        except ValueError:  # only the main thread receives signals
            self.previous = None

    def stop(self, number, frame):
        if self.event.is_set():
            raise Stopped("at once")
        self.event.set()

    def __exit__(self, *error):
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)


def save(turns, system, path, say):
    """Write the conversation in the messages format."""
    if not path:
        say("give a file: /save conversation.json")
        return
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    try:
        write_json(path, {"messages": messages})
    except OSError as error:
        say(f"error: {short(path)} cannot be written: {error.strerror}")
    except ValueError as error:
        say(f"error: {error}")
    else:
        say(f"{len(turns)} turns in {path}")
