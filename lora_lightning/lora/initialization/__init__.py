"""Initial values of A and B, taken from the weights or from the data."""
