"""Data pipeline from rows to batches."""
