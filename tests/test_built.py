"""Built kernels: kept in a folder of this user alone, under a name that is checked; what is built or damaged is reported."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
# Stands for the kernels in tests of building and caching.
SMALL = "void record(void *steps) {}\nint kernel_level(void) { return LEVEL; }\n"


@pytest.fixture
def process(monkeypatch, capsys, tmp_path):
    """process(cache, **environment) -> (what built.library() returns in a new process, or the text of its NoCompiler; stderr).

    It runs in this process, with the caches emptied and SMALL for the kernels."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "small.c").write_text(SMALL)
    monkeypatch.setattr(built, "HERE", tmp_path / "sources")
    monkeypatch.setattr(built, "SOURCES", {"small.c": ()})
    monkeypatch.setattr(built, "HEADERS", ())

    def process(cache, **environment):
        built.tell.cache_clear()
        scratch = Path(tempfile.mkdtemp(dir=tmp_path))
        monkeypatch.setattr(built, "scratch", lambda: scratch)
        for name, value in {"XDG_CACHE_HOME": str(cache), **environment}.items():
            monkeypatch.setenv(name, value)
        try:
            found = built.library.__wrapped__()
        except built.NoCompiler as error:
            found = str(error)
        return found, capsys.readouterr().err

    return process


@pytest.fixture
def cache(process, tmp_path):
    """(XDG_CACHE_HOME with one built library, the path of that library)."""
    (library, level), err = process(tmp_path / "cache")
    assert level == library.kernel_level() == built.highest_level() and err.count("building the C kernels") == 1
    [file] = (tmp_path / "cache" / "minitune").iterdir()
    return tmp_path / "cache", file


def start(cache, code=QUANTIZE, **environment):
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def run(*args, **environment):
    """(exit code, stdout, stderr) of another process."""
    process = start(*args, **environment)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def test_a_kept_library_is_not_built_again(process, cache):
    (library, _), err = process(cache[0])
    assert not err and library._name == str(cache[1])


def test_other_sources_flags_or_compilers_are_another_library(process, cache, monkeypatch):
    assert "building" not in process(cache[0])[1]
    (built.HERE / "small.c").write_text(SMALL + "int more;")
    assert "building" in process(cache[0])[1]
    monkeypatch.setattr(built, "FLAGS", (*built.FLAGS, "-O1"))
    assert "building" in process(cache[0])[1]
    assert "building" in process(cache[0], CC="gcc -std=gnu11")[1]
    assert len(list(cache[1].parent.iterdir())) == 4


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_the_folder_belongs_to_this_user_alone(tmp_path, umask, monkeypatch):
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
def test_a_damaged_or_planted_file_is_reported_and_never_used(damage, tmp_path, monkeypatch, capsys):
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
    assert "is damaged or belongs to somebody else; it is built again" in capsys.readouterr().err


def test_a_library_that_was_cut_short_is_built_again(process, cache):
    folder, library = cache
    content = library.read_bytes()
    library.unlink()  # not overwritten: this process has it mapped
    library.write_bytes(content[:4096])
    (_, level), err = process(folder)
    assert level == built.highest_level() and "it is built again" in err, err
    [again] = (folder / "minitune").iterdir()
    assert again.read_bytes() == content


@pytest.mark.parametrize("fault", ["writable by the group", "another user's", "a file", "read only"])
def test_a_folder_that_is_not_ours_alone_is_reported_and_the_kernels_run(process, cache, fault, tmp_path):
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
    (_, level), err = process(folder)
    assert level == built.highest_level()
    assert err.count("built kernels are not kept in") == 1 and err.count("building the C kernels") == 1, err
    assert "chmod 700" in err or fault != "writable by the group"


def test_processes_that_build_at_once_and_one_that_is_killed_leave_one_library(process, tmp_path, monkeypatch):
    compiler = tmp_path / "slow"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || sleep 0.5\nexec cc "$@"\n')
    compiler.chmod(0o700)
    pids = []
    for _ in range(4):
        pids.append(os.fork())
        if pids[-1] == 0:
            found, _ = process(tmp_path / "cache", CC=str(compiler))
            os._exit(0 if isinstance(found, tuple) else 1)
    time.sleep(0.3)
    os.kill(pids[0], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [-signal.SIGKILL, 0, 0, 0]
    assert [path.suffix for path in (tmp_path / "cache" / "minitune").iterdir()] == [".so"]


def test_without_a_compiler_it_says_so_once_and_computes_in_torch(tmp_path):
    code, out, err = run(tmp_path, f"{QUANTIZE}\nnf4.quantize(torch.ones(4, 64))", CC="no-such-compiler")
    assert code == 0 and out.startswith("torch (plain PyTorch") and "there is no C compiler 'no-such-compiler'" in out
    assert err.count("there is no C compiler") == 1


def test_a_compiler_that_fails_is_reported_once_and_torch_computes(tmp_path):
    code, out, err = run(tmp_path, CC="false")
    assert code == 0 and out.startswith("torch ") and "Traceback" not in err
    [line] = [line for line in err.splitlines() if "building" not in line]
    assert "plain PyTorch, which is slow" in line and len(line) < 500


@pytest.mark.parametrize("compiler", ["cc -no-such-flag", "cc '", "/", "false", "echo \x1b[31m"])
def test_why_a_compiler_fails_is_one_line(process, tmp_path, compiler):
    why, err = process(tmp_path / "cache", CC=compiler)
    assert isinstance(why, str) and "\n" not in why and len(why) < 400
    assert "Traceback" not in err and "\x1b" not in err


def test_an_empty_cc_is_cc(process, cache):
    assert process(cache[0], CC=" ")[1] == ""


def test_the_level_is_one_that_the_library_runs():
    library, level = built.library()
    assert level in (built.highest_level(), built.highest_level() - 1)  # the system may refuse AMX
