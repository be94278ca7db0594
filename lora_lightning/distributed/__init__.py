"""Several processes: what they share, and what each of them holds."""
