"""Hydra configs, shipped inside the wheel as `lora_lightning.conf`."""
