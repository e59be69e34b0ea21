"""Fine-tune a model with LoRA or QLoRA. Without options: an embedded model on the embedded rows, in under a minute."""

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.jobs.train", "TrainConfig", "train", __doc__)
