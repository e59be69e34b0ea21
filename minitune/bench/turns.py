"""Runs a command as a process and measures it."""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

# A program that runs a command and writes its exit code and peak memory. It is a process of its own, because on Linux the peak
# of a process includes the memory of the one that started it.
STARTER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(f"{os.waitstatus_to_exitcode(status)} {usage.ru_maxrss}")
"""


def run_measured(command):
    """Run a command, a list of words. Returns (standard output, peak resident memory in MiB). Raises ValueError with its last
    lines if it fails."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors, tempfile.NamedTemporaryFile("r") as ended:
        subprocess.run([sys.executable, "-c", STARTER, ended.name, *command], stdout=out, stderr=errors)
        out.seek(0)
        errors.seek(0)
        code, peak_kib = map(int, ended.read().split() or (1, 0))
        if code:
            tail = errors.read().decode(errors="replace").splitlines()[-5:]
            raise ValueError(f"{shlex.join(command)} ended with {code}: " + " | ".join(tail))
        return out.read().decode(errors="replace"), peak_kib // 1024


def measure_peer(command):
    """Run a peer once. Returns the last line of its output that is a JSON object, as a dict. Raises ValueError if there is
    none."""
    output, peak_rss_mb = run_measured(shlex.split(command))
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise ValueError(f"{command} printed no JSON line")
    return json.loads(lines[-1]) | {"peak_rss_mb": peak_rss_mb}


TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
