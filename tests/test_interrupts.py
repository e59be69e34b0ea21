"""How a script starts and ends: signals before and while its job runs, missing streams, a reader that goes away."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULE = """
import os, signal, sys, time
from dataclasses import dataclass
from minitune import screen
from minitune.config import arg

def send(name):
    if name in sys.argv[1:]:
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
        time.sleep(0.01)

def wait():
    time.sleep(0.2)  # for a signal that is sent again

if "--at import" in " ".join(sys.argv):
    send("import")

@dataclass(frozen=True)
class Options:
    at: str = arg("nowhere", "when the signal comes")

def job(config):
    send("job")
    if config.at == "lazy":
        import lazy
        wait()
    for i in range(3):
        screen.say(f"line {i}")
    open("made", "w").write("made")

def answers(config):
    for i in range(100_000):
        screen.show(sys.stdout, "answer\\n")
"""


@pytest.fixture
def start(tmp_path):
    """start(*argv, job="job", name="SIGTERM", shell="") -> the finished process of a script whose job is in MODULE."""
    (tmp_path / "fake.py").write_text(MODULE)
    (tmp_path / "script.py").write_text(
        "import sys\nfrom minitune.interrupts import main\nmain('fake', 'Options', sys.argv.pop(), 'a script')\n"
    )

    def run(*argv, job="job", name="SIGTERM", shell=""):
        path = f"{ROOT}:{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
        command = f'exec "{sys.executable}" script.py {" ".join(argv)} {job} {shell}'
        return subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=60,
            env={**os.environ, "SIGNAL": name, "PYTHONPATH": path},
        )  # fmt: skip

    return run


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("at", ["import", "job"])
def test_a_signal_ends_a_script_in_one_line_at_any_moment(start, at, name, tmp_path):
    done = start("--at", at, name=name)
    words = "Ctrl-C" if name == "SIGINT" else name
    assert (done.returncode, done.stderr) == (130, f"stopped: by {words}\n") and not (tmp_path / "made").exists()


def test_a_signal_within_a_late_import_waits_for_its_end(start, tmp_path):
    (tmp_path / "lazy.py").write_text(
        "import fake\nfake.sys.argv.append('lazy')\nfake.send('lazy')\nprint('imported')\n"
    )
    done = start("--at", "lazy")
    assert (done.returncode, done.stderr) == (130, "stopped: by SIGTERM\n") and done.stdout == "imported\n"


def test_a_signal_that_is_ignored_stays_ignored_as_nohup_asks(start, tmp_path):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited
    try:
        done = start("--at", "job", name="SIGHUP")
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert done.returncode == 0 and (tmp_path / "made").exists()


@pytest.mark.parametrize("shell", ["2>&-", ">&-", "<&- >&- 2>&-", "| head -1", ">/dev/full"])
def test_a_job_needs_no_screen(start, shell, tmp_path):
    done = start(shell=shell)
    if shell == ">/dev/full":
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "made").exists()


def test_a_reader_that_goes_away_ends_a_job_whose_result_is_what_it_prints(start):
    done = start(job="answers", shell="| head -1; exit ${PIPESTATUS[0]}".replace("exec", ""))
    assert (done.returncode, done.stdout, done.stderr) == (0, "answer\n", "")


def test_a_script_that_cannot_be_imported_is_one_line(start, tmp_path):
    (tmp_path / "fake.py").write_text("raise MemoryError")
    done = start()
    assert (done.returncode, done.stderr) == (1, "error: fake cannot be imported: not enough memory\n")
