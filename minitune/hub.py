"""Finds or downloads the folder of a model by its name, and the original Alpaca rows. The only module that uses the network.

The cache, the token, locks and proxies are those of huggingface_hub: HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE have
their usual meaning, and the cache is shared with other tools. The download itself is written here, because the server is not
trusted: huggingface_hub writes to any path that an ETag names, and deletes the received part of a shard when a download
breaks. Here only names from this module, commits and hashes become paths. A download ends at the announced size, is given up if
it is too slow, must match the repository's hash, and resumes where it stopped. For Xet's speed, `hf download ID` fills the same
cache."""

import contextlib
import difflib
import errno
import hashlib
import os
import queue
import re
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from minitune import screen
from minitune.files import expand, parse_json, read_json, write_whole
from minitune.schema import Number, check
from minitune.screen import short, some

MODELS = {
    "llama2": "meta-llama/Llama-2-7b-hf",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "phi2": "microsoft/phi-2",
}
EMBEDDED = ("tiny-mistral", "tiny-llama", "tiny-phi")
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
WAYS_OUT = f"Ways out: an embedded model ({', '.join(EMBEDDED)}) or a local folder with config.json and safetensors."
OTHER_DISK = "Free some space, or set HF_HOME to a folder on another disk."

INDEX, ADAPTER = "model.safetensors.index.json", "adapter_model.safetensors"
SMALL_FILES = (
    "generation_config.json tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json vocab.json merges.txt vocab.txt chat_template.jinja adapter_config.json"
).split()
PLAIN_NAME = re.compile(r"\w[\w.+-]{0,199}")  # name of a shard: without a folder, not hidden
COMMIT = re.compile("[0-9a-f]{40}")
HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # git's SHA-1 for small files, SHA-256 for large ones

ALPACA_URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
ALPACA_ROWS = 52_002

PATIENCE = 30  # seconds over which the speed of a download is measured
SLOWEST = 1024  # bytes per second; a slower download is given up
ATTEMPTS = 3  # attempts in a row that bring less than 1 MiB each
SMALL_LIMIT = 200_000_000  # most bytes of a listing, a tokenizer or the rows; the largest known ones have 50 MB
LARGE_LIMIT = 500_000_000_000  # most bytes of a file of weights: the hub's own limit

SIZE = Number(0, 10**15, is_whole=True)
TEXT = (str, None)
LISTED = {
    "rfilename": str,
    "size?": (SIZE, None),
    "blobId?": TEXT,
    "lfs?": ({"sha256?": TEXT, "size?": (SIZE, None)}, None),
}
LISTING = {"sha?": TEXT, "siblings": [LISTED]}  # answer of the hub's API, /api/models/ID/revision/NAME?blobs=true
ALPACA = [{"instruction": str, "input": str, "output": str}]


def resolve(name, revision=None, weights=True):
    """The local folder (Path) of a model, downloaded if needed.

    name: a short name (MODELS, EMBEDDED), a folder with config.json, or a hub id owner/name. A short name takes precedence
    over a folder of the same name; write ./mistral for the folder. revision: branch, tag or commit on the hub; None: main.
    weights: False fetches only config and tokenizer, so that they can be checked before 10 GB are downloaded.
    Raises ValueError if there is no such model, or it cannot be downloaded completely."""
    name = os.fspath(name)
    if name in MODELS:
        return _from_hub(MODELS[name], revision or "main", weights)
    folder = EMBEDDED_FOLDER / name if name in EMBEDDED else expand(name)
    if name in EMBEDDED or (name and os.path.exists(folder)):
        return _local(folder, revision)
    if "://" in name:
        raise ValueError(f"{short(name)} is a URL; expected a hub id such as mistralai/Mistral-7B-v0.1, or a folder")
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise ValueError(
            f"the folder {some([name])} does not exist; expected a folder with config.json or a hub id owner/name"
        )
    if len(name) > 96 or not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", name, re.ASCII) or ".." in name:
        known = [*MODELS, *EMBEDDED]
        guess = "".join(f" Did you mean {close}?" for close in difflib.get_close_matches(name[:99], known, n=1))
        raise ValueError(
            f"unknown model {short(name)}.{guess} Expected {', '.join(known)}, a folder or a hub id owner/name"
        )
    return _from_hub(name, revision or "main", weights)


