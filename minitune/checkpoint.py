"""Weights and adapters on disk: safetensors streamed into a model, PEFT's adapter format read and written.

Nothing here trains; the state of a run is written by minitune/run_folder.py. Only safetensors and JSON are read."""

import json
import os
import re
import stat
import time
from pathlib import Path

import torch
from minitune_kernels import decode, nf4
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.overrides import TorchFunctionMode

from minitune import hub, lora, quant
from minitune.files import expand, kind_of, paths_explained, read_json, write_json, write_whole
from minitune.models import ARCHITECTURES, architecture, build, build_encoder
from minitune.schema import Number, check
from minitune.screen import short, some, tell, warn
from minitune.tokenizer import end_ids

FLOATS = ("F32", "F16", "BF16", "F64")  # dtypes that weights are read in, by safetensors' names
INDEX = {"weight_map": {str: str}}  # the shape of model.safetensors.index.json
ADAPTER_CONFIG = "adapter_config.json"
STALE = re.compile(  # tables that old files hold as tensors, and that are computed from config.json
    r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids|token_type_ids)$"
)
FOREIGN = (  # names of another format in a checkpoint's tensors: what they mean
    (r"\.mixer\.|\.wte\.", "an outdated Phi file: use the newer revision of the checkpoint"),
    (
        r"tok_embeddings|attention\.w[qkvo]\.",
        "Meta's or Mistral's own format: use the checkpoint in transformers' format",
    ),
    (r"^(module|_orig_mod|_fsdp_wrapped_module)\.", "a wrapped model: save it again without the wrapper"),
    (r"^base_model\.model\.|\.base_layer\.", "a model wrapped by PEFT: merge it (merge_and_unload) and save that"),
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ: use the original checkpoint"),
)


