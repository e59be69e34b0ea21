"""One process a folder: who is refused, what a killed process leaves, and a file system without locks."""

import errno
import fcntl
import os
import signal
import time

import pytest

from minitune.locks import held
from minitune.runs.folder import hold

HOLDER = """
import sys, time
from pathlib import Path
from minitune.runs.folder import hold

with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_stops_nobody(forks, tmp_path):
    run = tmp_path / "run"
    holder = forks.start(HOLDER, "holder", run)
    while not holder.out.read_text() and holder.poll() is None:
        time.sleep(0.002)
    with pytest.raises(ValueError, match=rf"another process works in {run}; wait for it, or choose another --run"):
        with hold(run):
            pass
    assert holder.poll() is None
    holder.send_signal(signal.SIGKILL)
    assert holder.wait() == -signal.SIGKILL
    assert [path.name for path in run.iterdir()] == [".lock"], "of the process that had no time to remove it"
    with hold(run):
        pass
    assert list(run.iterdir()) == [], "a lock file is there while it is held, and hidden"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_worked_on_and_no_warning_of_a_library_is_seen(
    number, tmp_path, monkeypatch, capsys, recwarn
):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path):
        (tmp_path / "file").write_text("")
    said = capsys.readouterr().err
    # filelock itself goes on without flock(): by a file that holds the number of its process
    assert said.count("cannot be locked") == (number != errno.ENOSYS) and said.count("\n") <= 1
    assert not recwarn.list and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_lock_is_free_again_after_an_error_under_it(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError), held(tmp_path / ".lock", "refused"):
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []
