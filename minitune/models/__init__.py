"""The table of architectures: one row and one file each."""

from minitune.models import gpt2, llama, mistral, phi, roberta
from minitune.screen import short

ARCHITECTURES = {  # model_type of config.json -> (config, model, PEFT's default LoRA targets)
    "llama": (llama.LlamaConfig, llama.LlamaForCausalLM, llama.LORA_TARGETS),
    "mistral": (mistral.MistralConfig, mistral.MistralForCausalLM, mistral.LORA_TARGETS),
    "phi": (phi.PhiConfig, phi.PhiForCausalLM, phi.LORA_TARGETS),
    "gpt2": (gpt2.GPT2Config, gpt2.GPT2LMHeadModel, gpt2.LORA_TARGETS),  # a judge: not trained, not quantised
}
ENCODERS = {  # judges that give hidden states and no logits: model_type -> (config, model)
    "bert": (roberta.EncoderConfig, roberta.Encoder),
    "roberta": (roberta.EncoderConfig, roberta.Encoder),
}


def architecture(raw):
    """The row of a config.json, given as a dict. Raises ValueError on a model_type that is not in the table."""
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in ENCODERS:
        raise ValueError(
            f"config.json: model_type is {short(kind)}, an encoder, which predicts no next token; use it for BERTScore "
            "(evaluate.py --encoder)"
        )
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type is {short(kind)}, expected one of {', '.join(ARCHITECTURES)}; "
            "a new architecture is one file in minitune/models and one row in its __init__.py"
        )
    return ARCHITECTURES[kind]


def build(raw):
    """The model that a config.json describes, with torch's random weights. raw: config.json as a dict."""
    Config, Model, _ = architecture(raw)
    return Model(Config.from_json(raw))


def build_encoder(raw):
    """The encoder that a config.json describes, with torch's random weights. raw: config.json as a dict."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise ValueError(f"config.json: model_type is {short(kind)}, expected an encoder: {', '.join(ENCODERS)}")
    Config, Model = ENCODERS[kind]
    return Model(Config.from_json(raw))
