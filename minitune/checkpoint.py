"""Weights and adapters on disk: safetensors streamed into a model, PEFT's adapter format read and written.

Nothing here trains; the state of a run is written by minitune/run_folder.py. Only safetensors and JSON are read."""

import json
import math
import sys
import time
from pathlib import Path

import torch
from minitune_kernels import nf4
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from minitune import hub, lora, quant
from minitune.device import peak_bytes, reset_peak, resident_bytes
from minitune.files import read_json, write_json, write_whole
from minitune.models import architecture, build, build_encoder

GB = 1e9
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # dtypes that weights are read in, by safetensors' names: bytes of a value


def load_model(model, dtype=torch.float32, device="cpu", quantize="none", adapter=None, revision=None, say=None):
    """A model of minitune.models with the weights of a checkpoint, in eval mode, every parameter frozen.

    model: folder, short name or hub id. quantize: "none", "nf4" or "nf4-dq" turns the linear layers of the blocks
    into 4 bit as their tensors stream in; a checkpoint that bitsandbytes quantised stays as it is. adapter: folder in
    PEFT's format. say: called with the line that describes the load. Memory above the loaded model stays below twice
    the largest tensor. Raises ValueError on a file that is missing, cut short or of another shape before any weight
    is read, and on a weight with NaN or infinity when it is."""
    if quantize not in ("none", "nf4", "nf4-dq"):
        raise ValueError(f"quantize is {quantize!r}, expected none, nf4 or nf4-dq")
    if adapter is not None:
        read_adapter_config(adapter)  # a bad one shows before gigabytes are read
    folder = hub.resolve(str(model), revision)
    device = torch.device(device)
    net, stored_4bit = build_empty(folder)
    if quantize != "none" and not architecture(read_json(folder / "config.json"))[2]:
        raise ValueError(f"{folder} holds a judge, whose layers are not quantised; use quantize=none")
    if stored_4bit and quantize != "none":
        raise ValueError(f"{folder} holds 4-bit weights already; use quantize=none, which keeps them in 4 bit")
    start = time.perf_counter()
    tensors = Tensors(folder, getattr(net, "parameter_of", None))
    tied = tied_embedding(net)
    groups = group_by_parameter(tensors, net, tied, stored_4bit)
    reset_peak(torch.device("cpu"))
    before = resident_bytes()
    for name, parts in groups.items():
        owner, _, leaf = name.rpartition(".")
        module = net.get_submodule(owner)
        if len(parts) > 1:  # 4 bit, as bitsandbytes stores it. Copies: the file's pages go back at once
            stored = {part: tensors.read(key).to(device=device, copy=True) for part, key in parts.items()}
            shape = (module.out_features, module.in_features)
            replace(net, owner, quant.NF4Linear.from_bnb(stored, module.bias, dtype, shape, f"{folder}: {name}"))
        elif quantize != "none" and leaf == "weight" and isinstance(module, nn.Linear) and owner != "lm_head":
            weight = tensors.read(name).to(device)
            try:
                layer = quant.NF4Linear.from_weight(weight, module.bias, dtype, quantize == "nf4-dq")
            except ValueError as error:
                raise ValueError(f"{folder}: {name}: {error}") from None
            replace(net, owner, layer)
        else:
            module._parameters[leaf] = read_parameter(tensors, name, dtype, device)
    if tied:
        net.lm_head.weight = net.get_parameter(tied)
    net.eos_ids = end_ids(folder)
    check_filled(net)
    if say:
        # On a GPU resident_bytes() holds what CUDA loaded meanwhile; on a CPU it would hide what malloc keeps.
        loaded = before + model_bytes(net) if device.type == "cpu" else resident_bytes()
        above = max(0, peak_bytes(torch.device("cpu")) - loaded)
        say(
            f"loaded {folder.name}: {sum(p.numel() for p in count_parameters(net)) / 1e6:.1f} M stored values, "
            f"{model_bytes(net) / GB:.2f} GB in {time.perf_counter() - start:.1f} s; host memory above the model "
            f"{above / GB:.2f} GB at most (largest tensor {tensors.largest_bytes / GB:.2f} GB)"
        )
        if quantize != "none" or stored_4bit:
            say(f"4-bit kernels: {nf4.describe(device)}")
    if adapter is not None:
        load_adapter(net, adapter)
    return net.eval()


