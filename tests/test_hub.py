"""Names to folders, and downloads from the server of hub_server.py.

huggingface_hub reads its environment at import, so a download runs in a process of its own."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_server import COMMIT, INDEX, REPO, SHARDED, SHARDS, WEIGHTS, Hub

from minitune import hub

ROOT = Path(__file__).resolve().parents[1]
SINGLE = {"config.json": b"{}", "model.safetensors": b"w" * 1000}
ADAPTED = {**SINGLE, "adapter_config.json": b"{}", "adapter_model.safetensors": b"a" * 1000}

PRELUDE = """
import json, shutil, sys, time
from functools import partial
from minitune import hub, screen
time.sleep = lambda seconds: None  # between attempts
screen.progress = partial(screen.progress, disable=False)  # bars are for terminals
def attempt(function, *arguments):
    try:
        outcome = ["ok", str(function(*arguments))]
    except ValueError as error:
        outcome = ["error", str(error)]
    print(json.dumps(outcome) + "\\n", end="")  # one write: threads call this
"""


@pytest.fixture
def server():
    with Hub() as server:
        try:
            socket.create_connection(server.server_address, timeout=5).close()
        except OSError as error:
            pytest.skip(f"the loopback interface is down, and the hub of these tests lives there: {error}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.stop.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def closed_port():
    """The address of a server that is gone."""
    with Hub() as gone:
        return gone.url


@pytest.fixture
def run(tmp_path, server, forks):
    """Runs code in a process with an empty HF_HOME; returns what `attempt` printed, and stderr."""

    def run(code=f"attempt(hub.resolve, {REPO!r})", **variables):
        ours = re.compile("HF_|HUGGINGFACE|MINITUNE|.*_proxy$", re.IGNORECASE)
        kept = {key: value for key, value in os.environ.items() if not ours.match(key)}
        # A long limit, so that a busy machine does not look like a slow server.
        home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url, "HF_HUB_DOWNLOAD_TIMEOUT": "120"}
        done = forks.start(PRELUDE + code, "hub.py", environment={**kept, **home, **variables}, folder=tmp_path)
        assert done.wait(240) == 0, done.err.read_text()
        return [json.loads(line) for line in done.out.read_text().splitlines()], done.err.read_text()

    return run


def one_line(outcome, *parts, ways_out="tiny-mistral"):
    """The error in `outcome` is one line with all `parts` and a way out."""
    kind, message = outcome
    assert kind == "error" and "\n" not in message
    for part in (*parts, ways_out):
        assert part in message
    return True


def is_whole(outcome, files):
    kind, folder = outcome
    assert kind == "ok", folder
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == files
    return True


# Names


def test_import_is_cheap():
    code = "import sys, minitune.hub; print('huggingface_hub' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_local_folder_is_itself(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (tmp_path / "m", str(tmp_path / "m"), "m", "./m", "m/", "~/m"):
        assert hub.resolve(name).resolve() == (tmp_path / "m").resolve()
    with pytest.raises(ValueError, match="revision 'v1' is for models on the hub"):
        hub.resolve("./m", revision="v1")


@pytest.mark.parametrize(
    "name, says",
    [
        ("./no", "folder ./no does not exist"),
        ("../no", "folder ../no does not exist"),
        ("/no/where", "folder /no/where does not exist"),
        ("~/no/where", "folder ~/no/where does not exist"),
        ("no/where/else", "folder no/where/else does not exist"),
        ("no/where/", "folder no/where/ does not exist"),
        ("empty", "empty has no config.json"),
        ("adapter", "adapter holds an adapter, not a model"),
        ("file.gguf", "file.gguf is a file, not a folder"),
        ("mistrall", "unknown model 'mistrall'. Did you mean mistral"),
        ("~nosuchuser/x", "there is no such user's home folder"),
        ("a" * 5000, "unknown model 'aaa"),
        ("a/" + "b" * 5000, "unknown model"),
        ("x/\0", "null byte"),
        ("\x1b[31m/x", r"unknown model '\x1b[31m/x'"),
        ("a/..", "unknown model 'a/..'"),
        ("", "unknown model ''"),
        ("some one/model", "unknown model 'some one/model'"),
        ("https://huggingface.co/microsoft/phi-2", "is a URL; expected a hub id"),
    ],
)
def test_a_name_that_is_no_model_is_refused_without_the_network(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(hub, "_from_hub", lambda *arguments: pytest.fail("asked the hub"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError) as error:
        hub.resolve(name)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_short_names_win_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "EMBEDDED_FOLDER", tmp_path / "package")
    monkeypatch.setattr(hub, "_from_hub", lambda repo, revision, weights: (repo, revision))
    monkeypatch.chdir(tmp_path)
    for folder in ("mistral", "tiny-llama", "package/tiny-llama"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    assert hub.resolve("mistral") == ("mistralai/Mistral-7B-v0.1", "main")
    assert hub.resolve("mistral", revision="v2") == ("mistralai/Mistral-7B-v0.1", "v2")
    assert hub.resolve("tiny-llama") == tmp_path / "package" / "tiny-llama"
    assert hub.resolve("./mistral") == Path("mistral")


def test_embedded_rows_are_files_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "EMBEDDED_FOLDER", tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.json").write_text("[]")
    assert hub.embedded_rows("train") == tmp_path / "rows" / "train.json"
    with pytest.raises(ValueError, match="test.json is missing"):
        hub.embedded_rows("test")
    with pytest.raises(ValueError, match="parts train and test, not 'all'"):
        hub.embedded_rows("all")


# Downloads


def test_only_config_tokenizer_and_one_copy_of_the_weights_are_fetched(server, run):
    wanted = {**SHARDED, **{name: name.encode() for name in hub.SMALL_FILES if name not in SHARDED}}
    unwanted = "consolidated.safetensors onnx/model.safetensors pytorch_model.bin a.pth a.pt modeling.py README.md"
    server.repos[REPO] = {**wanted, **{name: b"no" for name in unwanted.split()}}
    (outcome, again), stderr = run(f"attempt(hub.resolve, {REPO!r})\nattempt(hub.resolve, {REPO!r})")
    assert is_whole(outcome, wanted) and again == outcome
    assert sorted(server.fetched()) == sorted(wanted), "each wanted file once, and nothing else"
    assert f"{SHARDS[1]}:   0%" in stderr and "100k" in stderr, "a bar shows the progress"


def test_weights_without_an_index(server, run):
    server.repos = {
        "a/single": {**SINGLE, hub.INDEX: INDEX, **WEIGHTS, "model.fp16.safetensors": b"half"},
        "a/variant": {"config.json": b"{}", "model-a.safetensors": b"a", "consolidated.safetensors": b"no"},
        "a/adapted": {**ADAPTED, "adapter_model.bin": b"no"},  # a model with an adapter, which transformers applies
    }
    outcomes, _ = run("\n".join(f"attempt(hub.resolve, {repo!r})" for repo in server.repos))
    assert is_whole(outcomes[0], SINGLE) and is_whole(outcomes[2], ADAPTED)
    assert one_line(outcomes[1], "no model.safetensors and no index of shards, only consolidated.safetensors")
    assert not [path for _, path, _ in server.log if "a/variant/resolve" in path and path.endswith(".safetensors")]


def test_the_token_goes_to_the_hub_and_to_no_other_host(server, run):
    server.gated = True
    (outcome,), _ = run(HF_TOKEN="hf_secret")
    assert is_whole(outcome, SHARDED)
    repo = [(path.startswith("/cdn/"), headers.get("authorization")) for _, path, headers in server.log if REPO in path]
    assert set(repo) == {(False, "Bearer hf_secret"), (True, None)}


def test_a_model_that_cannot_be_had_is_explained(server, run, closed_port):
    server.repos |= {
        "a/pickled": {"config.json": b"{}", "pytorch_model.bin": b"no"},
        "a/adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a"},
        "a/gap": {"config.json": b"{}", hub.INDEX: INDEX, SHARDS[0]: b"a"},
        "a/list": {"config.json": b"{}", hub.INDEX: b"[]", SHARDS[0]: b"a"},
    }
    server.pages = {
        "/api/models/a/portal/revision/main": b"<html>Log in</html>",
        "/api/models/a/busy/revision/main": 503,
    }
    code = f"attempt(hub.resolve, {REPO!r}, 'v9')\n"
    code += "\n".join(
        f"attempt(hub.resolve, 'a/{name}')" for name in "typo pickled adapter gap list portal busy".split()
    )
    (revision, typo, pickled, adapter, gap, no_map, portal, busy), _ = run(code)
    assert one_line(revision, f"{REPO} cannot be downloaded", "no revision 'v9'")
    assert one_line(typo, f"{server.url} has no such model, or it is private", "HF_TOKEN is not set")
    assert one_line(pickled, "no model.safetensors and no index of shards, only pytorch_model.bin", "Convert it")
    assert one_line(adapter, "has no config.json: it is an adapter")
    assert one_line(gap, f"names {SHARDS[1]}, which the repository does not have")
    assert one_line(no_map, "it is [], expected an object", ways_out=hub.INDEX)
    assert one_line(portal, "is not valid JSON", "a login page answers in its place")
    assert one_line(busy, f"{server.url} answered with HTTP status 503")
    assert not any(name.endswith(("bin", "safetensors")) for name in server.fetched()), "no weights for a lost cause"

    (outcome,), _ = run(HF_TOKEN="hf_expired")
    assert one_line(outcome, "refused the token", "Renew it")
    (outcome,), _ = run(HF_ENDPOINT=closed_port)
    assert one_line(outcome, "not in the cache", f"the connection to {closed_port} failed")
    (outcome,), _ = run(HF_HUB_OFFLINE="1")
    assert one_line(outcome, "not in the cache", "HF_HUB_OFFLINE is set")


def test_a_gated_model_names_the_page_of_its_licence(server, run):
    server.gated = True
    (outcome,), _ = run()
    assert one_line(outcome, "gated", f"https://huggingface.co/{REPO}", "HF_TOKEN is not set")
    assert server.fetched() == []


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "closed port"}])
def test_without_the_hub_the_cached_copy_is_used_and_said_if_it_is_whole(server, run, closed_port, variables):
    variables = {key: value.replace("closed port", closed_port) for key, value in variables.items()}
    (online,), _ = run()
    (outcome,), stderr = run(**variables)
    assert outcome == online and is_whole(outcome, SHARDED)
    assert f"using the copy in {outcome[1]}" in stderr

    (Path(outcome[1]) / SHARDS[1]).resolve().unlink()
    (outcome,), _ = run(**variables)
    assert one_line(outcome, f"is incomplete: it lacks {SHARDS[1]}", "cannot be downloaded")

    before = len(server.log)
    (outcome,), _ = run()
    assert is_whole(outcome, SHARDED)
    assert SHARDS[0] not in "".join(path for _, path, _ in server.log[before:]), "what is there is not fetched again"


def test_a_cut_download_is_an_error_and_a_rerun_goes_on_where_it_stopped(server, run):
    server.cut_at = {SHARDS[1]: 60_000}
    (outcome,), _ = run()
    assert one_line(outcome, "failed or was interrupted", "run the command again to resume")
    (offline,), _ = run(HF_HUB_OFFLINE="1")
    assert one_line(offline, f"is incomplete: it lacks {SHARDS[1]}")

    server.cut_at, server.log = {}, []
    (outcome,), _ = run()
    assert is_whole(outcome, SHARDED)
    assert [headers["range"] for _, path, headers in server.log if path.startswith("/cdn/")] == ["bytes=60000-"]
    assert server.fetched() == [SHARDS[1]]


def test_a_damaged_file_is_refused_and_fetched_anew(server, run):
    server.damaged = {SHARDS[0]}
    (outcome,), _ = run()
    assert one_line(outcome, f"{SHARDS[0]} arrived damaged")
    server.damaged = set()
    (outcome,), _ = run()
    assert is_whole(outcome, SHARDED)


def test_two_that_want_one_model_fetch_it_once(server, run):
    server.delay = 0.2
    code = f"""
