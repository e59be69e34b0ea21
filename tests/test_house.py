"""The shape of the house: who may import whom, the kernels/ folder's name, and what the project must not depend on."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {  # name: its modules. One imports only from floors below, and from those that stand before it on its own floor
    "bits": ["minitune_kernels."],
    "ground": [  # knows no model
        "minitune.interrupts",
        "minitune.screen",
        "minitune.schema",
        "minitune.files",
        "minitune.locks",
        "minitune.config",
        "minitune.device",
        "minitune.distributed",
        "minitune.pulse",
        "minitune.formats.templates",
        "minitune.formats.rows",
        "minitune.formats.files",
        "minitune.metrics.pairs",
        "minitune.metrics.ngrams",
        "minitune.metrics.writing",
        "minitune.metrics.bleu_tokens",
        "minitune.metrics.",
    ],
    "network": [  # formulas wired into blocks
        "minitune.models.layers",
        "minitune.models.config_json",
        "minitune.models.cache",
        "minitune.models.llama",
        "minitune.models.mistral",
        "minitune.models.phi",
        "minitune.models.gpt2",
        "minitune.models.roberta",
        "minitune.models",
        "minitune.quant",
        "minitune.adapters.lora",
        "minitune.decoding.",
    ],
    "disk": [  # weights, adapters, rows, the state of a run
        "minitune.hub",
        "minitune.tokenizer",
        "minitune.tensor_files",
        "minitune.adapters.peft_files",
        "minitune.model_folder",
        "minitune.checkpoint",
        "minitune.generation_config",
        "minitune.data.labels",
        "minitune.data.batches",
        "minitune.data.dataset",
        "minitune.data",
        "minitune.runs.folder",
        "minitune.runs.",
        "minitune.study.names",
        "minitune.study.files",
        "minitune.embedded.corpus",
        "minitune.embedded.make",
    ],
    "engines": [  # one subject each, no command line
        "minitune.generate",
        "minitune.plan",
        "minitune.loss",
        "minitune.health",
        "minitune.train",
        "minitune.session",
        "minitune.evaluation.metrics",
        "minitune.evaluation.scoring",
        "minitune.evaluation.held_out",
        "minitune.reports.commands",
        "minitune.reports.figures",
        "minitune.reports.page",
        "minitune.reports.words",
        "minitune.reports.results",
        "minitune.reports.runs",
        "minitune.reports.scores",
    ],
    "jobs": [
        "minitune.bench.turns",
        "minitune.bench.shapes",
        "minitune.bench.",
        "minitune.jobs.",
    ],  # several subjects put together
    "scripts": ["scripts."],
}
ORDER = [(name, entry) for name, entries in FLOORS.items() for entry in entries]
PACKAGES = {  # with no code of their own
    "minitune",
    *(
        f"minitune.{room}"
        for room in "adapters bench decoding embedded evaluation formats jobs metrics reports runs study".split()
    ),
}
PEERS = {"transformers", "peft", "bitsandbytes", "sacrebleu", "rouge_score", "bert_score", "hypothesis", "datasets"}
RUNTIME = {"torch", "safetensors", "sentencepiece", "tokenizers", "huggingface_hub", "filelock", "numpy", "nltk", "regex",
           "scipy", "tqdm", "matplotlib", "minitune", "minitune_kernels", "pyarrow", "triton"}  # fmt: skip


def place(name):
    """(number of the floor, number in ORDER) of a module; the whole name goes before a room's."""
    for number, (floor, entry) in sorted(enumerate(ORDER), key=lambda found: found[1][1].endswith(".")):
        if name == entry or entry.endswith(".") and name.startswith(entry):
            return list(FLOORS).index(floor), number
    raise AssertionError(f"{name} stands on no floor: add it to FLOORS in {__file__}")


