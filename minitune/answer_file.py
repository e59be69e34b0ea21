"""The file of answers to a file of questions: whole and valid after a kill at any moment, and gone on with by the next start.

A .jsonl file has an answer a line; any other name has one JSON list, an answer a line too, whose end is written with every batch.
What the answers depend on is in NAME.settings.json beside it: the answers of other settings are refused."""

import errno
import fcntl
import json
import os
from contextlib import contextmanager
from pathlib import Path

from minitune.files import differences, read_json, write_json


def settings_path(path):
    return Path(f"{path}.settings.json")


@contextmanager
def open_answers(path, settings, questions, each, start_over):
    """An AnswerFile, which no other process has open.

    settings: {what: value} that the answers depend on; questions: {"prompt": ..., "input": ...} of each; each: answers that a
    question has. start_over: forget what is there. A new file that gets no answer goes away again. Raises ValueError where it
    holds anything but the first of these answers."""
    is_new, file = not path.exists(), None
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:  # anything else: a file system without locks, so we go without
                raise ValueError(f"another process writes {path}; wait for it, or choose another --out") from None
        file = AnswerFile(path, handle, settings, questions, each, start_over)
        yield file
    finally:
        if is_new and file is not None and not file.records:
            path.unlink(missing_ok=True)
            settings_path(path).unlink(missing_ok=True)
        os.close(handle)


class AnswerFile:
    """An open file of answers. records: those in it, in the order of the questions."""

    def __init__(self, path, handle, settings, questions, each, start_over):
        self.path, self.handle, self.is_list = path, handle, path.suffix != ".jsonl"
        self.total, self.records = len(questions) * each, []
        opening, self.closing = (b"[", b"\n]\n") if self.is_list else (b"", b"")
        self.end = len(opening)  # where the next answer goes
        content = b"" if start_over else read_all(handle)
        if content.strip() not in (b"", b"[\n]"):
            self.check_settings(settings)
            self.parse(content)
            self.check_records(questions, each)
        if not self.records:
            os.ftruncate(handle, 0)
            os.pwrite(handle, opening + self.closing, 0)
            write_json(settings_path(path), settings)
        elif content[self.end :] != self.closing:  # torn by a crash of the machine
            os.ftruncate(handle, self.end)
            os.pwrite(handle, self.closing, self.end)

    def check_settings(self, settings):
        stored = settings_path(self.path)
        if not stored.is_file():
            raise ValueError(
                f"{self.path} is there, but not {stored.name}, which says what its answers depend on; choose another --out, "
                "or write over it with --resume never"
            )
        stored = read_json(stored)
        if changed := differences(stored if isinstance(stored, dict) else {}, settings):
            raise ValueError(
                f"{self.path} holds answers of other settings: {'; '.join(changed)}. Choose another --out, or use "
                "--resume never to answer again"
            )

    def parse(self, content):
        """Take in the records of `content`, and where they end. A torn last line is left out."""
        lines, start = content.split(b"\n"), 0
        last = max(number for number, line in enumerate(lines, 1) if line.strip())
        for number, line in enumerate(lines, 1):
            text = line.removesuffix(b",") if self.is_list else line
            if text.strip() and text not in (b"[", b"]"):
                try:
                    record = json.loads(text)
                except ValueError:  # not JSON, or not UTF-8
                    if number < last:
                        raise ValueError(
                            f"{self.path}, line {number} is no answer: {line[:80]!r}; use --resume never to answer again"
                        ) from None
                    return
                if not self.is_list and number == len(lines):  # its end of line is missing
                    return
                self.records.append(record)
                self.end = start + len(text) + (not self.is_list)
            start += len(line) + 1

    def check_records(self, questions, each):
        if len(self.records) > self.total:
            raise ValueError(
                f"{self.path} has {len(self.records)} answers, expected at most {self.total} to these questions; choose another "
                "--out, or use --resume never to answer again"
            )
        for i, record in enumerate(self.records):
            question = questions[i // each]
            is_record = isinstance(record, dict) and isinstance(record.get("answer"), str)
            if not is_record or {key: record[key] for key in ("prompt", "input") if key in record} != question:
                raise ValueError(
                    f"{self.path}, answer {i} is not one to question {i // each} of the file; choose another --out, or use "
                    "--resume never to answer again"
                )

    def write(self, records):
        """Append records. One write call: a kill leaves all of them or none, and so does a full disk (OSError)."""
        lines = [json.dumps(record, ensure_ascii=False).encode() for record in records]
        if self.is_list:
            body = b"," * bool(self.records) + b",".join(b"\n" + line for line in lines)
        else:
            body = b"".join(line + b"\n" for line in lines)
        written = body + self.closing
        if os.pwrite(self.handle, written, self.end) < len(written):
            os.ftruncate(self.handle, self.end)
            os.pwrite(self.handle, self.closing, self.end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.end += len(body)
        self.records += records

    def progress(self):
        return f"{self.path} has {len(self.records):,} of {self.total:,} answers"


def read_all(handle):
    with open(handle, "rb", closefd=False) as file:
        return file.read()