from threading import Thread
both = [Thread(target=attempt, args=(hub.resolve, {REPO!r})) for _ in range(2)]
[thread.start() for thread in both]
[thread.join() for thread in both]
"""
    (one, other), _ = run(code)
    assert one == other and is_whole(one, SHARDED)
    assert sorted(path for _, path, _ in server.log if "/cdn/" in path) == [f"/cdn/{REPO}//{name}" for name in SHARDS]


def test_a_full_disk_is_seen_before_the_weights_come(server, run):
    code = f"shutil.disk_usage = lambda path: shutil._ntuple_diskusage(0, 0, 150_000)\nattempt(hub.resolve, {REPO!r})"
    (outcome,), _ = run(code)
    assert one_line(outcome, "200,000 bytes", "150,000", "HF_HOME")
    assert not set(SHARDS) & set(server.fetched())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, where each write finds the disk full")
def test_a_disk_that_fills_up_meanwhile_is_explained(run, tmp_path):
    blobs = tmp_path / "home" / "hub" / "models--someone--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(WEIGHTS[SHARDS[0]]).hexdigest()}.incomplete").symlink_to("/dev/full")
    (outcome,), _ = run()
    assert one_line(outcome, "is full", "HF_HOME")


# A server that cannot be trusted

EVIL = ["../../../../evil", "..", "a/../../b", "\\..\\evil", "~/evil", "x\x1b[2J", "a" * 5000]


def written(home):
    """Every file under a HF_HOME, as text."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir())


