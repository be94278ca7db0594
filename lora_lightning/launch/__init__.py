"""How the jobs of a sweep are run. Imports hydra and the standard library; rich to show it."""
