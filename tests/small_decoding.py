"""Random models for which one token is far more likely than the others: one with a twin in transformers, one with adapters."""

import json

import pytest
import torch
from small import FAMILIES, draw, sizes

from minitune.adapters import lora
from minitune.models import build
from minitune.quant import NF4Linear

SIZES = sizes(vocab_size=61, hidden_size=32, intermediate_size=48)
PROMPTS = [[5, 9, 3, 7, 7, 1, 30, 12, 44], [4], [8, 8, 2, 50]]
ENDS = (11, 17)


@pytest.fixture(scope="session", params=FAMILIES)
def pair(request):
    """(transformers' model, ours) with the same random weights. One token is far more likely than the others."""
    transformers = pytest.importorskip("transformers", reason="parity is proven against transformers")
    family = request.param.capitalize()
    torch.manual_seed(0)
    options = {**SIZES, **FAMILIES[request.param], "attn_implementation": "eager"}
    config = getattr(transformers, f"{family}Config")(**options)
    theirs = draw(getattr(transformers, f"{family}ForCausalLM")(config).eval(), 0.3)
    ours = build(json.loads(config.to_json_string())).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tiny_with_adapter(family, dtype, quantize):
    """A model with LoRA on all linear layers, of widths that the C kernels take. quantize: as in load_model."""
    torch.manual_seed(0)
    widths = sizes(vocab_size=61, intermediate_size=192)
    model = draw(build({"model_type": family, **widths, **FAMILIES[family]}), 0.2)
    model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    for name, layer in list(model.named_modules()):
        if quantize != "none" and isinstance(layer, torch.nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            quantized = NF4Linear.from_weight(layer.weight.detach(), layer.bias, None, quantize == "nf4-dq")
            setattr(model.get_submodule(parent), leaf, quantized)
    lora.inject(model, r=4, alpha=8)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.2)
    return model.eval()