def test_no_text_from_a_server_becomes_a_path(server, run, tmp_path):
    server.repos, server.pages, code, home = {}, {}, "", tmp_path / "deep" / "down" / "in" / "home"
    evil_of = {}
    names = [{"rfilename": name} for name in SINGLE]
    for number, evil in enumerate([str(tmp_path / "evil"), *EVIL]):
        quoted = json.dumps(evil)[1:-1]  # of a header: no raw control characters
        for kind in ("etag", "linked", "commit", "sha", "sibling", "shard", "size"):
            repo = f"a/{kind}{number}"
            page = f"/api/models/{repo}/revision/main"
            server.repos[repo], evil_of[repo] = SINGLE, evil
            if kind == "etag":
                server.said[repo] = {"config.json": {"ETag": quoted}}
            elif kind == "linked":
                server.said[repo] = {"model.safetensors": {"X_Linked_Etag": quoted}}
            elif kind == "size":
                server.said[repo] = {"model.safetensors": {"X_Linked_Size": quoted}}
            elif kind == "commit":
                server.said[repo] = {"config.json": {"X_Repo_Commit": quoted}}
                server.pages[page] = json.dumps({"siblings": names}).encode()
            elif kind == "sha":
                server.pages[page] = json.dumps({"sha": evil, "siblings": names}).encode()
            elif kind == "sibling":
                server.repos[repo] = {**SINGLE, evil: b"evil"}
            else:
                index = json.dumps({"weight_map": {"a": evil}}).encode()
                server.repos[repo] = {"config.json": b"{}", hub.INDEX: index, evil: b"evil"}
            code += f"attempt(hub.resolve, {repo!r})\n"
    outcomes, stderr = run(code, HF_HOME=str(home))
    for repo, (kind, said) in zip(server.repos, outcomes, strict=True):
        said = said.replace(str(tmp_path), "")  # its length is the machine's
        assert kind == "ok" or len(said) < 500 and "\n" not in said and "\x1b" not in said, (repo, said)
        is_opaque = evil_of[repo].startswith("a" * 9) and repo.startswith(("a/etag", "a/linked"))  # no path: no hash
        assert kind == ("ok" if "sibling" in repo or is_opaque else "error"), (repo, said)
    assert all(
        re.fullmatch(
            r"hub/(\.locks/)?models--a--\w+/(blobs/[0-9a-f]+(\.incomplete)?|[0-9a-f]+\.lock|refs/main"
            rf"|snapshots/{COMMIT}/[\w.]+)",
            path,
        )
        for path in written(home)
    ), written(home)
    outside = {path for path in tmp_path.rglob("*") if path.is_file() and home not in path.parents}
    assert not outside
    assert "\x1b" not in stderr


