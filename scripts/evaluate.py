"""Score the answers of a run, base beside tuned, or files of answers: metrics with intervals and tests."""

from minitune.config import run_script
from minitune.evaluate import EvaluateConfig, evaluate

if __name__ == "__main__":
    run_script(EvaluateConfig, evaluate, __doc__)
