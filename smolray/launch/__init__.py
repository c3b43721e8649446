"""One run from its config to its result: data, resources, Ray Train workers, restarts.

In: a RunConfig. Out: result.json. This package does not import torch.
"""
