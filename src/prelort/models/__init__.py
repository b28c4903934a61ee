"""The base model and the exchangeable LoRA adapter in it."""
