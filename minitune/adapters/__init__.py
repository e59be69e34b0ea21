"""Methods of adapting a frozen model (LoRA), and adapter files in PEFT's format."""
