"""Pipeline parallelism: each worker holds some layers of the model, and hidden states travel between the workers.

Several such pipelines (replicas) share the data.

In: the model of a stage (load.py) and an objective, on NCCL or gloo. Out: exact optimizer steps and the state by
Hugging Face names. Each stage has its own AdamW. All stages of a pipeline read the same micro-batches; only the last
stage counts them.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from smolray.config import RunConfig
from smolray.data.batch import Batch
from smolray.engine.base import LocalSums, NonFiniteGradientError, StepResult, with_noise
from smolray.engine.optim import build_optimizer, moments, set_learning_rate, set_moments
from smolray.engine.pipeline.mesh import Mesh
from smolray.engine.pipeline.parameters import placements_of
from smolray.engine.pipeline.schedule import Pipe
from smolray.engine.pipeline.split import split_of
from smolray.engine.pipeline.stage import Bucket, Stage
from smolray.objectives.base import Normalisers, Objective
from smolray.planner.schedule import accepted_micro_batches
from smolray.pretrained import DTYPES
from smolray.run.state import EngineState, canonical_name, load_weights


class PipelineEngine:
    """An Engine (engine/base.py) over torch.distributed.pipelining.

    Args:
        model: as load.py loads it for this worker.
        objective: what is minimised.
        config: a run whose engine is `pipeline`.
        device: of this worker.
        state: restored before the first step.
        order: the ranks of the stages (Mesh).
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: RunConfig,
        device: torch.device,
        state: EngineState | None = None,
        order: Sequence[int] | None = None,
    ):
        self.model, self.objective, self.config, self.device, self.epoch = model, objective, config, device, 0
        self.split = split_of(model, config, dist.get_world_size())
        self.mesh = Mesh.of(self.split.stages, order)
        replica, self.index = self.mesh.coordinates(dist.get_rank())
        self.data_parallel = (replica, self.mesh.replicas)
        self.sees_images = self.index == 0  # precomputed features enter there too
        self.one_by_one = False
        self.pipeline, self.data = self.mesh.own_pipeline(), self.mesh.own_replicas()
        self.host = dist.new_group(backend="gloo")  # for what is in CPU memory anyway

        self.placements = placements_of(model, self.split)
        self.trained = [placement for placement in self.placements if placement.parameter.requires_grad]
        if state is not None:
            parameters = {canonical_name(placement.name): placement.parameter for placement in self.trained}
            load_weights(parameters, state.weights)
        self._move_to_device()

        own = [placement for placement in self.trained if self.index in placement.stages]
        self.parameters = {canonical_name(placement.name): placement.parameter for placement in own}
        # a tied parameter counts once in the gradient norm: on its first stage
        self.counted = [canonical_name(placement.name) for placement in own if placement.stages[0] == self.index]
        self.tied = self._tied_group([placement.stages for placement in self.trained if len(placement.stages) > 1])
        self._build_optimizer(state)

        layers, dtype = self.split.of_stage(self.index), DTYPES[config.model.dtype]
        stage = Stage(model, layers, self.index, objective, config.seed, dtype, device)
        first_trained = min(stage for placement in self.trained for stage in placement.stages)
        flows = tuple(boundary > first_trained for boundary in range(self.split.stages + 1))
        self.pipe = Pipe(stage, self.split.stages, flows, config.engine.schedule, self.pipeline)
        self._unchecked = True

    @property
    def last(self) -> bool:
        return self.index == self.split.stages - 1

    def accumulate(self, batches: Iterable[Batch], forwards: int, normalisers: Normalisers) -> LocalSums:
        step = [with_noise(batch.clone(), self.config, self.epoch) for batch in batches]
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        metrics = torch.zeros(len(self.objective.metrics), dtype=torch.float64, device=self.device)
        if step:
            self._begin(step, normalisers)
            if self.config.reference_model == "adapter":
                with self.model.disable_adapter():  # type: ignore[operator]  # a PeftModel: config/rules.py
                    self.pipe.score()
            loss = self.pipe.train()
            metrics += self._metrics(torch.zeros_like(metrics))

        self._sync_gradients(images=any(len(batch.tile_order) for batch in step))
        if not self.last:
            return LocalSums(loss, metrics)
        samples, tokens = sum(batch.samples for batch in step), sum(batch.meta["tokens"] for batch in step)
        ids = tuple((batch.meta["number"], tuple(batch.meta["ids"])) for batch in step)
        return LocalSums(loss, metrics, samples, tokens, ids)

    def _begin(self, step: list[Batch], normalisers: Normalisers) -> None:
        """Hand the micro-batches of a step to the stage, with empty ones up to a number that the schedule accepts."""
        count = accepted_micro_batches(len(step), self.split.stages, self.config.engine.schedule)
        padded = [*step, *([None] * (count - len(step)))]
        self.pipe.stage.begin(padded, normalisers, Bucket.of(step, count), self.epoch)

    def _metrics(self, start: torch.Tensor) -> torch.Tensor:
        """(metrics,) float64: their sums over the micro-batches that this stage has run, added to `start`."""
        names = self.objective.metrics
        every = (torch.stack([each[name] for name in names]).double() for each in self.pipe.stage.contributions)
        return sum(every, start)

    def step(self, learning_rate: float) -> StepResult:
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            raise NonFiniteGradientError(f"the gradient norm is {float(norm)}")
        if limit := self.config.optimizer.max_grad_norm:
            for master in self.masters.values():
                master.grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0).to(master.dtype))  # type: ignore[union-attr]

        if self.optimizer is not None:
            set_learning_rate(self.optimizer, learning_rate)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter is not self.masters[name]:
                    parameter.copy_(self.masters[name])
        self.steps += 1
        return StepResult(float(norm))

    def _gradient_norm(self) -> torch.Tensor:
        """() float64: the norm over all stages of the pipeline."""
        gradients = [self.masters[name].grad for name in self.counted]
        # _sync_gradients fills them; a copy in fp64 of the largest would take as much memory as all activations
        squares = [torch.linalg.vector_norm(g, dtype=torch.float64) ** 2 for g in gradients]  # type: ignore[arg-type]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.pipeline)
        return total.sqrt()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        borrowed = []
        for placement in self.placements:
            if not placement.plain:
                continue  # every worker holds quantised weights whole
            own, parameter = self.index in placement.stages, placement.parameter
            value = parameter.detach() if own else torch.empty_like(parameter, device=self.device)
            dist.broadcast(value, src=self.mesh.rank(placement.stages[0]))
            if not own:
                borrowed.append(placement)
                placement.put(value)
        yield
        for placement in borrowed:
            placement.drop()

    def state(self) -> EngineState:
        """The stages of the first pipeline send their parameters to rank 0, one at a time, through CPU memory."""
        state, rank = EngineState(optimizer_step=self.steps), dist.get_rank()
        for placement in self.trained:
            name, owner = canonical_name(placement.name), self.mesh.rank(placement.stages[0])
            held: list[Any] = [self._on_cpu(name) if rank == owner else None]
            if owner and rank == owner:
                dist.send_object_list(held, dst=0, group=self.host)
            if rank == 0:
                if owner:
                    dist.recv_object_list(held, src=owner, group=self.host)
                state.put(name, *held[0])
        return state

    def _on_cpu(self, name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The fp32 weights of a parameter and Adam's moments."""
        assert self.optimizer is not None
        master = self.masters[name]
        kept = {key: value.cpu() for key, value in moments(self.optimizer, master).items()}
        return master.detach().cpu(), kept

    def _build_optimizer(self, state: EngineState | None) -> None:
        """fp32 masters and AdamW over the parameters of this stage, with the moments of `state`."""
        self.masters = {
            name: self._master(parameter, state.weights[name] if state else None)
            for name, parameter in self.parameters.items()
        }
        self.optimizer = build_optimizer(self.masters, self.config.optimizer) if self.masters else None
        self.steps = state.optimizer_step if state else 0
        if state is not None and self.optimizer is not None:
            for name, master in self.masters.items():
                set_moments(self.optimizer, master, state.moments(name), state.optimizer_step)

    def _move_to_device(self) -> None:
        """Move this stage's weights, all quantised weights and the buffers. The rest stays on the meta device."""
        for placement in self.placements:
            if placement.plain and self.index in placement.stages:
                placement.put(placement.parameter.detach().to(self.device))
        for module in self.model.modules():
            if any(type(p) is not nn.Parameter for p in module._parameters.values() if p is not None):
                module.to(self.device)
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else buffer.to(self.device)

    def _master(self, parameter: nn.Parameter, value: torch.Tensor | None) -> nn.Parameter:
        """The fp32 weights that AdamW updates.

        An fp32 parameter is its own master. A 16-bit parameter gets a copy, into whose gradient every backward pass is
        added. `value`: the weights of a checkpoint.
        """
        if parameter.dtype == torch.float32:
            return parameter
        start = parameter.detach() if value is None else value
        master = nn.Parameter(start.to(self.device, torch.float32, copy=True))

        def add(p: torch.Tensor) -> None:
            assert p.grad is not None
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None

        parameter.register_post_accumulate_grad_hook(add)
        return master

    def _tied_group(self, pairs: list[tuple[int, ...]]) -> dist.ProcessGroup | None:
        """The two owners of tied embedding and head in this pipeline. Every worker takes part in making each group."""
        own = None
        for pair in pairs:
            for replica in range(self.data_parallel[1]):
                group = dist.new_group([self.mesh.rank(stage, replica) for stage in pair])
                if replica == self.data_parallel[0] and self.index in pair:
                    own = group
        return own

    def _sync_gradients(self, images: bool) -> None:
        """Sum the gradients over the replicas, and over the two owners of tied weights.

        A parameter that got no gradient in this step gets zeros. `images`: whether the step had images.
        """
        missing = [name for name, master in self.masters.items() if master.grad is None]
        if self._unchecked and images:
            if missing:
                raise RuntimeError(
                    f"{len(missing)} trainable parameters of stage {self.index} got no gradient on the first step: "
                    f"{', '.join(missing[:5])} …"
                )
            self._unchecked = False
        for name in missing:
            self.masters[name].grad = torch.zeros_like(self.masters[name])

        if self.data_parallel[1] > 1:
            gradients = [master.grad for master in self.masters.values()]
            for work in [dist.all_reduce(gradient, group=self.data, async_op=True) for gradient in gradients]:
                work.wait()
        if self.tied is not None:
            for placement in self.trained:
                if len(placement.stages) > 1:
                    dist.all_reduce(self.masters[canonical_name(placement.name)].grad, group=self.tied)