def embedded_rows(part):
    """The file of the embedded instruction rows, in the Alpaca format. part: "train" or "test"."""
    if part not in ("train", "test"):
        raise ValueError(f"the embedded rows have the parts train and test, not {part!r}")
    path = EMBEDDED_FOLDER / "rows" / f"{part}.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing from this installation; write it with scripts/make_tiny.py")
    return path


def alpaca_file():
    """The original alpaca_data.json (52,002 rows, 23 MB) in HF_HOME/minitune, downloaded at the first call.

    The environment variable MINITUNE_ALPACA_URL names a mirror. Raises ValueError, and keeps nothing, if the download is not
    complete."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    path = Path(constants.HF_HOME) / "minitune" / "alpaca_data.json"
    if path.is_file():
        return path
    url = os.environ.get("MINITUNE_ALPACA_URL") or ALPACA_URL
    ways_out = "Ways out: your own rows (--data FILE) or the embedded ones (--data embedded)."
    try:
        content = _read(url, {}, path.name)  # without the token, because the server is not the hub
        if fault := _fault_of_rows(content):
            raise ValueError(
                f"{some([url])} is not the original alpaca_data.json: {fault}. Nothing was kept. {ways_out}"
            )
        write_whole(path, content)
    except (HTTPError, OSError) as error:
        reason = _reason(error, url)
        raise ValueError(f"alpaca_data.json cannot be downloaded: {reason} {ways_out}") from error
    return path


def _fault_of_rows(content):
    """Why these bytes are not the original alpaca_data.json, or None."""
    try:
        rows = check(_json(content, "it"), ALPACA, "its value")
    except ValueError as error:
        return str(error)
    return f"{len(rows):,} rows instead of {ALPACA_ROWS:,}" if len(rows) != ALPACA_ROWS else None


def _local(folder, revision):
    """`folder`, if it holds a model. Raises ValueError if it does not."""
    if revision is not None:
        raise ValueError(f"revision {short(revision)} is for models on the hub; leave it out for the folder {folder}")
    if os.path.isfile(folder / "config.json"):
        return folder
    if os.path.isfile(folder / "adapter_config.json"):
        base = read_json(folder / "adapter_config.json", {}).get("base_model_name_or_path")
        named = f" ({short(base)})" if base else ""
        raise ValueError(
            f"{folder} holds an adapter, not a model; name its base{named} with --model, and this folder with --adapter"
        )
    fault = "is a file, not a folder" if folder.is_file() else "has no config.json"
    raise ValueError(f"{folder} {fault}; expected a folder with config.json, tokenizer and safetensors files")


# --- a model on the hub ---


@dataclass
class RemoteFile:
    """A file of a repository at one commit."""

    name: str
    url: str
    size: int | None  # bytes; None if the server does not say
    digest: str | None  # SHA-256 or git's SHA-1 in hex; None if the server gives no hash
    limit: int = SMALL_LIMIT  # most bytes to accept


def _from_hub(repo, revision, weights):
    """The snapshot folder of a model in the hub's cache, after downloading the files that it lacks."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    if not re.fullmatch(r"\w[\w./+-]{0,199}", revision) or ".." in revision:
        raise ValueError(f"revision is {short(revision)}, expected a branch, a tag or a commit of {repo}")
    try:
        try:
            commit, listed = _listing(repo, revision)
        except (HTTPError, OSError, ValueError) as error:  # ValueError: such as the login page of a network
            return _cached(repo, revision, weights, error)
        return _download(repo, revision, commit, listed, weights)
    except (HTTPError, OSError) as error:
        reason = _reason(error, constants.ENDPOINT, repo, revision)
        raise ValueError(f"{repo} cannot be downloaded: {reason} {WAYS_OUT}") from error
    except KeyboardInterrupt:
        again = "run the same command again to resume"
        raise KeyboardInterrupt(f"{repo} is not downloaded completely; {again}") from None


