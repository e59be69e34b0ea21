"""What Windows and macOS lack is removed from Python on Linux: everything still imports, trains and answers."""

import json

from test_house import modules

WITHOUT_POSIX = """
import builtins, importlib, os, signal, sys

import filelock, huggingface_hub, matplotlib.figure, torch._dynamo  # what makes use of these names where they are

plain = builtins.__import__

def checked(name, globals=None, *args, **kwargs):
    who = (globals or {}).get("__name__") or ""
    if name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix") and who.startswith("minitune"):
        raise ImportError(f"{who} imports {name}, which Windows does not have")
    return plain(name, globals, *args, **kwargs)

builtins.__import__ = checked
for name in '''getuid geteuid getgid fork pwrite pread fchmod killpg setsid statvfs sysconf uname getloadavg mkfifo O_NOFOLLOW
    O_DIRECTORY O_CLOEXEC sched_getaffinity sched_setaffinity wait3 wait4 nice'''.split():
    delattr(os, name)
for name in "SIGHUP SIGKILL SIGALRM SIGXFSZ SIGUSR1 SIGQUIT alarm setitimer pthread_sigmask sigwait".split():
    delattr(signal, name)

names, options, prompts = map(eval, sys.argv[1:])
for name in names:
    importlib.import_module(name)

from minitune.config import TrainConfig
from minitune.jobs.generate import AnswerConfig, answer
from minitune.train import train

run = train(TrainConfig(**options), say=lambda line: None)
answer(AnswerConfig(model=options["model"], adapter=str(run), prompts=prompts, out="answers.jsonl", max_new_tokens=2))
"""


def test_everything_works_without_what_only_posix_has(tmp_path, bare_forks):
    names = [name for name, _ in modules() if not name.startswith("scripts")]
    options = {
        "model": "tiny-llama",
        "data": "rows.jsonl",
        "test_size": 1,
        "device": "cpu",
        "max_steps": 1,
        "samples": 0,
    }
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    done = bare_forks.start(WITHOUT_POSIX, "code", *map(repr, (names, options, "prompts.jsonl")), folder=tmp_path)
    assert done.wait() == 0, done.err.read_text()
    assert len([json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]) == 2
