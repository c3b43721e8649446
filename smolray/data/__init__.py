"""Raw data -> shards -> index -> EpochPlan -> Batch.

It knows no model: what a model computes from the data is in `precompute`.
"""
