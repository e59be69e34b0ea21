"""Score the answers of a run, base beside tuned, or files of answers: metrics with intervals and tests."""

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.jobs.evaluate", "EvaluateConfig", "evaluate", __doc__)