def _listing(repo, revision):
    """(commit, {file name: its entry in the hub's listing}) of a revision. Raises ValueError if the answer is not a listing."""
    from huggingface_hub import constants, hf_hub_url

    url = f"{constants.ENDPOINT}/api/models/{repo}/revision/{quote(revision, safe='')}"
    found = check(_json(_read(f"{url}?blobs=true", _headers()), url), LISTING, f"the answer of {url}")
    commit = found.get("sha")
    if commit is None:  # some mirrors give it only in the headers of a file
        response, _ = _open("HEAD", hf_hub_url(repo, "config.json", revision=revision), _headers())
        commit = response.headers.get("X-Repo-Commit")
    if not COMMIT.fullmatch(commit or ""):
        raise ValueError(f"{url} names the commit {short(commit)}, expected 40 hexadecimal digits")
    if COMMIT.fullmatch(revision) and commit != revision:
        raise ValueError(f"{url} answered with another commit, {commit}")
    return commit, {file["rfilename"]: file for file in found["siblings"]}


def _cached(repo, revision, weights, error):
    """The snapshot folder in the cache, if it is complete, for when the hub cannot be reached or refuses. Prints the reason.

    error: what went wrong. Raises ValueError if the cache does not have the model."""
    from huggingface_hub import constants, try_to_load_from_cache

    reason = _reason(error, constants.ENDPOINT, repo, revision)
    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        fault = f"it is not in the cache {constants.HF_HUB_CACHE}"
        raise ValueError(f"{repo} cannot be downloaded, and {fault}: {reason} {WAYS_OUT}") from error
    folder = Path(config).parent
    files = {path.name for path in folder.iterdir() if path.exists()}  # without links to deleted blobs
    wanted = (_weights(files, folder) or ["all safetensors"]) if weights else []
    if lacking := [name for name in wanted if name not in files]:
        fault = f"the copy in {folder} is incomplete: it lacks {some(lacking)}"
        raise ValueError(f"{repo} cannot be downloaded, and {fault}: {reason} {WAYS_OUT}") from error
    screen.tell(f"{repo}: using the copy in {folder}, because it cannot be downloaded: {reason}")
    return folder


def _download(repo, revision, commit, listed, weights):
    """Download the files of a repository that a model needs. Returns the snapshot folder.

    listed: {file name: its entry in the listing}. weights: whether to download the weights too."""
    from huggingface_hub import constants

    if "config.json" not in listed:
        is_adapter = "adapter_config.json" in listed
        kind = "it is an adapter, so name its base model instead" if is_adapter else "it is not a model"
        raise ValueError(f"{repo} (revision {revision}) has no config.json: {kind}. {WAYS_OUT}")
    if INDEX not in listed and not _weights(listed, None):
        kinds = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
        held = some(sorted(n for n in listed if n.endswith(kinds)) or sorted(listed))
        convert = "Convert it with transformers (from_pretrained, then save_pretrained), or use another revision."
        raise ValueError(
            f"{repo} (revision {revision}) has no model.safetensors and no index of shards, only {held}. {convert} {WAYS_OUT}"
        )

    storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"  # the name that huggingface_hub uses
    folder, blobs = storage / "snapshots" / commit, storage / "blobs"
    small = [*SMALL_FILES, *([] if "model.safetensors" in listed else [INDEX])]
    files = _describe(repo, commit, folder, [name for name in ("config.json", *small) if name in listed], listed)
    for made in (folder, blobs, storage / "refs"):
        made.mkdir(parents=True, exist_ok=True)
    for file in files:
        _fetch(file, storage, folder)
    if revision != commit:
        write_whole(storage / "refs" / revision, commit)
    if not weights:
        return folder

    names = _weights(listed, folder)
    if absent := [name for name in names if name not in listed]:
        raise ValueError(f"{INDEX} of {repo} names {some(absent)}, which the repository does not have. {WAYS_OUT}")
    files = _describe(repo, commit, folder, names, listed, LARGE_LIMIT)
    have = sum(_size(blobs / _key(file)) or _size(blobs / f"{_key(file)}.incomplete") for file in files)
    needed = sum(file.size or 0 for file in files) - have
    free = shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{needed:,} bytes ({needed / 1e9:.1f} GB) are needed, {free:,} ({free / 1e9:.1f} GB) are free"
        raise ValueError(f"the disk is too full for {repo}: {sizes} in {blobs}. {OTHER_DISK} {WAYS_OUT}")
    if files:
        screen.tell(f"{repo}: downloading {needed / 1e9:.2f} GB to {blobs}")
    for file in files:
        _fetch(file, storage, folder)
    return folder


