"""From a model's name to a local folder, and the original Alpaca rows: the only module that uses the network.

The cache, tokens, locks, bars and small files are huggingface_hub's: HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE
mean what they always mean, and the cache is shared with other tools. Weights are the exception. huggingface_hub 2
deletes what it has of a file when the download breaks, and a shard is 5-10 GB: here it comes over plain HTTP into
blobs/ETAG.incomplete, a rerun goes on where it stopped, and the SHA-256 is checked at the end. Who wants Xet's speed
instead fills the same cache with `hf download ID`.
"""

import difflib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

from minitune.files import read_json, write_whole

MODELS = {
    "llama2": "meta-llama/Llama-2-7b-hf",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "phi2": "microsoft/phi-2",
}
EMBEDDED = ("tiny-mistral", "tiny-llama", "tiny-phi")
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
WAYS_OUT = f"Ways out: an embedded model ({', '.join(EMBEDDED)}) or a local folder with config.json and safetensors."
OTHER_DISK = "Free some space, or set HF_HOME to a folder on another disk."

INDEX = "model.safetensors.index.json"
SMALL_FILES = (
    "generation_config.json tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json vocab.json merges.txt vocab.txt chat_template.jinja"
).split()

ALPACA_URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
ALPACA_ROWS = 52_002


def resolve(name, revision=None):
    """The local folder (Path) of a model, downloaded first if need be.

    name: a short name (MODELS, EMBEDDED), a folder with config.json, or a hub id owner/name. A short name wins over a
    folder called the same: write ./mistral for the folder. revision: branch, tag or commit on the hub; None is main.
    Raises ValueError that says what to do if there is no such model or it cannot be downloaded whole."""
    name = os.fspath(name)
    if name in MODELS:
        return _from_hub(MODELS[name], revision or "main")
    folder = EMBEDDED_FOLDER / name if name in EMBEDDED else Path(os.path.expanduser(name))
    if name in EMBEDDED or (name and folder.exists()):
        return _local(folder, revision)
    if "://" in name:
        raise ValueError(f"{name!r} is an address; expected a hub id such as mistralai/Mistral-7B-v0.1, or a folder")
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise ValueError(f"the folder {name} does not exist; expected a folder with config.json or a hub id owner/name")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        known = [*MODELS, *EMBEDDED]
        guess = "".join(f" Did you mean {close}?" for close in difflib.get_close_matches(name, known, n=1))
        raise ValueError(f"unknown model {name!r}.{guess} Expected {', '.join(known)}, a folder or a hub id owner/name")
    return _from_hub(name, revision or "main")


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

    MINITUNE_ALPACA_URL names a mirror. Raises ValueError, and keeps nothing, if it does not arrive whole."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.file_download import http_get

    path = Path(constants.HF_HOME) / "minitune" / "alpaca_data.json"
    if path.is_file():
        return path
    url = os.environ.get("MINITUNE_ALPACA_URL") or ALPACA_URL
    ways_out = "Ways out: rows of yours (--data FILE) or the embedded ones (--data embedded)."
    content = io.BytesIO()
    try:
        # Without build_hf_headers: this is not the hub, the token stays here.
        http_get(url, content, headers={"Accept-Encoding": "identity"}, displayed_filename=path.name)
        if fault := _fault_of_rows(content.getvalue()):
            raise ValueError(f"{url} is not the original alpaca_data.json: {fault}. Nothing was kept. {ways_out}")
        write_whole(path, content.getvalue())
    except (HTTPError, OSError) as error:
        raise ValueError(f"alpaca_data.json cannot be downloaded: {_reason(error, url)} {ways_out}") from error
    return path


def _fault_of_rows(content):
    try:
        rows = json.loads(content)
    except ValueError as error:  # not JSON, or not text
        return f"not JSON ({error})"
    keys = {"instruction", "input", "output"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in rows):
        return "not a list of rows with instruction, input and output"
    return f"{len(rows):,} rows instead of {ALPACA_ROWS:,}" if len(rows) != ALPACA_ROWS else None


def _local(folder, revision):
    if revision is not None:
        raise ValueError(f"revision {revision!r} is for models on the hub; leave it out for the folder {folder}")
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter, not a model: name its base as the model and it as the adapter")
    fault = "is a file, not a folder" if folder.is_file() else "has no config.json"
    raise ValueError(f"{folder} {fault}; expected a folder with config.json, tokenizer and safetensors files")


