"""Answer one question or a file of them, with sampling, beam search or greedily."""

from minitune.answer import AnswerConfig, answer
from minitune.config import run_script

if __name__ == "__main__":
    run_script(AnswerConfig, answer, __doc__)
