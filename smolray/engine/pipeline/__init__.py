"""The pipeline engine:

the model partitioned by layers over workers, on the schedules of torch.distributed.pipelining.
"""
