"""minitune: LoRA and QLoRA fine-tuning of Llama, Mistral and Phi in raw PyTorch."""
