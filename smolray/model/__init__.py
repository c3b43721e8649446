"""The model: loading, freezing, adapters, attention over packed sequences, the forward pass, decoding.

In: a ModelConfig and Batches. Out: hidden states.
"""
