"""Reads the tensors of a checkpoint folder: one safetensors file, or shards with an index."""

import json
import os
import stat
from pathlib import Path

from safetensors import SafetensorError, safe_open

from minitune.files import kind_of, paths_explained, read_json
from minitune.screen import short, some

FLOATS = ("F32", "F16", "BF16", "F64")  # supported dtypes of weights, by safetensors' names
INDEX = {"weight_map": {str: str}}  # the shape of model.safetensors.index.json


class Tensors:
    """The tensors of a checkpoint folder, in one file or in shards. Names, shapes and dtypes are read at once, the contents one
    tensor at a time with read().

    folder: a Path. Raises ValueError if the folder has no safetensors files, or a file is missing or damaged."""

    def __init__(self, folder):
        self.folder = folder
        self.files = {}  # tensor name -> Path of its file
        self.shapes = {}  # tensor name -> tuple
        self.dtypes = {}  # tensor name -> safetensors' name of the dtype, such as BF16
        shards = self.shards()
        for file, promised in shards.items():
            with open_safetensors(file) as f:
                check_header(file)
                for name in f.keys():
                    if name in self.files and name not in promised:  # a second copy that the index does not name
                        continue
                    view = f.get_slice(name)
                    self.files[name], self.shapes[name] = file, tuple(view.get_shape())
                    self.dtypes[name] = view.get_dtype()

    def shards(self):
        """{Path of a file: names of the tensors that the index lists for it}. Raises ValueError as the class."""
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if os.path.exists(single):  # takes precedence over an index, as in transformers
            return {single: set()}
        if not os.path.exists(index):
            other = [
                p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in sorted(self.folder.glob(pattern))
            ]
            hint = f"; it has {some(other, 3)}: convert to safetensors first" if other else ""
            raise ValueError(f"{self.folder} has neither model.safetensors nor model.safetensors.index.json{hint}")
        weight_map = read_json(index, INDEX)["weight_map"]
        if not weight_map:
            raise ValueError(f"{index}: weight_map is empty; download it again")
        shards = {}
        for name, file in weight_map.items():
            if Path(file).name != file or file in ("", ".", ".."):
                raise ValueError(
                    f"{index} puts {some([name])} into {short(file)}, expected a file in the same folder; do not use it"
                )
            shards.setdefault(self.folder / file, set()).add(name)
        if missing := [file.name for file in shards if not os.path.exists(file)]:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of {len(shards)} files that its index names: "
                f"{some(missing, 3)}; download them"
            )
        return shards

    def read(self, name):
        """One tensor. Opens the file again each time, so that the mapped pages of earlier tensors are freed."""
        with open_safetensors(self.files[name]) as f:
            return f.get_tensor(name)


def open_safetensors(file):
    """safe_open() of a Path. Raises ValueError if it is missing or not a complete safetensors file."""
    with paths_explained(file):
        mode = file.stat().st_mode
    if not stat.S_ISREG(mode):  # reading a pipe may never end
        kind = "a folder" if stat.S_ISDIR(mode) else kind_of(mode)
        raise ValueError(f"{file} cannot be read: it is {kind}, expected a safetensors file")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a whole safetensors file ({short(str(error))}). It is damaged or incomplete: download or copy it "
            "again"
        ) from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({short(str(error))}); expected a safetensors file") from None


def check_header(file):
    """Raises ValueError if the header of a safetensors file names a tensor twice. safe_open() accepts this, but it is not
    defined which of the two it reads."""

    def unique(pairs):
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(
                f"{file} names {some([twice])} twice in its header, which the format forbids; use another copy"
            )
        return dict(pairs)

    with open(file, "rb") as f:
        json.loads(f.read(int.from_bytes(f.read(8), "little")), object_pairs_hook=unique)
