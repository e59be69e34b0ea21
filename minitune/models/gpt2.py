"""GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, one product for queries, keys and values.

minitune computes perplexity with it and does not train it. Module names and shapes are Hugging Face's, so that its weights
load unchanged: a Conv1D stores its weight as (in, out). B, T, C, H, D as in layers.py."""

from dataclasses import dataclass

import torch
from minitune_kernels import ops
from torch import nn

from minitune.models import config_json
from minitune.models.layers import ACTIVATIONS, LayerNorm, Layout, Linear, attention

LORA_TARGETS = ()


@dataclass(frozen=True)
class GPT2Config:
    """The settings in the config.json of a GPT-2, under the names of the other families. Without dropout: it is not trained."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    unread: tuple[str, ...] = ()  # keys of config.json without effect here

    @classmethod
    def from_json(cls, raw):
        """raw: config.json as a dict. Raises ValueError on what is not supported."""
        read = config_json.Reader(raw, "gpt2")
        hidden_size, heads = read.integer("n_embd", 768), read.integer("n_head", 12)
        if hidden_size % heads:
            raise ValueError(f"config.json: n_embd is {hidden_size}, expected a multiple of n_head, {heads}")
        context = read.integer("n_positions", 1024)
        layers = read.layers("n_layer", 12)
        for key, value in (
            ("hidden_size", hidden_size),
            ("num_attention_heads", heads),
            ("num_hidden_layers", layers),
            ("max_position_embeddings", context),
        ):
            read.only(key, value)  # transformers prefers these names to n_embd and so on: both must agree
        read.decoder(layers, context)
        read.only("scale_attn_weights", True)
        read.only("scale_attn_by_inverse_layer_idx", False)
        read.ignore("n_ctx")  # size of the mask in old files
        read.ignore("reorder_and_upcast_attn")  # order of two factors, for mixed precision
        read.ignore("embd_pdrop", "attn_pdrop", "resid_pdrop")  # used in training only
        # of heads for other tasks
        read.ignore("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")
        read.ignore("summary_first_dropout", "n_special", "predict_special_tokens", "_num_labels")
        read.ignore("gradient_checkpointing")
        return read.done(
            cls(
                vocab_size=read.integer("vocab_size", 50257),
                hidden_size=hidden_size,
                intermediate_size=read.integer("n_inner", None) or 4 * hidden_size,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=context,
                layer_norm_eps=read.number("layer_norm_epsilon", 1e-5),
                hidden_act=read.only("activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu"),
                tie_word_embeddings=read.boolean("tie_word_embeddings", True),
            )
        )


class Conv1D(nn.Module):
    """x @ weight + bias, with weight (in, out): the transpose of nn.Linear's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        """x (.., in) -> (.., out) in x.dtype."""
        return ops.linear(x, self.weight.T, self.bias, whole_texts=True)


class GPT2Attention(nn.Module):
    """Self-attention with one product for queries, keys and values."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.c_attn = Conv1D(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = Conv1D(config.hidden_size, config.hidden_size)

    def forward(self, x, layout, cache=None):
        """x (B, T, C) -> (B, T, C). layout: a layers.Layout; cache: the cache.LayerCache of this layer, or None."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        return self.c_proj(attention(q, k, v, layout, cache))


class GPT2MLP(nn.Module):
    """MLP: c_proj(gelu(c_fc(x)))."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.c_fc = Conv1D(config.hidden_size, config.intermediate_size)
        self.c_proj = Conv1D(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        return self.c_proj(self.activation(self.c_fc(x)))


class GPT2Block(nn.Module):
    """Pre-norm block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.layer_norm_eps, whole_texts=True)
        self.attn = GPT2Attention(config)
        self.ln_2 = LayerNorm(config.hidden_size, config.layer_norm_eps, whole_texts=True)
        self.mlp = GPT2MLP(config)

    def forward(self, x, layout, cache=None):
        """x (B, T, C) -> (B, T, C). layout: a layers.Layout; cache: the cache.LayerCache of this layer, or None."""
        x = x + self.attn(self.ln_1(x), layout, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2Model(nn.Module):
    """Embeddings of tokens and positions, blocks and final norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList(GPT2Block(config) for _ in range(config.num_hidden_layers))
        self.ln_f = LayerNorm(config.hidden_size, config.layer_norm_eps, whole_texts=True)

    def forward(self, input_ids, attention_mask=None, documents=None, cache=None):
        """input_ids (B, T) int64 -> hidden states (B, T, C). Other arguments: see Layout.of; cache is a cache.Cache.

        Raises ValueError if a text is longer than the learned positions."""
        layout = Layout.of(input_ids, attention_mask, documents, cache)
        last, context = int(layout.positions.max()) if input_ids.numel() else 0, self.config.max_position_embeddings
        if last >= context:
            raise ValueError(
                f"a text of {last + 1} tokens or more is longer than this GPT-2's {context} positions; cut it into "
                "windows, as minitune.metrics.perplexity does"
            )
        x = self.wte(input_ids) + self.wpe(layout.positions)
        for i, block in enumerate(self.h):
            x = block(x, layout, cache.layers[i] if cache is not None else None)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.ln_f(x)


class GPT2LMHeadModel(nn.Module):
    """The language model: GPT2Model and the output head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = GPT2Model(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, whole_texts=True)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    @property
    def model(self):
        """The body, under the name that the other families use."""
        return self.transformer

    def forward(self, input_ids, attention_mask=None, documents=None, cache=None):
        """input_ids (B, T) int64 -> logits (B, T, vocab_size). Other arguments: see Layout.of; cache is a cache.Cache."""
        return self.lm_head(self.transformer(input_ids, attention_mask, documents, cache))
