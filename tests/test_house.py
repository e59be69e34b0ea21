"""The shape of the house: who may import whom, the kernels/ folder's name, and what the project must not depend on."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [  # a module imports only from floors below its own; a name that ends with a dot stands for all below it
    ["minitune_kernels."],
    [
        "minitune.interrupts",
        "minitune.screen",
        "minitune.schema",
        "minitune.files",
        "minitune.config",
        "minitune.device",
        "minitune.hub",
        "minitune.quant",
        "minitune.lora",
        "minitune.prompts",
        "minitune.tiny_corpus",
        "minitune.models.layers",
        "minitune.models.config_json",
        "minitune.sampling",
        "minitune.lookup",
        "minitune.metrics.",
    ],
    [
        "minitune.models.llama",
        "minitune.models.mistral",
        "minitune.models.phi",
        "minitune.models.gpt2",
        "minitune.models.roberta",
        "minitune.models.cache",
    ],
    ["minitune.models", "minitune.tokenizer", "minitune.generate"],
    [
        "minitune.checkpoint",
        "minitune.data",
        "minitune.run_folder",
        "minitune.generation_config",
        "minitune.reports.commands",
        "minitune.reports.study_files",
        "minitune.reports.figures",
    ],
    [
        "minitune.train",
        "minitune.answer_file",
        "minitune.reports.results",
        "minitune.reports.page",
        "minitune.reports.words",
    ],
    [
        "minitune.tiny",
        "minitune.demo",
        "minitune.inspect_data",
        "minitune.benchmark",
        "minitune.kernel_benchmark",
        "minitune.metric_benchmark",
        "minitune.answer",
        "minitune.scoring",
        "minitune.reports.scores",
        "minitune.reports.runs",
    ],
    ["minitune.chat", "minitune.bertscore_benchmark", "minitune.evaluate", "minitune.report"],
    ["minitune.sweep"],
    ["scripts."],
]
PACKAGES = ("minitune", "minitune.metrics", "minitune.reports")  # with no code of their own
GROUND = [  # what other modules of floor 1 may use; among themselves, those that stand before them
    "minitune.interrupts",
    "minitune.screen",
    "minitune.schema",
    "minitune.files",
    "minitune.config",
    "minitune.metrics.pairs",
    "minitune.metrics.ngrams",
    "minitune.metrics.writing",
    "minitune.metrics.bleu_tokens",
    "minitune.models.layers",
]
PEERS = {"transformers", "peft", "bitsandbytes", "sacrebleu", "rouge_score", "bert_score", "hypothesis", "datasets"}
RUNTIME = {"torch", "safetensors", "sentencepiece", "tokenizers", "huggingface_hub", "numpy", "nltk", "regex", "scipy",
           "tqdm", "matplotlib", "minitune", "minitune_kernels", "pyarrow", "triton"}  # fmt: skip


def floor(name):
    for number, row in enumerate(FLOORS):
        if any(name == entry or entry.endswith(".") and name.startswith(entry) for entry in row):
            return number
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
                yield f"{node.module}.{alias.name}" if inner.with_suffix(".py").exists() else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("name, path", [pytest.param(*m, id=m[0]) for m in modules() if m[0] not in PACKAGES])
def test_imports_point_down(name, path):
    for target in imports(path):
        if target.split(".")[0] not in ("minitune", "minitune_kernels"):
            continue
        same_kernels = name.startswith("minitune_kernels") and target.startswith("minitune_kernels")
        below = GROUND[: GROUND.index(name)] if name in GROUND else GROUND
        ground = target in below and floor(name) == floor(target)
        assert same_kernels or ground or floor(target) < floor(name), (
            f"{path.relative_to(ROOT)} imports {target}, from its floor or above"
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
    code = f"import sys, minitune.demo, minitune.tiny; print(sorted(set(sys.modules) & set({sorted(PEERS)})))"
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


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "scripts").glob("*.py")))
def test_every_script_has_help_and_one_clear_line_for_a_wrong_option(name, script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = script(name, "--help")
    assert shown.returncode == 0 and "usage:" in shown.stdout and max(map(len, shown.stdout.splitlines())) <= 80
    assert script(name, "--version").stdout.startswith("minitune ")
    wrong = script(name, "--no-such-option")
    assert wrong.returncode == 2 and "--no-such-option" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_readme_names_every_module():
    readme = (ROOT / "README.md").read_text()
    missing = [
        str(path.relative_to(ROOT)) for _, path in modules() if path.name != "__init__.py" and path.name not in readme
    ]
    assert not missing, f"the tree in README.md lacks {', '.join(missing)}"
