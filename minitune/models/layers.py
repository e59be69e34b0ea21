"""The layers that every architecture shares: linear layers, norms, RoPE and its scalings, attention over packed documents.

The formulas are in kernels/formulas.py. Each model file writes out how a block connects these layers. Letters: B batch, T
tokens of this call, S keys (T plus the cached ones, see cache.py), C hidden, H heads, H_kv key-value heads, D head dim."""

import math
from dataclasses import dataclass, field

import torch
from minitune_kernels import ops
from torch import nn

from minitune.screen import short

MAX_NUMBER = 1e30  # largest number accepted from a config.json: its square is finite in float64

ACTIVATIONS = {"gelu": ops.gelu, "gelu_new": ops.gelu_tanh, "gelu_pytorch_tanh": ops.gelu_tanh}


class Linear(nn.Linear):
    """nn.Linear through ops.linear, which on a CPU has a faster product for the few rows of a decoding step.

    whole_texts: passed to ops.linear; True in the models that score texts (GPT-2, BERT, RoBERTa)."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, whole_texts=False):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.whole_texts = whole_texts

    def forward(self, x):
        """x (.., in_features) -> (.., out_features) in x.dtype."""
        return ops.linear(x, self.weight, self.bias, self.whole_texts)


def project(x, *layers):
    """[layer(x) for layer in layers], for at most three layers. x: (.., C).

    One call computes all products if every layer is a plain Linear without hooks. A layer wrapped by LoRA, a 4-bit layer or
    a hook makes each layer run by itself."""
    if all(type(layer) is Linear and not layer._forward_hooks and not layer._forward_pre_hooks for layer in layers):
        return ops.linears(x, *((layer.weight, layer.bias) for layer in layers))
    return [layer(x) for layer in layers]


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm through ops.layer_norm. whole_texts: as in Linear."""

    def __init__(self, hidden_size, eps, whole_texts=False):
        super().__init__(hidden_size, eps)
        self.whole_texts = whole_texts

    def forward(self, x):
        """x (.., C) -> (.., C) in x.dtype."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps, self.whole_texts)


class RMSNorm(nn.Module):
    """RMSNorm with a weight (arXiv 1910.07467), through ops.rms_norm."""

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x):
        """x (.., C) -> (.., C) in x.dtype."""
        return ops.rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864) in Hugging Face's half-split layout, with its scalings.

    head_dim: number of rotated dims of each head: all of them, or in Phi the first part. theta: base of the frequencies.
    kind: default, linear, dynamic or llama3. The other fields are parameters of the scaled kinds."""

    head_dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0  # context of pre-training, for dynamic and llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def inverse_frequencies(self, length, device=None):
        """Angle per position, in radians: (head_dim / 2,) fp32.

        length: tokens in the longest sequence; used by the dynamic kind only."""
        theta = self.theta
        if self.kind == "dynamic" and length > self.original_length:
            stretch = self.factor * length / self.original_length - (self.factor - 1)
            theta = theta * stretch ** (self.head_dim / (self.head_dim - 2))
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=device).float() / self.head_dim
        inverse = 1.0 / theta**steps
        if self.kind == "linear":
            inverse = inverse / self.factor
        elif self.kind == "llama3":  # long wavelengths are stretched, short ones kept, those between are interpolated
            waves = 2 * math.pi / inverse
            blend = (self.original_length / waves - self.low_freq_factor) / (
                self.high_freq_factor - self.low_freq_factor
            )
            # Swapped factors: transformers warns, and then uses the lower bound only.
            if self.low_freq_factor > self.high_freq_factor:
                is_long = waves > self.original_length / self.low_freq_factor
                blend = torch.where(is_long, 0.0, 1.0)
            blend = blend.clamp(0, 1)
            inverse = (1 - blend) * inverse / self.factor + blend * inverse
        return inverse

    def tables(self, positions, dtype, documents=None):
        """positions (B, T) int64 -> (cos, sin), each (B, 1, T, head_dim / 2), computed in fp32 and returned in dtype.

        documents: lengths of the packed documents, or None. The dynamic kind scales each by its own length."""
        if self.kind == "dynamic" and documents:
            parts = [self.tables(part, dtype) for part in positions.split(documents, dim=1)]
            return tuple(torch.cat(table, dim=2) for table in zip(*parts, strict=True))
        if self.kind == "dynamic" and len(positions) > 1:  # each row is scaled by its own length
            parts = [self.tables(row[None], dtype) for row in positions]
            return tuple(torch.cat(table) for table in zip(*parts, strict=True))
        length = int(positions.max()) + 1 if self.kind == "dynamic" else 0
        angles = positions[:, None, :, None].float() * self.inverse_frequencies(length, positions.device)
        return angles.cos().to(dtype), angles.sin().to(dtype)


