"""Weights and adapters on disk: safetensors streamed into a model, PEFT's adapter format read and written.

Nothing here trains; the state of a run is written by minitune/train.py. Only safetensors and JSON are read."""

import json
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from minitune import hub, lora, quant
from minitune.device import peak_bytes, reset_peak, resident_bytes
from minitune.files import read_json, write_json, write_whole
from minitune.models import architecture, build

GB = 1e9
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # of one value


def load_model(model, dtype=torch.float32, device="cpu", quantize="none", adapter=None, revision=None, say=None):
    """A model of minitune.models with the weights of a checkpoint, in eval mode, every parameter frozen.

    model: folder, short name or hub id. quantize: "none", "nf4" or "nf4-dq" turns the linear layers of the blocks
    into 4 bit as their tensors stream in; a checkpoint that bitsandbytes quantised stays as it is. adapter: folder in
    PEFT's format. say: called with the line that describes the load. Memory above the loaded model stays below twice
    the largest tensor. Raises ValueError on a file that is missing, cut short or of another shape, before any weight
    is read."""
    folder = hub.resolve(str(model), revision)
    raw = read_json(folder / "config.json")
    if not isinstance(raw, dict):
        raise ValueError(f"{folder / 'config.json'} holds a {type(raw).__name__}, expected an object")
    device = torch.device(device)
    if quantize not in ("none", "nf4", "nf4-dq"):
        raise ValueError(f"quantize is {quantize!r}, expected none, nf4 or nf4-dq")
    try:
        stored_4bit = quant.is_bnb_4bit(raw)
        with torch.device("meta"):
            net = build(raw)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if stored_4bit and quantize != "none":
        raise ValueError(f"{folder} holds 4-bit weights already; use quantize=none, which keeps them in 4 bit")
    start = time.perf_counter()
    tensors = Tensors(folder)
    tied = net.config.tie_word_embeddings
    groups = group_by_parameter(tensors, net, tied, stored_4bit)
    reset_peak(torch.device("cpu"))
    for name, parts in groups.items():
        owner, _, leaf = name.rpartition(".")
        module = net.get_submodule(owner)
        if stored_4bit and len(parts) > 1:
            stored = {part: tensors.read(name + part).to(device) for part in parts}
            layer = quant.NF4Linear.from_bnb(
                {part.removeprefix("."): t for part, t in stored.items()}, module.bias, dtype
            )
            replace(net, owner, layer)
        elif quantize != "none" and leaf == "weight" and isinstance(module, nn.Linear) and owner != "lm_head":
            weight = tensors.read(name).to(device)
            replace(net, owner, quant.NF4Linear.from_weight(weight, module.bias, dtype, quantize == "nf4-dq"))
        else:
            weight = tensors.read(name).to(
                device=device, dtype=dtype, copy=True
            )  # a copy: the file's pages go back at once
            module._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
    if tied:
        net.lm_head.weight = net.model.embed_tokens.weight
    left = [name for name, p in (*net.named_parameters(), *net.named_buffers()) if p.is_meta]
    assert not left, f"not loaded: {left[:5]}"
    if say:
        resident, largest = resident_bytes(), tensors.largest_bytes
        above = max(0, peak_bytes(torch.device("cpu")) - resident)
        say(
            f"loaded {folder.name}: {sum(p.numel() for p in count_parameters(net)) / 1e6:.1f} M stored values, "
            f"{model_bytes(net) / GB:.2f} GB in {time.perf_counter() - start:.1f} s; host memory above the model "
            f"{above / GB:.2f} GB at most (largest tensor {largest / GB:.2f} GB)"
        )
    if adapter is not None:
        load_adapter(net, adapter)
    return net.eval()


def count_parameters(net):
    seen = {}
    for tensor in (*net.parameters(), *net.buffers()):
        seen[id(tensor)] = tensor
    return seen.values()


def model_bytes(net):
    """Bytes of all parameters and buffers, a tied one once."""
    return sum(t.numel() * t.element_size() for t in count_parameters(net))


def replace(net, name, layer):
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, layer)


