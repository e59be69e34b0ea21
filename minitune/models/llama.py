"""Llama 1, 2 and 3.x (arXiv 2302.13971, 2307.09288, 2407.21783): pre-norm blocks, RoPE, grouped-query attention,
SwiGLU.

Module names are Hugging Face's, so that its weights load unchanged. B, T, C, H, D as in layers.py."""

from dataclasses import dataclass
from functools import partial

from minitune_kernels import ops
from torch import nn
from torch.utils.checkpoint import checkpoint

from minitune.models import config_json
from minitune.models.layers import Layout, Linear, RMSNorm, Rope, attention, project, read_rope

LORA_TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True)
class LlamaConfig:
    """The settings in the config.json of a Llama."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    unread: tuple[str, ...] = ()  # keys of config.json without effect here

    @classmethod
    def from_json(cls, raw):
        """raw: config.json as a dict, in the old or the new spelling. Raises ValueError on what is not supported."""
        read = config_json.Reader(raw, "llama")
        heads = read.integer("num_attention_heads", 32)
        layers = read.layers("num_hidden_layers", 32)
        context = read.integer("max_position_embeddings", 2048)
        hidden_size = read.integer("hidden_size", 4096)
        head_dim = read.integer("head_dim", None) or hidden_size // heads
        read.only("hidden_act", "silu", "swish")
        read.training("attention_dropout")
        read.decoder(layers, context)
        return read.done(
            cls(
                vocab_size=read.integer("vocab_size", 32000),
                hidden_size=hidden_size,
                intermediate_size=read.integer("intermediate_size", 11008),
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=read.groups("num_key_value_heads", None, heads),
                head_dim=head_dim,
                max_position_embeddings=context,
                rms_norm_eps=read.number("rms_norm_eps", 1e-6),
                rope=read.rope(lambda raw: read_rope(raw, head_dim)),
                attention_bias=read.boolean("attention_bias", False),
                mlp_bias=read.boolean("mlp_bias", False),
                tie_word_embeddings=read.boolean("tie_word_embeddings", False),
            )
        )


class LlamaAttention(nn.Module):
    """Grouped-query self-attention with RoPE."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        C, bias = config.hidden_size, config.attention_bias
        self.q_proj = Linear(C, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = Linear(C, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = Linear(C, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, C, bias=bias)

    def forward(self, x, rope, layout, cache=None):
        """x (B, T, C) -> (B, T, C).

        rope: (cos, sin) of Rope.tables(), each (B, 1, T, rope.head_dim / 2). layout: a layers.Layout, the positions and masks
        of this call. cache: the cache.LayerCache of this layer, or None."""
        B, T, _ = x.shape
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H_kv, T, D)
        v = v.view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = ops.rope(q, *rope), ops.rope(k, *rope)
        return self.o_proj(attention(q, k, v, layout, cache))


class LlamaMLP(nn.Module):
    """Gated MLP: down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config):
        super().__init__()
        C, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(C, inner, bias=bias)
        self.up_proj = Linear(C, inner, bias=bias)
        self.down_proj = Linear(inner, C, bias=bias)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        return self.down_proj(ops.swiglu(*project(x, self.gate_proj, self.up_proj)))


class LlamaBlock(nn.Module):
    """Pre-norm block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rope, layout, cache=None):
        """x (B, T, C) -> (B, T, C).

        rope: (cos, sin) of Rope.tables(), each (B, 1, T, rope.head_dim / 2). layout: a layers.Layout, the positions and masks
        of this call. cache: the cache.LayerCache of this layer, or None."""
        x = x + self.self_attn(self.input_layernorm(x), rope, layout, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embedding, blocks and final norm. recompute: gradient checkpointing, see models/__init__.py."""

    recompute = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, attention_mask=None, documents=None, cache=None):
        """input_ids (B, T) int64 -> hidden states (B, T, C). Other arguments: see Layout.of; cache is a cache.Cache."""
        layout = Layout.of(input_ids, attention_mask, documents, cache)
        x = self.embed_tokens(input_ids)
        rope = self.config.rope.tables(layout.positions, x.dtype, layout.documents)
        if cache is not None:
            x = cache.run(self.layers, x, rope, layout)
            cache.advance(input_ids.shape[1])
        else:
            for block in self.layers:
                run = partial(checkpoint, block, use_reentrant=False) if self.recompute and self.training else block
                x = run(x, rope, layout)
        return self.norm(x)


class LlamaForCausalLM(nn.Module):
    """The language model: LlamaModel and the output head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids, attention_mask=None, documents=None, cache=None):
        """input_ids (B, T) int64 -> logits (B, T, vocab_size). Other arguments: see Layout.of; cache is a cache.Cache."""
        return self.lm_head(self.model(input_ids, attention_mask, documents, cache))