def _weights(names, folder):
    """The files of the weights among `names`, and of an adapter beside them. A repository may hold the weights several times,
    such as in consolidated.safetensors, so only the standard names count. folder: where the index of shards is read."""
    adapter = [ADAPTER] if {ADAPTER, "adapter_config.json"} <= set(names) else []
    if "model.safetensors" in names:
        return ["model.safetensors", *adapter]
    if INDEX in names:
        shards = sorted(set(read_json(folder / INDEX, {"weight_map": {str: str}})["weight_map"].values()))
        if odd := [name for name in shards if not PLAIN_NAME.fullmatch(name)]:
            raise ValueError(
                f"{folder / INDEX} names the file {short(odd[0])}, expected plain names such as model-00001.safetensors"
            )
        return shards + adapter
    return []  # other files, such as consolidated.safetensors, use other tensor names


def _describe(repo, commit, folder, names, listed, limit=SMALL_LIMIT):
    """The RemoteFiles for those `names` that the snapshot `folder` lacks, with hash and size from the listing and the server.

    listed: as in _download. limit: most bytes of a file. Raises ValueError if a size or hash is invalid, or two hashes
    differ."""
    from huggingface_hub import hf_hub_url

    files = []
    for name in names:
        if (folder / name).exists():
            continue
        url, entry = hf_hub_url(repo, name, revision=commit), listed[name]
        response, _ = _open("HEAD", url, _headers())
        headers, large, is_itself = response.headers, entry.get("lfs"), response.status_code == 200
        etag = _hash_in(headers.get("X-Linked-Etag") or (headers.get("ETag") if is_itself else None), name)
        size = _size_in(headers.get("X-Linked-Size") or (headers.get("Content-Length") if is_itself else None), name)
        sha256 = (large or {}).get("sha256") or (etag if etag and len(etag) == 64 else None)
        if etag and len(etag) == 64 and etag != sha256:
            raise ValueError(f"the hub gives two hashes for {name} of {repo}: {short(sha256)} and {etag}. {WAYS_OUT}")
        digest = sha256 or (entry.get("blobId") if large is None else None) or etag
        if digest and not HASH.fullmatch(digest):
            raise ValueError(
                f"the hub lists {name} of {repo} with the hash {short(digest)}, expected hexadecimal digits"
            )
        size = next((s for s in (size, (large or {}).get("size"), entry.get("size")) if s is not None), None)
        if size is not None and size > limit:
            raise ValueError(f"the hub gives {name} of {repo} {size:,} bytes, expected at most {limit:,}. {WAYS_OUT}")
        files.append(RemoteFile(name, url, size, digest, limit))
    return files


