"""LoRA layers: a frozen layer, wrapped and called, with trainable matrices."""
