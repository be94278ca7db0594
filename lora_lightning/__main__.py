"""`python -m lora_lightning`, the same as `lora-lightning`."""

from .cli import main

if __name__ == "__main__":
    main()
