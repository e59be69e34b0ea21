"""The README's table "to change this, open that": each row is performed, by an edit of the file in a copy of the package and a
command that shows the effect."""

import functools
import json
import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TRAIN = """
from minitune.config import TrainConfig
from minitune.train import train
sys.modules["minitune.train"].draw_curves = lambda records, path: None  # a picture takes half a second
options = dict(data="rows.json", test_size=4, max_steps=2, eval_every=2, samples=0, run="run", log_every=1)
run = train(TrainConfig({options}, lora_targets=("q_proj", "v_proj"), **options), print)
print(*(line.split('"tokens"')[0] for line in (run / "metrics.jsonl").open()), *sorted(p.name for p in run.iterdir()))
"""
MISTRAL, NF4 = (
    TRAIN.format(options='model="tiny-mistral"'),
    TRAIN.format(options='model="tiny-mistral", quantize="nf4"'),
)
ANSWER = """
from minitune.jobs.generate import AnswerConfig, answer
answer(AnswerConfig(model="tiny-mistral", prompt="What is 3 + 4?", template="alpaca", json=True, max_new_tokens=6{options}))
"""
BEAMS, DRAWN, GREEDY = (ANSWER.format(options=o) for o in (", num_beams=3", ", do_sample=True, temperature=0.7", ""))
SCORED = """
from minitune.jobs.evaluate import EvaluateConfig, evaluate
evaluate(EvaluateConfig(predictions="answers.json", references=("rows.json",), resamples=50), print)
"""
RUN = (
    MISTRAL
    + """
from minitune.jobs.evaluate import EvaluateConfig, evaluate
result = evaluate(EvaluateConfig(run="run", resamples=10, max_new_tokens=2), print)
"""
)
REPORT = """
from minitune.jobs.report import ReportConfig, report
sys.modules["minitune.reports.figures"].png = lambda figure: b""  # as above
report(ReportConfig(folders=("study",), out="report.html"), print)
print(open("report.html").read())
"""
REPORT_OF_RUN = RUN + REPORT.replace('"study"', '"run"')
EDITS = {  # row: [(file, text, what replaces it, Python code that shows the effect)]
    "the formula of an operation": [
        ("kernels/formulas.py", "return weight * (wide", "return (1 + weight) * (wide", MISTRAL),
        ("kernels/formulas.py", "F.silu(gate) * up", "F.silu(gate) * up * 2", GREEDY),
    ],
    "how a Llama": [
        (f"minitune/models/{name}.py", old, new, TRAIN.format(options=f'model="tiny-{name}"'))
        for name, old, new in (
            ("llama", "x = x + self.self_attn(", "x = x + 0.5 * self.self_attn("),
            ("mistral", "x = x + self.self_attn(", "x = x + 0.5 * self.self_attn("),
            ("phi", "self.resid_dropout(self.mlp(h)) + x", "2 * self.resid_dropout(self.mlp(h)) + x"),
        )
    ],
    "RoPE's scalings": [
        ("minitune/models/layers.py", "inverse = 1.0 / theta**steps", "inverse = 0.5 / theta**steps", MISTRAL)
    ],
    "the LoRA layer": [("minitune/adapters/lora.py", "a=math.sqrt(5)", "a=0", MISTRAL)],
    "how a 4-bit layer": [
        ("minitune/quant.py", "return nf4.product(x, packed", "return 2 * nf4.product(x, packed", NF4),
    ],
    "which 4-bit kernel": [
        (
            "kernels/nf4.py",
            'names = ["cpu", "torch"] if kind == "cpu"',
            'names = ["torch"] if kind == "cpu"',
            "import torch; from minitune_kernels import nf4; print(nf4.describe(torch.device('cpu')))",
        ),
        (
            "kernels/nf4_cpu.py",
            "if shape[1] % 64:",
            "if True:",
            "import torch; from minitune_kernels import nf4_cpu as c; print(c.max_rows((64, 64), torch.float32))",
        ),
    ],
    "an option": [
        (
            "minitune/config.py",
            'lora_rank: int = arg(16, "',
            'lora_rank: int = arg(32, "',
            "from minitune.config import make_parser, TrainConfig; make_parser(TrainConfig, {}).print_help()",
        ),
        (
            "minitune/decoding/options.py",
            "max_new_tokens: int = arg(64",
            "max_new_tokens: int = arg(65",
            "from minitune.generate import GenerateConfig; print(GenerateConfig())",
        ),
    ],
    "the prompt template": [
        ("minitune/formats/templates.py", "### Response:", "### Answer:", GREEDY),
        (
            "minitune/formats/rows.py",
            '"text": ("text",)',
            '"text": ("passage",)',
            "from minitune.formats.rows import detect; print(detect({'passage': 'a'}))",
        ),
    ],
    "labels": [
        ("minitune/data/labels.py", 'loss_on == "all" and i > 0', "i > 0", MISTRAL),
        (
            "minitune/data/batches.py",
            "multiple=8",
            "multiple=64",
            "from minitune.data import Example, collate; print(collate([Example([1, 2], [1, 2], 0, 1)], 0).input_ids.shape)",
        ),
        (
            "minitune/data/dataset.py",
            "order = np.random.default_rng(seed).permutation(n).tolist()",
            "order = list(range(n))",
            "from minitune.data.dataset import split; print(split(9, 3))",
        ),
    ],
    "the learning rate": [
        ("minitune/plan.py", "return config.learning_rate * shape", "return 9 * config.learning_rate * shape", MISTRAL)
    ],
    "the loop": [("minitune/train.py", "clip = config.max_grad_norm or math.inf", "clip = 1e-9", MISTRAL)],
    "when a step is refused": [("minitune/health.py", "if not math.isfinite(loss):", "if loss > 0:", MISTRAL)],
    "how the next token": [
        ("minitune/decoding/sampling.py", "scores = scores / temperature", "scores = -scores / temperature", DRAWN),
        ("minitune/decoding/search.py", "self.scores = [lowered[i] for", "self.scores = [0 * lowered[i] for", BEAMS),
        (
            "minitune/generate.py",
            "return self.model.lm_head(self.model.model(",
            "return -self.model.lm_head(self.model.model(",
            GREEDY,
        ),
    ],
    "the key-value cache": [
        ("minitune/models/cache.py", "self.parts[prompt] = keys, values", "self.parts[prompt] = keys, -values", GREEDY)
    ],
    "a metric": [
        ("minitune/metrics/exact_match.py", "return candidate.strip() in", "return candidate.strip() not in", SCORED),
        ("minitune/evaluation/metrics.py", '"exact match (share)"', '"equal answers"', SCORED),
    ],
    "an interval": [
        ("minitune/metrics/significance.py", "Interval(value, *limits(", "Interval(value + 1, *limits(", SCORED)
    ],
    "what `evaluate.py`": [
        ("minitune/jobs/evaluate.py", 'ANSWER_KEYS = ("answer", ', 'ANSWER_KEYS = ("other", "answer", ', SCORED),
        ("minitune/evaluation/held_out.py", "{base}-finetuned", "{base}-tuned", RUN),
    ],
    "the grid": [
        (
            "minitune/study/names.py",
            "(30, 40, 50, 60, 80)",
            "(30, 50)",
            "from minitune.jobs.sweep import *; print(decoding_points(SweepConfig(run='x', study=True))[0])",
        ),
        (
            "minitune/jobs/sweep.py",
            "(STUDY if config.study else {})",
            "{}",
            "from minitune.jobs.sweep import *; print(len(decoding_points(SweepConfig(run='x', study=True))[0]))",
        ),
    ],
    "what the report says": [
        ("minitune/reports/scores.py", 'Section("Scores", ', 'Section("The scores", ', REPORT),
        ("minitune/reports/page.html", '<html lang="en">', '<html lang="en" class="mine">', REPORT),
        ("minitune/reports/page.py", 'return re.sub(r"', 'return "s-" + re.sub(r"', REPORT),
        ("minitune/reports/figures.py", 'role="img"', 'role="figure"', REPORT_OF_RUN),
        ("minitune/reports/runs.py", 'Section("Environment and sources"', 'Section("Sources"', REPORT_OF_RUN),
    ],
    "the files of a run": [
        ("minitune/runs/folder.py", 'run / "environment.json"', 'run / "machine.json"', MISTRAL),
        (
            "minitune/runs/state.py",
            "def save_state(path, progress,",
            "def save_state(path, progress, *rest):\n    path.touch()\n\n\ndef saved(path, progress,",
            MISTRAL + "print((run / 'last' / 'state.safetensors').stat().st_size > 0)",
        ),
        (
            "minitune/runs/curves.py",
            "figsize=(7, 5)",
            "figsize=(9, 5)",
            "from minitune.runs.curves import curves; print(curves([]).get_size_inches())",
        ),
    ],
    "how weights and adapters": [
        ("minitune/checkpoint.py", 'f"Loaded {', 'f"Read {', MISTRAL),
        ("minitune/adapters/peft_files.py", 'PEFT_PREFIX = "base_model.model."', 'PEFT_PREFIX = "mine."', RUN),
    ],
    "a short name": [
        (
            "minitune/hub.py",
            '"phi2": "microsoft/phi-2"',
            '"phi2": "microsoft/phi-1"',
            "from minitune import hub; print(hub.MODELS)",
        )
    ],
    "the embedded rows": [
        (
            "minitune/embedded/corpus.py",
            'FOODS = "grass',
            'FOODS = "gras',
            "from minitune.embedded.corpus import rows; print(rows(1))",
        )
    ],
}
CASES = [(row, *edit) for row, edits in EDITS.items() for edit in edits]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package, and a folder with rows, answers and files of the study to work in."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "minitune", folder / "minitune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(
        ROOT / "kernels", folder / "minitune_kernels", ignore=shutil.ignore_patterns("__pycache__", "benchmarks")
    )
    work = folder / "work"
    (work / "study").mkdir(parents=True)
    rows = [{"instruction": f"say {i}", "output": f"it is {i}"} for i in range(10)]
    (work / "rows.json").write_text(json.dumps(rows))
    answers = [{"answer": f"it is {i % 7}", "other": "none"} for i in range(10)]
    (work / "answers.json").write_text(json.dumps(answers))
    name = work / "study" / "llama_topk50_nb5_t1"
    Path(f"{name}.json").write_text(json.dumps([f"it is {i}" for i in range(10)]))
    Path(f"{name}_score.json").write_text(
        json.dumps({"Perplexity": 20.0, "BLEU": 0.3, "ROUGE-L": 0.4, "BERTScore": 0.8})
    )
    return folder