class Tensors:
    """The tensors of a checkpoint folder, one file or sharded: shapes known at once, contents read one at a time."""

    def __init__(self, folder):
        self.folder = folder
        self.files = {}  # tensor name -> file
        self.shapes = {}
        self.largest_bytes = 0
        for file, expected in self.shards().items():
            with self.open(file) as f:
                names = list(f.keys())
                if expected is not None and (absent := sorted(set(expected) - set(names))):
                    raise ValueError(
                        f"{file} lacks {len(absent)} tensors that the index puts there: {first_five(absent)}"
                    )
                for name in names if expected is None else expected:
                    view = f.get_slice(name)
                    self.files[name], self.shapes[name] = file, tuple(view.get_shape())
                    size = BYTES[view.get_dtype()] * torch.Size(self.shapes[name]).numel()
                    self.largest_bytes = max(self.largest_bytes, size)

    def shards(self):
        """{file: names that the index puts there, or None: all of it}."""
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if not index.exists():
            if single.exists():
                return {single: None}
            other = [
                p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in sorted(self.folder.glob(pattern))
            ][:3]
            hint = f"; it has {', '.join(other)}: convert to safetensors first" if other else ""
            raise ValueError(f"{self.folder} has neither model.safetensors nor model.safetensors.index.json{hint}")
        stored = read_json(index)
        weight_map = stored.get("weight_map") if isinstance(stored, dict) else None
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(v, str) for v in weight_map.values())
        ):
            raise ValueError(f"{index} has no weight_map from tensor names to file names; download it again")
        shards = {}
        for name, file in weight_map.items():
            if Path(file).name != file or file in ("", ".", ".."):
                raise ValueError(f"{index} puts {name} into {file!r}, which is not a file of its own folder; refused")
            shards.setdefault(self.folder / file, []).append(name)
        if missing := [file.name for file in shards if not file.exists()]:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of {len(shards)} files that its index names: "
                f"{first_five(missing)}; download them"
            )
        return shards

    def open(self, file):
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{file} is not a whole safetensors file ({error}); it is corrupt or cut short: "
                "download or copy it again"
            ) from None

    def read(self, name):
        """One tensor. The file is opened anew, so that the pages of earlier tensors do not stay in memory."""
        with self.open(self.files[name]) as f:
            return f.get_tensor(name)


def group_by_parameter(tensors, net, tied, stored_4bit):
    """{parameter name: the suffixes stored for it}, after a check of names and shapes in both directions.

    Raises ValueError with the missing, the unexpected and the misshapen, the first five of each."""
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    if tied:
        shapes.pop("lm_head.weight", None)
    groups, unexpected, wrong = {}, [], []
    for name, shape in tensors.shapes.items():
        base, mark, _ = name.partition(".weight.")
        if name.endswith("rotary_emb.inv_freq") or tied and name == "lm_head.weight":
            continue  # recomputed from config.json; a copy of the embedding
        if stored_4bit and mark and base + ".weight" in shapes:
            groups.setdefault(base + ".weight", []).append(name[len(base) + len(".weight") :])
        elif name in shapes:
            groups.setdefault(name, []).append("")
            if shape != shapes[name]:
                wrong.append(f"{name} {list(shape)}, expected {list(shapes[name])}")
        else:
            unexpected.append(name)
    if stored_4bit:  # their packed shape is checked by from_bnb
        wrong = [text for text in wrong if len(groups[text.split(" ")[0]]) == 1]
    missing = [name for name in shapes if "" not in groups.get(name, ())]
    problems = [
        f"{len(found)} {what}: {first_five(found)}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if found
    ]
    if problems:
        hint = ""
        if any(name.startswith(("layers.", "transformer.")) for name in unexpected):
            hint = (
                ". The names are those of an outdated Phi file: convert it, or use the newer revision of the checkpoint"
            )
        raise ValueError(f"{tensors.folder}: the tensors are not those of its config.json; {'; '.join(problems)}{hint}")
    return groups


def first_five(names):
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


# --- adapters in PEFT's format
# ---------------------------------------------------------------------------------------------

ADAPTER_DEFAULTS = {  # keys of adapter_config.json that may stand there only with a value that changes nothing
    "alpha_pattern": ({}, None),
    "rank_pattern": ({}, None),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "layers_pattern": (None,),
    "layers_to_transform": (None,),
    "modules_to_save": (None, []),
    "use_dora": (False,),
    "exclude_modules": (None,),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "target_parameters": (None,),
    "trainable_token_indices": (None,),
    "use_qalora": (False,),
    "arrow_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "ensure_weight_tying": (False,),
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "corda_config": (None,),
    "eva_config": (None,),
    "loftq_config": ({}, None),
    "lora_ga_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
ADAPTER_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "revision",
    "init_lora_weights",
    "peft_version",
    "megatron_core",
    "runtime_config",
    "qalora_group_size",
    "use_rslora",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
}


