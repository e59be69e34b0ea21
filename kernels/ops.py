"""The door to the operations of a model's block: callers pass tensors and get tensors.

Each function computes its formula in formulas.py, by a faster version where there is one: C (ops_cpu.py) on a CPU in fp32 and
bf16 if no gradient is recorded, Triton (ops_triton.py), or PyTorch with fused functions and gradients written by hand
(ops_torch.py). A version is used only while it agrees with the formula (agreement.py). Otherwise the formula itself runs.

MINITUNE_KERNELS=torch uses no C. MINITUNE_KERNELS=triton uses the Triton versions, on CUDA from compute capability 8.0 on. They
are not the default: nobody has measured yet whether they are faster than PyTorch. Letters as in formulas.py, and R sequences."""

import functools
import importlib.util
import os
from typing import NamedTuple

import torch
from minitune_kernels import agreement, formulas, nf4, ops_cpu, ops_torch
from minitune_kernels.agreement import agrees
from minitune_kernels.direct import is_direct

formulas_fingerprint = agreement.formulas_fingerprint  # for files that are wrong once a formula was edited
prepare = ops_cpu.prepare  # builds the C kernels: call it before a measured time begins
Shape = ops_cpu.Shape  # of a cache in C
ACTIVATIONS = ("gelu", "gelu_tanh")  # of linear_activation()


@functools.cache
def why_no_triton(device):
    """None where the Triton versions run on `device`, otherwise the reason in words."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on a CPU Triton runs in its interpreter only, under TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda"):
        return f"a device of type {device.type} has no Triton kernels here"
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def triton_for(x):
    """The module ops_triton where its versions are asked for and run on the device of x, else None."""
    if (
        os.environ.get("MINITUNE_KERNELS") != "triton"
        or x.dtype not in nf4.FLOATS
        or why_no_triton(x.device) is not None
    ):
        return None
    if not is_direct(x):
        return None
    from minitune_kernels import ops_triton

    return ops_triton


def rms_norm(x, weight, eps):
    """See formulas.rms_norm."""
    if ops_cpu.takes(x) and ops_cpu.is_along(weight, x) and agrees("rms_norm", "C", x):
        return ops_cpu.rms_norm(x, weight, eps)
    if (triton := triton_for(x)) and triton.fits_rms_norm(x, weight) and agrees("rms_norm", "Triton", x):
        return triton.rms_norm(x, weight, eps)
    if agrees("rms_norm", "torch", x):
        return ops_torch.rms_norm(x, weight, eps)
    return formulas.rms_norm(x, weight, eps)


def layer_norm(x, weight, bias, eps, whole_texts=False):
    """See formulas.layer_norm. whole_texts: for a judge, whose figures keep the bits of torch's function. C is not used."""
    if (
        not whole_texts
        and ops_cpu.takes(x)
        and ops_cpu.is_along(weight, x)
        and ops_cpu.is_along(bias, x)
        and agrees("layer_norm", "C", x)
    ):
        return ops_cpu.layer_norm(x, weight, bias, eps)
    if agrees("layer_norm", "torch", x):
        return ops_torch.layer_norm(x, weight, bias, eps)
    return formulas.layer_norm(x, weight, bias, eps)


def rope(x, cos, sin):
    """See formulas.rope."""
    if (
        ops_cpu.takes(x)
        and x.stride(-1) == 1
        and ops_cpu.turns(cos, x)
        and ops_cpu.turns(sin, x)
        and agrees("rope", "C", x)
    ):
        return ops_cpu.rope(x, cos, sin)
    if (triton := triton_for(x)) and triton.fits_rope(x, cos, sin) and agrees("rope", "Triton", x):
        return triton.rope(x, cos, sin)
    if agrees("rope", "torch", x):
        return ops_torch.rope(x, cos, sin)
    return formulas.rope(x, cos, sin)


def swiglu(gate, up):
    """See formulas.swiglu."""
    is_pair = up.dtype is gate.dtype and up.shape == gate.shape
    if is_pair and ops_cpu.takes(gate) and agrees("swiglu", "C", gate):
        return ops_cpu.swiglu(gate, up)
    if is_pair and (triton := triton_for(gate)) and agrees("swiglu", "Triton", gate):
        return triton.swiglu(gate, up)
    if agrees("swiglu", "torch", gate):
        return ops_torch.swiglu(gate, up)
    return formulas.swiglu(gate, up)


def gelu(x):
    """See formulas.gelu."""
    return ops_torch.gelu(x) if agrees("gelu", "torch", x) else formulas.gelu(x)


