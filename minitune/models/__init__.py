"""The table of architectures: one row and one file each."""

from minitune.models import llama, mistral, phi

ARCHITECTURES = {  # model_type of config.json -> (config, model, PEFT's default LoRA targets)
    "llama": (llama.LlamaConfig, llama.LlamaForCausalLM, llama.LORA_TARGETS),
    "mistral": (mistral.MistralConfig, mistral.MistralForCausalLM, mistral.LORA_TARGETS),
    "phi": (phi.PhiConfig, phi.PhiForCausalLM, phi.LORA_TARGETS),
}


def architecture(raw):
    """The row of a config.json, given as a dict. Raises ValueError on a model_type that is not in the table."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type is {kind!r}, expected one of {', '.join(ARCHITECTURES)}; "
            "a new architecture is one file in minitune/models and one row in its __init__.py"
        )
    return ARCHITECTURES[kind]


def build(raw):
    """The model that a config.json describes, with torch's random weights. raw: config.json as a dict."""
    Config, Model, _ = architecture(raw)
    return Model(Config.from_json(raw))
