"""Hyperparameter search with Ray Tune over ordinary runs.

In: a RunConfig with a `search` section. Out: trials.jsonl, best.yaml, a report.
"""