def save_adapter(model, folder, base_model=None, revision=None, extra=None, trained=True):
    """Write the LoRA weights of `model` as PEFT does: adapter_config.json and adapter_model.safetensors (fp32).

    base_model, revision: where the frozen weights came from. extra: our own facts (the prompt template ...), written to
    minitune.json beside them. Every file appears whole or not at all; the weights are read back and compared. Raises
    ValueError where what was written is not what is in memory, or, for a trained adapter, where every B is still
    zero."""
    folder = Path(folder)
    layers = lora.lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layers to save; call lora.inject first")
    first = next(iter(layers.values()))
    leaves = tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))
    untouched = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "in_features")}
    config = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(first.alpha) if first.alpha == int(first.alpha) else first.alpha,
        "lora_dropout": first.lora_dropout.p,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": first.r,
        "rank_pattern": {},
        "revision": revision,
        "target_modules": list(layers if untouched & set(leaves) else leaves),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": first.use_rslora,
    }
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in lora.adapter_tensors(model).items()}
    write_whole(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_json(folder / "adapter_config.json", config)
    if extra is not None:
        write_json(folder / "minitune.json", extra)
    stored = read_adapter_tensors(folder)
    if stored.keys() != tensors.keys() or any(not torch.equal(stored[name], tensors[name]) for name in tensors):
        raise ValueError(
            f"{folder / 'adapter_model.safetensors'} does not hold what was written; the disk may be failing"
        )
    if trained and not any(t.any() for name, t in tensors.items() if ".lora_B." in name):
        raise ValueError(f"{folder}: every lora_B is zero, so the adapter does nothing; was the learning rate 0?")


def read_adapter_tensors(folder):
    path = Path(folder) / "adapter_model.safetensors"
    if not path.exists():
        raise ValueError(f"{folder} has no adapter_model.safetensors; expected a folder in PEFT's format")
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name).clone() for name in f.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None


def read_adapter_config(folder):
    """adapter_config.json as a dict. Raises ValueError on a setting that minitune does not implement."""
    path = Path(folder) / "adapter_config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected an object")
    for key, value in config.items():
        if key in ADAPTER_DEFAULTS:
            if value not in ADAPTER_DEFAULTS[key]:
                raise ValueError(
                    f"{path}: {key} is {value!r}, which minitune does not implement; "
                    f"it takes {' or '.join(json.dumps(v) for v in ADAPTER_DEFAULTS[key])}"
                )
        elif key not in ADAPTER_IGNORED and value not in (None, False, {}, []):
            raise ValueError(
                f"{path}: {key} is {value!r}, a setting that minitune does not know; remove it if it changes nothing"
            )
    for key, kinds in (("r", int), ("lora_alpha", (int, float)), ("target_modules", (str, list))):
        if not isinstance(config.get(key), kinds):
            raise ValueError(
                f"{path}: {key} is {config.get(key)!r}, expected {'a number' if key != 'target_modules' else 'names'}"
            )
    return config


def load_adapter(model, folder, trainable=False):
    """Wrap `model` with the LoRA layers of an adapter in PEFT's format, in place. Returns its adapter_config.json as
    a dict.

    Strict both ways: a tensor without a layer, or a layer without a tensor, is a ValueError."""
    config = read_adapter_config(folder)
    stored = read_adapter_tensors(folder)
    targets = config["target_modules"]
    targets = targets if isinstance(targets, str) else present_targets(model, targets, folder)
    lora.inject(
        model,
        config["r"],
        config["lora_alpha"],
        config.get("lora_dropout", 0.0),
        targets,
        config.get("use_rslora", False),
    )
    own = lora.adapter_tensors(model)
    missing, unexpected = sorted(set(own) - set(stored)), sorted(set(stored) - set(own))
    wrong = [
        f"{name} {list(stored[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in stored and own[name].shape != stored[name].shape
    ]
    if missing or unexpected or wrong:
        raise ValueError(
            f"{folder} does not fit the model: missing {first_five(missing) or 'none'}; unexpected "
            f"{first_five(unexpected) or 'none'}; of another shape {first_five(wrong) or 'none'}"
        )
    for name, tensor in own.items():
        tensor.data.copy_(stored[name])
        tensor.requires_grad_(trainable)
    return config


def present_targets(model, targets, folder):
    """The targets that the model has. Adapters with names of another architecture circulate: PEFT wraps what it
    finds; so do we, and say it."""
    found = []
    for target in targets:
        try:
            lora.match_targets(model, (target,))
            found.append(target)
        except ValueError:
            print(
                f"warning: {folder}: target_modules names {target!r}, which this model does not have; passed over, as by PEFT"
            )
    if not found:
        raise ValueError(
            f"{folder}: none of target_modules {', '.join(targets)} is in this model; it is of another architecture"
        )
    return tuple(found)


def default_targets(folder):
    """PEFT's LoRA targets for the architecture of a checkpoint folder."""
    return architecture(read_json(Path(folder) / "config.json"))[2]
