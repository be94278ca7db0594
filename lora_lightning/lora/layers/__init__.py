"""LoRA layers: wrappers that call a frozen layer and add trainable matrices."""
