"""Evaluation: answers, retrieval, preferences and losses over the validation shards.

In: a model and shards. Out: an EvalReport.
"""
