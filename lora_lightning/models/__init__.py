"""Loading, quantization and compilation of base models and tokenizers."""
