"""torch.distributed.pipelining over one Stage: a PipelineStage and a schedule for each bucket of shapes.

In: a Stage that has been handed its batches. Out: their forward and backward, gradients summed into the parameters.
Zero-bubble schedules are not offered: they lose the gradients of a stage whose input needs none. With one stage a rank
Interleaved1F1B sends the right things early.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B

from smolray.engine.pipeline.stage import Bucket, Stage
from smolray.planner.schedule import Schedule


@dataclass
class Pipe:
    """`flows`: whether gradients cross the boundary before each stage, the first and the end included: False behind
    stages where nothing trains.
    """

    stage: Stage
    stages: int
    flows: tuple[bool, ...]
    schedule: Schedule
    group: dist.ProcessGroup
    _made: dict[str, tuple[Bucket, ScheduleGPipe | ScheduleInterleaved1F1B]] = field(default_factory=dict)

    def train(self) -> torch.Tensor:
        """Forward and backward of all micro-batches.

        Returns the sum of their losses in float64, zero but in the last stage.
        """
        losses: list[torch.Tensor] = []
        self._step("train", losses)
        total = torch.zeros((), dtype=torch.float64, device=self.stage.device)
        return total + sum(loss.detach().double() for loss in losses)

    @torch.no_grad()
    def score(self) -> None:
        """Forward only: the last stage keeps the log-probabilities of each micro-batch's completions."""
        self.stage.scoring = True
        self._step("score", None)
        self.stage.scoring = False

    def _step(self, mode: str, losses: list[torch.Tensor] | None) -> None:
        bucket, numbers = self.stage.bucket, torch.arange(self.stage.bucket.micro_batches)
        if mode not in self._made or self._made[mode][0] != bucket:
            # Only the newest is kept: it holds a buffer for each micro-batch, and making one costs a message around the
            # pipeline.
            self._made[mode] = (bucket, self._make(mode))
        self._made[mode][1].step(
            number=numbers, target=None if losses is None else numbers, losses=losses, return_outputs=False
        )

    def _make(self, mode: str) -> ScheduleGPipe | ScheduleInterleaved1F1B:
        module, index, training = self.stage, self.stage.index, mode == "train"

        def example(tiles: bool, boundary: int) -> torch.Tensor:
            return torch.empty(
                module.boundary(tiles),
                dtype=module.dtype,
                device="meta",
                requires_grad=training and self.flows[boundary],
            )

        stage = PipelineStage(
            module,
            index,
            self.stages,
            module.device,
            group=self.group,
            input_args=() if index == 0 else (example(module.receives_tiles, index),),
            output_args=(torch.empty((), device="meta", requires_grad=training),)
            if index == self.stages - 1
            else (example(module.sends_tiles, index + 1),),
        )
        count = module.bucket.micro_batches
        if not training:
            return ScheduleGPipe(stage, count)
        if self.schedule == "gpipe":
            return ScheduleGPipe(stage, count, loss_fn=_given, scale_grads=False)
        return ScheduleInterleaved1F1B([stage], count, loss_fn=_given, scale_grads=False)


def _given(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The last stage gives the loss itself, already divided by the step's totals: shares add up."""
    return output
