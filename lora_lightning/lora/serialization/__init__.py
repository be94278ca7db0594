"""PEFT adapter folders: writing, reading and checks."""