def _hash_in(etag, name):
    """The hash in an ETag, or None if it is not a hash. Raises ValueError if it looks like a path."""
    if etag is None:
        return None
    etag = etag.strip().removeprefix("W/").strip('"')
    if etag.startswith(("/", "~")) or ".." in etag or not etag.isprintable() or "\\" in etag:
        raise ValueError(
            f"the server gives {name} the ETag {short(etag)}, which is a path, not a hash: do not trust this server. {WAYS_OUT}"
        )
    return etag.lower() if HASH.fullmatch(etag.lower()) else None


def _size_in(text, name):
    """The number of bytes in a header, or None if `text` is None. Raises ValueError if it is not a number."""
    if text is not None and not re.fullmatch(r"\s*[0-9]{1,15}\s*", text):
        raise ValueError(f"the server gives {name} a size of {short(text)}, expected a number of bytes. {WAYS_OUT}")
    return None if text is None else int(text)


def _key(file):
    """The name of the incomplete blob of a RemoteFile, without its suffix."""
    return file.digest or hashlib.sha256(file.url.encode()).hexdigest()


def _fetch(file, storage, folder):
    """Download a RemoteFile into the snapshot `folder`. Resumes from the .incomplete file in storage/blobs."""
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import WeakFileLock

    part = storage / "blobs" / f"{_key(file)}.incomplete"
    # the lock that huggingface_hub uses for this blob
    lock = storage.parent / ".locks" / storage.name / f"{_key(file)}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if (folder / file.name).exists():
            return
        blob = storage / "blobs" / file.digest if file.digest else None
        if blob is None or not blob.exists():
            attempts = ATTEMPTS
            while attempts:
                before = _size(part)
                try:
                    _append(file, part)
                    break
                except (HTTPError, Refused) as error:
                    if isinstance(error, Refused) and error.status not in (408, 429, 500, 502, 503, 504):
                        raise
                    attempts = ATTEMPTS if _size(part) - before >= 1 << 20 else attempts - 1
                    if not attempts:
                        raise
                    time.sleep(1)
            blob = storage / "blobs" / _proven(file, part)
            os.replace(part, blob)
        _link(blob, folder / file.name)


def _append(file, part):
    """Download the rest of a RemoteFile to the Path `part`. Raises HTTPError or OSError; the received bytes are kept."""
    bound = file.limit if file.size is None else file.size
    with open(part, "ab") as out:
        have = _size(part)
        if have > bound:
            out.truncate(0)
            have = 0
        if have and have == file.size:
            return
        response, blocks = _open("GET", file.url, {**_headers(), **({"Range": f"bytes={have}-"} if have else {})})
        if have and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            if response.status_code == 206:
                raise OSError(f"the server sent another part of {file.name} than was requested")
            out.truncate(0)  # the server sends the whole file
            have = 0
        announced = _size_in(response.headers.get("Content-Length"), file.name)
        total = file.size if announced is None or file.size is not None else have + announced
        bound = min(bound, have + shutil.disk_usage(part.parent).free // 2 if total is None else total)
        with screen.progress(total, "B", unit_scale=True, desc=file.name, initial=have, leave=bound > 10**7) as bar:
            for block in blocks:
                have += len(block)
                if have > bound:
                    out.truncate(0)
                    raise OSError(f"the server sends more of {file.name} than the {bound:,} bytes that are allowed")
                out.write(block)
                bar.update(len(block))
        out.flush()
        os.fsync(out.fileno())
        if total is not None and have != total:
            raise OSError(f"{file.name} has {have:,} bytes, but {total:,} were announced")


def _proven(file, part):
    """Check a complete download against the repository's hash. Returns the hash, which is the name of the blob.

    Raises OSError, and deletes the file, if the hash is another one."""
    size = _size(part)
    # SHA-256 of large files, git's SHA-1 of small ones, and the plain SHA-1 that some mirrors use as ETag.
    digests = [hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size), hashlib.sha1()]
    if file.digest:
        digests = digests[:1] if len(file.digest) == 64 else digests[1:]
    with open(part, "rb") as content:
        while block := content.read(1 << 20):
            for digest in digests:
                digest.update(block)
    found = [digest.hexdigest() for digest in digests]
    if file.digest is None:
        screen.warn(f"the server gives no hash of {file.name}, so its content could not be checked")
        return found[0]
    if file.digest not in found:
        part.unlink()
        raise OSError(f"{file.name} arrived damaged: its hash is {found[0]}, not {file.digest}; it was deleted")
    return file.digest