@pytest.fixture(scope="module")
def shown(package, bare_forks):
    """shown(code): what Python code prints, and how it ends, with the package as it is now in the folder `work`."""

    def run(code):
        shutil.rmtree(package / "work" / "run", ignore_errors=True)
        settings = {name: value for name, value in os.environ.items() if name != "MINITUNE_KERNELS"}
        begin = f"import sys, torch; sys.path.insert(0, {str(package)!r}); torch.set_num_threads(1)\n"
        process = bare_forks.start(begin + code, "code", folder=package / "work", environment=settings)
        code = process.wait(120)
        assert "SyntaxError" not in process.err.read_text()
        text = process.out.read_text() + re.sub(r"(?m)^ .*\n", "", process.err.read_text())
        return code, re.sub(r"[\d.,]+ (tokens/s|s\b)|in [\d.]+ s|\d{4}-\d\d-\d\d[ T\d:.]*|0x\w+", "", text)

    return run


@pytest.fixture(scope="module")
def unedited(shown):
    """unedited(code): what code shows with the package as it is, run once."""
    return functools.cache(shown)


def test_every_row_of_the_table_is_performed_here():
    table = (ROOT / "README.md").read_text().split("| to change | open |\n| --- | --- |\n")[1].split("\n\n")[0]
    rows = [line.split(" | ") for line in table.splitlines()]
    assert [row for row, _ in rows if not any(row.removeprefix("| ").startswith(key) for key in EDITS)] == []
    for row, files in rows:
        key = next(key for key in EDITS if row.removeprefix("| ").startswith(key))
        named = {Path(name).name for name in re.findall(r"`([\w/.]+\.(?:py|html))`", files)} - {"make_tiny.py"}
        edited = {Path(file).name for file, *_ in EDITS[key]}
        assert named <= edited, f"{key}: the table names {named - edited}, which nothing here edits"


@pytest.mark.parametrize(
    "row, file, old, new, code", CASES, ids=[f"{row}-{Path(file).name}" for row, file, *_ in CASES]
)
def test_an_edit_where_the_table_says_has_its_effect(row, file, old, new, code, package, shown, unedited):
    before = unedited(code)
    path = package / file.replace("kernels/", "minitune_kernels/", 1)
    text = path.read_text()
    assert text.count(old) >= 1, f"{file} has no {old!r} any more"
    times = path.stat()
    path.write_text(text.replace(old, new))
    try:
        assert shown(code) != before
    finally:
        path.write_text(text)
        os.utime(
            path, ns=(times.st_atime_ns, times.st_mtime_ns)
        )  # bytecode of the edit may have the same size and second


def test_what_is_shown_is_the_same_without_an_edit(shown, unedited):
    for code in (MISTRAL, GREEDY, SCORED):
        assert shown(code) == unedited(code)
