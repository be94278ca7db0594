"""`python -m lora_lightning`, the same as `lora-lightning`."""

from lora_lightning.cli.main import main

if __name__ == "__main__":
    main()
