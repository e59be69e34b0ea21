"""Files of answers with which a later start goes on: whole and valid after a kill at any moment.

Two layouts share everything but where the settings stand. QuestionAnswers, of generate --out: answers in the order of the
questions and nothing else; NAME.settings.json beside the file has what they depend on, and a checksum of each. RowAnswers,
generations/NAME.jsonl of evaluate and sweep: the settings in the first line, then an answer a line, which names its row and has
a checksum of its own. Answers of other settings and edited ones are refused."""

import errno
import os
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minitune.files import (
    differences,
    fingerprint,
    parse_json,
    paths_explained,
    read_json,
    to_json,
    writable,
    write_json,
)
from minitune.interrupts import postponed
from minitune.locks import held
from minitune.schema import COUNT, check
from minitune.screen import short, some, warn

ADAPTER = "adapter (sha256)"  # the key of the settings for the adapter's fingerprint
FORMULAS = "formulas (sha256)"  # the key for the fingerprint of the formulas, which older files lack
SUMS = "checksums (crc32)"  # the key of NAME.settings.json for one of each answer that was begun to be written


def settings_path(path):
    return Path(f"{path}.settings.json")


def open_answers(path, settings, questions, each, start_over):
    """The QuestionAnswers of `path`, see opened(). questions: {"prompt": ..., "input": ...} of each; each: answers that a
    question has."""
    return opened(QuestionAnswers, path, settings, start_over, questions, each)


def open_row_answers(path, settings, rows, start_over):
    """The RowAnswers of `path`, see opened(). rows: how many rows there are to answer."""
    return opened(RowAnswers, path, settings, start_over, rows)


