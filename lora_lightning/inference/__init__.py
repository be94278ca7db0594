"""Trained adapters in use: predict, evaluate, chat, merge."""
