"""Ends a script without a traceback on Ctrl-C, SIGTERM and a closed terminal, at any moment.

Uses the standard library only, because it must work before anything else is imported."""

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
    """Run a script: import a module, which takes seconds if it imports torch, and run its job with the options of the command
    line.

    module: name of the module. options, job: names in it of the dataclass of options and of the function. description: for
    --help. Exits with the code that config.run_script() documents, or 1 if the import fails."""
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
    """Open /dev/null for each standard stream that is closed (as by 2>&-). Otherwise the next file to be opened would get the
    stream's number, and messages would be written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


def leave(number, frame):
    """Signal handler that ends the process at once with code 130. Used while no job runs; an exception during an import would
    end in a traceback or worse."""
    os.write(2, f"stopped: {SIGNALS[number]}\n".encode())
    os._exit(130)


def interrupt(number, frame):
    """Signal handler that raises KeyboardInterrupt. During an import, where an exception could crash the process, it sends the
    signal again 0.05 s later."""
    if is_importing(frame):
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        return
    raise KeyboardInterrupt(SIGNALS[number] if number != signal.SIGINT else "")


def is_importing(frame):
    """Whether the stack of `frame` is inside an import statement."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextmanager
def handled(handler, signals=tuple(SIGNALS)):
    """Context in which these signals call `handler`. A signal that is ignored, as under nohup, stays ignored. Outside of the
    main thread nothing changes, because Python handles signals in the main thread only."""
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
    """Context that delays the signals until its end, so that a file and the state in memory that describes it stay consistent."""
    came = []
    try:
        with handled(lambda number, frame: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


def sigterm_as_ctrl_c():
    """Context in which Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, whose text names the signal (empty for Ctrl-C).

    So a job that a time limit ends can still say what was saved. The training loop replaces the handlers by StopSignal while it
    runs."""
    return handled(interrupt)


class StopSignal:
    """Context in which the first Ctrl-C, SIGTERM or SIGHUP only sets `requested`, so that the current step can end and be saved.
    The second one raises KeyboardInterrupt, unless it comes during an import, which cannot be interrupted safely."""

    requested = False

    def __enter__(self):
        self.previous = {}
        for number in SIGNALS:
            if number not in (signal.SIGINT, signal.SIGTERM) and signal.getsignal(number) == signal.SIG_IGN:  # by nohup
                continue
            try:
                self.previous[number] = signal.signal(number, self.ask)
            except ValueError:  # not the main thread, so there is nothing to handle
                break
        return self

    def ask(self, number, frame):
        if self.requested and not is_importing(frame):
            raise KeyboardInterrupt("at once; the state is that of the last save")
        self.requested = True
        with suppress(OSError):  # the terminal may be gone
            # not print(): the signal may have interrupted a print()
            os.write(2, b"\nstopping after this step; once more to stop at once\n")

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
