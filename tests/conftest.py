"""Fixtures that every test file may use."""

import gc
import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch loads; the tensors of a test are too small for more
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # no thread of a test spins on a core that another test needs
sys.path.append(str(ROOT / "tests"))  # for triton_interpreter: pytest's importlib mode adds no folder

# Started in the background or by nohup, the tests and their processes would inherit that these signals are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.fsync = lambda handle: None  # no test cuts the power, and a training waits for the disk half a second

import torch  # noqa: E402
from forks import Forks  # noqa: E402

# Forked now, before anything else is imported. They wait for a first job, and import what they need for it then.
WITH_MINITUNE = Forks(("minitune.jobs.chat", "minitune.jobs.sweep"))
WITHOUT_MINITUNE = Forks(
    ("matplotlib.figure", "matplotlib.backends.backend_agg", "scipy.stats", "tokenizers", "sentencepiece",
     "safetensors.torch", "numpy", "nltk", "regex", "tqdm", "filelock", "torch.fx.experimental.symbolic_shapes")
)  # fmt: skip

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402

from minitune.tokenizer import load_tokenizer  # noqa: E402

pytest_plugins = ["small_runs", "small_adapters", "small_decoding", "small_reports"]  # their fixtures

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels run on CPU tensors


def pytest_collection_finish(session):
    """Let the garbage collector pass over what the imports made: torch and transformers are hundreds of thousands of objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data_dir():
    """Real weights, tokenizers and rows, which the project does not ship. Skips where they are absent."""
    folder = Path(os.environ.get("MINITUNE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}: set MINITUNE_TEST_DATA to a folder with it")
    return folder


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Starts scripts and code in processes that have imported torch and minitune already."""
    WITH_MINITUNE.folder = tmp_path_factory.mktemp("forks")
    return WITH_MINITUNE


@pytest.fixture(scope="session")
def bare_forks(tmp_path_factory):
    """The same with torch and other libraries, but nothing of minitune, which a test may have changed or must import itself."""
    WITHOUT_MINITUNE.folder = tmp_path_factory.mktemp("forks")
    return WITHOUT_MINITUNE


@pytest.fixture
def script(monkeypatch, capsys):
    """script("generate.py", *argv) runs a script here, where torch is imported already: what it printed (stdout, stderr) and its
    exit code (returncode), as subprocess.run() gives them."""

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


@pytest.fixture
def specification(monkeypatch):
    """The torch backend: the same products of the same bits as a dense layer, whatever the number of rows."""
    monkeypatch.setenv("MINITUNE_KERNELS", "torch")


@pytest.fixture(scope="session")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes: pip install minitune[test]")


@pytest.fixture(scope="session")
def byte_tokenizers(tmp_path_factory):
    """(with BOS, without): an id a byte, 256 <|bos|>, 257 <|eos|>."""
    made = []
    for has_bos in (True, False):
        model = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        model.add_special_tokens(["<|bos|>", "<|eos|>"])
        if has_bos:
            model.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 256)])
        folder = tmp_path_factory.mktemp("tokenizer")
        model.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|eos|>"}')
        (folder / "config.json").write_text("{}")
        made.append(load_tokenizer(folder))
    return made


@pytest.fixture
def tokenizer(byte_tokenizers):
    return byte_tokenizers[0]
