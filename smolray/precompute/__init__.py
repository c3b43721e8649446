"""What a frozen model computes once over the shards:

vision features and reference log-probabilities, written as sidecars.
"""
