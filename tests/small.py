"""Random models and a tokenizer of one token a byte, both made in milliseconds: what tests of layers, files, training and
decoding share."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FAMILIES = {  # what makes each one itself
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "phi": {"partial_rotary_factor": 0.5},
}


def sizes(**changes):
    """The sizes of a model in the words of config.json. changes: what a test needs otherwise, and further keys."""
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
    """Draw the weights again: vectors around 1, matrices around 0 with a deviation above an initialisation's, so that faults
    show. From 0.2 on the logits make sharp choices. Returns the model."""
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
