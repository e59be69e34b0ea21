"""Fine-tune the embedded models with LoRA and QLoRA and show held-out loss and exact match before and after."""

from minitune.interrupts import main

if __name__ == "__main__":
    main("minitune.jobs.demo", "DemoConfig", "demo", __doc__)