def test_content_must_have_the_hash_of_the_repository(server, run):
    zeros = "0" * 64
    server.repos = {f"a/{kind}": SINGLE for kind in ("etag", "linked", "lfs", "blob", "two")}
    server.said = {
        "a/etag": {"config.json": {"ETag": f'"{zeros[:40]}"'}},
        "a/linked": {"model.safetensors": {"X_Linked_Etag": f'"{zeros}"'}},
        "a/lfs": {"model.safetensors": {"X_Linked_Etag": None}},
        "a/blob": {"config.json": {"ETag": None}},
    }
    pages = {
        "lfs": {"rfilename": "model.safetensors", "lfs": {"sha256": zeros, "size": 1000}},
        "blob": {"rfilename": "config.json", "blobId": zeros[:40]},
        "two": {"rfilename": "model.safetensors", "lfs": {"sha256": zeros}},
    }
    for kind, entry in pages.items():
        siblings = [{"rfilename": name} for name in SINGLE if name != entry["rfilename"]] + [entry]
        page = f"/api/models/a/{kind}/revision/main"
        server.pages[page] = json.dumps({"sha": COMMIT, "siblings": siblings}).encode()
    (etag, linked, lfs, blob, two), _ = run("\n".join(f"attempt(hub.resolve, {repo!r})" for repo in server.repos))
    for outcome in (etag, linked, lfs, blob):
        assert one_line(outcome, "arrived damaged", "it was deleted")
    assert one_line(two, "two hashes for model.safetensors")