def _from_hub(repo, revision):
    """The snapshot folder of a model in the hub's cache, after fetching what it lacks."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError  # of httpx2 or httpx; those of requests are OSErrors

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HTTPError, OSError, json.JSONDecodeError) as error:  # JSON: a captive portal answers 200 with its own page
        return _cached(repo, revision, error)
    try:
        return _download(repo, revision, {sibling.rfilename for sibling in info.siblings or []})
    except (HTTPError, OSError) as error:
        reason = _reason(error, constants.ENDPOINT, repo, revision)
        raise ValueError(f"{repo} cannot be downloaded: {reason} {WAYS_OUT}") from error


def _cached(repo, revision, error):
    """The snapshot in the cache when the hub is out of reach or refuses, if it is whole. Prints that, and why."""
    from huggingface_hub import constants, try_to_load_from_cache

    reason = _reason(error, constants.ENDPOINT, repo, revision)
    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        fault = f"it is not in the cache {constants.HF_HUB_CACHE}"
        raise ValueError(f"{repo} cannot be downloaded, and {fault}: {reason} {WAYS_OUT}") from error
    folder = Path(config).parent
    files = {path.name for path in folder.iterdir() if path.exists()}  # a link to a deleted blob does not
    lacking = [name for name in _weights(files, folder) or ["all safetensors"] if name not in files]
    if lacking:
        fault = f"the copy in {folder} is incomplete: it lacks {_some(lacking)}"
        raise ValueError(f"{repo} cannot be downloaded, and {fault}: {reason} {WAYS_OUT}") from error
    print(f"{repo}: using the copy in {folder}, because it cannot be downloaded: {reason}", file=sys.stderr)
    return folder


def _download(repo, revision, names):
    """Fetch what a model needs out of the repository's file `names`; returns the snapshot folder.

    config.json goes first: the commit that it comes from is the one of all others, and `revision` in the cache."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    if "config.json" not in names:
        kind = "an adapter, whose base is the model to name" if "adapter_config.json" in names else "no model"
        raise ValueError(f"{repo} (revision {revision}) has no config.json: it is {kind}. {WAYS_OUT}")
    if INDEX not in names and not _weights(names, None):
        kinds = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
        held = _some(sorted(n for n in names if n.endswith(kinds)) or sorted(names))
        convert = "Convert it with transformers (from_pretrained, then save_pretrained), or take another revision."
        raise ValueError(
            f"{repo} (revision {revision}) has no model.safetensors and no index of shards, only {held}. {convert} {WAYS_OUT}"
        )

    folder = Path(hf_hub_download(repo, "config.json", revision=revision)).parent
    commit, blobs = folder.name, folder.parent.parent / "blobs"
    for name in [*SMALL_FILES, *([] if "model.safetensors" in names else [INDEX])]:
        if name in names:
            hf_hub_download(repo, name, revision=commit)
    weights = _weights(names, folder)
    if absent := [name for name in weights if name not in names]:
        raise ValueError(f"{INDEX} of {repo} names {_some(absent)}, which the repository does not have. {WAYS_OUT}")

    urls = {name: hf_hub_url(repo, name, revision=commit) for name in weights if not (folder / name).exists()}
    remote = {name: get_hf_file_metadata(url) for name, url in urls.items()}
    have = sum(_size(blobs / file.etag) or _size(blobs / f"{file.etag}.incomplete") for file in remote.values())
    needed = sum(file.size or 0 for file in remote.values()) - have
    free = shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{needed:,} bytes ({needed / 1e9:.1f} GB) are to come, {free:,} ({free / 1e9:.1f} GB) are free"
        raise ValueError(f"the disk is too full for {repo}: {sizes} in {blobs}. {OTHER_DISK} {WAYS_OUT}")
    if remote:
        print(f"{repo}: downloading {needed / 1e9:.2f} GB to {blobs}", file=sys.stderr)
    for name, file in remote.items():
        _fetch(name, urls[name], blobs / file.etag, file.size)
        hf_hub_download(repo, name, revision=commit)  # finds the blob and links it into the snapshot
    return folder


def _weights(names, folder):
    """The files of one copy of the weights among `names`: consolidated.safetensors and variants often lie beside them.
    An index says it; it is read in `folder`."""
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if INDEX in names:
        index = read_json(folder / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map; expected one from tensor to file name")
        return sorted(set(weight_map.values()))
    return []  # names of other schemes (consolidated.safetensors) hold other tensor names


def _fetch(name, url, blob, size):
    """Download one file of weights to `blob`, going on from its .incomplete part. size: bytes, None if not known."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    part = blob.with_name(f"{blob.name}.incomplete")
    storage = blob.parent.parent
    lock = storage.parent / ".locks" / storage.name / f"{blob.name}.lock"  # that of huggingface_hub for this blob
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        if size is not None and _size(part) > size:
            part.unlink()
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        with open(part, "ab") as file:
            http_get(url, file, resume_size=_size(part), headers=headers, expected_size=size, displayed_filename=name)
            file.flush()
            os.fsync(file.fileno())
        if re.fullmatch("[0-9a-f]{64}", blob.name) and _sha256(part) != blob.name:  # the hub's ETag of large files
            part.unlink()
            raise OSError(f"{name} arrived damaged: its SHA-256 is not {blob.name}; it was deleted")
        os.replace(part, blob)


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _some(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _reason(error, url, repo=None, revision=None):
    """Why a download failed and what to do, in a sentence or two."""
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # huggingface_hub wraps what went wrong
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    token = "The token of HF_TOKEN or `hf auth login` was sent." if get_token() else "HF_TOKEN is not set."
    what = " ".join(str(error).strip().partition("\n\n")[0].split()) or type(error).__name__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to download."
    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/{repo}"
        return f"it is gated. Accept its licence on {page} and set HF_TOKEN to a token of that account. {token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}. Look up its branches, tags and commits on {url}/{repo}."
    if status == 401 and "Invalid credentials" in response.headers.get("X-Error-Message", ""):
        return "the hub refused the token of HF_TOKEN or `hf auth login`. Renew it, or unset it for a public model."
    if repo and (isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404)):
        missing = f"{url} has no such model, or it is private, and there is no folder of that name"
        return f"{missing}. Check the spelling, or set HF_TOKEN to a token that may read it. {token}"
    if status is not None:
        return f"{url} answered with HTTP status {status} ({what})."
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk with {constants.HF_HOME} is full ({what}). {OTHER_DISK}"
    if isinstance(error, PermissionError):
        return f"the cache cannot be written ({what}). Set HF_HOME to a folder of yours."
    kept = " to go on: what has arrived is kept" if repo else ""
    again = f"Check the network and run the command again{kept}."
    return f"the connection to {url} failed or was cut ({type(error).__name__}: {what}). {again}"
