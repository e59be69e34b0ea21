"""Built kernels: kept under a checked name in a folder of this user alone, built in seconds, and said."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from minitune_kernels import built

if os.environ.get("MINITUNE_KERNELS", "auto") == "torch":
    pytest.skip("no C kernels, as MINITUNE_KERNELS asks", allow_module_level=True)
try:
    built.library()
except built.NoCompiler as error:
    pytest.skip(f"no C kernels: {error}", allow_module_level=True)

QUANTIZE = """
import torch; from minitune_kernels import nf4
print(nf4.describe(torch.device('cpu')))
nf4.quantize(torch.ones(4, 64))"""
FAST = (
    "import minitune_kernels.built as b; b.SOURCES = dict.fromkeys(b.SOURCES, ('-O0',)); b.highest_level = lambda: 0\n"
)


def start(cache, code=FAST + QUANTIZE, **environment):
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def run(*args, **environment):
    """(exit code, stdout, stderr). The kernels are built without optimisation: what is asked here is not their speed."""
    process = start(*args, **environment)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache with one built library in it."""
    cache = tmp_path_factory.mktemp("cache")
    code, out, err = run(cache)
    assert code == 0 and out.startswith("cpu (C kernels, portable C") and err.count("building the C kernels") == 1, err
    return cache


@pytest.fixture
def cache(filled, tmp_path):
    """(a copy of `filled`, the library in it)."""
    subprocess.run(["cp", "-a", f"{filled}/minitune", tmp_path], check=True)
    [library] = (tmp_path / "minitune").iterdir()
    return tmp_path, library


def test_a_kept_library_is_not_built_again(cache):
    code, out, err = run(cache[0])
    assert code == 0 and out.startswith("cpu ") and not err


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_the_folder_is_of_this_user_alone(tmp_path, umask, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = os.umask(umask)
    try:
        built.keep("x", ".so", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "minitune").stat().st_mode) == 0o700
    [file] = (tmp_path / "minitune").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and built.kept("x", ".so") == file


@pytest.mark.parametrize("damage", ["short", "zeros", "empty", "a bit", "another user's", "writable by all", "a link"])
def test_a_damaged_or_planted_file_is_said_and_never_used(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content = bytes(range(256)) * 40
    file = built.keep("x", ".so", content)
    changed = {"short": content[:5000], "zeros": bytes(len(content)), "empty": b"", "a bit": b"\x01" + content[1:]}
    if damage in changed:
        file.write_bytes(changed[damage])
    elif damage == "another user's":
        if os.getuid():
            pytest.skip("only root can give a file away")
        os.chown(file, 12345, 12345)
    elif damage == "writable by all":
        file.chmod(0o666)
    else:
        file.rename(tmp_path / "elsewhere.so")
        file.symlink_to(tmp_path / "elsewhere.so")
    assert built.kept("x", ".so") is None and not file.exists()
    assert "is damaged or of somebody else; it is built again" in capsys.readouterr().err


def test_a_library_that_was_cut_short_is_built_again(cache):
    folder, library = cache
    content = library.read_bytes()
    library.write_bytes(content[:4096])
    code, out, err = run(folder)
    assert code == 0 and out.startswith("cpu ") and "it is built again" in err, err
    [again] = (folder / "minitune").iterdir()
    assert again.read_bytes() == content


@pytest.mark.parametrize("fault", ["writable by the group", "another user's", "a file", "read only"])
def test_a_folder_that_is_not_ours_alone_is_said_and_the_kernels_run(cache, fault, tmp_path):
    folder, library = cache
    if fault == "writable by the group":
        library.parent.chmod(0o770)
    elif fault == "another user's":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        os.chown(library.parent, 12345, 12345)
    elif fault == "a file":
        folder = tmp_path / "other"
        folder.mkdir()
        (folder / "minitune").write_text("in the way")
    else:
        folder = "/proc/self"
    code, out, err = run(folder)
    assert code == 0 and out.startswith("cpu "), err
    assert err.count("built kernels are not kept in") == 1 and err.count("building the C kernels") == 1, err
    assert "chmod 700" in err or fault != "writable by the group"


def test_two_processes_that_build_at_once_and_one_that_is_killed_leave_one_library(tmp_path):
    killed = start(tmp_path)
    time.sleep(2.5)  # in the middle of importing or compiling
    killed.send_signal(signal.SIGKILL)
    processes = [start(tmp_path) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0 and out.startswith("cpu "), err
    killed.communicate()
    assert [p.suffix for p in (tmp_path / "minitune").iterdir()] == [".so"]


def test_without_a_compiler_it_says_so_once_and_computes_in_torch(tmp_path):
    code, out, err = run(tmp_path, f"{QUANTIZE}\nnf4.quantize(torch.ones(4, 64))", CC="no-such-compiler")
    assert code == 0 and out.startswith("torch (plain PyTorch") and "there is no C compiler 'no-such-compiler'" in out
    assert err.count("there is no C compiler") == 1


@pytest.mark.parametrize("compiler", ["cc -no-such-flag", "cc '", "/", "false", "echo \x1b[31m"])
def test_a_compiler_that_fails_is_said_in_one_line(tmp_path, compiler):
    code, out, err = run(tmp_path, FAST + QUANTIZE, CC=compiler)
    assert code == 0 and out.startswith("torch ") and "Traceback" not in err and "\x1b" not in err
    [line] = [line for line in err.splitlines() if "building" not in line]
    assert "plain PyTorch, which is slow" in line and len(line) < 500


def test_an_empty_cc_is_cc(cache):
    assert run(cache[0], CC=" ")[1].startswith("cpu ")


def test_the_level_is_one_that_the_library_runs():
    library, level = built.library()
    assert level in (built.highest_level(), built.highest_level() - 1)  # AMX may not be lent
