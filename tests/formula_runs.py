"""What small models compute, by whichever package stands first on sys.path. tests/test_formulas.py runs it in processes of their
own, also on copies of the package whose formulas were edited."""

import json
import sys

import torch

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5},
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.5},
    "phi-gelu": {"model_type": "phi", "partial_rotary_factor": 0.5, "hidden_act": "gelu"},
}
PROMPTS = [[5, 9, 3, 7, 5, 9, 3], [4, 8]]
DECODINGS = {  # name: (options, prompts)
    "greedy": ({"lookup": 0}, 2),
    "one prompt, replayed": ({"lookup": 0}, 1),
    "prompt lookup": ({"lookup": 3}, 1),
    "sampling": ({"do_sample": True}, 2),
    "beams": ({"num_beams": 3}, 2),
    "beam sampling": ({"num_beams": 3, "do_sample": True}, 1),
}


def main(folder, dtype, *families):
    """Print {family: run()} of the package in a folder, as JSON."""
    sys.path[:0] = [folder]
    print(json.dumps({family: run(family, getattr(torch, dtype)) for family in families}))


def run(family, dtype):
    """{what: numbers} of a family, or of the judges."""
    torch.manual_seed(0)
    with torch.inference_mode(family == "judges"):
        return judged(dtype) if family == "judges" else trained_and_decoded(family, dtype)


def randomised(model, dtype):
    """A model that makes sharp choices."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model.to(dtype).eval()


def trained_and_decoded(family, dtype):
    from minitune_kernels import ops

    from minitune.adapters import lora
    from minitune.generate import GenerateConfig, decode
    from minitune.models import build
    from minitune.models.cache import Memory
    from minitune.quant import NF4Linear

    is_4bit, family = family.endswith("nf4"), family.removesuffix("-nf4")
    model = randomised(build({**SIZES, **FAMILIES[family]}), dtype)
    if is_4bit:
        for name, layer in list(model.model.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                lora.put(model.model, name, NF4Linear.from_weight(layer.weight.data, layer.bias, dtype))
    lora.inject(model, 3, 6)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, 0, 0.2)
    ids, found = torch.tensor([[*range(3, 40), *range(20, 30)]]), {}

    def loss():
        return ops.cross_entropy(model.model(ids, documents=[30, 17])[0, :-1], model.lm_head, ids[0, 1:])

    model.train()
    loss().backward()
    gradients = [layer.lora_A.weight.grad for layer in lora.lora_layers(model).values()]
    found["training"] = [gradient.abs().sum().item() for gradient in gradients]
    model.eval()
    with torch.no_grad():
        found["held-out loss"] = [loss().item()]
    for name, (options, count) in DECODINGS.items():
        answers, _ = decode(model, PROMPTS[:count], GenerateConfig(max_new_tokens=9, eos_ids=(), seed=3, **options))
        found[name] = [number for answer in answers for number in answer.logprobs]
    streamed, memory, options = [], Memory(), GenerateConfig(max_new_tokens=9, eos_ids=())
    for prompt in (PROMPTS[0], PROMPTS[0] + PROMPTS[1]):
        (answer,), _ = decode(model, [prompt], options, on_token=streamed.append, memory=memory)
        found["a stream"] = found.get("a stream", []) + answer.logprobs
    return found


def judged(dtype):
    from minitune.metrics.perplexity import sequence_nll
    from minitune.models import build
    from minitune.models.roberta import Encoder, EncoderConfig

    small = {"vocab_size": 61, "n_embd": 48, "n_head": 3, "n_layer": 2, "n_positions": 64}
    gpt2 = randomised(build({"model_type": "gpt2", **small}), dtype)
    sizes = SIZES | {"num_attention_heads": 2, "num_hidden_layers": 1}
    encoder = randomised(Encoder(EncoderConfig.from_json({"model_type": "bert", **sizes})), dtype)
    ids = torch.tensor([[*range(3, 33)]])
    return {
        "perplexity": [nll for nll, _ in sequence_nll(gpt2, [list(range(3, 40)), [4, 5, 6]])],
        "BERTScore": encoder(ids, lengths=[20, 5, 5])[0, :, 0].tolist(),
    }