def modules():
    for folder in ("minitune", "kernels", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name.replace("kernels", "minitune_kernels", 1) if folder == "kernels" else name, path


def imports(path):
    """Every module that a file imports, relative to the top level: `from minitune import hub` is minitune.hub."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import; write the whole name"
            for alias in node.names:
                inner = ROOT / f"{node.module}.{alias.name}".replace(".", "/").replace("minitune_kernels", "kernels")
                is_module = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(
    "name, path", [pytest.param(*m, id=m[0]) for m in modules() if m[0] not in PACKAGES - {"minitune.data"}]
)
def test_imports_point_down(name, path):
    for target in imports(path):
        if target.split(".")[0] not in ("minitune", "minitune_kernels"):
            continue
        same_kernels = name.startswith("minitune_kernels") and target.startswith("minitune_kernels")
        assert same_kernels or place(target) < place(name), (
            f"{path.relative_to(ROOT)} imports {target}, which stands above it or beside it"
        )


def test_only_the_runtime_dependencies_are_imported():
    for name, path in modules():
        for target in imports(path):
            top = target.split(".")[0]
            assert top not in PEERS, f"{name} imports {top}, which only tests may"
            assert top in RUNTIME or top in sys.stdlib_module_names, (
                f"{name} imports {top}, which setup.py does not bring"
            )


def test_importing_minitune_loads_no_peer():
    code = f"import sys, minitune.jobs.demo, minitune.embedded.make; print(sorted(set(sys.modules) & set({sorted(PEERS)})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_kernels_folder_does_not_shadow_hugging_face():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "see the comment in setup.py"
    import minitune_kernels.nf4

    assert Path(minitune_kernels.nf4.__file__).resolve().parent == ROOT / "kernels"


def test_scripts_stay_short():
    for path in (ROOT / "scripts").glob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 50, (
            f"{path.name} has {lines} lines: what it does belongs into minitune/, where a test can call it"
        )


def test_a_file_of_tests_has_one_subject_and_less_than_600_lines():
    lines = {path.name: path.read_text().count("\n") for path in (ROOT / "tests").glob("*.py")}
    assert max(lines.values()) < 600, f"split {max(lines, key=lines.get)} by subject"


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "scripts").glob("*.py")))
def test_every_script_has_help_and_one_clear_line_for_a_wrong_option(name, script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = script(name, "--help")
    assert shown.returncode == 0 and "usage:" in shown.stdout and max(map(len, shown.stdout.splitlines())) <= 80
    assert script(name, "--version").stdout.startswith("minitune ")
    wrong = script(name, "--no-such-option")
    assert wrong.returncode == 2 and "--no-such-option" in wrong.stderr and wrong.stderr.count("\n") == 1


@pytest.mark.parametrize("folder", ["minitune", "kernels", "scripts", "tests"])
def test_a_folder_s_readme_lists_its_modules_and_nothing_else(folder):
    page = (ROOT / folder / "README.md").read_text()
    tree = page.split(f"```\n{folder}/\n")[1].split("```")[0]
    listed, room = set(), ROOT / folder
    for line in tree.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        room = ROOT / folder if indent == 2 else room
        if name.endswith("/"):
            room = ROOT / folder / name
        listed |= {room / word for word in line.split()[: 2 if folder == "kernels" else 1] if word.endswith(".py")}
    real = {p for p in (ROOT / folder).rglob("*.py") if p.name != "__init__.py" or p.parent.name in ("models", "data")}
    assert {str(p.relative_to(ROOT)) for p in listed ^ real} == set(), (
        "listed without being there, or there without being listed"
    )


def test_the_four_walks_name_files_and_functions_that_are_there():
    """A name without a dot is defined in a file of its line; one with a dot, or of a line without files, in the house."""
    house = [
        p for room in ("minitune", "kernels", "scripts") for p in (ROOT / room).rglob("*") if p.suffix in (".py", ".c")
    ]
    texts = {path: path.read_text() for path in house}
    walks = (ROOT / "minitune" / "README.md").read_text().split("## Four walks")[1].split("\n## ")[0]
    assert walks.count("**From ") == 4
    for line in walks.splitlines():
        names = [name for name in re.findall(r"`([\w./]+)`", line) if name not in ("torch", "F.linear")]
        files = {name: [p for p in house if p in (ROOT / name, ROOT / "minitune" / name)] for name in names}
        here = [path for found in files.values() for path in found]
        for name in names:
            if re.search(r"\.(py|c)$", name):
                assert files[name], f"{name} is not there: {line}"
                continue
            last = name.split(".")[-1]
            places = here if here and "." not in name else house
            definition = re.compile(rf"(def|class) {last}\b|^(int|void) {last}\(", re.M)
            assert any(path.stem == last or definition.search(texts[path]) for path in places), f"{name}: {line}"
