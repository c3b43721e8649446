"""What a frozen model computes once over the shards.

In: shards and a model. Out: vision features and reference log-probabilities, written as sidecars.
"""
