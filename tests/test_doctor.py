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
    "few rows": {
        "linear": {
            "fp32": {"max rows": 4, "rates": {"4": {"C": 9e9, "torch": 8e9}, "8": {"C": 9e9, "torch": 15e9}}},
            "bf16": {"max rows": 0, "rates": {"1": {"torch": 3.4e9}}},
        },
        "4 bit": {"fp32": {"max rows": 128, "rates": {"1": {"C": 2e9, "torch": 0.4e9}}}},
    },
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
    assert "products fp32 66, bf16 2, int8 not available GFLOP/s" in text and "copy 11.0 GB/s, read 10.0 GB/s" in text
    assert "fp32 C up to 4 rows (4 rows 9.0 and 8.0, 8 rows 9.0 and 15.0)" in text
    assert (
        "bf16 torch, as there is no such product in C here" in text and "4 bit fp32 C up to 128 rows (1 row 2.0" in text
    )
    assert "training float32 on " in text and "measured here: 0.066 TFLOP/s in fp32" in text


def test_a_bug_report_is_json_without_user_host_and_home(capsys, monkeypatch, tmp_path):
    home = tmp_path / "home-of-margaret-é"
    (home / ".cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setattr(job.getpass, "getuser", lambda: "margaret")
    monkeypatch.setattr(job.platform, "node", lambda: "host-of-margaret")
    doctor(DoctorConfig(json=True), print)
    text = capsys.readouterr().out
    assert json.loads(text)["chosen"]["kept in"] == "~/.cache/minitune" and "margaret" not in text
    monkeypatch.setattr(job.getpass, "getuser", lambda: "cpu")
    assert job.without_names({"a": ["2.13.0+cpu", "/x/cpu/y"]}) == {"a": ["2.13.0+cpu", "/x/USER/y"]}


def test_a_missing_compiler_is_named_with_what_to_do_and_is_the_verdict(monkeypatch):
    monkeypatch.setattr(
        "minitune_kernels.nf4_cpu.why_not", lambda device: "there is no C compiler 'cc'; install gcc or clang"
    )
    report = doctor(DoctorConfig(), lambda line: None)
    [(what, words)] = [entry for entry in report["missing"] if entry[0] == "the C kernels"]
    assert "install gcc or clang" in words and "the C kernels cannot be built" in report["verdict"]


def test_again_measures_anew(monkeypatch):
    forgotten = []
    monkeypatch.setattr(measured, "forget", lambda: forgotten.append(1))
    doctor(DoctorConfig(), lambda line: None)
    doctor(DoctorConfig(again=True), lambda line: None)
    assert forgotten == [1]
