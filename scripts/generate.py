"""Answer one question or a file of them, with sampling, beam search or greedily."""

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.jobs.generate", "AnswerConfig", "answer", __doc__)
