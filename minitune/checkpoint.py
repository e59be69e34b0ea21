"""Loads checkpoints: the tensors of safetensors files are matched with the parameters of a model and read one by one.

Not here: adapter files (adapters/peft_files.py) and the state of a run (runs/state.py). Only safetensors and JSON are read."""

import re
import time

import torch
from minitune_kernels import nf4, ops
from torch import nn

from minitune import quant
from minitune.adapters.peft_files import load_adapter as load_adapter
from minitune.adapters.peft_files import read_adapter_config
from minitune.adapters.peft_files import save_adapter as save_adapter
from minitune.files import expand
from minitune.model_folder import ModelFolder, build_empty
from minitune.models import build_encoder
from minitune.screen import short, some, tell, warn
from minitune.tensor_files import FLOATS

STALE = re.compile(  # buffers that old files store, and that the model computes from config.json
    r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids|token_type_ids)$"
)
FOREIGN = (  # (pattern of tensor names, the format that they belong to: what to do)
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
    """A model of minitune.models with the weights of a checkpoint, in eval mode, with all parameters frozen.

    model: a ModelFolder, or a folder, short name or hub id. dtype: of the parameters, and the compute dtype of 4-bit layers.
    quantize: "none", or "nf4" or "nf4-dq" to quantise the linear layers of the blocks while their tensors are read; a checkpoint
    that bitsandbytes quantised stays in 4 bit. adapter: a folder in PEFT's format; None: the adapter in the model's own folder,
    if there is one. revision: see hub.resolve. say: called with lines that describe what was loaded.
    Peak memory is the loaded model plus less than twice its largest tensor. Raises ValueError before any weight is read if
    a file is missing, incomplete or has tensors of other shapes, and while reading if a weight has NaN or infinity."""
    if quantize not in ("none", "nf4", "nf4-dq"):
        raise ValueError(f"quantize is {short(quantize)}, expected none, nf4 or nf4-dq")
    if adapter is not None:
        read_adapter_config(adapter)  # raises on a bad one before gigabytes are read
    opened = ModelFolder.open(model, revision)
    folder, own = opened.path, opened.own_adapter
    if own is not None and adapter is None:
        read_adapter_config(own)
        tell(f"{folder} holds an adapter beside the model; it is applied, as in transformers.")
        adapter = own
    elif own is not None and expand(adapter).resolve() != own.resolve():
        tell(f"{folder} holds an adapter beside the model; it is not applied, because {adapter} was given.")
    device = torch.device(device)
    if device.type == "cpu":
        ops.prepare()
    net, stored_4bit = opened.take_empty(), opened.is_4bit
    if quantize != "none" and not opened.row[2]:
        raise ValueError(f"{folder} holds a GPT-2, which minitune does not quantise; use --quantize none")
    if stored_4bit and quantize != "none":
        raise ValueError(f"{folder} holds 4-bit weights already; use --quantize none, which keeps them in 4 bit")
    start = time.perf_counter()
    tensors, tied = opened.tensors, tied_embedding(net)
    groups = match_tensors(opened, net, tied, stored_4bit)
    for name, parts in groups.items():
        owner, _, leaf = name.rpartition(".")
        module = net.get_submodule(owner)
        # Several parts: a 4-bit weight in bitsandbytes' format. Copies, so that the pages of the mapped file are freed.
        if len(parts) > 1:
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
    net.eos_ids = tuple(i for i in opened.eos_ids if i < net.config.vocab_size)
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
    """The encoder of a checkpoint (RoBERTa or BERT), in eval mode, with all parameters frozen. Heads in the files are not read.

    Arguments and errors as in load_model. The result has the argument `model` as .name, from which metrics.bertscore
    chooses the layer to use."""
    opened = ModelFolder.open(model, revision)
    net, tensors = build_empty(opened, build_encoder), opened.tensors
    if opened.is_4bit:
        raise ValueError(f"{opened.path} holds 4-bit weights, expected an encoder in {', '.join(FLOATS)}")
    for name, parts in match_tensors(opened, net, None, False).items():
        owner, _, leaf = name.rpartition(".")
        net.get_submodule(owner)._parameters[leaf] = read_parameter(tensors, name, parts["weight"], dtype, device)
    check_filled(net)
    net.name = opened.name
    return net.eval()


def read_parameter(tensors, name, stored, dtype, device):
    """One tensor as a frozen parameter. name, stored: its names in the model and in the file.

    Raises ValueError if it has NaN or infinity."""
    weight = tensors.read(stored).to(device=device, dtype=dtype, copy=True)
    # aminmax is one pass over the tensor, 10 GB/s on one core; NaN and infinity show in the bounds.
    if not all(bound.isfinite() for bound in weight.aminmax()):
        raise ValueError(
            f"{tensors.folder}: {name} holds NaN or infinity in {str(dtype).removeprefix('torch.')}; the checkpoint is "
            "damaged, or its values are too large for this dtype"
        )
    return nn.Parameter(weight, requires_grad=False)


def check_filled(net):
    """Asserts that every parameter and buffer was loaded."""
    left = [name for name, p in (*net.named_parameters(), *net.named_buffers()) if p.is_meta]
    assert not left, f"not loaded: {left[:5]}"


def tied_embedding(net):
    """Name of the embedding weight that the head shares, or None if the head has its own weight."""
    head = net.lm_head.weight
    return next((name for name, p in net.named_parameters() if p is head and name != "lm_head.weight"), None)


def stored_tensors(net):
    """Parameters and buffers of a model; a tied parameter only once."""
    return {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}.values()


def model_bytes(net):
    """Bytes of all parameters and buffers; a tied parameter counts once."""
    return sum(t.numel() * t.element_size() for t in stored_tensors(net))


def parameter_count(net):
    """Number of parameters; a tied one counts once, and a 4-bit weight counts its elements, not its bytes."""
    packed = sum(m.in_features * m.out_features for m in net.modules() if isinstance(m, quant.NF4Linear))
    return packed + sum(p.numel() for p in net.parameters())


def parameters_in_words(count):
    size, unit = next((pair for pair in ((1e9, "B"), (1e6, "M")) if count >= pair[0]), (1e3, "K"))
    return f"{count / size:.1f} {unit} parameters"


def bytes_in_words(count):
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} KB"