def load_model(model, dtype=torch.float32, device="cpu", quantize="none", adapter=None, revision=None, say=None):
    """A model of minitune.models with the weights of a checkpoint, in eval mode, every parameter frozen.

    model: folder, short name or hub id. quantize: "none", "nf4" or "nf4-dq" turns the linear layers of the blocks
    into 4 bit as their tensors stream in; a checkpoint that bitsandbytes quantised stays as it is. adapter: folder in
    PEFT's format; None: that of the model's own folder, if one lies there. say: called with the line that describes the
    load. Memory above the loaded model stays below twice the largest tensor. Raises ValueError on a file that is
    missing, cut short or of another shape before any weight is read, and on a weight with NaN or infinity when it is."""
    if quantize not in ("none", "nf4", "nf4-dq"):
        raise ValueError(f"quantize is {short(quantize)}, expected none, nf4 or nf4-dq")
    if adapter is not None:
        read_adapter_config(adapter)  # a bad one shows before gigabytes are read
    folder = hub.resolve(str(model), revision)
    own = own_adapter(folder)
    if own is not None and adapter is None:
        read_adapter_config(own)
        tell(f"{folder} holds an adapter beside the model; it is applied, as transformers does.")
        adapter = own
    elif own is not None and expand(adapter).resolve() != own.resolve():
        tell(f"{folder} holds an adapter of its own, which is left out: {adapter} is asked for.")
    device = torch.device(device)
    if device.type == "cpu":
        decode.prepare()
    net, stored_4bit = build_empty(folder)
    if quantize != "none" and not architecture(read_config(folder))[2]:
        raise ValueError(f"{folder} holds a GPT-2, which minitune does not quantise; use --quantize none")
    if stored_4bit and quantize != "none":
        raise ValueError(f"{folder} holds 4-bit weights already; use --quantize none, which keeps them in 4 bit")
    start = time.perf_counter()
    tensors = Tensors(folder)
    tied = tied_embedding(net)
    groups = match_tensors(tensors, net, tied, stored_4bit)
    for name, parts in groups.items():
        owner, _, leaf = name.rpartition(".")
        module = net.get_submodule(owner)
        if len(parts) > 1:  # 4 bit, as bitsandbytes stores it. Copies: the file's pages go back at once
            stored = {part: tensors.read(key).to(device=device, copy=True) for part, key in parts.items()}
            shape = (module.out_features, module.in_features)
            replace(net, owner, quant.NF4Linear.from_bnb(stored, module.bias, dtype, shape, f"{folder}: {name}"))
        elif quantize != "none" and leaf == "weight" and isinstance(module, nn.Linear) and owner != "lm_head":
            weight = tensors.read(parts["weight"]).to(device)
            if weight.dtype == torch.float64:
                weight = weight.float()
            try:
                layer = quant.NF4Linear.from_weight(weight, module.bias, dtype, quantize == "nf4-dq")
            except ValueError as error:
                raise ValueError(f"{folder}: {name}: {error}") from None
            replace(net, owner, layer)
        else:
            module._parameters[leaf] = read_parameter(tensors, name, parts["weight"], dtype, device)
    if tied and "lm_head.weight" not in groups:
        net.lm_head.weight = net.get_parameter(tied)
    net.eos_ids = tuple(i for i in end_ids(folder) if i < net.config.vocab_size)
    check_filled(net)
    if say:
        seconds = time.perf_counter() - start
        say(
            f"Loaded {folder.name}: {parameters_in_words(parameter_count(net))}, {bytes_in_words(model_bytes(net))}"
            + (f", in {seconds:.0f} s." if seconds >= 2 else ".")
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
    tensors = Tensors(folder)
    for name, parts in match_tensors(tensors, net, None, False).items():
        owner, _, leaf = name.rpartition(".")
        net.get_submodule(owner)._parameters[leaf] = read_parameter(tensors, name, parts["weight"], dtype, device)
    check_filled(net)
    net.name = str(model)
    return net.eval()


def own_adapter(folder):
    """The folder of the adapter that lies beside a model in the model's own folder, None where there is none."""
    return folder if (folder / ADAPTER_CONFIG).is_file() else None


def read_parameter(tensors, name, stored, dtype, device):
    """One tensor as a frozen parameter. name, stored: what the model and the file call it. Raises ValueError where it is
    not finite."""
    weight = tensors.read(stored).to(device=device, dtype=dtype, copy=True)
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


def read_config(folder):
    """config.json of a checkpoint folder as a dict."""
    return read_json(Path(folder) / "config.json", {})


class LeftAsIs(TorchFunctionMode):
    """While open, torch.nn.init leaves tensors as they are: to draw numbers for meta tensors it would import torch._dynamo,
    which takes 2 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def build_empty(folder, build=build):
    """(the model of a checkpoint folder on meta, without weights; whether its weights are stored in 4 bit).

    build: of minitune.models, for a language model or for an encoder. Raises ValueError on a config.json that is not
    supported."""
    raw = read_config(folder)
    try:
        with torch.device("meta"), LeftAsIs():
            return build(raw), quant.is_bnb_4bit(raw)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    except (RuntimeError, TypeError) as error:  # meta tensors fail for one reason only: their size
        reason = short(str(error).splitlines()[0])
        raise ValueError(f"{folder}: the sizes in config.json are too large for any machine: {reason}") from None


def stored_tensors(net):
    """Parameters and buffers, a tied one once."""
    return {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}.values()


def model_bytes(net):
    """Bytes of all parameters and buffers, a tied one once."""
    return sum(t.numel() * t.element_size() for t in stored_tensors(net))


def parameter_count(net):
    """Weights of a model, a tied one once, and those of a 4-bit layer as many as it stands for."""
    packed = sum(m.in_features * m.out_features for m in net.modules() if isinstance(m, quant.NF4Linear))
    return packed + sum(p.numel() for p in net.parameters())


def parameters_in_words(count):
    size, unit = next((pair for pair in ((1e9, "B"), (1e6, "M")) if count >= pair[0]), (1e3, "K"))
    return f"{count / size:.1f} {unit} parameters"


def bytes_in_words(count):
    return (
        f"{count / 1e9:.1f} GB"
        if count >= 1e9
        else f"{count / 1e6:.0f} MB"
        if count >= 1e6
        else f"{count / 1e3:.0f} KB"
    )


def replace(net, name, layer):
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, layer)


class Tensors:
    """The tensors of a checkpoint folder, one file or sharded: shapes known at once, contents read one at a time."""

    def __init__(self, folder):
        self.folder = folder
        self.files = {}  # tensor name -> file
        self.shapes = {}
        self.dtypes = {}  # safetensors' names: BF16, F8_E4M3 ...
        shards = self.shards()
        for file, promised in shards.items():
            with open_safetensors(file) as f:
                check_header(file)
                for name in f.keys():
                    if name in self.files and name not in promised:  # a second copy: the index says which one counts
                        continue
                    view = f.get_slice(name)
                    self.files[name], self.shapes[name] = file, tuple(view.get_shape())
                    self.dtypes[name] = view.get_dtype()

    def shards(self):
        """{file: the names that the index puts there}."""
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if os.path.exists(single):  # it goes before an index, as in transformers
            return {single: set()}
        if not os.path.exists(index):
            if own_adapter(self.folder):
                base = read_adapter_config(self.folder).get("base_model_name_or_path")
                raise ValueError(
                    f"{self.folder} holds an adapter, not the weights of a model; name its base"
                    + (f" ({short(base)})" if base else "")
                    + " with --model, and this folder with --adapter"
                )
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
                    f"{index} puts {some([name])} into {short(file)}, which is not a file of its own folder; refused"
                )
            shards.setdefault(self.folder / file, set()).add(name)
        if missing := [file.name for file in shards if not os.path.exists(file)]:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of {len(shards)} files that its index names: "
                f"{some(missing, 3)}; download them"
            )
        return shards

    def read(self, name):
        """One tensor. The file is opened anew, so that the pages of earlier tensors do not stay in memory."""
        with open_safetensors(self.files[name]) as f:
            return f.get_tensor(name)


def open_safetensors(file):
    with paths_explained(file):
        mode = file.stat().st_mode
    if not stat.S_ISREG(mode):  # a pipe may never end
        kind = "a folder" if stat.S_ISDIR(mode) else kind_of(mode)
        raise ValueError(f"{file} cannot be read: it is {kind}, expected a safetensors file")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a whole safetensors file ({short(str(error))}); it is corrupt or cut short: download or "
            "copy it again"
        ) from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({short(str(error))}); expected a safetensors file") from None


def check_header(file):
    """Raises ValueError where the header of a file that safe_open() took names a tensor twice: which one counts is not
    defined."""

    def unique(pairs):
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{file} names {some([twice])} twice in its header, which the format forbids; refused")
        return dict(pairs)

    with open(file, "rb") as f:
        json.loads(f.read(int.from_bytes(f.read(8), "little")), object_pairs_hook=unique)


def own_name(name, net, parameters, prefix):
    """The parameter of a stored tensor, by transformers' rules: with the name of the body (`model.`) before it or without.
    None where there is no such parameter. For a part of a 4-bit weight, that of the weight."""
    base, mark, _ = name.partition(".weight.")
    name = f"{base}.weight" if mark else name
    if hasattr(net, "parameter_of"):
        name = net.parameter_of(name)
    candidates = (name, f"{prefix}{name}", (name or "").removeprefix(prefix))
    return next((candidate for candidate in candidates if candidate in parameters), None)


def match_tensors(tensors, net, tied, stored_4bit):
    """{parameter name: {"weight": tensor name}}, for a weight in 4 bit with "absmax" and the other parts beside it.

    Every parameter has its tensor, of its shape and of a dtype that is read, or a ValueError names what does not fit. A
    tensor that the model has no place for is left out, as in transformers, and named in a line."""
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters(remove_duplicate=False)}
    linear = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    prefix = next(iter(shapes)).partition(".")[0] + "."
    groups, left, unexpected = {}, [], []
    for name in tensors.shapes:
        part = name.partition(".weight.")[2]
        own = own_name(name, net, shapes, prefix)
        if own is None or part and not (stored_4bit and own in linear):
            if own and stored_4bit:  # a 4-bit part of what is no linear layer
                unexpected.append(name)
            elif not STALE.search(name) and not (hasattr(net, "parameter_of") and net.parameter_of(name) is None):
                left.append(name)
            continue
        parts = groups.setdefault(own, {})
        if (part or "weight") in parts:
            raise ValueError(f"{tensors.folder} holds {own} twice: as {some([parts[part or 'weight'], name])}")
        parts[part or "weight"] = name
    said = tie(tensors, groups, tied) if tied else None
    if tied and "lm_head.weight" not in groups:
        del shapes["lm_head.weight"]
    plain = {name: parts["weight"] for name, parts in groups.items() if parts.keys() == {"weight"}}
    if stored_4bit and len(plain) == len(groups):
        raise ValueError(
            f"{tensors.folder}: config.json has a quantization_config for 4-bit weights, but no weight is in 4 bit; "
            "remove quantization_config from it if the checkpoint is not quantised"
        )
    missing = [name for name in shapes if "weight" not in groups.get(name, ())]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": [
            f"{name} {list(tensors.shapes[stored])}, expected {list(shapes[name])}"
            for name, stored in plain.items()
            if tensors.shapes[stored] != shapes[name]
        ],
        f"of a dtype other than {', '.join(FLOATS)}": [
            f"{stored} {tensors.dtypes[stored]}" for stored in plain.values() if tensors.dtypes[stored] not in FLOATS
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {what}: {some(names, 2)}" for what, names in problems.items() if names)
        raise ValueError(f"{tensors.folder}: its weights do not fit its config.json: {found}{hint(missing, left)}")
    if said:
        speak, text = said
        speak(f"{tensors.folder.name}: {text}")
    say_left_out(tensors, net, prefix, left)
    return groups


def hint(missing, left):
    """What tensors that do not fit probably are. missing: parameters without one; left: tensors without a place."""
    if missing and set(missing) <= {"lm_head.weight", "lm_head.bias"}:
        return (
            ". It is the body of a model, saved without its head (transformers would draw one at random); use the "
            "checkpoint of the whole model"
        )
    for pattern, words in FOREIGN:
        if any(re.search(pattern, name) for name in left):
            return f". The names are those of {words}"
    return f"; {len(left)} with other names: {some(left, 2)}" if left else ""


def tie(tensors, groups, tied):
    """Settles, in `groups`, what is read for the embedding `tied` and for the head where config.json ties them. Returns
    (tell or warn, what there is to say about it), or None."""
    head = "lm_head.weight"
    if head not in groups:
        return None
    if tied not in groups:
        groups[tied] = groups.pop(head)
        return tell, f"{head} is read as the embedding too, since config.json ties them."
    if is_equal(tensors, groups[tied]["weight"], groups[head]["weight"]):
        del groups[head]  # a copy of the embedding
        return None
    return warn, (
        f"config.json has tie_word_embeddings true, but {head} differs from {tied}; both are used as they are stored, as in "
        "transformers."
    )


def is_equal(tensors, first, second):
    """Whether two stored tensors hold the same values."""
    if tensors.shapes[first] != tensors.shapes[second] or not tensors.shapes[first]:
        return False
    starts = range(0, tensors.shapes[first][0], 4096)  # in parts, so that no copy is large
    return all(torch.equal(*(tensors.read(name)[i : i + 4096].float() for name in (first, second))) for i in starts)


def say_left_out(tensors, net, prefix, left):
    """One line on what of a checkpoint has no effect here, and one on tensors of the blocks that config.json has no place
    for: these may mean that config.json is wrong."""
    is_body = re.compile(rf"({re.escape(prefix)}|layers\.|h\.|encoder\.|lm_head\.)")
    loud, quiet = [], []
    for name in left:
        is_table = name.endswith(("cos_cached", "sin_cached", "inv_freq"))
        is_zero = name.endswith(".bias") and tensors.dtypes[name] in FLOATS and not tensors.read(name).any()
        (loud if is_body.match(name) and not is_table and not is_zero else quiet).append(name)
    keys = [*net.config.unread, *quant.unknown_keys(read_config(tensors.folder))]
    notes = [f"{some(keys, 3)} of config.json"] if keys else []
    notes += [f"the tensors {some(quiet, 3)}"] if quiet else []
    if notes:
        tell(f"{tensors.folder.name}: passed over, since this model does not use it: {'; '.join(notes)}.")
    if loud:
        warn(
            f"{tensors.folder.name}: config.json has no place for some tensors of the files: {some(loud, 3)}. They are left "
            "out, as in transformers; if the model was trained with them, its answers will be wrong."
        )


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


def default_targets(folder):
    """PEFT's LoRA targets for the architecture of a checkpoint folder. Raises ValueError on a judge, which has none."""
    targets = architecture(read_config(folder))[2]
    if not targets:
        raise ValueError(
            f"{folder} holds a GPT-2: minitune scores text with it and does not train it; name a Llama, Mistral or Phi"
        )
    return targets


def check_trainable(folder):
    """Raises ValueError where a model has an adapter of its own: a new one cannot be trained on top of it."""
    if own_adapter(folder):
        raise ValueError(
            f"{folder} holds an adapter beside the model, and a new one cannot be trained on top of it. Merge it into the "
            f"model first (PEFT's merge_and_unload), or move {ADAPTER_CONFIG} away to train the base alone"
        )
