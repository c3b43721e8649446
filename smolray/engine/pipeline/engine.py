"""Pipeline parallelism: the layers of one model lie on several workers, hidden states travel; several such pipelines
share the data.

In: the model of a stage (load.py) and an objective, on NCCL or gloo. Out: exact optimizer steps, each stage with its
own AdamW, and state by Hugging Face names. Every rank of one pipeline draws the same micro-batches; the last stage
alone counts them.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from smolray.config import RunConfig
from smolray.data.batch import Batch
from smolray.engine.base import LocalSums, StepResult
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

    `state`, when given, is restored before the first step; `order`: see Mesh.
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
        self.split = split = split_of(model, config, dist.get_world_size())
        self.mesh = mesh = Mesh.of(split.stages, order)
        replica, self.index = mesh.coordinates(dist.get_rank())
        self.data_parallel = (replica, mesh.replicas)
        self.sees_images = self.index == 0  # precomputed features enter there too
        self.pipeline, self.data = mesh.own_pipeline(), mesh.own_replicas()

        self.placements = placements_of(model, split)
        self.trained = [placement for placement in self.placements if placement.parameter.requires_grad]
        if state is not None:
            load_weights(
                {canonical_name(placement.name): placement.parameter for placement in self.trained}, state.weights
            )
        self._move_to_device()
        own = [placement for placement in self.trained if self.index in placement.stages]
        self.parameters = {canonical_name(placement.name): placement.parameter for placement in own}
        self.counted = {canonical_name(placement.name) for placement in own if placement.stages[0] == self.index}
        self.tied = self._tied_pair([placement.stages for placement in self.trained if len(placement.stages) > 1])
        self.masters = {
            name: self._master(p, state.weights[name] if state else None) for name, p in self.parameters.items()
        }
        self.optimizer = build_optimizer(self.masters, config.optimizer) if self.masters else None
        self.steps = state.optimizer_step if state else 0
        if state is not None and self.optimizer is not None:
            for name, master in self.masters.items():
                set_moments(self.optimizer, master, state.moments(name), state.optimizer_step)

        stage = Stage(
            model, split.of_stage(self.index), self.index, objective, config.seed, DTYPES[config.model.dtype], device
        )
        first = min(stage for placement in self.trained for stage in placement.stages)
        flows = tuple(boundary > first for boundary in range(split.stages + 1))
        self.pipe = Pipe(stage, split.stages, flows, config.engine.schedule, self.pipeline)
        self._unchecked = True

    @property
    def last(self) -> bool:
        return self.index == self.split.stages - 1

    def accumulate(self, batches: Iterable[Batch], forwards: int, normalisers: Normalisers) -> LocalSums:
        stage, names = self.pipe.stage, self.objective.metrics
        step = [batch.held() for batch in batches]
        loss, metrics = (torch.zeros(shape, dtype=torch.float64, device=self.device) for shape in ((), (len(names),)))
        if step:
            count = accepted_micro_batches(len(step), self.split.stages, self.config.engine.schedule)
            bucket = Bucket.of(step, count)
            stage.begin(step + [None] * (count - len(step)), normalisers, bucket, self.epoch)
            if self.objective.pairs and not len(step[0].reference_logps):
                with self.model.disable_adapter():  # type: ignore[operator]  # a PeftModel: config/rules.py
                    self.pipe.score()
            loss = self.pipe.train()
            metrics += sum(
                (
                    torch.stack([contributions[name] for name in names]).double()
                    for contributions in stage.contributions
                ),
                torch.zeros_like(metrics),
            )
        self._sync_gradients(images=any(len(batch.tile_order) for batch in step))
        if not self.last:
            return LocalSums(loss, metrics)
        ids = tuple((batch.meta["number"], tuple(batch.meta["ids"])) for batch in step)
        return LocalSums(
            loss, metrics, sum(batch.samples for batch in step), sum(batch.meta["tokens"] for batch in step), ids
        )

    def step(self, learning_rate: float) -> StepResult:
        squares = [self.masters[name].grad.double().square().sum() for name in self.counted]  # type: ignore[union-attr]  # filled by _sync_gradients
        norm = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=self.device)
        dist.all_reduce(norm, group=self.pipeline)
        norm = norm.sqrt()
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

    @contextmanager
    def gathered(self) -> Iterator[None]:
        borrowed = []
        for placement in self.placements:
            if not placement.plain:
                continue  # every worker has quantised weights whole
            mine = self.index in placement.stages
            value = placement.parameter.detach() if mine else torch.empty_like(placement.parameter, device=self.device)
            dist.broadcast(value, src=self.mesh.rank(placement.stages[0]))
            if not mine:
                borrowed.append(placement)
                placement.put(value)
        yield
        for placement in borrowed:
            placement.drop()

    def state(self) -> EngineState:
        """One parameter at a time from the first pipeline's stages to rank 0."""
        state, rank = EngineState(optimizer_step=self.steps), dist.get_rank()
        for placement in self.trained:
            name, owner = canonical_name(placement.name), self.mesh.rank(placement.stages[0])
            held: list[Any] = [None]
            if rank == owner:
                assert self.optimizer is not None
                master = self.masters[name]
                held = [
                    (
                        master.detach().cpu(),
                        {key: value.cpu() for key, value in moments(self.optimizer, master).items()},
                    )
                ]
            if owner and rank == owner:
                dist.send_object_list(held, dst=0, device=self.device)
            if rank == 0:
                if owner:
                    dist.recv_object_list(held, src=owner, device=self.device)
                state.put(name, *held[0])
        return state

    def _move_to_device(self) -> None:
        """This stage's weights, all quantised ones and the buffers; the rest stays on the meta device."""
        for placement in self.placements:
            if placement.plain and self.index in placement.stages:
                placement.put(placement.parameter.detach().to(self.device))
        for module in self.model.modules():
            if any(type(p) is not nn.Parameter for p in module._parameters.values() if p is not None):
                module.to(self.device)
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else buffer.to(self.device)

    def _master(self, parameter: nn.Parameter, value: torch.Tensor | None) -> nn.Parameter:
        """The fp32 weights that AdamW updates: the parameter itself, or, of a 16-bit one, a copy into whose gradient
        every backward is added.
        """
        if parameter.dtype == torch.float32:
            return parameter
        master = nn.Parameter(
            (parameter.detach() if value is None else value).to(self.device, torch.float32, copy=True)
        )

        def add(p: torch.Tensor) -> None:
            assert p.grad is not None
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None

        parameter.register_post_accumulate_grad_hook(add)
        return master

    def _tied_pair(self, pairs: list[tuple[int, ...]]) -> dist.ProcessGroup | None:
        """The two owners of tied embedding and head, in this pipeline; every worker takes part in making each group."""
        mine = None
        for pair in pairs:
            for replica in range(self.data_parallel[1]):
                group = dist.new_group([self.mesh.rank(stage, replica) for stage in pair])
                if replica == self.data_parallel[0] and self.index in pair:
                    mine = group
        return mine

    def _sync_gradients(self, images: bool) -> None:
        """Zeros where a step gave none, then sums over the pipelines and over the two owners of tied weights."""
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
        gradients = [master.grad for master in self.masters.values()]
        if self.data_parallel[1] > 1:
            for work in [dist.all_reduce(gradient, group=self.data, async_op=True) for gradient in gradients]:
                work.wait()
        if self.tied is not None:
            for placement in self.trained:
                if len(placement.stages) > 1:
                    dist.all_reduce(self.masters[canonical_name(placement.name)].grad, group=self.tied)