def replace(net, name, layer):
    """Replace the module `name` of a model."""
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, layer)


def own_name(name, net, parameters, prefix):
    """Name of the parameter for a stored tensor, or None. For a part of a 4-bit weight it is the name of the weight.

    name: of the stored tensor. parameters: names in the model. prefix: the name of the body, such as "model."; as in transformers
    the files may have it or not."""
    base, mark, _ = name.partition(".weight.")
    name = f"{base}.weight" if mark else name
    if hasattr(net, "parameter_of"):
        name = net.parameter_of(name)
    candidates = (name, f"{prefix}{name}", (name or "").removeprefix(prefix))
    return next((candidate for candidate in candidates if candidate in parameters), None)


def match_tensors(folder, net, tied, stored_4bit):
    """{parameter name: {"weight": tensor name}}. A 4-bit weight has further parts: {"weight": .., "absmax": .., ...}.

    folder: a ModelFolder. net: the model without weights. tied: see tied_embedding. stored_4bit: whether the checkpoint is in
    4 bit. Raises ValueError if a parameter has no tensor, or one of another shape or an unsupported dtype. A tensor without a
    parameter is ignored, as in transformers, and reported in one line."""
    tensors = folder.tensors
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters(remove_duplicate=False)}
    linear = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    prefix = next(iter(shapes)).partition(".")[0] + "."
    groups, left, unexpected = {}, [], []
    for name in tensors.shapes:
        part = name.partition(".weight.")[2]
        own = own_name(name, net, shapes, prefix)
        if own is None or part and not (stored_4bit and own in linear):
            if own and stored_4bit:  # a part of a 4-bit weight, but of a layer that is not linear
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
    say_left_out(folder, net, prefix, left)
    return groups


def hint(missing, left):
    """The end of the error message: a guess of what the tensors are. missing: parameters without a tensor; left: tensors without
    a parameter."""
    if missing and set(missing) <= {"lm_head.weight", "lm_head.bias"}:
        return (
            ". The model was saved without its head (transformers would initialise one at random); use the checkpoint of the "
            "whole model"
        )
    for pattern, words in FOREIGN:
        if any(re.search(pattern, name) for name in left):
            return f". The names are those of {words}"
    return f"; {len(left)} with other names: {some(left, 2)}" if left else ""


def tie(tensors, groups, tied):
    """Decide which tensors are read for the embedding `tied` and for the head, if config.json ties them; changes `groups`.

    Returns (function, line) to report it with, such as (warn, "..."), or None."""
    head = "lm_head.weight"
    if head not in groups:
        return None
    if tied not in groups:
        groups[tied] = groups.pop(head)
        return tell, f"{head} is used for the embedding too, because config.json ties them."
    if is_equal(tensors, groups[tied]["weight"], groups[head]["weight"]):
        del groups[head]  # a copy of the embedding
        return None
    return warn, (
        f"config.json has tie_word_embeddings true, but {head} differs from {tied}; both are used as stored, as in "
        "transformers."
    )


def is_equal(tensors, first, second):
    """Whether two stored tensors hold the same values."""
    if tensors.shapes[first] != tensors.shapes[second] or not tensors.shapes[first]:
        return False
    starts = range(0, tensors.shapes[first][0], 4096)  # in parts, to keep the fp32 copies small
    return all(torch.equal(*(tensors.read(name)[i : i + 4096].float() for name in (first, second))) for i in starts)


def say_left_out(folder, net, prefix, left):
    """Report, in one line, the keys and tensors of a checkpoint that have no effect here. A second line warns of tensors of the
    blocks: they may mean that config.json is wrong.

    folder: a ModelFolder. prefix: as in own_name. left: names of the tensors without a parameter."""
    tensors, name_of_folder = folder.tensors, folder.path.name
    is_body = re.compile(rf"({re.escape(prefix)}|layers\.|h\.|encoder\.|lm_head\.)")
    loud, quiet = [], []
    for name in left:
        is_table = name.endswith(("cos_cached", "sin_cached", "inv_freq"))
        is_zero = name.endswith(".bias") and tensors.dtypes[name] in FLOATS and not tensors.read(name).any()
        (loud if is_body.match(name) and not is_table and not is_zero else quiet).append(name)
    keys = [*net.config.unread, *quant.unknown_keys(folder.config)]
    notes = [f"{some(keys, 3)} of config.json"] if keys else []
    notes += [f"the tensors {some(quiet, 3)}"] if quiet else []
    if notes:
        tell(f"{name_of_folder}: ignored, because this model does not use it: {'; '.join(notes)}.")
    if loud:
        warn(
            f"{name_of_folder}: the model that config.json describes has no place for some tensors: {some(loud, 3)}. They are "
            "ignored, as in transformers; if the model was trained with them, its answers will be wrong."
        )
