"""Fine-tune the embedded models with LoRA and QLoRA and show held-out loss and exact match before and after."""

from minitune.config import run_script
from minitune.demo import DemoConfig, demo

if __name__ == "__main__":
    run_script(DemoConfig, demo, __doc__)
