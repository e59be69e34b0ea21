"""Fine-tune a model with LoRA or QLoRA: the job of scripts/train.py."""

from minitune.config import TrainConfig as TrainConfig


def train(config):
    """Fine-tune with the options of `config`; see minitune.train.train. torch is imported here, so that --help is fast."""
    from minitune.train import train

    return train(config)