@contextmanager
def opened(layout, path, settings, start_over, *asked):
    """A file of answers, which no other process has open. A new one that gets no answer is removed again.

    settings: {what: value} that the answers depend on. start_over: forget what is there. Raises ValueError where the file holds
    anything else than answers of these settings to what is `asked`."""
    path, file = writable(path), None
    with ExitStack() as stack:
        with paths_explained(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.with_name(f".{path.name}.lock")
            stack.enter_context(held(lock, f"another process writes {path}; wait for it{layout.elsewhere}"))
            is_new = not path.exists()
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        stack.callback(os.close, handle)
        try:
            file = layout(path, handle, settings, start_over, *asked)
            yield file
        finally:
            if is_new and file is not None and not file.records:
                path.unlink(missing_ok=True)
                settings_path(path).unlink(missing_ok=True)


class AnswerFile:
    """An open file of answers; a subclass is a layout. records: the answers in it, in their order."""

    opening = closing = b""  # what stands before and behind the answers
    is_list = False  # a JSON list, with a comma between its lines; else each line ends by itself
    elsewhere = ""  # what a user may do instead, in words
    shape = {}  # of an answer, for schema.check()

    def __init__(self, path, handle, settings, start_over):
        self.path, self.handle, self.settings, self.records = path, handle, settings, []
        self.again = f"use --resume never to answer again{self.elsewhere}"
        self.end = 0  # of the last answer: where the next one goes
        content = b"" if start_over else read_all(handle)
        self.take(content)
        if not self.records:
            self.end = len(self.opening)
            os.ftruncate(handle, 0)
            write_at(handle, self.opening + self.closing, 0)
            self.announce([])
        elif content[self.end :] != self.closing:  # torn by a crash of the machine
            os.ftruncate(handle, self.end)
            write_at(handle, self.closing, self.end)

    def take(self, content):
        """Check the settings of `content` and take in its answers."""
        raise NotImplementedError

    def check_answer(self, record, text, where):
        """Raises ValueError where `record`, the bytes `text` in the file, is not an answer that may come next."""
        raise NotImplementedError

    def finished(self, record):
        """The record as it is written."""
        return record

    def announce(self, lines):
        """Called before these answers are written."""

    def add(self, record, text):
        self.records.append(record)

    def check_settings(self, stored):
        """Raises ValueError where the answers that are there have other settings."""
        if FORMULAS in self.settings:
            stored = {FORMULAS: self.settings[FORMULAS], **stored}
        if stored.get(ADAPTER) != self.settings.get(ADAPTER) and stored | {ADAPTER: 0} == self.settings | {ADAPTER: 0}:
            raise ValueError(
                f"{self.path} holds answers of another adapter, or of one that was trained again since; {self.again}"
            )
        flat = [
            {k: v for k, v in s.items() if k != "decoding"} | (s.get("decoding") or {}) for s in (stored, self.settings)
        ]
        if changed := differences(*flat):
            raise ValueError(f"{self.path} holds answers of other settings: {some(changed)}; {self.again}")

    def read(self, content, skip=0):
        """Take in the answers of `content` behind its first `skip` lines. A torn last line is left out."""
        lines, start = content.split(b"\n"), 0
        last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
        for number, line in enumerate(lines, 1):
            text = line.removesuffix(b",") if self.is_list else line
            if number > skip and text.strip() and text not in (b"[", b"]"):
                where = f"{self.path}, line {number}"
                try:
                    record = parse_json(text.decode(), where)
                except ValueError:  # not JSON, or not UTF-8
                    if number < last:
                        raise ValueError(f"{where} is no answer: {short(text)}; {self.again}") from None
                    return
                if not self.is_list and number == len(lines):  # its end of line is missing
                    return
                try:
                    check(record, self.shape, where)
                except ValueError as error:
                    raise ValueError(f"{error}; {self.again}") from None
                self.check_answer(record, text, where)
                self.add(record, text)
                self.end = start + len(text) + (not self.is_list)
            start += len(line) + 1

    def write(self, records):
        """Append records. One write call: a kill leaves all of them or none, and so does a full disk (OSError)."""
        if not records:
            return
        records = [self.finished(record) for record in records]
        lines = [to_json(record).encode() for record in records]
        if self.is_list:
            body = b"," * bool(self.records) + b",".join(b"\n" + line for line in lines)
        else:
            body = b"".join(line + b"\n" for line in lines)
        self.announce(lines)
        written = body + self.closing
        with postponed():
            if write_at(self.handle, written, self.end) < len(written):
                os.ftruncate(self.handle, self.end)
                write_at(self.handle, self.closing, self.end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self.end += len(body)
            for record, line in zip(records, lines, strict=True):
                self.add(record, line)


class QuestionAnswers(AnswerFile):
    """Answers in the order of their questions. A .jsonl file has an answer a line; any other name has one JSON list, an answer
    a line too, whose end is written with every batch."""

    elsewhere = ", or choose another --out"
    shape = {
        "prompt": str,
        "input?": str,
        "answer": str,
        "prompt_tokens?": COUNT,
        "tokens?": COUNT,
        "ended_by?": {"eos", "stop", "length"},
        "score?": (None, float),
        "logprobs?": [{"id": COUNT, "token": str, "logprob": (None, float)}],
    }

    def __init__(self, path, handle, settings, start_over, questions, each):
        self.questions, self.each, self.total = questions, each, len(questions) * each
        self.sums = []  # of the answers in the file
        self.known_sums = None  # of the answers that an earlier start began to write
        self.is_list = path.suffix != ".jsonl"
        if self.is_list:
            self.opening, self.closing = b"[", b"\n]\n"
        super().__init__(path, handle, settings, start_over)

    def take(self, content):
        if content.strip() in (b"", b"[\n]"):
            return
        beside = settings_path(self.path)
        if not beside.is_file():
            raise ValueError(
                f"{self.path} is there, but not {beside.name}, which says what its answers depend on; {self.again}"
            )
        stored = read_json(beside, {f"{SUMS}?": [COUNT]})
        self.known_sums = stored.pop(SUMS, None)
        self.check_settings(stored)
        if self.known_sums is None:
            warn(
                f"{beside} has no checksums, as of an older minitune: the answers in {self.path} are taken as they are"
            )
        self.read(content)

    def check_answer(self, record, text, where):
        number = len(self.records)
        if number >= self.total:
            raise ValueError(
                f"{self.path} has more than {self.total} answers, expected at most those to these questions; {self.again}"
            )
        if {key: record[key] for key in ("prompt", "input") if key in record} != self.questions[number // self.each]:
            raise ValueError(
                f"{where}: answer {number} is not one to question {number // self.each} of the file; {self.again}"
            )
        if self.known_sums is not None and zlib.crc32(text) not in self.known_sums[number : number + 1]:
            raise ValueError(f"{where} was changed after it was written; {self.again}")

    def add(self, record, text):
        super().add(record, text)
        self.sums.append(zlib.crc32(text))

    def announce(self, lines):
        """Write the settings with the checksums of all answers. Before the answers: a kill in between leaves none without."""
        sums = self.sums + [zlib.crc32(line) for line in lines]
        write_json(settings_path(self.path), self.settings | {SUMS: sums})

    def progress(self):
        return f"{self.path} has {len(self.records):,} of {self.total:,} answers"


class RowAnswers(AnswerFile):
    """Answers to rows that have numbers, in any order. rows: {row: its answer}."""

    shape = {
        "row": COUNT,
        "answer": str,
        "tokens": COUNT,
        "ended_by": {"eos", "stop", "length"},
        "reference_loss": [(float, None)],
        "check": str,
    }

    def __init__(self, path, handle, settings, start_over, total):
        self.rows, self.total = {}, total
        self.set_head(settings)
        super().__init__(path, handle, settings, start_over)

    def set_head(self, settings):
        self.opening, self.settings_check = (to_json({"settings": settings}) + "\n").encode(), fingerprint(settings)

    def take(self, content):
        if self.opening.startswith(content):  # nothing, or a first line that a crash of the machine tore
            return
        try:
            head = parse_json(content.partition(b"\n")[0].decode(), self.path)
        except ValueError:  # not JSON, or not UTF-8
            head = None
        stored = head.get("settings") if isinstance(head, dict) else None
        if not isinstance(stored, dict) or not isinstance(stored.get("decoding") or {}, dict):
            raise ValueError(
                f"{self.path}, line 1 has no settings: it is not a file of answers; move it, or {self.again}"
            )
        self.check_settings(stored)
        self.set_head(stored)  # an older minitune may have left out a setting that is not set
        self.read(content, skip=1)

    def check_answer(self, record, text, where):
        if not record["row"] < self.total or record["row"] in self.rows:
            raise ValueError(f"{where} answers row {short(record['row'])} again, or there is no such row; {self.again}")
        if record != self.finished(record):
            raise ValueError(f"{where} was changed after it was written; {self.again}")

    def finished(self, record):
        """The record with a checksum of the rest of it and of its settings."""
        rest = {key: value for key, value in record.items() if key != "check"}
        return rest | {"check": fingerprint([rest, self.settings_check])[:16]}

    def add(self, record, text):
        super().add(record, text)
        self.rows[record["row"]] = record


def write_at(handle, content, offset):
    """Write bytes in one call; returns how many were written. Windows has no os.pwrite."""
    os.lseek(handle, offset, os.SEEK_SET)
    return os.write(handle, content)


def read_all(handle):
    with open(handle, "rb", closefd=False) as file:
        return file.read()
