"""The training loop and the worker around it.

In: an engine, epoch plans, streams. Out: trained weights, events, checkpoints.
"""