ROPE_KINDS = {  # kind -> the settings that it requires
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(config, head_dim, default_partial=1.0, is_partial=False):
    """(Rope, list of the settings without effect) of a config.json, given as a dict.

    Reads the old spelling (rope_theta, rope_scaling), the new one (rope_parameters), or both. Where the two disagree, the
    result is the one of transformers. head_dim: dims of a head. default_partial: rotated share of a head if the file does not
    name one. is_partial: whether the file may change that share. Raises ValueError on a scaling that is not implemented."""
    old, new = (config.get(key) for key in ("rope_scaling", "rope_parameters"))
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict | None):
            raise ValueError(f"{key} is {short(value)}, expected an object or null")
    name = "rope_scaling" if old else "rope_parameters"
    settings, unread = dict(old or new or {}), []
    if old and new and any(value != settings.get(key, config.get(key)) for key, value in new.items()):
        unread.append("rope_parameters (rope_scaling takes precedence)")

    def given(key, default):
        """A setting of the RoPE object; if it is missing there, the same key at the top level of config.json."""
        inner, outer = settings.pop(key, None), config.get(key)
        if inner is not None and outer is not None and inner != outer:
            unread.append(f"{key} ({name}.{key} takes precedence)")
        return first_given(inner, outer, default)

    theta, partial = given("rope_theta", 10000.0), given("partial_rotary_factor", default_partial)
    kinds = [settings.pop(key) for key in ("rope_type", "type") if settings.get(key) is not None]
    kind = kinds[0] if kinds else "default"
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise ValueError(
            f"rope scaling of type {short(kind)} is not supported; minitune takes {', '.join(ROPE_KINDS)}. "
            "Use a checkpoint without it, or add it to Rope in minitune/models/layers.py"
        )
    if len(kinds) > 1 and kinds[1] != kind:
        unread.append(f"{name}.type (rope_type takes precedence)")
    outer, context = config.get("original_max_position_embeddings"), config.get("max_position_embeddings")
    if kind == "llama3":
        settings["original_max_position_embeddings"] = first_given(
            outer, settings.get("original_max_position_embeddings"), context
        )
    elif outer is not None:
        unread.append("original_max_position_embeddings")
    if missing := [key for key in ROPE_KINDS[kind] if settings.get(key) is None]:
        raise ValueError(f"rope scaling of type {kind!r} needs {', '.join(missing)}")
    extra = [key for key, value in settings.items() if key not in ROPE_KINDS[kind] and value is not None]
    unread += [f"{name}.{key}" for key in extra if (key, settings[key]) != ("factor", 1.0)]
    used = {key: settings[key] for key in ROPE_KINDS[kind]}
    if not is_partial and partial != default_partial and kind == "default":
        unread.append("partial_rotary_factor (this architecture rotates whole heads)")
        partial = default_partial
    for key, value in {"rope_theta": theta, "partial_rotary_factor": partial, **used}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_NUMBER:
            raise ValueError(f"{key} is {short(value)}, expected a number above 0 and at most {MAX_NUMBER:g}")
    if partial != default_partial and not is_partial:
        raise ValueError(f"partial_rotary_factor is {partial}, expected 1: this architecture rotates whole heads")
    if kind == "llama3" and used["low_freq_factor"] == used["high_freq_factor"]:
        raise ValueError(
            f"low_freq_factor and high_freq_factor are both {used['low_freq_factor']}, expected two different numbers"
        )
    rotary = int(head_dim * partial)
    if rotary % 2 or not 0 < rotary <= head_dim or kind == "dynamic" and rotary == 2:
        raise ValueError(
            f"RoPE of type {kind!r} rotates {rotary} of {head_dim} dims of a head, expected an even number"
        )
    # For the dynamic kind this is always max_position_embeddings.
    original = used.pop("original_max_position_embeddings", context or 0)
    return Rope(rotary, theta, kind, original_length=original, **used), unread


