"""What is minimised: one file for each objective.

In: hidden states and a Batch. Out: this micro-batch's contribution to loss and metrics.
"""
