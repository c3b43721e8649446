"""DeepSpeed ZeRO, stages 0 to 3, with or without offload, on NCCL or gloo as the process group is.

In: a model ready for training and an objective. Out: exact optimizer steps. DeepSpeed averages gradients over workers
and by default divides them by its own accumulation count. `_backward` alone undoes the first and switches off the
second.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from smolray.config import RunConfig
from smolray.data.batch import Batch
from smolray.engine.base import LocalSums, NonFiniteGradientError, StepResult, micro_batch_seed, with_noise
from smolray.engine.gradients import GradientSums
from smolray.engine.lean_import import without
from smolray.engine.optim import (
    FP32,
    build_optimizer,
    dequantised,
    moments,
    optimizer_step,
    set_learning_rate,
    set_moments,
)
from smolray.engine.zero_config import deepspeed_config
from smolray.model.adapters import trainable
from smolray.model.forward import hidden_states
from smolray.model.load import base_model
from smolray.objectives.base import Normalisers, Objective
from smolray.objectives.contrastive import contrast, embeddings
from smolray.objectives.reference import Reference, reference_of
from smolray.pretrained import DTYPES
from smolray.run.state import EngineState, Moments, canonical_name, load_weights

with without("mlflow"):  # DeepSpeed's autotuner loads it: a second at the start of every worker, and nothing uses it
    import deepspeed
    from deepspeed.utils import (
        lazy_init_hp_params_optimizer_state,
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

LINEAR = nn.functional.linear  # DeepSpeed replaces it at stage 3, for the rest of the process


def compile_nothing() -> None:
    """Keep DeepSpeed from compiling its all-reduce for inference on a CPU: 40 s, and no training uses it."""
    deepspeed.ops.__compatible_ops__ = {}


class _ObjectiveModule(nn.Module):
    """What DeepSpeed wraps: a module whose forward pass gives the loss; without normalisers the embeddings."""

    def __init__(self, model: nn.Module, objective: Objective, reference: Reference | None):
        super().__init__()
        self.model, self.objective, self.reference = model, objective, reference

    def forward(self, batch: Batch, normalisers: Normalisers | None):
        if normalisers is None:
            return embeddings(self.model, batch)
        if self.reference is not None and not len(batch.reference_logps):
            batch = replace(batch, reference_logps=self.reference(self.model, batch))
        hidden = hidden_states(self.model, batch, self.objective.positions(batch))
        return self.objective.loss(base_model(self.model).lm_head, hidden, batch, normalisers)


class ZeroEngine:
    """An Engine (engine/base.py) over deepspeed.initialize. `state`, when given, is restored before the first step."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: RunConfig,
        device: torch.device,
        state: EngineState | None = None,
    ):
        self.model, self.objective, self.config, self.device = model, objective, config, device
        self.stage = config.zero_stage
        self.epoch = 0
        self.data_parallel, self.sees_images = (dist.get_rank(), dist.get_world_size()), True
        self.one_by_one = not objective.embeds
        self.parameters = {canonical_name(name): p for name, p in trainable(model).items()}
        self.reference_known = config.reference_model == "precompute"  # its log-probabilities come with the batches

        # a frozen copy is taken before a checkpoint is read
        reference = reference_of(model.to(device), config)
        if state is not None:
            load_weights(self.parameters, state.weights)  # before fp32 masters are copied
        model.to(device)

        self.masters = self._own_masters() if self.stage == 0 else self.parameters
        if self.stage == 3 and config.engine.offload_param == "none":
            hide_frozen(model)
        if self.stage < 3:
            # DeepSpeed's adds the bias separately: in bf16 it rounds differently
            nn.functional.linear = LINEAR
        compile_nothing()
        deepspeed.logger.setLevel(logging.WARNING)

        self.sums = GradientSums(self.parameters, sharded=self.stage == 3)

        # At stage 0 DeepSpeed does not report the norm when it clips, so this engine clips there.
        self.engine, *_ = deepspeed.initialize(
            model=_ObjectiveModule(model, objective, reference),
            optimizer=build_optimizer(self.masters, config.optimizer),
            config=deepspeed_config(
                config, clip=self.stage > 0, trained=sum(p.numel() for p in self.parameters.values())
            ),
            dist_init_required=False,
        )

        self._first_step = True
        if state is not None:
            self._load_state(state)

    def accumulate(self, batches: Iterable[Batch], forwards: int, normalisers: Normalisers) -> LocalSums:
        names = self.objective.metrics
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        metrics = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        samples = tokens = done = 0
        began = time.perf_counter()
        ids: list[tuple[int, tuple[str, ...]]] = []
        if self.objective.embeds:
            batches = [batch.clone() for batch in batches]
            found, met = self._embeddings(batches, forwards), self._now()
            batches = contrast(batches, found, self.config.retrieval.temperature, self.device)
            began += self._now() - met  # waiting for the others

        self.sums.several = forwards > 1
        coalesced = self.engine.coalesce_grad_reduction() if self.stage else nullcontext()
        if self.stage == 0:
            self.engine.set_gradient_accumulation_boundary(False)
        with coalesced:
            for batch in batches:
                number = batch.meta["number"]
                torch.manual_seed(micro_batch_seed(self.config.seed, self.epoch, number))
                batch = with_noise(batch.to(self.device), self.config, self.epoch)
                batch_loss, contributions = self.engine(batch, normalisers)
                self._backward(batch_loss)
                loss += batch_loss.detach().double()
                metrics += torch.stack([contributions[name] for name in names]).double()
                samples, tokens, done = samples + batch.samples, tokens + batch.meta["tokens"], done + 1
                ids.append((number, tuple(batch.meta["ids"])))
            seconds = self._now() - began

            # Passes are collective: ZeRO-3 needs as many as the busiest worker makes, the other stages at least one
            # backward pass, so that every gradient exists.
            for _ in range(max(forwards if self.stage == 3 else 1, 1) - done):
                empty = dummy_batch(self.device, self.objective.pairs, self.reference_known)
                self._backward(self.engine(empty, normalisers)[0] * 0.0)
            if self.stage or dist.get_world_size() > 1:
                self.sums.put_back()
            if self._first_step:
                self._check_gradients()

        self.engine.set_gradient_accumulation_boundary(True)
        if self.stage == 0 and dist.get_world_size() > 1:  # alone it would only copy them to a bucket and back
            self.engine.allreduce_gradients()
        return LocalSums(loss, metrics, samples, tokens, tuple(ids), seconds)

    def _now(self) -> float:
        """Seconds on a clock, after the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @torch.no_grad()
    def _embeddings(self, batches: list[Batch], forwards: int) -> list[torch.Tensor]:
        """The first pass of a contrastive step: every embedding, under the dropout of the second pass."""
        found = []
        for batch in batches:
            torch.manual_seed(micro_batch_seed(self.config.seed, self.epoch, batch.meta["number"]))
            found.append(self.engine(with_noise(batch.to(self.device), self.config, self.epoch), None))
        for _ in range(forwards - len(batches) if self.stage == 3 else 0):
            self.engine(dummy_batch(self.device, False, False), None)
        return found

    def step(self, learning_rate: float) -> StepResult:
        set_learning_rate(self.engine.optimizer, learning_rate)
        norm = None
        if self.stage == 0:
            for name, master in self.masters.items():
                master.grad = self.sums.take(name)
            limit = self.config.optimizer.max_grad_norm or float("inf")
            norm = float(nn.utils.clip_grad_norm_(self.masters.values(), limit))
            if not math.isfinite(norm):
                raise NonFiniteGradientError(f"the gradient norm is {norm}")

        self.engine.step()
        if self.stage == 0:
            self._follow_masters()

        # On the other stages DeepSpeed looks at the norm and leaves the weights where it is not finite.
        scaled, skipped = self.config.model.dtype == "float16", bool(getattr(self.engine.optimizer, "overflow", False))
        if skipped and not scaled:
            raise NonFiniteGradientError("the gradient norm is nan or infinite")
        norm = norm if norm is not None else float(self.engine.get_global_grad_norm() or 0.0)
        return StepResult(norm, skipped, loss_scale=float(self.engine.optimizer.loss_scale) if scaled else None)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return

        from trl.models.utils import add_hooks, remove_hooks  # takes a second, at the start of every worker

        # Workers evaluate different numbers of batches, so DeepSpeed's collective hooks must be off while weights are
        # whole.
        remove_hooks(self.engine)
        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            yield
        add_hooks(self.engine)

    def state(self) -> EngineState:
        keep = dist.get_rank() == 0
        # before the first real step, as after an fp16 overflow
        if self.stage and not optimizer_step(self._base_optimizer()):
            self._make_moments()
            for values in self._base_optimizer().state.values():
                values["step"] = torch.zeros_like(values["step"])  # no update was made

        self._link_moments()
        state = EngineState(optimizer_step=optimizer_step(self._base_optimizer()))
        if self.config.model.dtype == "float16":
            state.loss_scale = float(self.engine.optimizer.loss_scale)
        for name, p in self.parameters.items():
            weight, kept = self._full(name, p)
            if keep:
                state.put(name, weight, kept)
        return state

    def _load_state(self, state: EngineState) -> None:
        """Restore moments, masters and step counts. The working weights were set before DeepSpeed took them over."""
        if self.stage == 0:
            load_weights(self.masters, state.weights)
            for name, master in self.masters.items():
                set_moments(self._base_optimizer(), master, state.moments(name), state.optimizer_step)
            return

        self._make_moments()
        self._link_moments()
        for name, p in self.parameters.items():
            for key, value in dequantised(state.moments(name)).items():
                self._set_moment(p, value.to(self.device), key)
            self._set_master(p, state.weights[name].to(self.device))
        for values in self._base_optimizer().state.values():
            values["step"] = torch.full_like(values["step"], float(state.optimizer_step))
        if state.loss_scale is not None and hasattr(self.engine.optimizer, "loss_scaler"):
            self.engine.optimizer.loss_scaler.cur_scale = state.loss_scale

    def _backward(self, loss: torch.Tensor) -> None:
        """Backward pass of a contribution to the step's loss. The factor undoes DeepSpeed's mean over workers."""
        self.engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def _check_gradients(self) -> None:
        missing = [
            name
            for name, p in self.parameters.items()
            if p.grad is None and getattr(p, "grad_accum", None) is None and name not in self.sums
        ]
        if missing:
            raise RuntimeError(
                f"{len(missing)} trainable parameters got no gradient on the first step: {', '.join(missing[:5])} …"
            )
        self._first_step = False

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self.engine.optimizer if self.stage == 0 else self.engine.optimizer.optimizer

    def _own_masters(self) -> dict[str, nn.Parameter]:
        """What the optimizer of stage 0 updates: fp32 copies where the model computes in 16 bit.

        On the other stages DeepSpeed keeps the masters.
        """
        dtype = DTYPES[self.config.model.dtype]
        if dtype == torch.float32:
            return self.parameters
        masters = {name: nn.Parameter(p.detach().float()) for name, p in self.parameters.items()}
        for p in self.parameters.values():
            p.data = p.data.to(dtype)  # adapters compute like the rest
        return masters

    @torch.no_grad()
    def _follow_masters(self) -> None:
        """Copy the updated masters of stage 0 into the working weights."""
        for name, p in self.parameters.items():
            if self.masters[name] is not p:
                p.copy_(self.masters[name])
                self.masters[name].grad = None

    def _full(self, name: str, p: nn.Parameter) -> tuple[torch.Tensor, Moments]:
        """The whole fp32 weights of a parameter and Adam's moments. Collective."""
        if self.stage == 0:
            return self.masters[name], moments(self._base_optimizer(), self.masters[name])
        return safe_get_full_fp32_param(p), {key: safe_get_full_optimizer_state(p, key) for key in FP32}

    def _make_moments(self) -> None:
        """Make one step with lr = 0 and no decay: DeepSpeed creates the moments, which the setters need, on a step."""
        groups = self.engine.optimizer.param_groups
        decay = [g["weight_decay"] for g in groups]
        for g in groups:
            g["lr"] = g["weight_decay"] = 0.0
        self._first_step = False
        self.accumulate((), 1, Normalisers(1, 1, 1))
        self.engine.step()
        for g, value in zip(groups, decay, strict=True):
            g["weight_decay"] = value
        self._first_step = True

    def _link_moments(self) -> None:
        """Link the moments to the parameters again.

        DeepSpeed 0.19 links those of all parameter groups after it has stepped the first, when the others have none.
        """
        zero = self.engine.optimizer
        if self.stage in (1, 2):
            for group, master in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(group, master, zero.optimizer.state)

    def _set_moment(self, p: nn.Parameter, value: torch.Tensor, key: str) -> None:
        if self.stage == 3:
            safe_set_local_optimizer_state(p, local_slice(value), key)
        else:
            safe_set_full_optimizer_state(p, value, key)

    def _set_master(self, p: nn.Parameter, value: torch.Tensor) -> None:
        if self.stage == 3:
            safe_set_local_fp32_param(p, local_slice(value))
        else:
            safe_set_full_fp32_param(p, value)