def load_encoder(model, dtype=torch.float32, device="cpu", revision=None):
    """The encoder of a checkpoint (RoBERTa or BERT), in eval mode, every parameter frozen; the heads stored with it are left.

    Arguments and errors as load_model's, with the same strict check. Keeps the name `model` as .name, by which
    metrics.bertscore finds the layer to use."""
    folder = hub.resolve(str(model), revision)
    device = torch.device(device)
    net, stored_4bit = build_empty(folder, build_encoder)
    if stored_4bit:
        raise ValueError(f"{folder} holds 4-bit weights, expected an encoder in {', '.join(FLOATS)}")
    tensors = Tensors(folder, net.parameter_of)
    for name in group_by_parameter(tensors, net, None, False):
        owner, _, leaf = name.rpartition(".")
        net.get_submodule(owner)._parameters[leaf] = read_parameter(tensors, name, dtype, device)
    check_filled(net)
    net.name = str(model)
    return net.eval()


def read_parameter(tensors, name, dtype, device):
    """One tensor as a frozen parameter. Raises ValueError where it is not finite."""
    weight = tensors.read(name).to(device=device, dtype=dtype, copy=True)
    if not all(bound.isfinite() for bound in weight.aminmax()):  # one pass, 10 GB/s on one core
        raise ValueError(
            f"{tensors.folder}: {name} holds NaN or infinity in {str(dtype).removeprefix('torch.')}; the checkpoint is "
            "damaged, or its values are too large for this dtype"
        )
    return nn.Parameter(weight, requires_grad=False)


def check_filled(net):
    left = [name for name, p in (*net.named_parameters(), *net.named_buffers()) if p.is_meta]
    assert not left, f"not loaded: {left[:5]}"


def tied_embedding(net):
    """The name of the embedding whose weight the head shares, None where the head has its own."""
    head = net.lm_head.weight
    return next((name for name, p in net.named_parameters() if p is head and name != "lm_head.weight"), None)


def build_empty(folder, build=build):
    """(the model of a checkpoint folder on meta, without weights; whether its weights are stored in 4 bit).

    build: of minitune.models, for a language model or for an encoder. Raises ValueError on a config.json that is not
    supported."""
    raw = read_json(folder / "config.json")
    if not isinstance(raw, dict):
        raise ValueError(f"{folder / 'config.json'} holds a {type(raw).__name__}, expected an object")
    try:
        with torch.device("meta"):
            return build(raw), quant.is_bnb_4bit(raw)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    except RuntimeError as error:  # meta tensors fail for one reason only: their size
        raise ValueError(f"{folder}: the sizes in config.json are absurd: {str(error).splitlines()[0]}") from None


def end_ids(folder):
    """The token ids that end an answer, as transformers takes them: of generation_config.json, else of config.json."""
    path = folder / "generation_config.json"
    stored = read_json(path) if path.is_file() else {}
    for name, config in (("generation_config.json", stored), ("config.json", read_json(folder / "config.json"))):
        ids = config.get("eos_token_id") if isinstance(config, dict) else None
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
                raise ValueError(f"{folder / name}: eos_token_id is {ids!r}, expected token ids, 0 or more")
            return tuple(ids)
    return ()


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
    """The tensors of a checkpoint folder, one file or sharded: shapes known at once, contents read one at a time.

    parameter_of: the name that the model has for a stored tensor, None for one to leave out; not given: the same name."""

    def __init__(self, folder, parameter_of=None):
        self.folder = folder
        self.stored = {}  # the model's name -> the file's name
        self.files = {}  # tensor name -> file
        self.shapes = {}
        self.dtypes = {}  # safetensors' names: BF16, F8_E4M3 ...
        self.largest_bytes = 0
        shards = self.shards()
        placed = {name: file for file, names in shards.items() for name in names or ()}
        for file, expected in shards.items():
            with open_safetensors(file) as f:
                names = list(f.keys())
                if expected is not None and (absent := sorted(set(expected) - set(names))):
                    raise ValueError(
                        f"{file} lacks {len(absent)} tensors that the index puts there: {first_five(absent)}"
                    )
                for name in names:
                    if placed.get(name, file) != file:  # a second copy: the index says which one counts
                        continue
                    view = f.get_slice(name)
                    if parameter_of is not None:
                        stored, name = name, parameter_of(name)
                        if name is None:
                            continue
                        if name in self.stored:
                            raise ValueError(f"{folder} holds {name} twice: as {self.stored[name]} and as {stored}")
                        self.stored[name] = stored
                    self.files[name], self.shapes[name] = file, tuple(view.get_shape())
                    self.dtypes[name] = view.get_dtype()
                    size = FLOATS.get(self.dtypes[name], 1) * math.prod(self.shapes[name])
                    self.largest_bytes = max(self.largest_bytes, size)

    def shards(self):
        """{file: names that the index puts there, or None: all of it}."""
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if single.exists():  # it goes before an index, as in transformers
            return {single: None}
        if not index.exists():
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

    def read(self, name):
        """One tensor. The file is opened anew, so that the pages of earlier tensors do not stay in memory."""
        with open_safetensors(self.files[name]) as f:
            return f.get_tensor(self.stored.get(name, name))


