"""Base models and tokenizers: loaded, quantized, compiled."""
