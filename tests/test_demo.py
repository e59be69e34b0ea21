"""The demonstration: its runs side by side, in processes of their own."""

import os
import signal
import sys
import time

import pytest

from minitune.jobs import demo

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runs are side by side on Linux only")


def test_runs_side_by_side_give_the_rows_of_the_table_in_order(monkeypatch):
    monkeypatch.setattr(demo, "fine_tune_and_compare", lambda name, quantize, config, say: (name, quantize))
    assert demo.side_by_side(demo.DemoConfig(), 2) == list(demo.RUNS)


def test_a_process_that_the_system_kills_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(demo, "fine_tune_and_compare", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(OSError, match="a process of the demonstration was killed"):
        demo.side_by_side(demo.DemoConfig(), 2)


def test_a_run_that_fails_ends_the_others_and_says_why(monkeypatch):
    def fail(name, quantize, config, say):
        if quantize == "nf4":
            raise ValueError("the disk is full")
        time.sleep(60)

    monkeypatch.setattr(demo, "fine_tune_and_compare", fail)
    started = time.monotonic()
    with pytest.raises(ValueError, match="the disk is full"):
        demo.side_by_side(demo.DemoConfig(), 2)
    assert time.monotonic() - started < 50
