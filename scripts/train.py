"""Fine-tune a model with LoRA or QLoRA. Without options: an embedded model on the embedded rows, in under a minute."""

from minitune.config import TrainConfig, run_script
from minitune.train import train

if __name__ == "__main__":
    run_script(TrainConfig, train, __doc__)
