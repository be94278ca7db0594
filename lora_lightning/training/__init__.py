"""One training run, from the module to its results."""
