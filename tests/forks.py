"""Processes of the tests that are forked from one that has imported torch already, which takes seconds, and can be killed.

As a script, the process that forks: a job a line of stdin; the pid and the exit code of its process, a line each, on stdout."""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__')"


def serve(modules):
    for name in ("torch._dynamo", *modules):  # torch.optim imports the first at its first use
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


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


class Forks:
    """What forks, one process at a time; one that still runs is killed by the next. folder: for their output. modules: what
    it has imported, beside torch."""

    def __init__(self, folder, modules=("minitune.jobs.chat", "minitune.jobs.sweep")):
        self.folder, self.last = folder, None
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self.server = subprocess.Popen([sys.executable, __file__, *modules], cwd=ROOT, **pipes)

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
        self.server.stdin.write(json.dumps(job).encode() + b"\n")
        self.last = Fork(self.server, int(self.server.stdout.readline()), Path(files))
        return self.last

    def script(self, name, *argv, **options):
        """A Fork that runs a script of scripts/."""
        return self.start(SCRIPT, ROOT / "scripts" / name, *argv, **options)

    def stop(self):
        self.server.stdin.close()
        self.server.wait(10)
        self.server.stdout.close()


class Fork:
    """A process: pid, out and err (the files of its streams) and, when it has ended, returncode, negative for a signal."""

    def __init__(self, server, pid, files):
        self.server, self.pid, self.returncode = server, pid, None
        self.out, self.err = files / "out", files / "err"

    def poll(self):
        if self.returncode is None and select.select([self.server.stdout], [], [], 0)[0]:
            self.returncode = int(self.server.stdout.readline())
        return self.returncode

    def wait(self, timeout=60):
        if self.returncode is None and not select.select([self.server.stdout], [], [], timeout)[0]:
            os.kill(self.pid, signal.SIGKILL)
            raise TimeoutError(f"a process did not end within {timeout} s; it said {self.err.read_text()[-2000:]}")
        return self.poll()

    def send_signal(self, number):
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


if __name__ == "__main__":
    serve(sys.argv[1:])
