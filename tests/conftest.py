"""Fixtures that every test file may use."""

import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch loads; the tensors of a test are too small for more
sys.path.append(str(ROOT / "tests"))  # for triton_interpreter: pytest's importlib mode adds no folder

# A shell that starts the tests behind itself has them, and what they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels run on CPU tensors


@pytest.fixture(scope="session")
def data_dir():
    """Real weights, tokenizers and rows, which the project does not ship. Skips where they are absent."""
    folder = Path(os.environ.get("MINITUNE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}: set MINITUNE_TEST_DATA to a folder with it")
    return folder
