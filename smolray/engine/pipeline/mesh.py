"""Which rank runs which stage of which pipeline.

In: the number of stages and, where cards were chosen for them, an order of the ranks. Out: a Mesh and its process
groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """`ranks`: those of stages 0, 1, … of the first pipeline, then of the second."""

    ranks: tuple[int, ...]
    stages: int

    @classmethod
    def of(cls, stages: int, order: Sequence[int] | None = None) -> "Mesh":
        """Of the initialised process group. By default ranks keep their order: those of a pipeline are neighbours."""
        return cls(tuple(order or range(dist.get_world_size())), stages)

    @property
    def replicas(self) -> int:
        return len(self.ranks) // self.stages

    def coordinates(self, rank: int) -> tuple[int, int]:
        """(pipeline, stage) of a rank."""
        return divmod(self.ranks.index(rank), self.stages)

    def rank(self, stage: int, replica: int = 0) -> int:
        return self.ranks[replica * self.stages + stage]

    def own_pipeline(self) -> dist.ProcessGroup:
        """This rank's pipeline, its stages in order. Collective."""
        return _own([[self.rank(s, r) for s in range(self.stages)] for r in range(self.replicas)])

    def own_replicas(self) -> dist.ProcessGroup:
        """The ranks that run this rank's stage. Collective."""
        return _own([[self.rank(s, r) for r in range(self.replicas)] for s in range(self.stages)])


def _own(groups: list[list[int]]) -> dist.ProcessGroup:
    """Every worker takes part in making each group."""
    made = [dist.new_group(ranks, sort_ranks=False) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks)
