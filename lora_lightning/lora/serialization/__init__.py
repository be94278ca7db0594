"""PEFT's folder: written, read, checked."""
