"""Trackers, user callbacks and messages: what people watch a run with.

In: the events of a run's log. Out: the same run in TensorBoard, Weights & Biases, MLflow, Trackio or SwanLab, and calls
of the user's own classes. Each follows the log in a thread of the driver (feed.py), so that one that fails or hangs
neither stops nor slows the run.
"""
