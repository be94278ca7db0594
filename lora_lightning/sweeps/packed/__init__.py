"""Runs of a sweep that train together in one process, on one frozen base.

Each run is the ordinary `train` of one config, with a Trainer, callbacks, loggers and a folder of
its own, in a thread of its own; but only one thread works at a time. They meet where the frozen
base is: a run that calls its model's backbone hands in its inputs and waits. When all wait, inputs
of one shape are stacked and go through the base once, with each run's adapter on its own rows; each
run gets its rows of the output and goes on with its own head and loss. After its backward pass it
waits again, until the gradients of all have gone back through the base, once.

A run is thereby what it is alone: the same batches, the same random numbers (each thread has its
own generators), the same products for all that is its own. On a CPU it ends with the same bits.
"""
