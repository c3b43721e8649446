"""Hyperparameter search, the part that knows nothing of Ray: the space, what to try next, the log of the trials, and the report."""
