"""LoRA (arXiv 2106.09685): a frozen linear layer plus B(A(x)) * scaling. Layers are wrapped by name; tensors have PEFT's keys.

Not here: adapter files, which peft_files.py reads and writes."""

import math
import re
import time
import warnings
from contextlib import contextmanager

import regex
import torch
from minitune_kernels import ops
from torch import nn

from minitune.screen import short, some

PATTERN_SECONDS = 1  # limit for matching a pattern against all names of a model; usual patterns take milliseconds
PATTERN_LENGTH, PATTERN_COPIES = 40_000, 10_000  # longest pattern in characters; largest product of its {n} repeats


class LoRALinear(nn.Module):
    """base_layer(x) + lora_B(lora_A(dropout(x))) * scaling.

    base_layer: nn.Linear or a quantised linear layer, frozen. r: the rank. alpha: scaling is alpha / r, or alpha / sqrt(r) with
    use_rslora (arXiv 2312.03732). dropout: on the input of lora_A.

    lora_A (r, in) and lora_B (out, r) are fp32 for every compute dtype, since bf16 would round small updates away. lora_B
    starts at zero, so that the layer starts equal to base_layer; inject() initialises lora_A."""

    def __init__(self, base_layer, r, alpha, dropout=0.0, use_rslora=False, device=None):
        super().__init__()
        self.base_layer = base_layer
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        """x (.., in) -> (.., out) in the dtype of base_layer's output."""
        rows = x.flatten(0, -2)  # (B * T, in)
        dropped = self.lora_dropout(rows) if self.lora_dropout.training else rows
        y = ops.lora(self.base_layer(rows), dropped, self.lora_A.weight, self.lora_B.weight, self.scaling)
        return y.view(*x.shape[:-1], -1)


def match_targets(model, targets):
    """Names of the linear layers that `targets` selects, in the model's order.

    targets: a list of names, each a full name or the last parts of one; ("all-linear",) for every linear layer but the
    head; or, as in PEFT, one string that is a regular expression for full names. Raises ValueError if a target matches no
    layer, or if the model already has LoRA layers."""
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already; load it again before adding others")
    # nn.Linear and the 4-bit layers
    linears = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
    if isinstance(targets, str):
        if targets.lower() != "all-linear":
            found = matching(targets, linears)
            if not found:
                raise ValueError(
                    f"lora_targets: no linear layer matches the pattern {short(targets)}; {known_leaves(linears)}"
                )
            return found
        targets = ("all-linear",)
    found, unmatched = set(), []
    for target in targets:
        if target == "all-linear":
            matches = {name for name in linears if name != "lm_head"}
        else:
            matches = {name for name in linears if name == target or name.endswith("." + target)}
        found |= matches
        if not matches:
            unmatched.append(target)
    if unmatched:
        raise ValueError(f"lora_targets: no linear layer is named {some(unmatched)}; {known_leaves(linears)}")
    return [name for name in linears if name in found]


def matching(pattern, names):
    """The `names` that a regular expression matches as a whole, as re.fullmatch in PEFT does.

    Raises ValueError if `pattern` is not a regular expression, or if matching takes more than PATTERN_SECONDS: (.*)*x would
    take years."""
    too_long = ValueError(
        f"lora_targets: the pattern {short(pattern)} needs too much time or memory; use a simpler one, or a list of names"
    )
    # regex expands repeats when it compiles: ((x{1000}){1000}){1000} would use up the memory.
    copies = math.prod(int((most or least or "1")[:6]) or 1 for least, most in re.findall(r"\{(\d*),?(\d*)\}", pattern))
    if len(pattern) > PATTERN_LENGTH or copies > PATTERN_COPIES:
        raise too_long
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FutureWarning about the syntax of the pattern
            re.compile(pattern)  # PEFT uses re, so a pattern that re refuses must be refused here
            compiled = regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"lora_targets: {short(pattern)} is not a regular expression: {short(str(error))}") from None
    end = time.monotonic() + PATTERN_SECONDS
    try:
        return [name for name in names if compiled.fullmatch(name, timeout=max(end - time.monotonic(), 1e-3))]
    except TimeoutError:
        raise too_long from None


def known_leaves(linears):
    """The last parts of the names of linear layers, as the end of an error message."""
    return "this model has " + some(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears), 10)


def inject(model, r, alpha, dropout=0.0, targets=("all-linear",), use_rslora=False, seed=0):
    """Freeze `model` and wrap the linear layers that `targets` selects (see match_targets) in LoRALinear, in place.

    lora_A is drawn from a kaiming-uniform distribution by a CPU generator with this seed, so it is equal on every device. Other
    arguments as in LoRALinear. Returns the names of the wrapped layers. Raises ValueError on a bad r, and as match_targets
    does."""
    if not (isinstance(r, int) and r > 0):
        raise ValueError(f"the rank r is {short(r)}, expected a whole number above 0")
    names = match_targets(model, targets)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        layer = wrap(model, name, r, alpha, dropout, use_rslora)
        start = torch.empty(r, layer.base_layer.in_features)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        layer.lora_A.weight.data.copy_(start)
    return names


def wrap(model, name, r, alpha, dropout, use_rslora):
    """Wrap the linear layer `name` in a LoRALinear on the same device. Returns the LoRALinear."""
    base = model.get_submodule(name)
    device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
    layer = LoRALinear(base, r, alpha, dropout, use_rslora, device)
    put(model, name, layer.train(model.training))
    return layer


def lora_layers(model):
    """{name: LoRALinear} of a model, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def switched_off(model):
    """Context in which `model` computes without its adapter: each LoRALinear is replaced by its base_layer."""
    layers = lora_layers(model)
    try:
        for name, layer in layers.items():
            put(model, name, layer.base_layer)
        yield
    finally:
        for name, layer in layers.items():
            put(model, name, layer)


def put(model, name, layer):
    """Replace the module `name` of the model."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def adapter_tensors(model):
    """{PEFT's key: parameter} of every LoRALinear; the parameters are not copied."""
    return {
        f"base_model.model.{name}.{part}.weight": getattr(module, part).weight
        for name, module in lora_layers(model).items()
        for part in ("lora_A", "lora_B")
    }
