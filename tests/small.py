"""Random weights and models, their files, and a tokenizer of one token a byte, all made in milliseconds: what tests of layers,
files, training and decoding share."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minitune.hub import INDEX
from minitune.models import build

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SHARD = "model-00002-of-00002.safetensors"
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FAMILIES = {  # what each one has that the others lack
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "phi": {"partial_rotary_factor": 0.5},
}


def sizes(**changes):
    """The sizes of a small model as keys of config.json. changes: other values, and further keys."""
    return {
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        **changes,
    }


def draw(model, std=0.08):
    """Draw the weights again: vectors around 1, matrices around 0 with a larger deviation than models start with, so that errors
    show. From 0.2 on one token is far more likely than the others. Returns the model."""
    for parameter in model.parameters():
        mean, deviation = (1.0, 0.1) if parameter.ndim == 1 else (0.0, std)
        torch.nn.init.normal_(parameter, mean, deviation)
    return model


def write_byte_tokenizer(folder, special, **config):
    """tokenizer.json with the tokens `special` first, then one a byte, and tokenizer_config.json."""
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(folder, family="llama", dtype=torch.float32, shards=1, **options):
    """A folder with a random model in Hugging Face's layout. Returns its tensors by name."""
    raw = {"model_type": family, **sizes(num_key_value_heads=2, eos_token_id=0), **options}
    torch.manual_seed(0)
    tensors = {name: tensor.detach().to(dtype) for name, tensor in draw(build(raw)).state_dict().items()}
    if raw.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    write_weights(folder, tensors, shards)
    return tensors


def write_weights(folder, tensors, shards=1):
    """model.safetensors, or several files with an index."""
    if shards == 1:
        return save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weight_map = {}
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def random_weight(*shape, dtype=torch.float32, seed=0):
    """Normal values of the size that weights have. The same seed gives the same values."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def bits(tensor):
    """Equal bits, not equal values: NaN equals itself and 0 is not -0."""
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
