"""What fits and what is fastest, before a GPU is taken.

In: a RunConfig, data statistics, an inventory of GPUs and links. Out: a Plan with its reasons.
"""
