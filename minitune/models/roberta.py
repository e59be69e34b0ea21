"""The encoders RoBERTa (arXiv 1907.11692) and BERT (arXiv 1810.04805), for BERTScore: post-norm blocks, learned positions, no
head. The two differ in how they count positions.

Module names are Hugging Face's, so that its weights load unchanged. B, T, C, H, D as in layers.py."""

import re
from dataclasses import dataclass
from itertools import groupby

import torch
from minitune_kernels import ops
from torch import nn

from minitune.models import config_json
from minitune.models.layers import LayerNorm
from minitune.screen import short

HEADS = ("pooler.", "lm_head.", "cls.", "classifier.", "qa_outputs.")  # heads stored with an encoder, not used here
LAYER_NORM = {"gamma": "weight", "beta": "bias"}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}  # names of ops
OLD_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


@dataclass(frozen=True)
class EncoderConfig:
    """The settings in the config.json of a RoBERTa or a BERT. Without dropout: neither is trained here.

    first_position: position of the first token. 0 in BERT, pad_token_id + 1 in RoBERTa."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str
    pad_token_id: int
    first_position: int
    unread: tuple[str, ...] = ()  # keys of config.json without effect here

    @classmethod
    def from_json(cls, raw):
        """raw: config.json as a dict. Raises ValueError on what is not supported."""
        read = config_json.Reader(raw, "roberta")
        is_roberta = read.only("model_type", "bert", "roberta") == "roberta"
        hidden_size, heads = read.integer("hidden_size", 768), read.integer("num_attention_heads", 12)
        if hidden_size % heads:
            raise ValueError(
                f"config.json: hidden_size is {hidden_size}, expected a multiple of num_attention_heads, {heads}"
            )
        pad_token_id = read.value("pad_token_id", 1 if is_roberta else 0, int, "a token id, or -1 for none")
        if not -1 <= pad_token_id <= config_json.MAX:
            raise ValueError(f"config.json: pad_token_id is {short(pad_token_id)}, expected a token id, or -1 for none")
        layers = read.layers("num_hidden_layers", 12)
        read.every_model(layers)
        read.only("is_causal", False, None)
        read.only("is_decoder", False)
        read.only("add_cross_attention", False)
        # transformers 5 no longer reads this key: a value other than absolute is reported as without effect.
        if read.raw.get("position_embedding_type") in ("absolute", None):
            read.ignore("position_embedding_type")
        # used in training only
        read.ignore("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        read.ignore("gradient_checkpointing", "tie_word_embeddings", "_num_labels", "output_past")
        read.ignore("directionality", "pooler_type", "pooler_fc_size", "pooler_num_attention_heads")  # of heads
        read.ignore("pooler_num_fc_layers", "pooler_size_per_head")
        return read.done(
            cls(
                vocab_size=read.integer("vocab_size", 50265 if is_roberta else 30522),
                hidden_size=hidden_size,
                intermediate_size=read.integer("intermediate_size", 3072),
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=read.integer("max_position_embeddings", 512),
                type_vocab_size=read.integer("type_vocab_size", 2),
                layer_norm_eps=read.number("layer_norm_eps", 1e-12),
                hidden_act=read.only("hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh"),
                pad_token_id=pad_token_id,
                first_position=pad_token_id + 1 if is_roberta else 0,
            )
        )

    @property
    def max_length(self):
        """Largest number of tokens of a text: 512 for RoBERTa's 514 positions."""
        return self.max_position_embeddings - self.first_position


class Embeddings(nn.Module):
    """Sum of the embeddings of tokens, positions and token types, and a LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, whole_texts=True)

    def forward(self, input_ids, positions, token_type_ids):
        """input_ids, positions (B, T) int64; token_type_ids (B, T) int64 or None for all 0 -> (B, T, C)."""
        types = self.token_type_embeddings(
            token_type_ids if token_type_ids is not None else torch.zeros_like(input_ids)
        )
        return self.LayerNorm(self.word_embeddings(input_ids) + types + self.position_embeddings(positions))


class SelfAttention(nn.Module):
    """Bidirectional self-attention, without its output projection."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))

    def forward(self, x, mask, runs):
        """x (B, T, C) -> (B, T, C).

        mask: (B, 1, 1, T) bool, True where there is no padding, or None. runs: for packed texts (B = 1), how many adjacent texts
        have which length, [(texts, length), ...]; else None."""
        B, T, C = x.shape
        qkv = [ops.linear_activation(x, layer.weight, layer.bias) for layer in (self.query, self.key, self.value)]
        if runs is None:
            return attend(*(t.view(B, T, self.num_heads, -1) for t in qkv), mask).reshape(B, T, C)
        pieces = zip(*(t[0].split([n * length for n, length in runs]) for t in qkv), runs, strict=True)
        outputs = []
        for *parts, (n, length) in pieces:
            outputs.append(attend(*(t.view(n, length, self.num_heads, -1) for t in parts), None).reshape(-1, C))
        return torch.cat(outputs)[None]


