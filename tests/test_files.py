"""Files, schemas and the screen with unusual input."""

import io
import json
import os
import stat
import subprocess
import sys

import pytest

from minitune import files, schema, screen
from minitune.schema import Number, check

# --- writing ---


def test_a_symbolic_link_is_followed_and_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "file.json")
    files.write_json(tmp_path / "link.json", [1])
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real" / "file.json").read_text()) == [1]


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "link to a fifo"])
def test_only_a_regular_file_is_replaced(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "device":
        path = "/dev/null"
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "pipe")
        path = tmp_path / "pipe" if kind == "fifo" else path
        if kind.startswith("link"):
            path.symlink_to(tmp_path / "pipe")
    before = os.stat(path).st_mode
    for act in (lambda: files.write_whole(path, "text"), lambda: files.prove_writable(path)):
        with pytest.raises(ValueError, match="expected a"):
            act()
    assert os.stat(path).st_mode == before and not stat.S_ISREG(before)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_a_full_disk_names_the_file(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "from minitune.files import write_whole\n"
        "try: write_whole(sys.argv[1], 'x' * 1000)\n"
        "except OSError as error: print(error.filename, error.strerror)"
    )
    path = tmp_path / "x.json"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{path} File too large"
    assert not list(tmp_path.iterdir())


def test_lone_surrogates_survive_a_round_trip(tmp_path):
    files.write_json(tmp_path / "x.json", ["a\ud800b", "é"])
    assert files.read_json(tmp_path / "x.json") == ["a\ud800b", "é"]
    assert "é".encode() in (tmp_path / "x.json").read_bytes()


# --- reading ---


@pytest.mark.parametrize(
    "content, word",
    [
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b'[{"a":' * 150 + b"1" + b"}]" * 150, "nested"),
        (b"9" * 5_000, "digits"),
        (b"[" + b"9" * 400 + b"]", "digits"),
        (b"{", "line 1"),
        (b"", "line 1"),
        (b"\xff\xfe", "UTF-8"),
    ],
    ids=range(8),
)
def test_broken_json_is_one_line_with_the_file(tmp_path, content, word):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        files.read_json(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and word in text and "\n" not in text and len(text) < 300


@pytest.mark.parametrize(
    "path", ["/dev/zero", ".", "no/such", "~nosuchuser/x", "a\0b", "\ud800", "x" * 5000], ids=range(7)
)
def test_what_is_no_file_is_one_line(path):
    for act in (files.read_bytes, files.prove_writable):
        if path == "no/such" and act is files.prove_writable:
            continue
        with pytest.raises(ValueError) as caught:
            act(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# --- schemas ---

PERSON = {
    "name": str,
    "age?": Number(0, 150, is_whole=True),
    "tags": [str],
    "grade": (None, {"a", "b"}),
    "more?": {str: float},
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": 5}, "x: name is 5, expected text"),
        ({"name": ...}, "x: name is missing, expected text"),
        ({"age": 151}, "x: age is 151, expected a whole number from 0 to 150"),
        ({"age": True}, "x: age is True, expected a whole number from 0 to 150"),
        ({"age": 1.5}, "x: age is 1.5, expected a whole number from 0 to 150"),
        ({"tags": ["a", 5]}, r"x: tags\[1\] is 5, expected text"),
        ({"tags": None}, "x: tags is None, expected a list, each text"),
        ({"grade": "c"}, "x: grade is 'c', expected null or one of a, b"),
        ({"grade": ["c"]}, "expected null or one of a, b"),
        ({"more": {"x": float("nan")}}, "x: more.'x' is nan, expected a finite number"),
        ({"more": {"x": "1"}}, "expected a finite number"),
    ],
)
def test_a_misfit_is_named_by_its_place(change, message):
    value = {"name": "A", "age": 5, "tags": [], "grade": None} | change
    value = {key: v for key, v in value.items() if v is not ...}
    with pytest.raises(ValueError, match=message):
        check(value, PERSON, "x")


def test_what_fits_comes_back():
    value = {"name": "A", "tags": ["b"], "grade": "a", "more": {"x": 1, "y": 2.5}, "unknown": object()}
    assert check(value, PERSON, "x") is value
    assert check([{"a": 1}, {"a": "t"}], [{"a": (int, str)}], "x")
    with pytest.raises(ValueError, match=r"x: \[1\].a is \[\], expected a whole number or text"):
        check([{"a": 1}, {"a": []}], [{"a": (int, str)}], "x")
    with pytest.raises(ValueError, match="x: it is 5, expected an object"):
        check(5, PERSON, "x")
    assert schema.words(schema.COUNT).startswith("a whole number from 0")


# --- the screen ---


def test_control_characters_are_shown_as_escapes(capsys):
    screen.say("a\x1b[31mb\x9bc\u202ed\r\ud800 é 日本 \U0001f468\u200d\U0001f469\ttab")
    assert (
        capsys.readouterr().out
        == "a\\x1b[31mb\\x9bc\\u202ed\\x0d\\ud800 é 日本 \U0001f468\u200d\U0001f469\ttab\n".replace("\\x0d", "\\r")
    )


VALUES = {
    "text": "x" * 100_000,
    "list": ["x" * 1000] * 1000,
    "object": {"k" * 5000: {"k": ["v" * 5000] * 50}},
    "number": 10**100_000,
    "escape": "\x1b\n",
    "bytes": b"x" * 9999,
}


@pytest.mark.parametrize("name", VALUES)
def test_values_in_messages_are_short_and_on_one_line(name):
    text = screen.short(VALUES[name])
    assert len(text) <= 130 and "\n" not in text and "\x1b" not in text


def test_a_closed_screen_ends_nothing(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    for stream in (None, Gone()):
        monkeypatch.setattr(sys, "stdout", stream)
        screen.say("line")


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_prepare_replaces_streams_that_are_missing(closed):
    code = (
        "from minitune import screen; screen.prepare(); screen.say('é'); screen.tell('é')\n"
        "with screen.progress(2, 'step') as bar: bar.update()"
    )
    done = subprocess.run(f"'{sys.executable}' -c \"{code}\" {closed}", shell=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_screen_without_a_letter_shows_its_escape():
    code = "from minitune import screen; screen.prepare(); screen.say('é日')"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, check=True)
    assert done.stdout == b"\\xe9\\u65e5\n"


def test_what_differs_is_short_and_printable():
    [change] = files.differences({"\x1b[2J" + "n" * 500: "\x1b[31m" + "v" * 500}, {})
    assert change.isprintable() and len(change) < 80 and change.endswith("-> None")
