"""Reads and writes adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from minitune.adapters import lora
from minitune.files import expand, read_json, write_json, write_whole
from minitune.models import ARCHITECTURES
from minitune.schema import Number, check
from minitune.screen import short, some, tell, warn
from minitune.tensor_files import FLOATS, check_header, open_safetensors

ADAPTER_CONFIG = "adapter_config.json"
INDEX_OF_LAYER = Number(0, 2**31 - 1, is_whole=True)
ALPHA = Number(-1e9, 1e9)  # far beyond usual values
# Largest product alpha * max(A) * max(B). Attention scores hold its square, which must stay below 3e38, the largest fp32.
MAX_REACH = 1e15
ADAPTER = {  # types of the keys of adapter_config.json that are read; null means PEFT's default
    "peft_type?": str,
    "r?": Number(1, 2**31 - 1, is_whole=True),
    "lora_alpha?": ALPHA,
    "lora_dropout?": Number(0, 1),
    "use_rslora?": bool,
    "fan_in_fan_out?": bool,
    "target_modules?": (str, [str]),
    "rank_pattern?": {str: Number(1, 2**31 - 1, is_whole=True)},
    "alpha_pattern?": {str: ALPHA},
    "bias?": {"none", "all", "lora_only"},
    "modules_to_save?": [str],
    "exclude_modules?": (str, [str]),
    "layers_to_transform?": (INDEX_OF_LAYER, [INDEX_OF_LAYER]),
    "layers_pattern?": (str, [str]),
}
PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "fan_in_fan_out": False}
PEFT_DEFAULTS |= {"rank_pattern": {}, "alpha_pattern": {}}
ADAPTER_DEFAULTS = {  # keys of features that minitune does not have: null or one of these values turns the feature off
    "arrow_config": (),
    "alora_invocation_tokens": (),
    "corda_config": (),
    "ensure_weight_tying": (False,),
    # Not allowed: pissa, olora, corda, loftq, lora_ga. With them PEFT changes the frozen weights when it loads the adapter.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "kasa_config": (),
    "layer_replication": (),
    "loftq_config": ({},),
    "lora_bias": (False,),
    "lora_ga_config": (),
    "megatron_config": (),
    "monteclora_config": (),
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
    "eva_config",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
ADAPTER_READ = {key.removesuffix("?") for key in ADAPTER}
PEFT_PREFIX = "base_model.model."  # before the model's own names in an adapter file


def save_adapter(model, folder, base_model=None, revision=None, extra=None, trained=True):
    """Write the LoRA weights of `model` in PEFT's format: adapter_config.json and adapter_model.safetensors (fp32).

    base_model, revision: the source of the frozen weights. extra: a dict of minitune's own facts (prompt template, ...), written
    to minitune.json. trained: refuse an adapter whose every lora_B is zero. Each file is written whole or not at all, and
    the weights are read back and compared.
    Raises ValueError if the model has no LoRA layers, if a weight is not finite (nothing is written then), or if the file
    does not hold the weights in memory."""
    folder = Path(folder)
    layers = lora.lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layers to save; call lora.inject first")
    if brought := getattr(model, "brought", None):  # set by load_adapter
        raise ValueError(
            f"the model has {some(brought)} of a loaded adapter, which cannot be saved with this one; load the base model "
            "without it"
        )
    first = next(iter(layers.values()))
    leaves = tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))
    untouched = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "in_features")}
    config = {
        "alpha_pattern": {name: number(layer.alpha) for name, layer in layers.items() if layer.alpha != first.alpha},
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": number(first.alpha),
        "lora_dropout": first.lora_dropout.p,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": first.r,
        "rank_pattern": {name: layer.r for name, layer in layers.items() if layer.r != first.r},
        "revision": revision,
        "target_modules": list(layers if untouched & set(leaves) else leaves),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": first.use_rslora,
    }
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in lora.adapter_tensors(model).items()}
    if broken := [name for name, t in tensors.items() if not t.isfinite().all()]:
        raise ValueError(f"{len(broken)} adapter tensors hold NaN or infinity, not saved: {some(broken, 3)}")
    write_whole(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_json(folder / ADAPTER_CONFIG, config)
    if extra is not None:
        write_json(folder / "minitune.json", extra)
    else:
        (folder / "minitune.json").unlink(missing_ok=True)  # left by an earlier adapter in this folder
    stored = read_adapter_tensors(folder)
    if stored.keys() != tensors.keys() or any(not torch.equal(stored[name], tensors[name]) for name in tensors):
        raise ValueError(
            f"{folder / 'adapter_model.safetensors'} does not hold what was written; the disk may be failing"
        )
    if trained and not any(t.any() for name, t in stored.items() if ".lora_B." in name):
        raise ValueError(f"{folder}: every lora_B is zero, so the adapter does nothing; was the learning rate 0?")


def number(value):
    """A float without fraction as an int, as PEFT writes it: 16.0 -> 16."""
    return int(value) if value == int(value) else value


def read_adapter_tensors(folder):
    """{PEFT's key: tensor}, copied from the file.

    Raises ValueError if the file is missing, incomplete, not of floats, or holds NaN or infinity."""
    path = expand(folder) / "adapter_model.safetensors"
    if not os.path.exists(path):
        pickled = os.path.exists(path.with_suffix(".bin"))
        hint = (
            "; adapter_model.bin is a pickle, which minitune does not read: save it again with a newer PEFT"
            if pickled
            else ""
        )
        raise ValueError(f"{folder} has no adapter_model.safetensors; expected a folder in PEFT's format{hint}")
    with open_safetensors(path) as f:
        check_header(path)
        dtypes = {name: f.get_slice(name).get_dtype() for name in f.keys()}
        if odd := [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in FLOATS]:
            raise ValueError(f"{path}: expected {', '.join(FLOATS)}, found {some(odd, 3)}")
        tensors = {name: f.get_tensor(name).clone() for name in f.keys()}
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path} holds NaN or infinity, expected finite weights: {some(broken, 3)}")
    return tensors


def read_adapter_config(folder):
    """adapter_config.json as a dict, with PEFT's defaults for missing keys. Unknown keys are kept; load_adapter reports them.

    Raises ValueError on an adapter that is not LoRA, and on a setting that minitune does not implement."""
    path = expand(folder) / ADAPTER_CONFIG
    config = PEFT_DEFAULTS | {key: value for key, value in read_json(path, {}).items() if value is not None}
    method = config.get("peft_type", "LORA")
    if method != "LORA":
        raise ValueError(
            f"{folder} holds an adapter of another method, peft_type {short(method)}; minitune reads LORA only. If the method "
            "allows it, merge the adapter into its base with PEFT (merge_and_unload) and use the merged model"
        )
    check(config, ADAPTER, path)
    for key, allowed in ADAPTER_DEFAULTS.items():
        if key in config and config[key] not in (*allowed, {}, []):
            shown = " or ".join(json.dumps(v) for v in (None, *allowed))
            raise ValueError(
                f"{path}: {key} is {short(config[key])}, which minitune does not implement; it takes {shown}"
            )
    targets = config.get("target_modules")
    if targets is not None and (not targets or not all(targets)):
        raise ValueError(f"{path}: target_modules is {short(targets)}, expected names, a pattern or all-linear")
    return config


def unknown_keys(config):
    """The keys of an adapter_config.json that PEFT does not know, without those that are false or empty."""
    known = ADAPTER_IGNORED | ADAPTER_READ | ADAPTER_DEFAULTS.keys()
    return [key for key, value in config.items() if key not in known and value not in (False, {}, [])]


def load_adapter(model, folder, trainable=False):
    """Add the LoRA layers of an adapter in PEFT's format to `model`, in place. Returns adapter_config.json as a dict.

    trainable: whether the LoRA weights require gradients. PEFT may also store whole modules, such as an embedding that it
    resized; they replace the model's own. Keys and tensors that PEFT ignores are ignored here and reported in one line.
    Raises ValueError if a LoRA tensor has no layer, a layer has no tensor, or a shape differs; the model is then unchanged."""
    config, stored = read_adapter_config(folder), read_adapter_tensors(folder)
    notes = [f"the keys {some(unknown)}"] if (unknown := unknown_keys(config)) else []
    if config["fan_in_fan_out"]:
        notes.append("fan_in_fan_out, which has no effect on linear layers")
    targets = config.get("target_modules") or peft_targets(model)
    if not isinstance(targets, str):
        targets, absent = present_targets(model, targets, folder)
        notes += [f"target_modules {some(absent)}, which this model does not have"] if absent else []
    try:
        names = lora.match_targets(model, targets)
        without = left_out(config, names, targets)
        names = [name for name in names if name not in without]
        ranks = by_pattern(config["rank_pattern"], names, config["r"])
        alphas = by_pattern(config["alpha_pattern"], names, config["lora_alpha"])
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    shapes = {}
    for name in names:
        layer = model.get_submodule(name)
        shapes[f"{PEFT_PREFIX}{name}.lora_A.weight"] = (ranks[name], layer.in_features)
        shapes[f"{PEFT_PREFIX}{name}.lora_B.weight"] = (layer.out_features, ranks[name])
    frozen, parameters = {}, dict(model.named_parameters(remove_duplicate=False))
    saved, absent = saved_parameters(config, model, parameters, folder)
    notes += [f"modules_to_save {some(absent)}, which this model does not have"] if absent else []
    shapes |= {f"{PEFT_PREFIX}{own}": tuple(parameters[own].shape) for own in saved}
    for key in stored.keys() - shapes.keys():
        own = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        if own in parameters:
            frozen[key], shapes[key] = own, tuple(parameters[own].shape)
    missing, unexpected = sorted(shapes.keys() - stored.keys()), sorted(stored.keys() - shapes.keys())
    if others := [key for key in unexpected if ".lora_" not in key]:
        notes.append(f"the tensors {some(others, 3)}")
    problems = {
        "missing": missing,
        "unexpected": [key for key in unexpected if ".lora_" in key],
        "of another shape": [
            f"{key} {list(stored[key].shape)}, expected {list(shape)}"
            for key, shape in shapes.items()
            if key in stored and stored[key].shape != shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(keys)} {what}: {some(keys, 2)}" for what, keys in problems.items() if keys)
        raise ValueError(f"{folder} does not fit the model: {found}")
    for name in names:
        A, B = (stored[f"{PEFT_PREFIX}{name}.{part}.weight"].abs().max().item() for part in ("lora_A", "lora_B"))
        if (reach := abs(alphas[name]) * A * B) > MAX_REACH:
            raise ValueError(
                f"{folder}: the weights of {name} are too large to compute with (up to {reach:.0e}). The adapter is damaged, or "
                "its training diverged; use another one"
            )
    replaced = []
    for key, own in frozen.items():
        weight = stored[key].to(parameters[own])
        if not torch.equal(weight, parameters[own]):
            replaced.append(own)
            parameters[own].data.copy_(weight)
    if replaced:
        warn(f"{folder} contains {some(sorted(replaced), 3)}, which replace those of the model, as in PEFT")
    for own in saved:  # as a new parameter: if a head is tied to the embedding, the embedding keeps its weights
        owner, _, leaf = own.rpartition(".")
        weight = stored[f"{PEFT_PREFIX}{own}"].to(parameters[own])
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
    if saved:
        tell(
            f"{folder} contains whole modules (modules_to_save), which replace the model's: "
            f"{some(config['modules_to_save'])}."
        )
    if notes:
        warn(f"{folder}: ignored, as in PEFT: {'; '.join(notes)}")
    model.brought = sorted({*replaced, *saved})
    model.requires_grad_(False)
    for name in names:
        lora.wrap(model, name, ranks[name], alphas[name], config["lora_dropout"], config["use_rslora"])
    for key, tensor in lora.adapter_tensors(model).items():
        tensor.data.copy_(stored[key])
        tensor.requires_grad_(trainable)
    return config


def left_out(config, names, targets):
    """The layers among `names`, which `targets` selects, that another key of the config excludes: a set of names.

    Raises ValueError if no layer is left, and if layers_to_transform is combined with a pattern."""
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        out = set(lora.matching(excluded, names))
    else:
        out = {name for name in names if any(name == e or name.endswith(f".{e}") for e in excluded)}
    for module in config.get("modules_to_save") or []:
        out |= set(lora.matching(rf"(^|.*\.){module}($|\..*)", names))
    layers, patterns = config.get("layers_to_transform", []), config.get("layers_pattern") or [r"[^.]*"]
    if layers != []:
        if isinstance(targets, str):
            raise ValueError("layers_to_transform needs target_modules that are a list, as in PEFT")
        wanted = "|".join(map(str, layers if isinstance(layers, list) else [layers]))
        kept = set(targets)
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            kept |= set(lora.matching(rf"(?:.*?\.)?(?:{pattern})\.(?:{wanted})\..*", names))
        out |= set(names) - kept
    if out >= set(names):
        raise ValueError(
            "exclude_modules, modules_to_save or layers_to_transform exclude every layer of target_modules"
        )
    return out


def saved_parameters(config, model, parameters, folder):
    """(the names among `parameters` that modules_to_save replaces, the modules in it that the model does not have).

    Raises ValueError if such a module has no plain weights, as in 4 bit."""
    saved, absent = [], []
    for module in config.get("modules_to_save") or []:
        owners = {name for name, _ in model.named_modules() if name == module or name.endswith(f".{module}")}
        found = [name for name in parameters if name.rpartition(".")[0] in owners]
        if not owners:
            absent.append(module)
        elif not any(name.endswith(".weight") for name in found):
            raise ValueError(
                f"{folder}: modules_to_save names {short(module)}, which this model does not have as plain weights"
            )
        saved += found
    return list(dict.fromkeys(saved)), absent


def by_pattern(patterns, names, default):
    """{name: value of the first pattern that matches it, else default}. A pattern matches the last parts of a name, as in
    PEFT."""
    values = dict.fromkeys(names, default)
    for pattern, value in reversed(patterns.items()):
        values |= dict.fromkeys(lora.matching(rf"(.*\.)?({pattern})$", names), value)
    return values


def peft_targets(model):
    """PEFT's default LoRA targets for the architecture of a model."""
    return next(targets for _, Model, targets in ARCHITECTURES.values() if isinstance(model, Model))


def present_targets(model, targets, folder):
    """(the targets that the model has, those that it lacks). Some published adapters list names of other architectures too;
    PEFT ignores these. Raises ValueError if the model has none of the targets."""
    modules = [name for name, _ in model.named_modules()]
    absent = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in modules)]
    if len(absent) == len(targets):
        raise ValueError(
            f"{folder}: the model has none of target_modules {some(targets)}; the adapter is for another architecture"
        )
    return tuple(target for target in targets if target not in absent), absent
