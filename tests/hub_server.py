"""A server on the loopback that speaks the hub's API, with everything that may go wrong.

Large files are answered as the hub does: HEAD tells ETag (SHA-256) and size, GET redirects to another host, which must never
see the token."""

import contextlib
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from minitune import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/model"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
WEIGHTS = {name: bytes([number]) * 100_000 for number, name in enumerate(SHARDS, 1)}
SHARDED = {"config.json": b'{"model_type": "mistral"}', "tokenizer.model": b"pieces", hub.INDEX: INDEX, **WEIGHTS}


def git_hash(body):
    """git's SHA-1 of a file."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


class Hub(ThreadingHTTPServer):
    """repos: id -> {file: bytes}; pages: path -> bytes or a status, before all else. The rest says what goes wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.pages, self.log = {REPO: SHARDED}, {}, []
        self.gated = False
        self.listed = {}  # file: more keys of its entry in the listing
        self.said = {}  # repo: {file: headers instead of the true ones; None: without it}
        self.cut_at = {}  # file: no answer goes past this byte
        self.trickles = set()  # files, or "headers": a byte every 10 ms, without end
        self.stop = threading.Event()
        self.damaged = set()
        self.delay = 0  # seconds before the content of a large file

    def fetched(self):
        """Files whose content was asked for, in order."""
        return [path.rpartition("/")[2] for method, path, _ in self.log if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content_Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def trickle(self):
        """A byte at a time, until the client has gone or the test ends."""
        with contextlib.suppress(OSError):
            while not self.server.stop.wait(0.01):
                self.wfile.write(b"x")

    def send(self, name, body, **headers):
        """A body, or what a Range header asks for of it, up to the byte at which the line is cut."""
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers["Content_Length"] = len(body) - start
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        body = body[: self.server.cut_at.get(name)]
        if name in self.server.damaged:
            body = body[:-1] + b"!"
        if name in self.server.trickles and self.command == "GET":
            self.answer(200, **{**headers, "Content_Length": 10**6})
            return self.trickle()
        self.answer(206 if start else 200, body[start:], **headers)

    def do_GET(self):
        server, path = self.server, unquote(self.path.partition("?")[0])
        server.log.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        if self.headers.get("Authorization") == "Bearer hf_expired":
            return self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        if path in server.pages:
            page = server.pages[path]
            return self.answer(page) if isinstance(page, int) else self.send(path, page)
        if path.startswith("/cdn/"):
            repo, _, name = path.removeprefix("/cdn/").partition("//")
            time.sleep(server.delay)
            return self.send(name, server.repos[repo][name])
        api = path.startswith("/api/models/")
        if "headers" in server.trickles and not api:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            return self.trickle()
        repo, _, rest = path.removeprefix("/api/models/").lstrip("/").partition("/revision/" if api else "/resolve/")
        revision, _, name = rest.partition("/")
        if repo not in server.repos:
            return self.answer(401, X_Error_Code="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = server.repos[repo]
        if api:
            siblings = [{"rfilename": name, **server.listed.get(name, {})} for name in files]
            return self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        if server.gated and "Authorization" not in self.headers:
            return self.answer(401, X_Error_Code="GatedRepo")
        if name not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        body, said = files[name], server.said.get(repo, {}).get(name, {})
        if not name.endswith(".safetensors"):
            return self.send(name, body, **{"ETag": f'"{git_hash(body)}"', "X_Repo_Commit": COMMIT, **said})
        linked = {"X_Linked_Etag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Linked_Size": len(body)}
        cdn = f"http://localhost:{server.server_port}/cdn/{repo}//{name}"
        headers = {"ETag": '"of the redirect"', "X_Repo_Commit": COMMIT, "Location": cdn, **linked, **said}
        return self.answer(302, **headers)

    do_HEAD = do_GET
