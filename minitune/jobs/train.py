"""Fine-tune a model with LoRA or QLoRA: the job of scripts/train.py."""

from minitune.config import TrainConfig as TrainConfig


def train(config):
    """Fine-tune as `config` says; see minitune.train.train. torch is imported here, so that --help need not wait for it."""
    from minitune.train import train

    return train(config)
