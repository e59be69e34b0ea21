"""A line of progress every 30 s in the log of a long run."""

import sys
import threading
from contextlib import suppress


def duration(seconds):
    """A number of seconds as text with one or two units: "45 s", "12 min", "3 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Pulse:
    """Context that prints the attribute `line` every 30 s, unless the output is a terminal, which shows a progress bar. So a log
    file shows that the run continues, even during a step or an evaluation of many minutes."""

    SECONDS = 30

    def __init__(self, say):
        self.say, self.line, self.ended = say, "preparing", threading.Event()
        is_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))
        self.thread = None if is_terminal else threading.Thread(target=self.beat, daemon=True)

    def beat(self):
        while not self.ended.wait(self.SECONDS):
            with suppress(OSError):  # such as a full disk, which the run itself reports
                self.say(self.line)

    def __enter__(self):
        if self.thread is not None:
            self.thread.start()
        return self

    def __exit__(self, *error):
        self.ended.set()
