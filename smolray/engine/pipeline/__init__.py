"""The pipeline engine: the layers of the model are distributed over workers.

In: a run and this worker's batches. Out: exact optimizer steps, on the schedules of torch.distributed.pipelining.
"""
