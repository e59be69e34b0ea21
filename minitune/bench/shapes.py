"""Writes checkpoints with the shape of a real model and random weights, for benchmarks."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from minitune import hub
from minitune.files import write_json
from minitune.models import build

MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip


def write_random_checkpoint(raw, folder, shard_bytes=2 * 10**9):
    """Write a sharded bf16 checkpoint with random weights. raw: its config.json as a dict. At most one shard is in memory."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build(raw).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(2**24 + 3, generator=generator) * 0.02).bfloat16()  # random numbers that are used cyclically
    weight_map, shard, size, place = {}, {}, 0, 0
    for name, shape in shapes.items():
        count = shape.numel()
        repeats = -(-(place + count) // len(pool))
        shard[name] = (
            torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else pool.repeat(repeats)[place:][:count].view(shape)
        )
        place = (place + count) % len(pool)
        size += 2 * count
        if size >= shard_bytes or name == list(shapes)[-1]:
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file({key: t.contiguous() for key, t in shard.items()}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    write_json(folder / "config.json", raw)
    total = sum(2 * shape.numel() for shape in shapes.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    tokenizer = (hub.resolve("tiny-mistral") / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(tokenizer)
