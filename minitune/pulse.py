"""A line every 30 s in the log of a long run."""

import sys
import threading
from contextlib import suppress


def duration(seconds):
    """A time that is left, in words of one or two units."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Pulse:
    """While open, says `line` every 30 s where the output is no terminal with a progress bar: a log file shows that a
    run goes on, also within a step or an evaluation of many minutes."""

    SECONDS = 30

    def __init__(self, say):
        self.say, self.line, self.ended = say, "preparing", threading.Event()
        is_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))
        self.thread = None if is_terminal else threading.Thread(target=self.beat, daemon=True)

    def beat(self):
        while not self.ended.wait(self.SECONDS):
            with suppress(OSError):  # a full disk: the run itself will say it
                self.say(self.line)

    def __enter__(self):
        if self.thread is not None:
            self.thread.start()
        return self

    def __exit__(self, *error):
        self.ended.set()
