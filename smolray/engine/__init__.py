"""Engines: one optimizer step over micro-batches, with DeepSpeed ZeRO or as a pipeline.

In: a model and Batches. Out: losses, updated weights, EngineState.
"""