def gelu_tanh(x):
    """See formulas.gelu_tanh."""
    if ops_cpu.takes(x) and agrees("gelu_tanh", "C", x):
        return ops_cpu.gelu_tanh(x)
    return ops_torch.gelu_tanh(x) if agrees("gelu_tanh", "torch", x) else formulas.gelu_tanh(x)


def linear(x, weight, bias=None, whole_texts=False):
    """See formulas.linear. C multiplies the few rows of a decoding step. whole_texts: as in layer_norm."""
    if not whole_texts and ops_cpu.fits(x, weight, bias) and agrees("linear", "C", x):
        return ops_cpu.linear(x, weight, bias)
    if agrees("linear", "torch", x):
        return ops_torch.linear(x, weight, bias)
    return formulas.linear(x, weight, bias)


def linears(x, *layers):
    """[linear(x, weight, bias) for weight, bias in layers], at most three. One call of C if it can multiply all of them."""
    if all(ops_cpu.fits(x, *layer) for layer in layers) and agrees("linear", "C", x):
        return ops_cpu.linears(x, *layers)
    return [linear(x, *layer) for layer in layers]


def linear_activation(x, weight, bias, activation=None):
    """linear(), then gelu or gelu_tanh by name, of whole texts in an encoder.

    In fp32 on a CPU by oneDNN, which is in torch beside MKL. On AMD Zen 4 it multiplies 1.1 times as fast (one core, 512 to 2048
    rows of 768 and 3072), and gelu takes a fifth of the time, as its input is still in the cache."""
    if has_one_dnn() and x.is_cpu and x.dtype is torch.float32 and not torch.is_grad_enabled():
        if agrees("linear", "oneDNN", x) and (activation is None or agrees(activation, "oneDNN", x)):
            name, approximation = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}[
                activation
            ]
            return agreement.one_dnn(x, weight, bias, name, approximation)
    y = linear(x, weight, bias, whole_texts=True)
    return y if activation is None else {"gelu": gelu, "gelu_tanh": gelu_tanh}[activation](y)


@functools.cache
def has_one_dnn():
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def lora(y, x, A, B, scaling):
    """See formulas.lora. y (rows, out), x (rows, in); y may be overwritten."""
    if (
        A.dtype is B.dtype is torch.float32  # .to(dtype) may have changed them
        and A.is_cpu
        and B.is_cpu
        and x.numel() <= ops_cpu.MAX_ROWS * x.shape[-1]
        and ops_cpu.takes(x)
        and A.shape[1] == x.shape[-1]
        and y.shape == (*x.shape[:-1], len(B))
        and agrees("lora", "C", x)
    ):
        return ops_cpu.add_lora(y.to(x.dtype).contiguous(), x, A, B, scaling)
    if agrees("lora", "torch", x):
        return ops_torch.lora_(y, x, A, B, scaling)
    return formulas.lora(y, x, A, B, scaling)


def causal_mask(T, S, window, device):
    """(1, 1, T, S) bool: each of the last T of S positions sees itself and the window - 1 tokens before it (None: all)."""
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
    mask = distance >= 0
    return (mask & (distance < window) if window else mask)[None, None]


def attention(q, k, v, mask=None, is_causal=False):
    """See formulas.attention. is_causal: in place of a mask, the causal one of T queries over T keys."""
    if agrees("attention", "torch, causal" if is_causal else "torch", q):
        return ops_torch.attention(q, k, v, mask, is_causal)
    if is_causal:
        mask = causal_mask(q.shape[2], k.shape[2], None, q.device)
    return formulas.attention(q, k, v, mask)


class CacheForm(NamedTuple):
    """How a key-value cache is stored, which follows from what attends over it. Chosen once for a cache, by cache_form().

    has_writers: attention takes a Shape, which may name the sequence that wrote a slot, so that nothing moves where beams change
    places; otherwise it takes masks, and keys are moved."""

    version: str
    dtype: torch.dtype
    has_writers: bool


def cache_form(k):
    """The CacheForm of a cache for keys like k, the keys of a prompt."""
    if ops_cpu.takes(k) and agrees("attention", "C, over a cache", k):
        return CacheForm("C", k.dtype, True)
    if agrees("attention", "torch, over a cache", k):
        # ops_torch multiplies in fp32: a cache in 16 bits would be converted at every step
        return CacheForm("torch", torch.float32 if k.is_cpu else k.dtype, False)
    return CacheForm("formula", k.dtype, False)


