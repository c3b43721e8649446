"""torch.distributed.pipelining over one Stage: a PipelineStage and a schedule for each Bucket of shapes.

In: a Stage that has got its batches (`Stage.begin`). Out: their forward and backward passes, gradients summed into the
parameters. Zero-bubble schedules are not offered: they lose the gradients of a stage whose input needs none. With one
stage on each rank Interleaved1F1B sends activations and gradients early.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B

from smolray.engine.pipeline.stage import Bucket, Stage
from smolray.planner.schedule import Schedule


@dataclass
class Pipe:
    """Runs the schedule of one step.

    Attributes:
        stage: this worker's.
        stages: their number.
        flows: for the boundary before each stage and the end of the last, whether gradients cross it: False where
            nothing before it is trained.
        schedule: engine.schedule.
        group: the ranks of the pipeline, stage by stage.
    """

    stage: Stage
    stages: int
    flows: tuple[bool, ...]
    schedule: Schedule
    group: dist.ProcessGroup
    _made: dict[str, tuple[Bucket, ScheduleGPipe | ScheduleInterleaved1F1B]] = field(default_factory=dict)

    def train(self) -> torch.Tensor:
        """Forward and backward passes of all micro-batches.

        Returns:
            () float64: the sum of their losses; 0 except on the last stage.
        """
        losses: list[torch.Tensor] = []
        self._step("train", losses)
        total = torch.zeros((), dtype=torch.float64, device=self.stage.device)
        return total + sum(loss.detach().double() for loss in losses)

    @torch.no_grad()
    def score(self) -> None:
        """Forward passes only: the last stage keeps the log-probabilities of each micro-batch's completions."""
        self.stage.scoring = True
        self._step("score", None)
        self.stage.scoring = False

    def _step(self, mode: str, losses: list[torch.Tensor] | None) -> None:
        bucket, numbers = self.stage.bucket, torch.arange(self.stage.bucket.micro_batches)
        if mode not in self._made or self._made[mode][0] != bucket:
            # Only the newest is kept: it holds a buffer for each micro-batch, and making one costs a message around the
            # pipeline.
            self._made[mode] = (bucket, self._make(mode))
        schedule = self._made[mode][1]
        target = None if losses is None else numbers
        schedule.step(number=numbers, target=target, losses=losses, return_outputs=False)

    def _make(self, mode: str) -> ScheduleGPipe | ScheduleInterleaved1F1B:
        module, training = self.stage, mode == "train"

        def example(tiles: bool, boundary: int) -> torch.Tensor:
            """What crosses a boundary, without data."""
            flows = training and self.flows[boundary]
            return torch.empty(module.boundary(tiles), dtype=module.dtype, device="meta", requires_grad=flows)

        first, last = module.index == 0, module.index == self.stages - 1
        received = () if first else (example(module.receives_tiles, module.index),)
        loss = torch.empty((), device="meta", requires_grad=training)
        sent = loss if last else example(module.sends_tiles, module.index + 1)
        stage = PipelineStage(
            module,
            module.index,
            self.stages,
            module.device,
            group=self.group,
            input_args=received,
            output_args=(sent,),
        )

        count = module.bucket.micro_batches
        if not training:
            return ScheduleGPipe(stage, count)
        if self.schedule == "gpipe":
            return ScheduleGPipe(stage, count, loss_fn=_loss_of_output, scale_grads=False)
        return ScheduleInterleaved1F1B([stage], count, loss_fn=_loss_of_output, scale_grads=False)


def _loss_of_output(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The last stage's output is the loss itself, already divided by the normalisers of the step: losses add up."""
    return output