def test_a_mirror_without_etags_serves_a_model_and_it_is_said_that_nothing_checks_it(server, run):
    for name in SHARDED:
        none = {"ETag": None, "X_Linked_Etag": None, "X_Linked_Size": None}
        server.said.setdefault(REPO, {})[name] = none
    server.said[REPO]["config.json"] = {"ETag": 'W/"5f3c-1a2b/="'}
    (outcome,), stderr = run()
    assert is_whole(outcome, SHARDED)
    assert f"no hash of {SHARDS[1]}, so its content could not be checked" in stderr
    blobs = {path.name for path in (Path(outcome[1]).parents[1] / "blobs").iterdir()}
    assert hashlib.sha256(WEIGHTS[SHARDS[0]]).hexdigest() in blobs, "found by other tools too"
    server.listed = {name: {"lfs": {"sha256": hashlib.sha256(body).hexdigest()}} for name, body in WEIGHTS.items()}
    (outcome,), stderr = run(HF_HOME=outcome[1] + "/../again")
    assert is_whole(outcome, SHARDED) and SHARDS[1] not in stderr.replace(f"{SHARDS[1]}:", "")


NONSENSE = [
    b"{}", b"[]", b"null", b'"x"', b"5", b"", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b'{"siblings": null}',
    b'{"siblings": 5}', b'{"siblings": [5]}', b'{"siblings": [null]}', b'{"siblings": [{}]}',
    b'{"siblings": [{"rfilename": 5}]}', b'{"siblings": [{"rfilename": "a", "size": -1}]}',
    b'{"siblings": [{"rfilename": "a", "size": 1e400}]}', b'{"siblings": [{"rfilename": "a", "lfs": []}]}',
    b'{"siblings": [{"rfilename": "\\ud800\\u001b"}], "sha": "' + COMMIT.encode() + b'"}', b'{"siblings": [], "sha": 5}',
    b'{"siblings": {"a": ' + b"[" * 50_000 + b"}}", b'{"x": "' + b"y" * 10_000_000 + b'"}',
]  # fmt: skip


def test_a_listing_that_is_none_is_one_line(server, run):
    server.pages = {f"/api/models/a/x{n}/revision/main": page for n, page in enumerate(NONSENSE)}
    code = "\n".join(f"attempt(hub.resolve, 'a/x{n}')" for n in range(len(NONSENSE)))
    outcomes, stderr = run(code, HF_HOME="h")
    for page, outcome in zip(NONSENSE, outcomes, strict=True):
        assert one_line(outcome), page[:50]
        assert len(outcome[1]) < 500 and "\x1b" not in outcome[1], page[:50]
    assert not stderr


ODD = [  # headers of a file, what the error says
    ({"X_Linked_Size": "-5"}, "a size of '-5'"),
    ({"X_Linked_Size": "1" + "0" * 30}, "a size of '1000"),
    ({"X_Linked_Size": "9" * 15}, "expected at most 500,000,000,000"),
    ({"X_Linked_Size": "999"}, "more of model.safetensors than the 999 bytes"),
    ({"X_Linked_Size": "1001"}, "has 1,000 bytes, but 1,001 were announced"),
    ({"Location": "http://[x"}, "redirects to 'http://[x', which is not a URL"),
    ({"Location": "file:///etc/passwd"}, "UnsupportedProtocol"),
    ({"Location": "x" * 3000}, "HTTP status 404"),
]


def test_sizes_and_redirects_that_cannot_be_are_one_line(server, run):
    server.repos = {f"a/x{number}": SINGLE for number in range(len(ODD))}
    server.said = {f"a/x{number}": {"model.safetensors": said} for number, (said, _) in enumerate(ODD)}
    outcomes, _ = run("\n".join(f"attempt(hub.resolve, {repo!r})" for repo in server.repos))
    for outcome, (_, says) in zip(outcomes, ODD, strict=True):
        assert one_line(outcome, says) and len(outcome[1]) < 500