def attend(q, k, v, mask):
    """Bidirectional softmax attention. q, k, v and the result: (B, T, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ops.attention(q, k, v, mask).transpose(1, 2)


class Output(nn.Module):
    """LayerNorm(dense(x) + residual): the last step of the attention and of the MLP of a block."""

    def __init__(self, inputs, config):
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, whole_texts=True)

    def forward(self, x, residual):
        """x (B, T, inputs), residual (B, T, C) -> (B, T, C)."""
        return self.LayerNorm(ops.linear_activation(x, self.dense.weight, self.dense.bias) + residual)


class Attention(nn.Module):
    """Self-attention with output projection, residual and LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config.hidden_size, config)

    def forward(self, x, mask, runs):
        """x (B, T, C) -> (B, T, C). mask, runs: as in SelfAttention."""
        return self.output(self.self(x, mask, runs), x)


class Intermediate(nn.Module):
    """First layer of the MLP, with its activation."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x):
        """x (B, T, C) -> (B, T, intermediate_size)."""
        return ops.linear_activation(x, self.dense.weight, self.dense.bias, self.activation)


class Block(nn.Module):
    """Post-norm block: attention, then MLP."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config.intermediate_size, config)

    def forward(self, x, mask, runs):
        """x (B, T, C) -> (B, T, C). mask, runs: as in SelfAttention."""
        x = self.attention(x, mask, runs)
        return self.output(self.intermediate(x), x)


class Blocks(nn.Module):
    """The list of blocks, under Hugging Face's name `layer`."""

    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))


class Encoder(nn.Module):
    """Embeddings and blocks, without a head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Blocks(config)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, lengths=None, layer=None):
        """input_ids (B, T) int64 -> (B, T, C), the hidden states after `layer` blocks (0: the embeddings; None: all blocks).

        attention_mask: (B, T), 0 on padding, where RoBERTa's input_ids must be its padding token. lengths: lengths of texts
        packed into one row (B = 1) without padding; adjacent texts of equal length share one attention call.
        Raises ValueError on a text longer than the learned positions, and on a layer that does not exist."""
        *_, last = self.walk(input_ids, attention_mask, token_type_ids, lengths, layer)
        return last

    def hidden_states(self, input_ids, attention_mask=None, token_type_ids=None, lengths=None, layer=None):
        """As forward, but the list of all hidden states: the embeddings, then the output of each block up to `layer`."""
        return list(self.walk(input_ids, attention_mask, token_type_ids, lengths, layer))

    def walk(self, input_ids, attention_mask, token_type_ids, lengths, layer):
        """Yields the embeddings and the output of each block up to `layer`, each (B, T, C). Arguments as in forward."""
        blocks = self.encoder.layer
        layer = len(blocks) if layer is None else layer
        if not 0 <= layer <= len(blocks):
            raise ValueError(f"layer is {layer}, expected 0 to {len(blocks)}, the blocks of this encoder")
        mask = runs = None
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape or lengths is not None:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, expected that of input_ids "
                    f"{tuple(input_ids.shape)}, and no lengths beside it"
                )
            if not attention_mask.all():
                mask = attention_mask.bool()[:, None, None, :]
        if lengths is not None:
            if input_ids.shape != (1, sum(lengths)) or min(lengths) < 1:
                raise ValueError(f"lengths={lengths} must be above 0 and sum to one row, here {tuple(input_ids.shape)}")
            runs = [(len(list(group)), length) for length, group in groupby(lengths)]
        x = self.embeddings(input_ids, self.positions(input_ids, lengths), token_type_ids)
        yield x
        for block in blocks[:layer]:
            x = block(x, mask, runs)
            yield x

    def positions(self, input_ids, lengths):
        """(B, T) int64. RoBERTa counts the tokens that are not padding and gives padding pad_token_id; BERT counts all."""
        config = self.config
        parts = input_ids.split(lengths, dim=1) if lengths is not None else [input_ids]
        longest = max(part.shape[1] for part in parts)
        if longest > config.max_length:
            raise ValueError(
                f"a text of {longest} tokens is longer than the {config.max_length} that this encoder takes; cut it"
            )
        if not config.first_position:
            return torch.cat([torch.arange(p.shape[1], device=p.device).expand(p.shape) for p in parts], dim=1)
        counted = ((part != config.pad_token_id).long() for part in parts)
        return torch.cat([part.cumsum(1) * part for part in counted], dim=1) + config.pad_token_id

    @staticmethod
    def parameter_of(name):
        """Name of the parameter that a stored tensor belongs to, or None for a tensor of a head or a buffer.

        Files of whole models prefix the names with "roberta." or "bert.". The first BERT files call LayerNorm's weight gamma
        and its bias beta."""
        inner = name.removeprefix("roberta.").removeprefix("bert.")
        if inner.startswith(HEADS) or inner in OLD_BUFFERS:
            return None
        return re.sub(r"LayerNorm\.(gamma|beta)$", lambda old: f"LayerNorm.{LAYER_NORM[old[1]]}", inner)
