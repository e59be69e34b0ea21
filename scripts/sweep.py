"""Vary decoding options of a run, or training options, and score every point; --study is the study's grid."""

from minitune.config import run_script
from minitune.sweep import SweepConfig, sweep

if __name__ == "__main__":
    run_script(SweepConfig, sweep, __doc__)