def test_a_server_that_trickles_is_given_up_and_what_came_is_kept(server, run):
    server.trickles = {SHARDS[0]}
    (outcome,), _ = run(f"hub.PATIENCE = 0.7\nattempt(hub.resolve, {REPO!r})")
    assert one_line(outcome, "too slow", "1,024 bytes per second", "run the command again to resume")
    server.trickles = {"headers"}
    (outcome,), _ = run(f"hub.PATIENCE = 0.7\nattempt(hub.resolve, {REPO!r})")
    assert one_line(outcome, "too slow: it sent 0 bytes")


def test_ctrl_c_says_how_to_go_on(server, run):
    server.trickles = {SHARDS[0]}
    code = f"""
import os, pathlib, signal, threading
def stop():
    while not list(pathlib.Path("home").rglob("*.incomplete")):
        threading.Event().wait(0.05)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=stop).start()
try:
    hub.resolve({REPO!r})
except KeyboardInterrupt as stop:
    print(json.dumps(str(stop)))
"""
    assert run(code)[0] == [f"{REPO} is not downloaded completely; run the same command again to resume"]


def test_config_and_tokenizer_come_without_the_weights_where_only_they_are_needed(server, run):
    code = f"attempt(hub.resolve, {REPO!r}, None, False)\nattempt(hub.resolve, {REPO!r})"
    (small, whole), _ = run(code)
    assert small == whole and is_whole(whole, SHARDED)
    assert [name for name in server.fetched() if name in SHARDED][:3] == ["config.json", "tokenizer.model", hub.INDEX]
    (offline,), _ = run(f"attempt(hub.resolve, {REPO!r}, None, False)", HF_HUB_OFFLINE="1")
    assert offline == small


def test_a_pinned_commit_is_that_commit_or_nothing(server, run):
    (outcome,), _ = run(f"attempt(hub.resolve, {REPO!r}, {COMMIT!r})")
    assert is_whole(outcome, SHARDED)
    other = "f" * 40
    server.pages[f"/api/models/{REPO}/revision/{other}"] = json.dumps({"sha": COMMIT, "siblings": []}).encode()
    (outcome, odd), _ = run(f"attempt(hub.resolve, {REPO!r}, {other!r})\nattempt(hub.resolve, {REPO!r}, '../x')")
    assert one_line(outcome, f"answered with another commit, {COMMIT}")
    assert one_line(odd, "revision is '../x'", ways_out="expected")


# The Alpaca rows


def rows(number):
    return json.dumps([{"instruction": "Say it.", "input": "", "output": "It."}] * number).encode()


def test_the_alpaca_rows_are_downloaded_once_and_without_the_token(server, run):
    server.pages = {"/alpaca": rows(52_002)}
    code, url = "attempt(hub.alpaca_file)", f"{server.url}/alpaca"
    (outcome,), stderr = run(code, MINITUNE_ALPACA_URL=url, HF_TOKEN="hf_secret")
    assert Path(outcome[1]).read_bytes() == server.pages["/alpaca"]
    assert outcome[1].endswith("home/minitune/alpaca_data.json") and "100%" in stderr
    (again,), _ = run(code, MINITUNE_ALPACA_URL=url, HF_HUB_OFFLINE="1")
    assert again == outcome
    assert [headers.get("authorization") for _, _, headers in server.log] == [None]


def test_alpaca_rows_that_are_not_the_original_are_refused_and_not_kept(server, run, tmp_path, closed_port):
    code, whole = "attempt(hub.alpaca_file)", rows(52_002)
    server.pages = {"/few": rows(3), "/html": b"<html>", "/keys": b'[{"text": "a"}]', "/cut": whole}
    server.cut_at = {"/cut": len(whole) // 2}
    for page, says in {
        "/few": "3 rows instead of 52,002",
        "/html": "not valid JSON",
        "/keys": "[0].instruction is missing",
        "/cut": "failed or was interrupted",
        "/none/of/it": "HTTP status",
    }.items():
        (outcome,), _ = run(code, MINITUNE_ALPACA_URL=server.url + page)
        assert one_line(outcome, says, "--data FILE", ways_out="--data embedded")
    (outcome,), _ = run(code, MINITUNE_ALPACA_URL=closed_port)
    assert one_line(outcome, "failed", "--data FILE", ways_out="--data embedded")
    (outcome,), _ = run(code, HF_HUB_OFFLINE="1")
    assert one_line(outcome, "HF_HUB_OFFLINE", "--data FILE", ways_out="--data embedded")
    assert not (tmp_path / "home" / "minitune").exists()
