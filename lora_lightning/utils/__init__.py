"""Files, locks and the terminal: utilities for every part of the package."""
