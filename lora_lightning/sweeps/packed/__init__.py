"""Experimental: runs of a sweep that train together in one process, on one frozen base.

Only `sweeps` uses this package, and only as a command. Its interfaces may change.

Each run is the ordinary `train` of one config. It has its own Trainer, callbacks, loggers, folder
and thread. Only one thread works at a time. The runs meet at the frozen base: a run that calls its
model's backbone hands in its inputs and waits.

When all runs wait, inputs of the same shape are stacked. They pass through the base once, with each
run's adapter on its own rows. Each run gets its rows of the output and continues with its own head
and loss. After its backward pass it waits again, until the gradients of all runs have passed back
through the base, once.

Each run thus computes the same as it does alone: the same batches, the same random numbers (each
thread has its own generators), and the same products for its own parameters. On a CPU, its result
is the same to the bit.
"""