def attention_over_cache(form, q, k, v, stores, where):
    """Store k, v (R, H_kv, T, D), the next T tokens of each sequence, and attend with q (R, H, T, D). Returns (R, T, H * D).

    stores: keys and values of the prompts, (B, H_kv, P, D), and of the new tokens, (R, H_kv, capacity, D); R = B * n, and the n
    sequences of a prompt share its keys. where: a Shape if form.has_writers, else (slots (T,) int64 of the new tokens, mask
    over the new tokens (1, 1, 1, T, capacity), and, only if a prompt token is hidden from a query, a mask over the prompts
    (B, 1, n or 1, 1, T or 1, P)), both True where a query may look."""
    if form.has_writers:
        return ops_cpu.attention_over_cache(q, k, v, where, stores)
    slots, new_mask, *prompt_mask = where
    for store, new in zip(stores[2:], (k, v), strict=True):
        store.index_copy_(2, slots, new.to(store.dtype))
    attend = ops_torch.attention_over_cache if form.version == "torch" else gathered_attention
    return attend(q, stores, new_mask, *prompt_mask or [None]).transpose(1, 2).flatten(2)


def gathered_attention(q, stores, new_mask, prompt_mask):
    """attention_over_cache() by the formula, over the keys of each sequence side by side. Returns (R, H, T, D)."""
    prompt_k, prompt_v, new_k, new_v = stores
    (R, _, T, _), (B, _, P, _) = q.shape, prompt_k.shape
    if prompt_mask is None:
        prompt_mask = new_mask.new_ones(())
    prompt_mask = prompt_mask.expand(B, 1, R // B, 1, T, P).reshape(R, 1, T, P)
    mask = torch.cat([prompt_mask, new_mask[0].expand(R, 1, T, -1)], dim=-1)
    pairs = (prompt_k, new_k), (prompt_v, new_v)
    keys, values = (torch.cat([before.repeat_interleave(R // B, 0), new], dim=2) for before, new in pairs)
    return formulas.attention(q, keys, values, mask)


def cross_entropy(hidden, head, targets):
    """The sum of formulas.cross_entropy over the targets, () fp32, without ever holding all logits.

    Its gradient is computed in the forward pass, for a chunk of tokens at a time. head: a module (.., C) -> (.., V)."""
    if torch.is_grad_enabled() and (hidden.requires_grad or ops_torch.trained_parameters(head)):
        if (triton := triton_for(hidden)) and agrees("cross_entropy", "Triton", hidden):
            return ops_torch.cross_entropy_with_gradient(hidden, head, targets, triton.loss_and_gradient)
        if agrees("cross_entropy", "torch", hidden):
            return ops_torch.cross_entropy_with_gradient(hidden, head, targets)
        return formulas.cross_entropy(hidden, head, targets).sum()
    if not len(targets):
        return hidden.sum().float() * 0
    if agrees("cross_entropy", "torch, without a gradient", hidden):
        return torch.stack(ops_torch.cross_entropy(hidden, head, targets, "sum")).sum()
    return token_losses(hidden, head, targets).sum()


def token_losses(hidden, head, targets):
    """formulas.cross_entropy without a gradient, a chunk of tokens at a time: (N,) fp32."""
    if agrees("cross_entropy", "torch, without a gradient", hidden):
        return torch.cat(ops_torch.cross_entropy(hidden, head, targets))
    parts = zip(hidden.split(ops_torch.CHUNK), targets.split(ops_torch.CHUNK), strict=True)
    return torch.cat([formulas.cross_entropy(h, head, t) for h, t in parts])


def most_likely(logits, count):
    """See formulas.most_likely. Of equal tokens any may be first where C is not taken."""
    if ops_cpu.takes(logits) and agrees("most_likely", "C", logits):
        return ops_cpu.most_likely(logits, count)
    if agrees("most_likely", "torch, without a gradient", logits):
        return ops_torch.most_likely(logits, count)
    return formulas.most_likely(logits, count)


def steady_rows(x, operations, weights):
    """Largest number of rows of x for which each row's result is bit-identical to that of the row alone; 1 if it is not known.

    operations: names of formulas; weights: of products; x: a tensor like the rows. 1 if a library multiplies, as its order of
    summation depends on the number of rows, and if torch computes gelu or a formula, which may treat the end of a vector
    differently."""
    versions = {"attention": "C, over a cache"}
    if "gelu" in operations or not ops_cpu.takes(x) or ("linear" in operations and not ops_cpu.max_rows(x.dtype)):
        return 1
    if not all(agrees(operation, versions.get(operation, "C"), x) for operation in operations):
        return 1
    rows = [ops_cpu.MAX_ROWS]
    for weight in weights:
        is_taken = weight.shape[1] % 32 == 0 and weight.is_contiguous()
        rows.append(max(1, ops_cpu.max_rows(weight.dtype)) if is_taken else 1)
    return min(rows)