def open_safetensors(file):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a whole safetensors file ({error}); it is corrupt or cut short: download or copy it again"
        ) from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error}); expected a safetensors file") from None


def group_by_parameter(tensors, net, tied, stored_4bit):
    """{parameter name: {"weight": tensor name}}, for a weight in 4 bit with "absmax" and the other parts beside it.

    Names, shapes and dtypes are checked in both directions. Raises ValueError with the missing, the unexpected and the
    wrong, the first five of each."""
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    linear = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    groups, unexpected = {}, []
    for name in tensors.shapes:
        base, mark, part = name.partition(".weight.")
        if name.endswith("rotary_emb.inv_freq") or tied and name == "lm_head.weight":
            continue  # recomputed from config.json; a copy of the embedding
        if name in shapes:
            groups.setdefault(name, {})["weight"] = name
        elif stored_4bit and mark and f"{base}.weight" in shapes.keys() & linear:
            groups.setdefault(f"{base}.weight", {})[part] = name
        else:
            unexpected.append(name)
    plain = [name for name, parts in groups.items() if parts.keys() == {"weight"}]  # from_bnb checks the others
    if stored_4bit and len(plain) == len(groups):
        raise ValueError(
            f"{tensors.folder}: config.json has a quantization_config for 4-bit weights, but no weight is in 4 bit; "
            "remove quantization_config from it if the checkpoint is not quantised"
        )
    problems = {
        "missing": [name for name in shapes if "weight" not in groups.get(name, ())],
        "unexpected": unexpected,
        "of another shape": [
            f"{name} {list(tensors.shapes[name])}, expected {list(shapes[name])}"
            for name in plain
            if tensors.shapes[name] != shapes[name]
        ],
        f"of a dtype other than {', '.join(FLOATS)}": [
            f"{name} {tensors.dtypes[name]}" for name in plain if tensors.dtypes[name] not in FLOATS
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {what}: {first_five(names)}" for what, names in problems.items() if names)
        hint = ""
        outdated = any(name.startswith(("layers.", "transformer.")) for name in unexpected)
        if outdated and not hasattr(net, "parameter_of"):
            hint = (
                ". The names are those of an outdated Phi file: convert it, or use the newer revision of the checkpoint"
            )
        raise ValueError(f"{tensors.folder}: the tensors are not those of its config.json; {found}{hint}")
    if tied and "lm_head.weight" in tensors.shapes:
        check_tied(tensors, tied)
    return groups


def check_tied(tensors, embedding):
    """Raises ValueError where a stored head is not the copy of the embedding that config.json promises."""
    head = "lm_head.weight"
    is_equal = tensors.shapes[head] == tensors.shapes[embedding]
    for start in range(0, tensors.shapes[head][0] if is_equal else 0, 4096):  # in parts, so that no copy is large
        rows = [tensors.read(name)[start : start + 4096].float() for name in (head, embedding)]
        is_equal = is_equal and torch.equal(*rows)
    if not is_equal:
        raise ValueError(
            f"{tensors.folder}: config.json says tie_word_embeddings, but {head} is not equal to {embedding}; set "
            "tie_word_embeddings to false if the head was trained by itself, or remove the head"
        )


def first_five(names):
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


# --- adapters in PEFT's format ------------------------------------------------------------------

ADAPTER_DEFAULTS = {  # keys of adapter_config.json that may hold null or these values only, which change nothing
    "alpha_pattern": ({},),
    "arrow_config": (),
    "alora_invocation_tokens": (),
    "bias": ("none",),
    "corda_config": (),
    "ensure_weight_tying": (False,),
    "eva_config": (),
    "exclude_modules": ([],),
    "fan_in_fan_out": (False,),
    # Not here: pissa, olora, corda, loftq, lora_ga. They change the frozen weights, and PEFT does so again on loading.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "kasa_config": (),
    "layer_replication": (),
    "layers_pattern": ([],),
    "layers_to_transform": ([],),
    "loftq_config": ({},),
    "lora_bias": (False,),
    "lora_ga_config": (),
    "megatron_config": (),
    "modules_to_save": ([],),
    "monteclora_config": (),
    "peft_type": ("LORA",),
    "rank_pattern": ({},),
    "target_parameters": ([],),
    "task_type": ("CAUSAL_LM",),
    "trainable_token_indices": (),
    "use_bdlora": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (),
}
ADAPTER_IGNORED = {  # without effect on the logits
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
ADAPTER_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"}
PEFT_PREFIX = "base_model.model."  # before the model's own names in an adapter file


def save_adapter(model, folder, base_model=None, revision=None, extra=None, trained=True):
    """Write the LoRA weights of `model` as PEFT does: adapter_config.json and adapter_model.safetensors (fp32).

    base_model, revision: where the frozen weights came from. extra: our own facts (the prompt template ...), written to
    minitune.json beside them. Every file appears whole or not at all; the weights are read back and compared. Raises
    ValueError where a weight is not finite (nothing is written then), where what was written is not what is in memory,
    and, for a trained adapter, where every B is still zero."""
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
    if broken := [name for name, t in tensors.items() if not t.isfinite().all()]:
        raise ValueError(f"{len(broken)} adapter tensors hold NaN or infinity, not saved: {first_five(broken)}")
    write_whole(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_json(folder / "adapter_config.json", config)
    if extra is not None:
        write_json(folder / "minitune.json", extra)
    else:
        (folder / "minitune.json").unlink(missing_ok=True)  # of an adapter that was here before
    stored = read_adapter_tensors(folder)
    if stored.keys() != tensors.keys() or any(not torch.equal(stored[name], tensors[name]) for name in tensors):
        raise ValueError(
            f"{folder / 'adapter_model.safetensors'} does not hold what was written; the disk may be failing"
        )
    if trained and not any(t.any() for name, t in stored.items() if ".lora_B." in name):
        raise ValueError(f"{folder}: every lora_B is zero, so the adapter does nothing; was the learning rate 0?")


def read_adapter_tensors(folder):
    """{PEFT's key: tensor}, copied from the file. Raises ValueError where the file is missing or not whole."""
    path = Path(folder) / "adapter_model.safetensors"
    if not path.exists():
        pickled = (Path(folder) / "adapter_model.bin").exists()
        hint = "; adapter_model.bin is a pickle, which is not read: save it again by a new PEFT" if pickled else ""
        raise ValueError(f"{folder} has no adapter_model.safetensors; expected a folder in PEFT's format{hint}")
    with open_safetensors(path) as f:
        dtypes = {name: f.get_slice(name).get_dtype() for name in f.keys()}
        if odd := [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in FLOATS]:
            raise ValueError(f"{path}: expected {', '.join(FLOATS)}, found {first_five(odd)}")
        tensors = {name: f.get_tensor(name).clone() for name in f.keys()}
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path} holds NaN or infinity, expected finite weights: {first_five(broken)}")
    return tensors


def read_adapter_config(folder):
    """adapter_config.json as a dict. Raises ValueError on a setting that minitune does not implement."""
    path = Path(folder) / "adapter_config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected an object")

    def is_number(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    def is_names(value):
        names = value if isinstance(value, list) else [value]
        return bool(names) and all(isinstance(name, str) and name for name in names)

    config = {"lora_dropout": 0.0, "use_rslora": False} | {k: v for k, v in config.items() if v is not None}
    for key, fits, expected in (
        ("r", lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0, "a whole number above 0"),
        ("lora_alpha", is_number, "a number"),
        ("lora_dropout", lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
        ("use_rslora", lambda v: isinstance(v, bool), "true or false"),
        ("target_modules", is_names, "a list of names, a pattern or all-linear"),
    ):
        if not fits(config.get(key)):
            raise ValueError(f"{path}: {key} is {config.get(key)!r}, expected {expected}")
    for key, value in config.items():
        if key in ADAPTER_DEFAULTS:
            if value not in ADAPTER_DEFAULTS[key]:
                allowed = " or ".join(json.dumps(v) for v in (None, *ADAPTER_DEFAULTS[key]))
                raise ValueError(f"{path}: {key} is {value!r}, which minitune does not implement; it takes {allowed}")
        elif key not in ADAPTER_IGNORED | ADAPTER_READ and value not in (False, {}, []):
            raise ValueError(
                f"{path}: {key} is {value!r}, a setting that minitune does not know; remove it if it changes nothing"
            )
    return config


def load_adapter(model, folder, trainable=False):
    """Wrap `model` with the LoRA layers of an adapter in PEFT's format, in place. Returns its adapter_config.json as
    a dict.

    Strict both ways: a tensor without a layer, or a layer without a tensor, is a ValueError, and the model stays as it
    was. PEFT stores a frozen head or embedding too where it wraps or resizes one; they replace the model's own."""
    config, stored = read_adapter_config(folder), read_adapter_tensors(folder)
    r, targets = config["r"], config["target_modules"]
    if not isinstance(targets, str):
        targets = present_targets(model, targets, folder)
    shapes = {}
    try:
        names = lora.match_targets(model, targets)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    for name in names:
        layer = model.get_submodule(name)
        shapes[f"{PEFT_PREFIX}{name}.lora_A.weight"] = (r, layer.in_features)
        shapes[f"{PEFT_PREFIX}{name}.lora_B.weight"] = (layer.out_features, r)
    frozen, parameters = {}, dict(model.named_parameters(remove_duplicate=False))
    for key in stored.keys() - shapes.keys():
        own = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        if own in parameters:
            frozen[key], shapes[key] = own, tuple(parameters[own].shape)
    missing, unexpected = sorted(shapes.keys() - stored.keys()), sorted(stored.keys() - shapes.keys())
    wrong = [
        f"{key} {list(stored[key].shape)}, expected {list(shape)}"
        for key, shape in shapes.items()
        if key in stored and stored[key].shape != shape
    ]
    if missing or unexpected or wrong:
        raise ValueError(
            f"{folder} does not fit the model: missing {first_five(missing) or 'none'}; unexpected "
            f"{first_five(unexpected) or 'none'}; of another shape {first_five(wrong) or 'none'}"
        )
    for key, own in frozen.items():
        weight = stored[key].to(parameters[own])
        if not torch.equal(weight, parameters[own]):
            warn(f"{folder} brings its own {own}, which replaces the model's, as in PEFT")
            parameters[own].data.copy_(weight)
    lora.inject(model, r, config["lora_alpha"], config["lora_dropout"], targets, config["use_rslora"])
    for key, tensor in lora.adapter_tensors(model).items():
        tensor.data.copy_(stored[key])
        tensor.requires_grad_(trainable)
    return config


def present_targets(model, targets, folder):
    """The targets that the model has. Adapters with names of another architecture circulate: PEFT wraps what it
    finds; so do we, and say it."""
    modules = [name for name, _ in model.named_modules()]
    absent = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in modules)]
    if len(absent) == len(targets):
        raise ValueError(
            f"{folder}: none of target_modules {first_five(targets)} is in this model; it is of another architecture"
        )
    if absent:
        warn(f"{folder}: target_modules names {first_five(absent)}, not in this model; passed over, as by PEFT")
    return tuple(target for target in targets if target not in absent)


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def default_targets(folder):
    """PEFT's LoRA targets for the architecture of a checkpoint folder. Raises ValueError on a judge, which has none."""
    targets = architecture(read_json(Path(folder) / "config.json"))[2]
    if not targets:
        raise ValueError(f"{folder} holds a judge: minitune scores text with it and does not train it")
    return targets
