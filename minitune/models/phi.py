"""Phi 1, 1.5 and 2 (arXiv 2306.11644, 2309.05463): attention and MLP in parallel after one LayerNorm, partial RoPE,
biases.

Module names are Hugging Face's, so that its weights load unchanged. B, T, C, H, D as in layers.py."""

from dataclasses import dataclass
from functools import partial

import torch
from minitune_kernels import ops
from torch import nn
from torch.utils.checkpoint import checkpoint

from minitune.models import config_json
from minitune.models.layers import (
    ACTIVATIONS,
    LayerNorm,
    Layout,
    Linear,
    Rope,
    attention,
    project,
    read_rope,
)

LORA_TARGETS = ("q_proj", "v_proj", "fc1", "fc2")


@dataclass(frozen=True)
class PhiConfig:
    """The settings in the config.json of a Phi."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    layer_norm_eps: float
    hidden_act: str
    rope: Rope
    embd_pdrop: float
    resid_pdrop: float
    tie_word_embeddings: bool
    unread: tuple[str, ...] = ()  # keys of config.json without effect here

    @classmethod
    def from_json(cls, raw):
        """raw: config.json as a dict, in the old or the new spelling. Raises ValueError on what is not supported."""
        read = config_json.Reader(raw, "phi")
        heads = read.integer("num_attention_heads", 32)
        layers = read.layers("num_hidden_layers", 24)
        context = read.integer("max_position_embeddings", 2048)
        hidden_size = read.integer("hidden_size", 2048)
        head_dim = read.integer("head_dim", None) or hidden_size // heads
        read.training("attention_dropout")
        read.only("qk_layernorm", False)
        read.decoder(layers, context)
        return read.done(
            cls(
                vocab_size=read.integer("vocab_size", 51200),
                hidden_size=hidden_size,
                intermediate_size=read.integer("intermediate_size", 8192),
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=read.groups("num_key_value_heads", None, heads),
                head_dim=head_dim,
                max_position_embeddings=context,
                layer_norm_eps=read.number("layer_norm_eps", 1e-5),
                hidden_act=read.only("hidden_act", "gelu_new", "gelu_pytorch_tanh", "gelu"),
                rope=read.rope(lambda raw: read_rope(raw, head_dim, default_partial=0.5, is_partial=True)),
                embd_pdrop=read.number("embd_pdrop", 0.0),
                resid_pdrop=read.number("resid_pdrop", 0.0),
                tie_word_embeddings=read.boolean("tie_word_embeddings", False),
            )
        )


class PhiAttention(nn.Module):
    """Self-attention with partial RoPE and biases."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        C = config.hidden_size
        self.q_proj = Linear(C, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(C, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(C, config.num_key_value_heads * config.head_dim)
        self.dense = Linear(config.num_attention_heads * config.head_dim, C)

    def forward(self, x, rope, layout, cache=None):
        """x (B, T, C) -> (B, T, C).

        rope: (cos, sin) of Rope.tables(), each (B, 1, T, rope.head_dim / 2). layout: a layers.Layout, the positions and masks
        of this call. cache: the cache.LayerCache of this layer, or None."""
        B, T, _ = x.shape
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H_kv, T, D)
        v = v.view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = ops.rope(q, *rope), ops.rope(k, *rope)  # rotates the first config.rope.head_dim dims of each head
        if x.dtype == torch.float16:  # Phi-2's attention scores exceed 65504, the largest fp16
            return self.dense(attention(q.float(), k.float(), v.float(), layout, cache).to(x.dtype))
        return self.dense(attention(q, k, v, layout, cache))


class PhiMLP(nn.Module):
    """MLP: fc2(gelu(fc1(x)))."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        return self.fc2(self.activation(self.fc1(x)))


class PhiBlock(nn.Module):
    """Attention and MLP in parallel after one LayerNorm, both added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = PhiAttention(config)
        self.mlp = PhiMLP(config)
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, rope, layout, cache=None):
        """x (B, T, C) -> (B, T, C).

        rope: (cos, sin) of Rope.tables(), each (B, 1, T, rope.head_dim / 2). layout: a layers.Layout, the positions and masks
        of this call. cache: the cache.LayerCache of this layer, or None."""
        h = self.input_layernorm(x)
        return self.resid_dropout(self.self_attn(h, rope, layout, cache)) + self.resid_dropout(self.mlp(h)) + x


class PhiModel(nn.Module):
    """Embedding, blocks and final norm. recompute: gradient checkpointing, see models/__init__.py."""

    recompute = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList(PhiBlock(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids, attention_mask=None, documents=None, cache=None):
        """input_ids (B, T) int64 -> hidden states (B, T, C). Other arguments: see Layout.of; cache is a cache.Cache."""
        layout = Layout.of(input_ids, attention_mask, documents, cache)
        x = self.embed_dropout(self.embed_tokens(input_ids))
        rope = self.config.rope.tables(layout.positions, x.dtype, layout.documents)
        if cache is not None:
            x = cache.run(self.layers, x, rope, layout)
            cache.advance(input_ids.shape[1])
        else:
            for block in self.layers:
                run = partial(checkpoint, block, use_reentrant=False) if self.recompute and self.training else block
                x = run(x, rope, layout)
        return self.final_layernorm(x)


class PhiForCausalLM(nn.Module):
    """The language model: PhiModel and the output head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = PhiModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids, attention_mask=None, documents=None, cache=None):
        """input_ids (B, T) int64 -> logits (B, T, vocab_size). Other arguments: see Layout.of; cache is a cache.Cache."""
        return self.lm_head(self.model(input_ids, attention_mask, documents, cache))
