"""ModelFolder: the files of a model, found by its name. Each file is read at its first use, and only once."""

import hashlib
import os
from functools import cached_property

import torch
from torch.overrides import TorchFunctionMode

from minitune import hub, quant
from minitune.adapters.peft_files import ADAPTER_CONFIG, read_adapter_config
from minitune.files import JsonFolder
from minitune.models import architecture, build
from minitune.screen import short
from minitune.tensor_files import Tensors
from minitune.tokenizer import embedding_rows, end_ids, load_tokenizer

FINGERPRINTED = (
    "config.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
)


class ModelFolder(JsonFolder):
    """The folder of a model: config.json, row of the architecture table, tokenizer, end tokens, tensors and fingerprint.

    path: the local folder. name, revision: the arguments of open()."""

    def __init__(self, path, name=None, revision=None):
        super().__init__(path)
        self.name, self.revision = name, revision

    @classmethod
    def open(cls, name, revision=None, weights=True):
        """The ModelFolder for a name, downloaded if needed. Arguments and errors as in hub.resolve(). A ModelFolder is returned
        unchanged."""
        if isinstance(name, cls):
            return name
        return cls(hub.resolve(name, revision, weights), os.fspath(name), revision)

    def with_weights(self):
        """The folder with its weights, for one that was opened with weights=False. It is the same object, unless the hub has a
        newer commit by now."""
        found = ModelFolder.open(self.name, self.revision)
        return self if found.path == self.path else found

    @property
    def config(self):
        """config.json as a dict."""
        return self.json("config.json", {})

    @property
    def row(self):
        """(config class, model class, PEFT's default LoRA targets) of the architecture. Raises ValueError if it is not
        supported."""
        return architecture(self.config)

    @cached_property
    def tokenizer(self):
        """The Tokenizer. Its eos_ids are those of this folder's `eos_ids`, and the end token in its own files."""
        return load_tokenizer(self)

    @property
    def eos_ids(self):
        """The token ids that end a generated text, as in transformers: from generation_config.json, else config.json."""
        return end_ids(self)

    @property
    def vocab_size(self):
        """Number of rows of the embedding in config.json, 0 if it is not there."""
        return embedding_rows(self)

    @property
    def is_4bit(self):
        """Whether config.json says that the weights are stored in bitsandbytes' NF4."""
        try:
            return quant.is_bnb_4bit(self.config)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    @property
    def own_adapter(self):
        """This folder if it has an adapter beside the model, else None."""
        return self.path if (self.path / ADAPTER_CONFIG).is_file() else None

    @cached_property
    def tensors(self):
        """The Tensors of the folder. Raises ValueError if there are none, such as in a folder of an adapter."""
        has_weights = any(
            os.path.exists(self.path / name) for name in ("model.safetensors", "model.safetensors.index.json")
        )
        if not has_weights and self.own_adapter:
            base = read_adapter_config(self.path).get("base_model_name_or_path")
            raise ValueError(
                f"{self.path} holds an adapter, not the weights of a model; name its base"
                f"{f' ({short(base)})' if base else ''} with --model, and this folder with --adapter"
            )
        return Tensors(self.path)

    @cached_property
    def empty(self):
        """The model on the meta device, without weights, for its names and shapes. Raises ValueError as build_empty()."""
        return build_empty(self)

    def take_empty(self):
        """The model on the meta device, to be filled by the caller. Later uses of `empty` build another one."""
        model = self.empty
        del self.empty
        return model

    @cached_property
    def fingerprint(self):
        """sha256 over config, tokenizer and, for each weight file, its size and 16 samples of 64 KiB."""
        digest = hashlib.sha256()
        for name in FINGERPRINTED:
            if (self.path / name).is_file():
                digest.update((self.path / name).read_bytes())
        for path in sorted(p for p in self.path.glob("*.safetensors") if p.is_file()):  # False for a dangling link
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                for i in range(16):
                    file.seek(size * i // 16)
                    digest.update(file.read(1 << 16))
        return digest.hexdigest()

    def default_targets(self):
        """PEFT's default LoRA targets for the architecture. Raises ValueError on a GPT-2, which has none."""
        if not (targets := self.row[2]):
            raise ValueError(
                f"{self.path} holds a GPT-2, which minitune uses for perplexity and does not train; name a Llama, Mistral or "
                "Phi"
            )
        return targets

    def check_trainable(self):
        """Raises ValueError if the folder has an adapter beside the model: a new one cannot be trained on top of it."""
        if self.own_adapter:
            raise ValueError(
                f"{self.path} holds an adapter beside the model, and a new one cannot be trained on top of it. Merge it into "
                f"the model first (PEFT's merge_and_unload), or move {ADAPTER_CONFIG} away to train the base alone"
            )


class LeftAsIs(TorchFunctionMode):
    """Context in which the functions of torch.nn.init do nothing. On meta tensors they would import torch._dynamo, which takes
    2 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def build_empty(folder, build=build):
    """The model of a ModelFolder on the meta device, without weights.

    build: models.build for a language model, or models.build_encoder. Raises ValueError on a config.json that is not
    supported."""
    try:
        with torch.device("meta"), LeftAsIs():
            return build(folder.config)
    except ValueError as error:
        raise ValueError(f"{folder.path}: {error}") from None
    except (RuntimeError, TypeError) as error:  # creating a meta tensor fails only if its size overflows
        reason = short(str(error).splitlines()[0])
        raise ValueError(f"{folder.path}: the sizes in config.json are too large for any machine: {reason}") from None
