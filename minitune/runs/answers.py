"""The file of answers to a file of questions: whole and valid after a kill at any moment, and gone on with by the next start.

A .jsonl file has an answer a line; any other name has one JSON list, an answer a line too, whose end is written with every batch.
What the answers depend on is in NAME.settings.json beside it, with a checksum of each: those of other settings and edited ones
are refused."""

import errno
import os
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minitune.files import differences, parse_json, paths_explained, read_json, to_json, writable, write_json
from minitune.interrupts import postponed
from minitune.locks import held
from minitune.schema import COUNT, check
from minitune.screen import short, some, warn

RECORD = {  # an answer
    "prompt": str,
    "input?": str,
    "answer": str,
    "prompt_tokens?": COUNT,
    "tokens?": COUNT,
    "ended_by?": {"eos", "stop", "length"},
    "score?": (None, float),
    "logprobs?": [{"id": COUNT, "token": str, "logprob": (None, float)}],
}
SUMS = "checksums (crc32)"  # the key of the settings with one for each answer that was begun to be written
AGAIN = "use --resume never to answer again, or choose another --out"


def settings_path(path):
    return Path(f"{path}.settings.json")


@contextmanager
def open_answers(path, settings, questions, each, start_over):
    """An AnswerFile, which no other process has open.

    settings: {what: value} that the answers depend on; questions: {"prompt": ..., "input": ...} of each; each: answers that a
    question has. start_over: forget what is there. A new file that gets no answer goes away again. Raises ValueError where it
    holds anything but the first of these answers."""
    path, file = writable(path), None
    with ExitStack() as stack:
        with paths_explained(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.with_name(f".{path.name}.lock")
            stack.enter_context(held(lock, f"another process writes {path}; wait for it, or choose another --out"))
            is_new = not path.exists()
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        stack.callback(os.close, handle)
        try:
            file = AnswerFile(path, handle, settings, questions, each, start_over)
            yield file
        finally:
            if is_new and file is not None and not file.records:
                path.unlink(missing_ok=True)
                settings_path(path).unlink(missing_ok=True)


class AnswerFile:
    """An open file of answers. records: those in it, in the order of the questions."""

    def __init__(self, path, handle, settings, questions, each, start_over):
        self.path, self.handle, self.is_list = path, handle, path.suffix != ".jsonl"
        self.total, self.records = len(questions) * each, []
        opening, self.closing = (b"[", b"\n]\n") if self.is_list else (b"", b"")
        self.end = len(opening)  # where the next answer goes
        self.settings, self.sums = settings, []
        content = b"" if start_over else read_all(handle)
        if content.strip() not in (b"", b"[\n]"):
            self.take(content, self.check_settings(), questions, each)
        if not self.records:
            os.ftruncate(handle, 0)
            write_at(handle, opening + self.closing, 0)
            self.write_settings()
        elif content[self.end :] != self.closing:  # torn by a crash of the machine
            os.ftruncate(handle, self.end)
            write_at(handle, self.closing, self.end)

    def check_settings(self):
        """The checksums of the answers, None where an older minitune wrote none. Raises ValueError where they are of other
        settings."""
        path = settings_path(self.path)
        if not path.is_file():
            raise ValueError(
                f"{self.path} is there, but not {path.name}, which says what its answers depend on; {AGAIN}"
            )
        stored = read_json(path, {f"{SUMS}?": [COUNT]})
        sums = stored.pop(SUMS, None)
        if changed := differences(stored, self.settings):
            raise ValueError(f"{self.path} holds answers of other settings: {some(changed)}; {AGAIN}")
        if sums is None:
            warn(f"{path} has no checksums, as of an older minitune: the answers in {self.path} are taken as they are")
        return sums

    def take(self, content, sums, questions, each):
        """Take in the answers of `content`, and where they end. A torn last line is left out."""
        lines, start = content.split(b"\n"), 0
        last = max(number for number, line in enumerate(lines, 1) if line.strip())
        for number, line in enumerate(lines, 1):
            text = line.removesuffix(b",") if self.is_list else line
            if text.strip() and text not in (b"[", b"]"):
                where = f"{self.path}, line {number}"
                try:
                    record = parse_json(text.decode(), where)
                except ValueError:  # not JSON, or not UTF-8
                    if number < last:
                        raise ValueError(f"{where} is no answer: {short(text)}; {AGAIN}") from None
                    return
                if not self.is_list and number == len(lines):  # its end of line is missing
                    return
                self.check_record(record, questions, each, where)
                if sums is not None and zlib.crc32(text) not in sums[len(self.records) : len(self.records) + 1]:
                    raise ValueError(f"{where} was changed after it was written; {AGAIN}")
                self.add(record, text)
                self.end = start + len(text) + (not self.is_list)
            start += len(line) + 1

    def check_record(self, record, questions, each, where):
        """Raises ValueError where `record` is not an answer to the question whose turn it is."""
        number = len(self.records)
        if number >= self.total:
            raise ValueError(
                f"{self.path} has more than {self.total} answers, expected at most those to these questions; {AGAIN}"
            )
        try:
            check(record, RECORD, where)
        except ValueError as error:
            raise ValueError(f"{error}; {AGAIN}") from None
        if {key: record[key] for key in ("prompt", "input") if key in record} != questions[number // each]:
            raise ValueError(f"{where}: answer {number} is not one to question {number // each} of the file; {AGAIN}")

    def add(self, record, line):
        self.records.append(record)
        self.sums.append(zlib.crc32(line))

    def write_settings(self, more=()):
        """With the checksums of the answers, and of the lines that come next: before them, so that a kill in between leaves
        no answer without one."""
        write_json(settings_path(self.path), self.settings | {SUMS: self.sums + [zlib.crc32(line) for line in more]})

    def write(self, records):
        """Append records. One write call: a kill leaves all of them or none, and so does a full disk (OSError)."""
        lines = [to_json(record).encode() for record in records]
        if self.is_list:
            body = b"," * bool(self.records) + b",".join(b"\n" + line for line in lines)
        else:
            body = b"".join(line + b"\n" for line in lines)
        self.write_settings(lines)
        written = body + self.closing
        with postponed():
            if write_at(self.handle, written, self.end) < len(written):
                os.ftruncate(self.handle, self.end)
                write_at(self.handle, self.closing, self.end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self.end += len(body)
            for record, line in zip(records, lines, strict=True):
                self.add(record, line)

    def progress(self):
        return f"{self.path} has {len(self.records):,} of {self.total:,} answers"


def write_at(handle, content, offset):
    """Write bytes in one call; returns how many were written. Windows has no os.pwrite."""
    os.lseek(handle, offset, os.SEEK_SET)
    return os.write(handle, content)


def read_all(handle):
    with open(handle, "rb", closefd=False) as file:
        return file.read()
