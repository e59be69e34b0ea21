"""Whoever edits a function of kernels/formulas.py sees the edit wherever the operation is computed, and is told once which faster
version was set aside. Without an edit no version is set aside."""

import json
import os
import shutil
from pathlib import Path

import pytest
from forks import Forks
from formula_runs import DECODINGS, FAMILIES

ROOT = Path(__file__).resolve().parents[1]
TRAINING, DECODED = {"training", "held-out loss"}, {*DECODINGS, "a stream"}
RANKED = DECODED - {"sampling", "beam sampling"}  # the others draw from all tokens
EVERYWHERE = TRAINING | DECODED

# Operation: (a line of its formula, the line in its place, {family: where the edit must show}).
EDITS = {
    "rms_norm": (
        "return weight * (wide * torch.rsqrt",
        "return (1 + weight) * (wide * torch.rsqrt",
        {"llama": EVERYWHERE},
    ),
    "layer_norm": (
        "return (normed * weight + bias)",
        "return (normed * weight * 1.01 + bias)",
        {"phi": EVERYWHERE, "judges": {"perplexity", "BERTScore"}},
    ),
    "rope": ("high * cos + low * sin, rest", "high * cos - low * sin, rest", {"phi": EVERYWHERE}),
    "swiglu": ("return F.silu(gate) * up", "return F.silu(gate) * up * 1.01", {"llama": EVERYWHERE}),
    "gelu": ("wide / math.sqrt(2)", "wide / math.sqrt(3)", {"phi-gelu": EVERYWHERE, "judges": {"BERTScore"}}),
    "gelu_tanh": ("0.044715", "0.5", {"phi": EVERYWHERE, "judges": {"perplexity"}}),
    "linear": (
        "    y = x @ weight.T\n",
        "    y = x @ weight.T * 1.01\n",
        {"llama": EVERYWHERE, "llama-nf4": EVERYWHERE, "judges": {"perplexity", "BERTScore"}},
    ),
    "lora": ("return y + (low", "return y - (low", {"llama": EVERYWHERE}),
    "attention": (
        "scores.softmax(-1) @ values",
        "(scores * 1.05).softmax(-1) @ values",
        {"mistral": EVERYWHERE, "judges": {"perplexity", "BERTScore"}},
    ),
    "cross_entropy": (
        "return logits.logsumexp(-1) -",
        "return 1.01 * logits.logsumexp(-1) -",
        {"llama": TRAINING, "judges": {"perplexity"}},
    ),
    "most_likely": ("log_softmax(-1).sort", "mul(1.01).log_softmax(-1).sort", {"llama": RANKED}),
}


class Runs:
    """Runs formula_runs.py. Keeps what was found with the unedited package."""

    def __init__(self, folder, forks):
        self.folder, self.forks, self.known = folder, {"": forks}, {}
        shutil.copytree(ROOT / "minitune", folder / "minitune", ignore=shutil.ignore_patterns("embedded"))

    def package(self, name, edit=None):
        """A folder with the package. edit: (old, new) in formulas.py."""
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            (folder / "minitune").symlink_to(self.folder / "minitune")
            shutil.copytree(ROOT / "kernels", folder / "minitune_kernels", ignore=shutil.ignore_patterns("benchmarks"))
            if edit:
                path = folder / "minitune_kernels" / "formulas.py"
                text = path.read_text()
                assert text.count(edit[0]) == 1, f"formulas.py has {edit[0]!r} {text.count(edit[0])} times"
                path.write_text(text.replace(*edit))
        return folder

    def run(self, package, families, dtype="float32", kernels="", capability=""):
        """(results, the lines of stderr) of a package."""
        environment = {key: value for key, value in os.environ.items() if key != "MINITUNE_KERNELS"}
        environment |= {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        if capability not in self.forks:  # torch reads it when it is imported
            self.forks[capability] = Forks((), environment)
            self.forks[capability].folder = self.folder
        environment |= {"MINITUNE_KERNELS": kernels} if kernels else {}
        code = "import formula_runs, sys; formula_runs.main(*sys.argv[1:])"
        done = self.forks[capability].start(code, "code", package, dtype, *families, environment=environment)
        assert done.wait() == 0, done.err.read_text()[-3000:]
        said = [line for line in done.err.read_text().splitlines() if "building the C kernels" not in line]
        return json.loads(done.out.read_text()), said

    def unedited(self, family, kernels):
        if (family, kernels) not in self.known:
            self.known[family, kernels] = self.run(self.package("unedited"), [family], kernels=kernels)[0][family]
        return self.known[family, kernels]

    def stop(self):
        for forks in self.forks.values():
            if forks is not self.forks[""]:
                forks.stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bare_forks):
    runs = Runs(tmp_path_factory.mktemp("formulas"), bare_forks)
    yield runs
    runs.stop()


@pytest.mark.parametrize(
    "operation, kernels", [*((name, "") for name in EDITS), ("attention", "torch"), ("linear", "torch")]
)
def test_an_edited_formula_is_seen_wherever_the_operation_is_computed_and_said_once(operation, kernels, runs):
    *edit, shows = EDITS[operation]
    package = runs.package(operation, edit)
    found, said = runs.run(package, shows, kernels=kernels)
    for family, where in shows.items():
        before = runs.unedited(family, kernels)
        changed = {name for name in before if found[family][name] != pytest.approx(before[name], rel=1e-4, abs=1e-4)}
        assert where <= changed, f"{family} does not show it in {where - changed}"
    (line,) = said
    assert line.startswith(f"minitune: {operation} follows its formula ({package}/minitune_kernels/formulas.py:")
    number = int(line.split("formulas.py:")[1].split(")")[0])
    text = (package / "minitune_kernels" / "formulas.py").read_text().splitlines()[number - 1]
    assert text.startswith(f"def {operation}(")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels, capability", [("", ""), ("torch", ""), ("", "default"), ("torch", "default")])
def test_what_was_not_edited_agrees_with_its_formula_and_says_nothing(dtype, kernels, capability, runs):
    families = ["llama", "phi", "judges"] if capability else [*FAMILIES, "llama-nf4", "judges"]
    assert runs.run(runs.package("unedited"), families, dtype, kernels, capability)[1] == []
