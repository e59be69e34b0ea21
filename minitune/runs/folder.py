"""The run folder: its lock, the files that are written at the start of a run, and the lines of metrics.jsonl and
samples.jsonl. The training state is in state.py, curves.png in curves.py."""

import errno
import hashlib
import itertools
import json
import math
import os
import tempfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from minitune.config import TrainConfig, from_file
from minitune.device import environment
from minitune.files import expand, parse_json, read_bytes, read_json, to_json, write_json, write_whole
from minitune.locks import held
from minitune.schema import COUNT, check
from minitune.screen import short

ADAPTERS = ("adapter", "best", "last")  # folders of a run with an adapter, in order of preference
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@contextmanager
def hold(run):
    """Lock the run folder for this process. The folder is made if it does not exist, checked to be writable, and cleared of
    temporary files that a killed process left. A folder that is still empty at the end is removed.

    Raises ValueError if it cannot be written, is the folder of a model, or is in use by another process."""
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        try:
            run.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run).close()
        except OSError as error:
            raise ValueError(
                f"the run folder {run} cannot be written: {error.strerror}; choose another --run"
            ) from None
        with held(run / ".lock", f"another process works in {run}; wait for it, or choose another --run"):
            if (run / "config.json").exists():
                stored = read_json(run / "config.json")
                if isinstance(stored, dict) and "model_type" in stored:
                    raise ValueError(
                        f"{run} is the folder of a model, which a run would overwrite; choose another --run"
                    )
            for half in (path for part in ("", *ADAPTERS) for path in (run / part).glob(".*.part")):
                half.unlink()
            yield
    finally:
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def append_line(path, record):
    """Append `record` as one line of JSON. A number that is not finite becomes null, as JSON has no such numbers.

    The line is written in one call: after a kill or a full disk (OSError with the path) the file has the whole line or none
    of it."""
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    line = (to_json(record) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        if os.write(handle, line) < len(line):
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


def read_lines(path, shape=None):
    """The records of a .jsonl file, [] if it does not exist. A torn last line, as a crash of the machine leaves it, is
    ignored.

    shape: what a line must hold, for schema.check(). Raises ValueError with the number of a line that is not JSON or does
    not fit."""
    path = Path(path)
    lines = read_bytes(path).split(b"\n") if path.exists() else []  # splitlines() would cut at U+2028 in an answer
    records = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            found = [parse_json(line.decode(), where)] if line else []
        except ValueError:  # not JSON, or not UTF-8
            if number < len(lines):
                raise ValueError(f"{where} is not JSON: {short(line)}") from None
        else:
            records += found if shape is None else [check(record, shape, where) for record in found]
    return records


STEPS = {"step": COUNT, "loss?": (float, None), "eval_loss?": (float, None), "lr?": (float, None)}


def read_steps(path):
    """The records of metrics.jsonl or samples.jsonl. Raises ValueError with the line unless the steps increase."""
    records = read_lines(path, STEPS)
    for number, (before, record) in enumerate(itertools.pairwise(records), 2):
        if record["step"] <= before["step"]:
            raise ValueError(
                f"{path}, line {number}: step is {record['step']} after step {before['step']}, expected a later one; "
                "put the lines in order, or start again with --resume never"
            )
    return records


def last_step(path):
    """The step in the last readable line of metrics.jsonl, 0 if there is none."""
    for line in reversed(Path(path).read_bytes().split(b"\n") if Path(path).is_file() else []):
        with suppress(ValueError):
            return check(parse_json(line.decode(), path), STEPS, path)["step"]
    return 0


def keep_lines(path, size, crc, step):
    """Cut a .jsonl file to its first `size` bytes, which were there when `step` was saved. A resumed run writes the other
    lines again.

    crc: zlib.crc32() of these bytes. Raises ValueError if the file does not begin with them."""
    content = read_bytes(path) if path.exists() else b""
    if len(content) < size or zlib.crc32(content[:size]) != crc:
        raise ValueError(
            f"{path} was changed or cut since step {step} was saved, so the run cannot go on with it; put back the file as "
            "it was, or start again with --resume never"
        )
    if len(content) > size:
        write_whole(path, content[:size])


def sync_lines(path, size, crc):
    """Flush the lines of a .jsonl file to the disk. Returns its [size in bytes, zlib.crc32].

    size, crc: those of the last call, so that only new lines are read. Raises OSError if the file became shorter."""
    if size == 0 and not path.exists():
        return [0, 0]
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        file.seek(size)
        added = file.read()
        if os.fstat(file.fileno()).st_size < size:
            raise OSError(f"{path} was cut while this training wrote it; the state of the last save stays")
    return [size + len(added), zlib.crc32(added, crc)]


def file_sha256(path):
    """sha256 of a file, None if it does not exist."""
    return hashlib.sha256(read_bytes(path)).hexdigest() if Path(path).exists() else None


def adapter_folder(run):
    """The folder of a run's adapter: adapter/, which training writes at its end, else best/ or last/. None if none of them
    has both files of an adapter."""
    return next((folder for name in ADAPTERS if has_adapter(folder := Path(run) / name)), None)


def has_adapter(folder):
    return all((folder / name).is_file() for name in ADAPTER_FILES)


def unfinished(found):
    """A line for the user if adapter_folder() found another folder than adapter/, else None."""
    final = found.parent / ADAPTERS[0]
    if found.name not in ADAPTERS[1:] or has_adapter(final):
        return None
    missing = [name for name in ADAPTER_FILES if not (final / name).is_file()]
    if len(missing) < len(ADAPTER_FILES):
        return f"warning: {final} has no {missing[0]}: {found} is used in its place"
    return f"{found.parent} did not end its training: {found} is used"


def find_adapter(path):
    """The folder of an adapter: `path` itself, or adapter_folder(path). Raises ValueError if there is none."""
    folder = expand(path)
    found = folder if (folder / ADAPTER_FILES[0]).is_file() else adapter_folder(folder)
    if found is None:
        raise ValueError(
            f"{short(str(path))} is not the folder of an adapter: it has no {ADAPTER_FILES[0]}, and no "
            f"{' or '.join(ADAPTERS)} of a run with {' and '.join(ADAPTER_FILES)}"
        )
    return found


def read_options(run):
    """The TrainConfig of a run folder. Raises ValueError if it is not a run folder."""
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"{run} has no config.json; expected a run folder of scripts/train.py")
    stored = read_json(path)
    if isinstance(stored, dict) and "model_type" in stored:
        raise ValueError(f"{run} is the folder of a model; expected a run folder of scripts/train.py")
    stored = from_file(TrainConfig, path)
    return TrainConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()})


