"""Files, locks and the terminal: what every part of the package uses."""
