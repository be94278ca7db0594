"""Use of trained adapters: predict, evaluate, chat, merge."""
