"""A command as a whole process, measured: minitune and its peers take turns."""

import json
import os
import shlex
import subprocess
import tempfile
from pathlib import Path


def run_measured(command):
    """Run a command to its end. Returns (standard output, peak resident memory in MiB).

    Linux counts this process's own memory at the start in, so
    a smaller child cannot be told. Raises ValueError with the child's last lines where it fails."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            tail = errors.read().decode(errors="replace").splitlines()[-5:]
            raise ValueError(f"{shlex.join(command)} ended with {process.returncode}: " + " | ".join(tail))
        return out.read().decode(errors="replace"), usage.ru_maxrss // 1024


def measure_peer(command):
    """One run of a peer. Its last line that is a JSON object counts."""
    output, peak_rss_mb = run_measured(shlex.split(command))
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise ValueError(f"{command} printed no JSON line")
    return json.loads(lines[-1]) | {"peak_rss_mb": peak_rss_mb}


TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