def hide_frozen(model: nn.Module) -> None:
    """Take a frozen vision tower and connector out of the module tree; they still run.

    ZeRO-3 shards all that it finds in the tree and gathers it for every pass.
    """
    inner = base_model(model).model
    for name in ("vision_model", "connector"):
        part = inner._modules.get(name)
        if part is not None and not any(p.requires_grad for p in part.parameters()):
            inner.__dict__[name] = inner._modules.pop(name)


def local_slice(value: torch.Tensor) -> torch.Tensor:
    """This rank's part of `value` as ZeRO-3 holds it: flat and padded to equal parts.

    `safe_set_full_*` fails where the values do not divide by the workers.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    size = -(-value.numel() // world)
    flat = nn.functional.pad(value.flatten(), (0, size * world - value.numel()))
    return flat[rank * size : (rank + 1) * size].contiguous()


def dummy_batch(device: torch.device, pairs: bool, reference_known: bool) -> Batch:
    """A batch of two tokens and no image.

    The model runs a dummy tile for it where the vision tower takes part (forward.py). Without `reference_known` the
    reference model runs too.
    """
    completions = torch.arange(2 if pairs else 1)
    none, two = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)
    return Batch(
        input_ids=two + 1,
        position_ids=torch.tensor([[0, 1]]),
        branch=two,
        lengths=none,
        pixel_values=torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
        features=torch.zeros(0, 0, 0),
        tile_order=none,
        target_positions=completions * 0,
        target_ids=completions * 0 + 1,
        target_completion=completions,
        ends=completions * 0 + 1,
        reference_logps=torch.zeros(len(completions) if reference_known else 0),
        meta={"branched": False},
    ).to(device)
