"""Which rank runs which stage of which pipeline.

In: the number of stages and, where the GPUs of the stages were chosen, an order of the ranks. Out: a Mesh and its
process groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """`ranks`: of stages 0, 1, … of the first pipeline, then of the second."""

    ranks: tuple[int, ...]
    stages: int

    @classmethod
    def of(cls, stages: int, order: Sequence[int] | None = None) -> "Mesh":
        """Over the initialised process group.

        `order`: as `ranks`; default: ascending, so that the stages of a pipeline are neighbours.
        """
        return cls(tuple(order or range(dist.get_world_size())), stages)

    @property
    def replicas(self) -> int:
        """The number of pipelines."""
        return len(self.ranks) // self.stages

    def coordinates(self, rank: int) -> tuple[int, int]:
        """(pipeline, stage) of a rank."""
        return divmod(self.ranks.index(rank), self.stages)

    def rank(self, stage: int, replica: int = 0) -> int:
        return self.ranks[replica * self.stages + stage]

    def own_pipeline(self) -> dist.ProcessGroup:
        """The ranks of this rank's pipeline, its stages in order. Collective."""
        return _own([[self.rank(s, r) for s in range(self.stages)] for r in range(self.replicas)])

    def own_replicas(self) -> dist.ProcessGroup:
        """The ranks that run the same stage as this rank. Collective."""
        return _own([[self.rank(s, r) for r in range(self.replicas)] for s in range(self.stages)])


def _own(groups: list[list[int]]) -> dist.ProcessGroup:
    """The process group that holds this rank. Every worker takes part in making each of them."""
    made = [dist.new_group(ranks, sort_ranks=False) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks)
