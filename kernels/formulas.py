"""The operations of a model's block, one plain PyTorch function each: the law of the house.

An edit of a function here changes the operation everywhere: in training and decoding, on every device. Models call ops.py, which
uses a faster version only while it agrees with the formula (agreement.py). The gradient of a formula is autograd's.

Letters: B batch, T tokens, C hidden, H heads, H_kv key-value heads, D head dim, S keys, N supervised tokens, V vocabulary.
Functions take any device and float dtype, and return the dtype of their first argument unless they say otherwise."""

import math

import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, the mean in fp32 (arXiv 1910.07467). x (.., C); weight (C,)."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def layer_norm(x, weight, bias, eps):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in fp32 (arXiv 1607.06450). x (.., C)."""
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed * weight + bias).to(x.dtype)


def rope(x, cos, sin):
    """Rotate x (B, H, T, D) by its positions: dim i together with dim i + d/2, for the first d dims. The others stay as they are
    (arXiv 2104.09864, Hugging Face's half-split layout; Phi rotates a part of a head). cos, sin: (B or 1, 1, T, d/2)."""
    half = cos.shape[-1]
    low, high, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


def swiglu(gate, up):
    """silu(gate) * up, both of one shape (arXiv 2002.05202)."""
    return F.silu(gate) * up


def gelu(x):
    """x times the normal distribution's probability below x (arXiv 1606.08415), in fp32."""
    wide = x.float()
    return (wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))).to(x.dtype)


def gelu_tanh(x):
    """GELU with tanh for the error function (arXiv 1606.08415), in fp32."""
    wide = x.float()
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    return (wide * 0.5 * (1 + torch.tanh(inner))).to(x.dtype)


def linear(x, weight, bias=None):
    """x (.., in) @ weight (out, in).T + bias (out,) or None -> (.., out). The product of a 4-bit weight is this one, with the
    dequantised weight (nf4.py)."""
    y = x @ weight.T
    return y if bias is None else y + bias


def lora(y, x, A, B, scaling):
    """y (.., out) + x (.., in) A^T B^T * scaling (arXiv 2106.09685). A (r, in) and B (out, r) are kept in fp32 and rounded to
    x.dtype."""
    low = x @ A.to(x.dtype).T
    return y + (low @ (B * scaling).to(x.dtype).T).to(y.dtype)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v, in fp32 (arXiv 1706.03762). q (B, H, T, D); k, v (B, H_kv, S, D): H / H_kv heads share a
    key-value head (arXiv 2305.13245). mask: bool, expands to (B, H, T, S), True where a query may look; None: everywhere.
    Returns (B, H, T, D)."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (t.float().repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q.float() @ keys.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ values).to(q.dtype)


def cross_entropy(hidden, head, targets):
    """-ln p of each target, (N,) fp32. hidden (N, C); head: a module (.., C) -> (.., V); targets (N,) int64. Training sums it."""
    logits = head(hidden).float()
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]


def most_likely(logits, count):
    """The `count` most likely of V tokens: (log-probabilities (R, count) fp32, ids (R, count) int64), the best first, of equal
    ones the lower id. logits (R, V). A row with NaN has NaN."""
    logprobs, ids = logits.float().log_softmax(-1).sort(dim=-1, descending=True, stable=True)
    return logprobs[:, :count], ids[:, :count]
