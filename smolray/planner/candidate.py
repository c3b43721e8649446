"""One way to train a run, with the memory and the time that the planner predicts for it."""

import math
from dataclasses import dataclass
from functools import cached_property

from smolray.planner.gpu_sets import Place
from smolray.planner.memory import Memory, Zero
from smolray.planner.time import StepTime

# Candidates this near to the fastest are judged by how simple they are: predictions are not more exact than that.
NEARLY = 0.97


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes:
        strategy: single, zero-0 to zero-3, pipeline, or "pipeline x data" (several pipelines share the data).
        gpus: the GPU of each rank; of a pipeline: of each stage, one replica after the other.
        names: what those GPUs are called.
        micro_batch: conversations in a micro-batch, at most.
        micro_batches: in an optimizer step, over all workers.
        checkpointing: model.gradient_checkpointing.
        memory: bytes by part on each GPU.
        capacity: bytes that may be filled on each GPU.
        time: seconds of a step by part.
        samples: conversations in a step, on average.
        zero: the ZeRO settings; None for a pipeline.
        shares: micro-batches of a step assigned to each rank; empty for a pipeline.
        partition: layers in each stage; empty without a pipeline.
        replicas: pipelines that share the data.
        host_lacks: bytes of main memory that a worker lacks for what it offloads; 0 or less where it fits.
    """

    strategy: str
    gpus: tuple[Place, ...]
    names: tuple[str, ...]
    micro_batch: int
    micro_batches: int
    checkpointing: bool | int
    memory: tuple[Memory, ...]
    capacity: tuple[int, ...]
    time: StepTime
    samples: float
    zero: Zero | None = None
    shares: tuple[int, ...] = ()
    partition: tuple[int, ...] = ()
    replicas: int = 1
    host_lacks: float = -math.inf

    @cached_property
    def missing(self) -> float:
        """Bytes that the fullest GPU or node lacks; 0 or less where the candidate fits."""
        if self.zero:  # every GPU holds the same
            return max(self.memory[0].total - min(self.capacity), self.host_lacks)
        return max(m.total - c for m, c in zip(self.memory, self.capacity, strict=True))

    @property
    def fits(self) -> bool:
        return self.missing <= 0

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.time.total

    @property
    def name(self) -> str:
        """The strategy and what it offloads."""
        if self.zero and self.zero.offload_param:
            return f"{self.strategy}, weights offloaded"
        if self.zero and self.zero.offload_optimizer:
            return f"{self.strategy}, optimizer offloaded"
        return self.strategy

    @property
    def limit(self) -> str:
        """What limits it: the part of memory that does not fit, or the part of the step that takes longest."""
        if self.fits:
            return self.time.limit
        if self.missing == self.host_lacks:
            return f"main memory for each GPU lacks {max(self.missing / 1e9, 0.1):.1f} GB (offload)"
        tight = max(range(len(self.memory)), key=lambda i: self.memory[i].total - self.capacity[i])
        return f"{self.names[tight]} lacks {max(self.missing / 1e9, 0.1):.1f} GB ({self.memory[tight].largest})"
