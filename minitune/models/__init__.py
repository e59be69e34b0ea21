"""The table of architectures: one row and one file each.

What the rest of the house asks of a model in ARCHITECTURES, and what tests/test_models.py checks for every row:

- `Config.from_json(raw)` takes config.json as a dict. `config` has vocab_size, max_position_embeddings, num_hidden_layers,
  num_attention_heads, hidden_size, tie_word_embeddings and `unread`, the keys of config.json without effect here. Optional:
  `rope` (a layers.Rope; None or missing: learned positions), `sliding_window` (tokens that a query attends to, or None),
  `hidden_act`.
- `model(input_ids, attention_mask=None, documents=None, cache=None)`: (B, T) int64 -> logits (B, T, vocab_size).
- `model.model(...)` takes the same arguments and returns the hidden states (B, T, C) that `model.lm_head` maps to logits. With
  a cache.Cache it runs its blocks through cache.run() and then calls cache.advance().
- `model.lm_head`: a linear layer; with tie_word_embeddings its weight is the embedding's, the same Parameter.
- `model.model.recompute`: True turns gradient checkpointing on. Each block keeps only its input and runs again in the backward
  pass.
- An architecture that can be trained has LoRA targets and `model.model.embed_tokens`. Its linear layers are layers.Linear and
  have Hugging Face's names, because LoRA and NF4 replace layers by name."""

from minitune.models import gpt2, llama, mistral, phi, roberta
from minitune.screen import short

ARCHITECTURES = {  # model_type of config.json -> (config, model, PEFT's default LoRA targets)
    "llama": (llama.LlamaConfig, llama.LlamaForCausalLM, llama.LORA_TARGETS),
    "mistral": (mistral.MistralConfig, mistral.MistralForCausalLM, mistral.LORA_TARGETS),
    "phi": (phi.PhiConfig, phi.PhiForCausalLM, phi.LORA_TARGETS),
    "gpt2": (gpt2.GPT2Config, gpt2.GPT2LMHeadModel, gpt2.LORA_TARGETS),  # for perplexity: not trained, not quantised
}
ENCODERS = {  # for BERTScore, hidden states and no logits: model_type -> (config, model)
    "bert": (roberta.EncoderConfig, roberta.Encoder),
    "roberta": (roberta.EncoderConfig, roberta.Encoder),
}


def architecture(raw):
    """The row (config, model, LoRA targets) for a config.json. raw: config.json as a dict.

    Raises ValueError on a model_type that is not in the table."""
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in ENCODERS:
        raise ValueError(
            f"config.json: model_type is {short(kind)}, an encoder, which predicts no next token. Expected a language "
            "model; an encoder can be used for BERTScore only (evaluate.py --encoder)"
        )
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type is {short(kind)}, expected one of {', '.join(ARCHITECTURES)}; "
            "a new architecture is one file in minitune/models and one row in its __init__.py"
        )
    return ARCHITECTURES[kind]


def build(raw):
    """The model that a config.json describes, with torch's random weights. raw: config.json as a dict.

    Raises ValueError on a config that is not supported."""
    Config, Model, _ = architecture(raw)
    return Model(Config.from_json(raw))


def build_encoder(raw):
    """The encoder that a config.json describes, with torch's random weights. raw: config.json as a dict.

    Raises ValueError on a config that is not supported."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise ValueError(f"config.json: model_type is {short(kind)}, expected an encoder: {', '.join(ENCODERS)}")
    Config, Model = ENCODERS[kind]
    return Model(Config.from_json(raw))