def _link(blob, path):
    """Make `path` in a snapshot a relative link to its blob, or a copy if the file system has no links."""
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        os.symlink(os.path.relpath(blob, path.parent), temporary)
    except OSError:  # Windows, exFAT
        shutil.copyfile(blob, temporary)
    os.replace(temporary, path)


def _size(path):
    """Bytes of a file, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


# --- a server ---


class Refused(OSError):
    """An error answer of a server: its HTTP status, and the hub's code and message."""

    def __init__(self, response):
        self.status = response.status_code
        self.code, self.said = (response.headers.get(name, "") for name in ("X-Error-Code", "X-Error-Message"))
        super().__init__(f"HTTP status {self.status}" + (f": {self.said}" if self.said else ""))


def _headers():
    """The headers of a request to HF_ENDPOINT, with the token if there is one.

    huggingface_hub's build_hf_headers() is not used, because it may send a request itself."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if not re.fullmatch(r"[!-~]*", token or ""):
        raise ValueError("the token of HF_TOKEN or `hf auth login` has invalid characters; set it again")
    return {"User-Agent": "minitune", **({"Authorization": f"Bearer {token}"} if token else {})}


def _read(url, headers, name=None):
    """The body behind a URL, at most SMALL_LIMIT bytes. name: label of a progress bar, or None for no bar."""
    response, blocks = _open("GET", url, headers)
    total = _size_in(response.headers.get("Content-Length"), url)
    content = bytearray()
    bar = screen.progress(total, "B", unit_scale=True, desc=name) if name else contextlib.nullcontext()
    with bar:
        for block in blocks:
            content += block
            if len(content) > SMALL_LIMIT:
                raise OSError(f"the server sends more than {SMALL_LIMIT:,} bytes")
            if name:
                bar.update(len(block))
    return bytes(content)


def _json(content, where):
    """The value of JSON in bytes. Raises ValueError as parse_json()."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not valid JSON: it is not UTF-8 text") from None
    return parse_json(text, where)


def _open(method, url, headers):
    """(response, iterator over the blocks of its body) of a request, after redirects. The token is sent to the first host only.

    A HEAD request stops at the hub's description of a large file, before the redirect to its storage. Raises Refused on an error
    status, and OSError on a bad redirect or encoding."""
    for _ in range(6):
        stream = _receive(method, url, headers)
        response = next(stream)
        location = response.headers.get("Location")
        if response.status_code not in (301, 302, 303, 307, 308) or not location:
            break
        try:
            target = urljoin(url, location)
            is_same_host = _origin(target) == _origin(url)
        except ValueError:
            raise OSError(f"it redirects to {short(location)}, which is not a URL") from None
        if method == "HEAD" and ("X-Linked-Etag" in response.headers or not is_same_host):
            return response, stream
        stream.close()
        if not is_same_host:
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        url = target
    else:
        raise OSError(f"{some([url])} redirects without end")
    if response.status_code >= 300:
        stream.close()
        raise Refused(response)
    encoding = response.headers.get("Content-Encoding", "identity")
    if method == "GET" and encoding.lower() not in ("identity", "binary"):
        raise OSError(f"it sends the content compressed ({short(encoding)}), which was not requested")
    return response, stream