def adapter_fingerprint(folder):
    """sha256 of an adapter in PEFT's format, None if `folder` is None or has no adapter.

    Answers, scores and points of a sweep store it. If it no longer matches, they are out of date."""
    if folder is None:
        return None
    parts = [file_sha256(Path(folder) / name) for name in ADAPTER_FILES]
    return None if None in parts else hashlib.sha256("".join(parts).encode()).hexdigest()


def free_name(run):
    """The path of a run folder beside `run` that does not exist yet."""
    return next(path for i in itertools.count(2) if not (path := run.with_name(f"{run.name}-{i}")).exists())


def place_of(run):
    """(device, inode) of a folder, which stay the same when it is renamed. None if it does not exist."""
    try:
        found = os.stat(run)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def check_place(run, place):
    """Raises OSError if the run folder is not the one in which this training began."""
    if place_of(run) != place:
        raise OSError(
            f"the run folder {run} was removed or replaced while this training ran, so its state is lost; start again, "
            "and leave the folder where it is"
        )


def start_run(run, config, device, fingerprint):
    """Remove what an earlier run left in the folder, and write config.json and environment.json."""
    for name in (
        "last/state.safetensors",  # removed first: without it the rest cannot be resumed
        "metrics.jsonl",
        "samples.jsonl",
        "curves.png",
        *(f"{part}/{file}" for part in ADAPTERS for file in (*reversed(ADAPTER_FILES), "minitune.json")),
    ):
        (run / name).unlink(missing_ok=True)
    write_config(run, config)
    write_json(run / "environment.json", environment(device) | {"seed": config.seed, "data_fingerprint": fingerprint})


def write_held_out(run, test_set):
    """Write heldout.jsonl: the held-out rows as they were read, for --prompts FILE and --references FILE."""
    if not test_set.examples:
        (run / "heldout.jsonl").unlink(missing_ok=True)
    else:
        # Through JSON, as Parquet has values that JSON has not.
        rows = (json.loads(json.dumps(row, default=str)) for row in test_set.rows)
        write_whole(run / "heldout.jsonl", "".join(to_json(row) + "\n" for row in rows))


def write_config(run, config):
    """Write config.json. Its `resume` is auto, as a run that is given as --config is to be resumed, not started again."""
    write_json(run / "config.json", asdict(config) | {"run": str(run), "resume": "auto"})