def first_given(*values):
    return next(value for value in values if value is not None)


@dataclass
class Layout:
    """Positions of the tokens of one call, and which keys each query may attend to. Made once per call, shared by the layers.

    positions: (B, T) int64. window: tokens of a sliding window, or None. documents: lengths of the documents packed into the
    one row, or None. mask: (B or 1, 1, T, S) bool, True where a query may attend, or None for causal attention.
    window_masks: masks of documents longer than the window, by length. cache_masks: the result of Cache.masks(), once asked
    for."""

    positions: torch.Tensor
    window: int | None = None
    documents: list[int] | None = None
    mask: torch.Tensor | None = None
    window_masks: dict = field(default_factory=dict)
    cache_masks: tuple | None = None

    @classmethod
    def of(cls, input_ids, attention_mask=None, documents=None, cache=None, window=None):
        """The layout of input_ids (B, T). At most one of the next three is given:

        attention_mask: (B, T), 0 on padding, left or right. documents: lengths of documents packed into one row; B is 1 and
        they sum to T. cache: a cache.Cache, which knows the positions of the new tokens. window: tokens of a sliding window,
        or None. Raises ValueError if the arguments do not fit together."""
        B, T = input_ids.shape
        device = input_ids.device
        if sum(given is not None for given in (attention_mask, documents, cache)) > 1:
            raise ValueError("attention_mask, documents and cache are given together; give one of them")
        if cache is not None:
            return cls(cache.positions(T, device), window, documents=[b - a for _, a, b in cache.pieces] or None)
        if documents is not None:
            if B != 1 or sum(documents) != T:
                raise ValueError(f"documents={documents} must sum to the {T} tokens of one row (here {B} rows)")
            positions = torch.cat([torch.arange(n, device=device) for n in documents])[None]
            return cls(positions, window, documents=[n for n in documents if n])
        if attention_mask is None:
            positions = torch.arange(T, device=device).expand(B, T)
        else:
            if attention_mask.shape != (B, T):
                raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(B, T)}")
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        mask = None
        if attention_mask is not None or window and T > window:
            mask = ops.causal_mask(T, T, window, device)
            if attention_mask is not None:
                # Padding attends to itself: a softmax over an empty row would give NaN.
                own = torch.eye(T, dtype=torch.bool, device=device)
                mask = mask & attention_mask.bool()[:, None, None, :] | own
        return cls(positions, window, mask=mask)

    def masks(self, cache):
        """The result of cache.masks() for these positions, computed once for all layers."""
        if not self.cache_masks:
            self.cache_masks = cache.masks(self.positions)
        return self.cache_masks

    def document_mask(self, length):
        """Mask (1, 1, length, length) of a packed document, or None (causal) if it fits into the window."""
        if not self.window or length <= self.window:
            return None
        if length not in self.window_masks:
            self.window_masks[length] = ops.causal_mask(length, length, self.window, self.positions.device)
        return self.window_masks[length]


def attention(q, k, v, layout, cache=None):
    """Softmax attention with scores divided by sqrt(D). Returns (B, T, H * D) in q.dtype.

    q: (B, H, T, D). k, v: (B, H_kv, T, D), H a multiple of H_kv. layout: a Layout. cache: a cache.LayerCache, which stores k and
    v; the queries then attend to the cached keys too."""
    if cache is not None:
        return cache.attend(q, k, v, layout)
    B, H, T, D = q.shape
    if layout.documents is None:
        out = ops.attention(q, k, v, layout.mask, layout.mask is None and T > 1).transpose(1, 2)  # (B, T, H, D)
    else:  # one call per document, so that no scores between documents are computed
        outputs = []
        for *piece, n in zip(*(t.split(layout.documents, dim=2) for t in (q, k, v)), layout.documents, strict=True):
            mask = layout.document_mask(n)
            outputs.append(ops.attention(*piece, mask, mask is None).transpose(1, 2))
        out = torch.cat(outputs, dim=1)
    return out.reshape(B, T, H * D)
