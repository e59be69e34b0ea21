"""Adapters in PEFT's format, read and written: adapter_config.json and adapter_model.safetensors."""

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


# --- adapters in PEFT's format ------------------------------------------------------------------

INDEX_OF_LAYER = Number(0, 2**31 - 1, is_whole=True)
ALPHA = Number(-1e9, 1e9)  # far beyond use
MAX_REACH = 1e15  # of alpha * A * B, whose square, in the attention's scores, must stay within fp32's 3e38
ADAPTER = {  # what the keys of adapter_config.json that are read must hold; null means PEFT's default
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
ADAPTER_DEFAULTS = {  # keys that PEFT reads and that may hold null or these values only, which change nothing
    "arrow_config": (),
    "alora_invocation_tokens": (),
    "corda_config": (),
    "ensure_weight_tying": (False,),
    # Not here: pissa, olora, corda, loftq, lora_ga. They change the frozen weights, and PEFT does so again on loading.
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
    """Write the LoRA weights of `model` as PEFT does: adapter_config.json and adapter_model.safetensors (fp32).

    base_model, revision: where the frozen weights came from. extra: our own facts (the prompt template ...), written to
    minitune.json beside them. Every file appears whole or not at all; the weights are read back and compared. Raises
    ValueError where a weight is not finite (nothing is written then), where what was written is not what is in memory,
    and, for a trained adapter, where every B is still zero."""
    folder = Path(folder)
    layers = lora.lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layers to save; call lora.inject first")
    if brought := getattr(model, "brought", None):  # of load_adapter
        raise ValueError(f"the model has {some(brought)} of another adapter, which would not be saved")
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
        (folder / "minitune.json").unlink(missing_ok=True)  # of an adapter that was here before
    stored = read_adapter_tensors(folder)
    if stored.keys() != tensors.keys() or any(not torch.equal(stored[name], tensors[name]) for name in tensors):
        raise ValueError(
            f"{folder / 'adapter_model.safetensors'} does not hold what was written; the disk may be failing"
        )
    if trained and not any(t.any() for name, t in stored.items() if ".lora_B." in name):
        raise ValueError(f"{folder}: every lora_B is zero, so the adapter does nothing; was the learning rate 0?")


def number(value):
    """16.0 as 16, the way PEFT writes it."""
    return int(value) if value == int(value) else value


def read_adapter_tensors(folder):
    """{PEFT's key: tensor}, copied from the file. Raises ValueError where the file is missing or not whole."""
    path = expand(folder) / "adapter_model.safetensors"
    if not os.path.exists(path):
        pickled = os.path.exists(path.with_suffix(".bin"))
        hint = "; adapter_model.bin is a pickle, which is not read: save it again by a new PEFT" if pickled else ""
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
    """adapter_config.json as a dict, with PEFT's defaults for what it lacks. Raises ValueError on an adapter that is not LoRA,
    and on a setting that minitune does not implement. A key that PEFT does not know is kept: load_adapter names it."""
    path = expand(folder) / ADAPTER_CONFIG
    config = PEFT_DEFAULTS | {key: value for key, value in read_json(path, {}).items() if value is not None}
    method = config.get("peft_type", "LORA")
    if method != "LORA":
        raise ValueError(
            f"{folder} holds an adapter of another method, peft_type {short(method)}; minitune reads LORA only. Merge it "
            "into its base with PEFT (merge_and_unload) where the method can, and use the merged model"
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
    """The keys of an adapter_config.json that PEFT does not know, unless they ask for nothing."""
    known = ADAPTER_IGNORED | ADAPTER_READ | ADAPTER_DEFAULTS.keys()
    return [key for key, value in config.items() if key not in known and value not in (False, {}, [])]


def load_adapter(model, folder, trainable=False):
    """Wrap `model` with the LoRA layers of an adapter in PEFT's format, in place. Returns its adapter_config.json as
    a dict.

    Strict both ways: a LoRA tensor without a layer, or a layer without a tensor, is a ValueError, and the model stays as it
    was. PEFT stores a frozen head or embedding too where it wraps or resizes one; they replace the model's own. What PEFT
    passes over is passed over and named in a line."""
    config, stored = read_adapter_config(folder), read_adapter_tensors(folder)
    notes = [f"the keys {some(unknown)}"] if (unknown := unknown_keys(config)) else []
    if config["fan_in_fan_out"]:
        notes.append("fan_in_fan_out, which linear layers do not have")
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
                f"{folder}: the weights of {name} are too large to compute with (up to {reach:.0e}); the adapter is damaged, or "
                "its training went wrong"
            )
    replaced = []
    for key, own in frozen.items():
        weight = stored[key].to(parameters[own])
        if not torch.equal(weight, parameters[own]):
            replaced.append(own)
            parameters[own].data.copy_(weight)
    if replaced:
        warn(f"{folder} brings its own {some(sorted(replaced), 3)}, to replace the model's, as in PEFT")
    for own in saved:  # a parameter of its own: a tied head leaves the embedding as it is
        owner, _, leaf = own.rpartition(".")
        weight = stored[f"{PEFT_PREFIX}{own}"].to(parameters[own])
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
    if saved:
        tell(
            f"{folder} brings modules_to_save of its own, which replace the model's: {some(config['modules_to_save'])}."
        )
    if notes:
        warn(f"{folder}: passed over, as by PEFT: {'; '.join(notes)}")
    model.brought = sorted({*replaced, *saved})
    model.requires_grad_(False)
    for name in names:
        lora.wrap(model, name, ranks[name], alphas[name], config["lora_dropout"], config["use_rslora"])
    for key, tensor in lora.adapter_tensors(model).items():
        tensor.data.copy_(stored[key])
        tensor.requires_grad_(trainable)
    return config


def left_out(config, names, targets):
    """Those of the layers `names`, which `targets` mean, that PEFT does not wrap since another key leaves them out."""
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
        raise ValueError("exclude_modules, modules_to_save or layers_to_transform leave no layer to its LoRA")
    return out


def saved_parameters(config, model, parameters, folder):
    """(the names among `parameters` that an adapter brings whole, in modules_to_save; the modules that the model lacks, which
    PEFT passes over). Raises ValueError where the model has such a module in 4 bit."""
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
    """{name: the value of the first pattern that matches it, as PEFT matches them: at its end, after a dot}."""
    values = dict.fromkeys(names, default)
    for pattern, value in reversed(patterns.items()):
        values |= dict.fromkeys(lora.matching(rf"(.*\.)?({pattern})$", names), value)
    return values


def peft_targets(model):
    """PEFT's LoRA targets for the architecture of a model."""
    return next(targets for _, Model, targets in ARCHITECTURES.values() if isinstance(model, Model))


def present_targets(model, targets, folder):
    """(the targets that the model has, those that it lacks). Adapters with names of another architecture circulate: PEFT wraps
    what it finds, and so do we."""
    modules = [name for name, _ in model.named_modules()]
    absent = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in modules)]
    if len(absent) == len(targets):
        raise ValueError(
            f"{folder}: none of target_modules {some(targets)} is in this model; it is of another architecture"
        )
    return tuple(target for target in targets if target not in absent), absent
