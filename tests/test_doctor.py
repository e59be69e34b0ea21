"""scripts/doctor.py: what it prints, and that a bug report names nobody."""

import json

import pytest
from minitune_kernels import measured

from minitune.jobs import doctor as job
from minitune.jobs.doctor import DoctorConfig, doctor

FIGURES = {
    "seconds": 0.4,
    "products": {"fp32": 66e9, "bf16": 2e9, "int8": None},
    "one row": {"fp32": 2.7e9, "bf16": 3.4e9},
    "4 bit": {"1": 2e9, "16": 3e9},
    "copy": 11e9,
    "read": 10e9,
    "conditions": {},
}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(measured, "machine", lambda: FIGURES)


def test_the_report_fits_80_columns_and_says_what_was_measured_chosen_and_missing(capsys):
    report = doctor(DoctorConfig(), print)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and " ".join(lines[-2:]).endswith(report["verdict"][-30:])
    text = " ".join(" ".join(lines).split())
    assert "products fp32 66, bf16 2, int8 not here GFLOP/s" in text and "copy 11.0 GB/s, read 10.0 GB/s" in text
    assert "training float32 on " in text and "measured here: 0.066 TFLOP/s in fp32" in text


def test_a_bug_report_is_json_without_user_host_and_home(capsys, monkeypatch, tmp_path):
    home = tmp_path / "home-of-margaret"
    (home / ".cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setattr(job.getpass, "getuser", lambda: "margaret")
    monkeypatch.setattr(job.platform, "node", lambda: "host-of-margaret")
    doctor(DoctorConfig(json=True), print)
    text = capsys.readouterr().out
    assert json.loads(text)["chosen"]["kept in"] == "~/.cache/minitune" and "margaret" not in text


def test_a_missing_compiler_is_named_with_what_to_do_and_is_the_verdict(monkeypatch):
    monkeypatch.setattr(
        "minitune_kernels.nf4_cpu.why_not", lambda device: "there is no C compiler 'cc'; install gcc or clang"
    )
    report = doctor(DoctorConfig(), lambda line: None)
    [(what, words)] = [entry for entry in report["missing"] if entry[0] == "the C kernels"]
    assert "install gcc or clang" in words and "no C compiler" in report["verdict"]


def test_again_measures_anew(monkeypatch):
    forgotten = []
    monkeypatch.setattr(measured, "forget", lambda: forgotten.append(1))
    doctor(DoctorConfig(), lambda line: None)
    doctor(DoctorConfig(again=True), lambda line: None)
    assert forgotten == [1]
