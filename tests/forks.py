"""Processes of the tests that are forked from one that has imported torch already, which takes seconds, and can be killed.

As a script, the process that forks; see serve()."""

import faulthandler
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__')"


def serve(modules, commands, replies):
    """Fork a process for each line of `commands`, a job as JSON. Its pid and its exit code are a line each on `replies`.
    modules: what is imported before the first job begins."""
    for number, line in enumerate(commands):
        if number == 0:
            for name in ("torch._dynamo", *modules):  # torch.optim imports the first at its first use
                importlib.import_module(name)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        print(pid, file=replies, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=replies, flush=True)


def child(job):
    for number, (path, flags) in enumerate(
        [(job["stdin"], os.O_RDONLY)] + [(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("out", "err")]
    ):
        os.dup2(os.open(path, flags), number)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.argv = job["argv"]
    code = 0
    try:
        exec(job["code"], {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve_in_this_process(modules, commands, replies):
    """serve() in a fork of pytest, and end. commands, replies: descriptors; every other file of pytest is closed here."""
    try:
        faulthandler.disable()
        for low, high in zip((2, *sorted((commands, replies))), (*sorted((commands, replies)), 10_000), strict=True):
            os.closerange(low + 1, high)
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__  # not those that pytest reads
        warnings.resetwarnings()  # to Python's own rules, and to stderr: pytest keeps a list
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = lambda *what: sys.stderr.write(warnings.formatwarning(*what[:4]))
        os.chdir(ROOT)
        serve(modules, os.fdopen(commands), os.fdopen(replies, "w"))
    finally:
        os._exit(0)


class Forks:
    """What forks, one process at a time; one that still runs is killed by the next. modules: what it has imported, beside torch.

    It is a fork of this process, which must have imported torch and little more; with an environment, a new process."""

    def __init__(self, modules, environment=None):
        self.folder, self.last = None, None
        (commands, self.commands), (self.replies, replies) = os.pipe(), os.pipe()
        if environment is not None:
            command = [sys.executable, __file__, *modules]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=commands, stdout=replies)
        elif os.fork() == 0:
            serve_in_this_process(modules, commands, replies)
        os.close(commands), os.close(replies)
        self.replies = os.fdopen(self.replies, "rb", buffering=0)

    def start(self, code, *argv, environment=None, folder=ROOT, stdin=os.devnull):
        """A Fork that runs Python code with sys.argv = argv."""
        if self.last is not None and self.last.poll() is None:
            self.last.send_signal(signal.SIGKILL)
            self.last.wait()
        files = tempfile.mkdtemp(dir=self.folder)
        for name in ("out", "err"):
            Path(files, name).touch()  # who reads them may come before the process
        job = {
            "code": code,
            "argv": list(map(str, argv)),
            "environment": dict(os.environ if environment is None else environment),
            "folder": str(folder),
            "stdin": str(stdin),
            "out": f"{files}/out",
            "err": f"{files}/err",
        }
        os.write(self.commands, json.dumps(job).encode() + b"\n")
        self.last = Fork(self.replies, int(self.replies.readline()), Path(files))
        return self.last

    def script(self, name, *argv, **options):
        """A Fork that runs a script of scripts/."""
        return self.start(SCRIPT, ROOT / "scripts" / name, *argv, **options)

    def stop(self):
        os.close(self.commands)
        self.replies.close()
        if hasattr(self, "process"):
            self.process.wait(10)


class Fork:
    """A process: pid, out and err (the files of its streams) and, when it has ended, returncode, negative for a signal."""

    def __init__(self, replies, pid, files):
        self.replies, self.pid, self.returncode = replies, pid, None
        self.out, self.err = files / "out", files / "err"

    def poll(self):
        if self.returncode is None and select.select([self.replies], [], [], 0)[0]:
            self.returncode = int(self.replies.readline())
        return self.returncode

    def wait(self, timeout=60):
        if self.returncode is None and not select.select([self.replies], [], [], timeout)[0]:
            os.kill(self.pid, signal.SIGKILL)
            raise TimeoutError(f"a process did not end within {timeout} s; it said {self.err.read_text()[-2000:]}")
        return self.poll()

    def send_signal(self, number):
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


if __name__ == "__main__":
    serve(sys.argv[1:], sys.stdin, os.fdopen(os.dup(1), "w"))