def _origin(url):
    """(scheme, host, port) of a URL. Raises ValueError if it is not a URL."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _receive(method, url, headers):
    """Yields the response (status and headers), then the blocks of its body as they arrive.

    Raises TimeoutError if fewer than SLOWEST bytes per second arrive for PATIENCE seconds. The request runs in a thread, which is
    then abandoned: a timeout of the socket does not end a server that sends one byte per second, not even during the headers."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    box, is_left = queue.Queue(maxsize=16), threading.Event()
    headers = {**headers, "Accept-Encoding": "identity"}
    limits = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "follow_redirects": False}
    conversation = get_session().stream(method, url, headers=headers, **limits)
    threading.Thread(target=_converse, args=(conversation, method == "GET", box, is_left), daemon=True).start()
    waited, received = 0.0, 0
    try:
        while True:
            start = time.monotonic()
            try:
                item = box.get(timeout=max(PATIENCE - waited, 0.001))
            except queue.Empty:
                item = b""
            waited += time.monotonic() - start
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            if isinstance(item, bytes):
                received += len(item)
            if waited >= PATIENCE:
                if received < SLOWEST * PATIENCE:
                    raise TimeoutError(f"it sent {received:,} bytes in {waited:.0f} s")
                waited, received = 0.0, 0
            if item:
                yield item
    finally:
        is_left.set()


def _converse(conversation, has_body, box, is_left):
    """The thread of _receive(): puts the response, the blocks of its body and None into the queue `box`, or the error that ended
    the request. is_left: an Event that is set when nobody reads the queue any more."""
    from huggingface_hub.errors import HTTPError

    def put(item):
        while not is_left.is_set():
            with contextlib.suppress(queue.Full):
                return box.put(item, timeout=1)

    try:
        with conversation as response:
            put(response)
            for block in response.iter_raw() if has_body and response.status_code < 300 else ():
                put(block)
                if is_left.is_set():
                    return
        put(None)
    except (HTTPError, OSError) as error:
        put(error)
    except Exception as error:  # such as the client's InvalidURL: the reader of the queue must get every error
        put(OSError(f"{type(error).__name__}: {error}"))


def _reason(error, url, repo=None, revision=None):
    """Why a download failed and what to do, in one or two sentences."""
    from huggingface_hub import constants, errors, get_token

    token = "The token of HF_TOKEN or `hf auth login` was sent." if get_token() else "HF_TOKEN is not set."
    what = short(" ".join(str(error).split()) or type(error).__name__, 160)[1:-1]
    status, code = getattr(error, "status", None), getattr(error, "code", "")
    kept = " to resume; the received part is kept" if repo else ""
    again = f"Check the network and run the command again{kept}."
    url = some([url])
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to download."
    if code == "GatedRepo":
        page = f"https://huggingface.co/{repo}"
        return f"it is gated. Accept its licence on {page} and set HF_TOKEN to a token of that account. {token}"
    if code == "RevisionNotFound":
        return f"it has no revision {short(revision)}. Look up its branches, tags and commits on {url}/{repo}."
    if status == 401 and "Invalid credentials" in error.said:
        return "the hub refused the token of HF_TOKEN or `hf auth login`. Renew it, or unset it for a public model."
    if repo and code != "EntryNotFound" and (code == "RepoNotFound" or status in (401, 404)):
        missing = f"{url} has no such model, or it is private, and there is no folder of that name"
        return f"{missing}. Check the spelling, or set HF_TOKEN to a token that may read it. {token}"
    if status is not None:
        return f"{url} answered with {what}."
    if isinstance(error, ValueError):
        return f"{what}. Check HF_ENDPOINT, and whether a proxy or a login page answers in its place."
    if isinstance(error, TimeoutError):
        return f"{url} is too slow: {what}, expected at least {SLOWEST:,} bytes per second. {again}"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk with {constants.HF_HOME} is full ({what}). {OTHER_DISK}"
    if isinstance(error, PermissionError):
        return f"the cache cannot be written ({what}). Set HF_HOME to a folder that you can write to."
    if type(error) is OSError and error.errno is None:
        return f"{what} ({url}). {again}"
    return f"the connection to {url} failed or was interrupted ({type(error).__name__}: {what}). {again}"
