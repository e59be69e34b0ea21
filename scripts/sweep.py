"""Vary decoding options of a run, or training options, and score every point; --study is the study's grid."""

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.jobs.sweep", "SweepConfig", "sweep", __doc__)
