"""What was measured to be faster is taken: the dtype of `auto`, and C or torch for few rows of a product. Once a machine."""

import json

import pytest
import torch
from minitune_kernels import built, measured, nf4_cpu, ops, ops_cpu

from minitune import session
from minitune.config import TrainConfig
from minitune.device import choose_dtype
from minitune.evaluation.held_out import EvaluateConfig, Run
from minitune.files import read_json
from minitune.train import train

KNOWN = measured.machine, measured.max_rows
CPU, QUIET = torch.device("cpu"), lambda line: None
FEW_ROWS = {
    "few rows": {name: {d: {"max rows": 4, "rates": {}} for d in measured.DTYPES} for name in ("linear", "4 bit")}
}
XEON = {
    "products": {"fp32": 0.32e12, "bf16": 0.16e12},
    "one row": {"fp32": 3e9, "bf16": 7e9},
} | FEW_ROWS  # AVX-512 bf16, no AMX
ZEN4 = {"products": {"fp32": 0.2e12, "bf16": 0.42e12}, "one row": {"fp32": 3e9, "bf16": 6e9}} | FEW_ROWS
ZEN3 = {
    "products": {"fp32": 0.066e12, "bf16": 0.002e12},
    "one row": {"fp32": 2.7e9, "bf16": 3.4e9},
} | FEW_ROWS  # bf16 is emulated


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing is known of this machine in this process: neither in a test here, nor from it in a later one."""
    for function in KNOWN:
        function.cache_clear()
    yield
    for function in KNOWN:
        function.cache_clear()


@pytest.mark.parametrize(
    "figures, training, decoding",
    [
        pytest.param(XEON, torch.float32, torch.bfloat16, id="xeon"),
        pytest.param(ZEN4, torch.bfloat16, torch.bfloat16, id="zen4"),
        pytest.param(ZEN3, torch.float32, torch.float32, id="zen3"),
    ],
)
def test_auto_is_what_was_measured_to_be_faster_and_says_the_figures(figures, training, decoding, monkeypatch):
    monkeypatch.setattr(measured, "machine", lambda: figures)
    dtype, reason = choose_dtype("auto", CPU, "training")
    assert dtype is training and f"{figures['products']['fp32'] / 1e12:.2g} TFLOP/s in fp32" in reason
    dtype, reason = choose_dtype("auto", CPU, "decoding")
    assert dtype is decoding and f"{figures['one row']['bf16'] / 1e9:.2g} G weights/s in bf16" in reason
    assert choose_dtype("fp32", CPU, "training") == (torch.float32, "as asked")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_machine_is_measured_once_and_again_when_a_setting_changes(own_cache, monkeypatch):
    calls = []
    monkeypatch.setattr(measured, "measure", lambda: calls.append(1) or {"seconds": 0.1, **ZEN4})
    first = measured.machine()
    measured.machine.cache_clear()  # as in another process
    assert measured.machine() == first and len(calls) == 1
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    measured.machine.cache_clear()
    assert measured.machine()["conditions"]["ONEDNN_MAX_CPU_ISA"] == "AVX2" and len(calls) == 2
    measured.forget()
    measured.machine()
    assert len(calls) == 3


def test_kept_figures_that_were_altered_are_not_believed(own_cache, monkeypatch):
    monkeypatch.setattr(measured, "measure", lambda: {"seconds": 0.1, **ZEN4})
    measured.machine()
    [path] = built.folder().glob("machine-*.json")
    path.write_text(json.dumps(XEON))
    measured.machine.cache_clear()
    assert measured.machine()["products"] == ZEN4["products"]


def test_the_measurement_gives_every_figure_and_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    figures = measured.measure()
    assert torch.get_num_threads() == before
    assert set(figures) == {"seconds", "products", "one row", "few rows", "copy", "read"}
    rates = [*figures["products"].values(), *figures["one row"].values(), figures["copy"] / 10, figures["read"] / 10]
    for product in figures["few rows"].values():
        for found in product.values():
            assert found["max rows"] in (0, *measured.COUNTS)
            rates += [rate for row in found["rates"].values() for rate in row.values()]
    assert all(rate is None or rate > 1e6 for rate in rates)


def rates_of(c, torch, calls=None):
    """The argument of compared(), from functions of the number of rows."""

    def rates(rows):
        if calls is not None:
            calls.append(rows)
        return {"torch": torch(rows)} | ({"C": c(rows)} if c else {})

    return rates


@pytest.mark.parametrize(
    "c, torch, most",
    [
        pytest.param(lambda rows: 3 if rows <= 8 else 1, lambda rows: 2, 8, id="torch overtakes"),
        pytest.param(lambda rows: 1.96, lambda rows: 2, measured.COUNTS[-1], id="a tie"),
        pytest.param(lambda rows: 1, lambda rows: 2, 0, id="torch is faster"),
        pytest.param(None, lambda rows: 2, 0, id="no such product in C"),
    ],
)
def test_c_multiplies_up_to_the_number_of_rows_at_which_torch_is_faster(c, torch, most):
    assert measured.compared(rates_of(c, torch))["max rows"] == most


def test_a_busy_moment_does_not_decide_how_many_rows_c_takes():
    calls = []
    found = measured.compared(rates_of(lambda rows: 1 if calls == [1, 4] else 3, lambda rows: 2, calls))
    assert found["max rows"] == measured.COUNTS[-1] and calls[:3] == [1, 4, 4] and found["rates"]["4"]["C"] == 3


def test_torch_is_not_called_with_many_rows_where_it_would_take_a_second():
    calls = []
    found = measured.compared(rates_of(lambda rows: 9, lambda rows: 2, calls))
    assert found["max rows"] == measured.COUNTS[-1] and calls == [1, 4, 8]


@pytest.mark.parametrize("most", [0, 4])
def test_a_layer_asks_c_up_to_the_measured_number_of_rows(most, own_cache, monkeypatch):
    if not ops_cpu.runs_here(None):
        pytest.skip("there is no C compiler")
    monkeypatch.delenv("MINITUNE_KERNELS", raising=False)
    table = {"max rows": most, "rates": {}}
    few = {name: {dtype: table for dtype in measured.DTYPES} for name in ("linear", "4 bit")}
    monkeypatch.setattr(measured, "machine", lambda: {**ZEN4, "few rows": few})
    x, weight = torch.ones(8, 64), torch.ones(3, 64)
    with torch.no_grad():
        assert [ops_cpu.fits(x[:rows], weight) for rows in (1, 4, 5)] == [most == 4, most == 4, False]
        assert ops.steady_rows(x, {"linear"}, [weight]) == max(1, most)
    assert nf4_cpu.max_rows((3, 64), torch.float16) == most and nf4_cpu.max_rows((3, 96), torch.float32) == 0
    assert nf4_cpu.steady_rows((3, 64), torch.float32) == max(1, most)


def test_a_race_ends_with_its_time_and_leaves_a_call_that_is_far_slower():
    now, calls = [0.0], []

    def call(name, seconds):
        calls.append(name)
        now[0] += seconds

    best = measured.race({"fast": lambda: call("fast", 0.01), "slow": lambda: call("slow", 0.1)}, 0.5, lambda: now[0])
    assert best == pytest.approx({"fast": 0.01, "slow": 0.1}) and calls.count("slow") == 1
    assert now[0] < 0.5 + 0.02 and calls.count("fast") > 30


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that `auto` began in fp32, on a machine where it would now take bf16, and the options to go on with it."""
    rows = [{"instruction": f"say {i}", "output": f"{i}"} for i in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = dict(
        model="tiny-mistral", data=str(tmp_path / "rows.json"), test_size=4, samples=0, dtype="auto", save_every=1
    )
    options |= dict(run=str(tmp_path / "run"), warmup=0, epochs=1)
    monkeypatch.setattr(measured, "machine", lambda: ZEN3)
    train(TrainConfig(**options, max_steps=1), QUIET)
    monkeypatch.setattr(measured, "machine", lambda: ZEN4)
    return tmp_path / "run", options


def test_a_resumed_run_and_its_evaluation_stay_in_the_dtype_that_it_began_in(run):
    folder, options = run
    said = []
    train(TrainConfig(**options, max_steps=2), said.append)
    assert any("float32 (as in the run so far)" in line for line in said) and any(
        "resuming from step 1" in line for line in said
    )
    assert read_json(folder / "adapter" / "minitune.json")["dtype"] == "fp32"
    assert Run(EvaluateConfig(run=str(folder)), QUIET).facts["compute dtype"] == "float32"
    assert session.read_facts(folder / "adapter")["dtype"] == "fp32"


def test_a_run_that_starts_anew_takes_the_dtype_that_is_faster_now(run):
    folder, options = run
    said = []
    train(TrainConfig(**options, max_steps=1, resume="never"), said.append)
    assert any("bfloat16 (measured here: 0.2 TFLOP/s in fp32, 0.42 TFLOP/s in bf16)" in line for line in said)
