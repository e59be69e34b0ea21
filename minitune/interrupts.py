"""Ctrl-C, SIGTERM and a closed terminal: how a script ends at any moment without a traceback. Standard library only, since it
works before anything else is imported."""

import importlib
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress

SIGNALS = {signal.SIGINT: "by Ctrl-C", signal.SIGTERM: "by SIGTERM"}
if hasattr(signal, "SIGHUP"):
    SIGNALS[signal.SIGHUP] = "by SIGHUP"


def main(module, options, job, description):
    """What a script does: import a module, which takes seconds where it brings torch, and run its job with the options of the
    command line. module: its name; options, job: names in it."""
    open_missing_streams()
    with handled(leave):
        try:
            code, run_script = importlib.import_module(module), importlib.import_module("minitune.config").run_script
        except (ImportError, MemoryError, OSError) as error:
            if "--debug" in sys.argv:
                raise
            is_short = isinstance(error, MemoryError) or "failed to map segment" in str(error)
            reason = "not enough memory" if is_short else str(error)
            text = " ".join(f"error: {module} cannot be imported: {reason}"[:480].split())
            os.write(2, f"{text}\n".encode(errors="backslashreplace"))
            sys.exit(1)
    run_script(getattr(code, options), getattr(code, job), description)


def open_missing_streams():
    """Open what was closed (2>&-): a file that is opened later must not get the number of a stream, and what is told."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


def leave(number, frame):
    """End at once: nothing is done yet, or everything. An exception in the middle of an import would be a traceback or worse."""
    os.write(2, f"stopped: {SIGNALS[number]}\n".encode())
    os._exit(130)


def interrupt(number, frame):
    """Raise KeyboardInterrupt; after an import, where there is one: in the middle of it, it would end the process."""
    if is_importing(frame):
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        return
    raise KeyboardInterrupt(SIGNALS[number] if number != signal.SIGINT else "")


def is_importing(frame):
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextmanager
def handled(handler, signals=tuple(SIGNALS)):
    """While open, these signals call `handler`, unless they are ignored as nohup asks it. Nothing changes outside of the main
    thread: whoever started it takes the signals."""
    previous = {}
    try:
        for number in signals:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def postponed():
    """While open, these signals wait: what is written to a file and what is known of it must not come apart."""
    came = []
    try:
        with handled(lambda number, frame: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


def sigterm_as_ctrl_c():
    """While open, Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, the last two with their name: a job that is ended by its
    time limit says what is kept too. A training takes the signals for itself while its loop runs (train.StopSignal), and
    gives them back."""
    return handled(interrupt)


class StopSignal:
    """While open, the first Ctrl-C, SIGTERM or SIGHUP (the terminal was closed) only asks: the step in hand ends and is
    saved. The second one interrupts; within an import, which cannot be interrupted safely, the third."""

    requested = False

    def __enter__(self):
        self.previous = {}
        for number in SIGNALS:
            if number not in (signal.SIGINT, signal.SIGTERM) and signal.getsignal(number) == signal.SIG_IGN:  # of nohup
                continue
            try:
                self.previous[number] = signal.signal(number, self.ask)
            except ValueError:  # not the main thread: whoever started it takes the signals
                break
        return self

    def ask(self, number, frame):
        if self.requested and not is_importing(frame):
            raise KeyboardInterrupt("at once; the state is that of the last save")
        self.requested = True
        with suppress(OSError):  # a terminal that is gone
            os.write(2, b"\nstopping after this step; once more to stop at once\n")  # print may be what was interrupted

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
