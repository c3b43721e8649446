"""The folder of a run: events, status, checkpoints, predictions.

In: what happens in training. Out: files, and what can be read from them. Imports no torch here.
"""
