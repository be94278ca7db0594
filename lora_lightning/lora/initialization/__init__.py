"""First values of A and B that are taken from the weights or from the data."""
