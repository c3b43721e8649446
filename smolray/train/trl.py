"""The same run with TRL's own SFTTrainer or DPOTrainer and its DeepSpeed integration.

It is an alternative, an oracle for our losses, and a peer for benchmarks.

In: the run's model, plans and shards. Out: the StepInfo that our loop gives its hooks, so that events, evaluation,
checkpoints and export are those of every run. TRL differs in this: there is no packing; the stock processor prepares
every image; of many turns only the last answer is trained; the last batch of an epoch is filled up from the epoch's
start; a run that was interrupted starts again, so it is neither exactly-once nor elastic.
"""

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import patch_environment
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.models.utils import unwrap_model_for_generation

from smolray.config import RunConfig
from smolray.data.plan import EpochPlans
from smolray.data.processor import run_processor
from smolray.engine.base import LocalSums
from smolray.engine.optim import build_optimizer
from smolray.engine.zero import compile_nothing
from smolray.engine.zero_config import deepspeed_config
from smolray.model.adapters import trainable
from smolray.objectives.registry import objective_of
from smolray.run.checkpoint import Progress
from smolray.run.state import EngineState, canonical_name, load_weights
from smolray.train.refusal import refused_step
from smolray.train.step import Hook, StepInfo, StepMetrics, StopPoll, sum_over_workers
from smolray.train.trl_dataset import PlanOrder, shard_dataset

TRL_NAMES = {"token_accuracy": "mean_token_accuracy"}  # our name of a metric -> TRL's, where they differ


class TrlRun(TrainerCallback):
    """Both the Engine and the TrainLoop of a run.

    `state`: the weights of a finished run; a run that is not finished starts again.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        state: EngineState | None,
        plans: EpochPlans,
        folder: str,
        progress: Progress,
        hooks: Sequence[Hook] = (),
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self.config, self.model, self.plans, self.hooks = config, model, plans, hooks
        self._stop = StopPoll(stop_requested)
        self.enough: Callable[[], bool] = lambda: False  # looked at after the hooks of each step
        self.objective = objective_of(config)
        self.parameters = {canonical_name(name): p for name, p in trainable(model).items()}
        self.micro_batches = -(-plans.samples // config.train.per_device_train_batch_size)  # of an epoch
        finished = progress.step >= self.total_steps
        self.progress = progress if finished else Progress(data=progress.data)
        if state is not None and finished:
            load_weights(self.parameters, state.weights)

        self.trainer = self._trainer(folder) if not finished else None
        self._mark = time.perf_counter()  # when the last step ended
        self._waited = 0.0
        self._tokens = 0.0  # of all steps so far

    @property
    def total_steps(self) -> int:
        """`train.max_steps`, else the steps of all epochs."""
        limit = self.config.train.max_steps
        return limit if limit > 0 else self._epoch_steps * len(self.plans)

    @property
    def _epoch_steps(self) -> int:
        return -(-self.micro_batches // self.config.global_batch)

    def run(self) -> Progress:
        """Train to the end or to a stop."""
        assert self.trainer is not None  # the caller has checked that steps are left
        self._mark = time.perf_counter()
        self.trainer.train()
        return self.progress

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside it the model holds whole weights on every worker."""
        if self.trainer is None:
            yield
            return
        with unwrap_model_for_generation(self.trainer.model_wrapped, self.trainer.accelerator):
            yield

    def state(self) -> EngineState:
        """The weights alone, in fp32; TRL's optimizer states are not kept. Collective."""
        state = EngineState()
        with self.gathered():
            for name, p in self.parameters.items() if dist.get_rank() == 0 else ():
                state.weights[name] = p.detach().to("cpu", torch.float32, copy=True)
        return state

    # What TRL's trainer calls.

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._waited = time.perf_counter() - self._mark

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a step while the weights are still good. DeepSpeed has left out the update of such a one by now."""
        assert self.trainer is not None
        if self.config.zero_stage:
            refused = self.config.model.dtype != "float16" and self.trainer.model_wrapped.optimizer.overflow
        else:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            refused = not math.isfinite(nn.utils.get_total_norm(gradients))
        if refused:
            what = "the gradient norm is nan or infinite"
            raise refused_step(self.config, what, state.global_step + 1, f"epoch {state.epoch:.3g}", ())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:  # the trainer's summary at its end
            return
        step_info = self._step_info(state.global_step, logs)
        self.progress = step_info.progress
        for hook in self.hooks:
            hook(step_info)
        control.should_training_stop = step_info.stopping or step_info.last or self.enough()
        self._mark = time.perf_counter()

    def _step_info(self, step: int, logs: dict[str, float]) -> StepInfo:
        epoch, number = divmod(step - 1, self._epoch_steps)
        consumed = min((number + 1) * self.config.global_batch, self.micro_batches)
        end_of_epoch = consumed == self.micro_batches
        rows = self._index_rows(epoch, number, consumed)
        sums = self._sums()

        tokens, self._tokens = int(logs["num_tokens"] - self._tokens), logs["num_tokens"]
        progress = replace(
            self.progress,
            step=step,
            epoch=epoch + end_of_epoch,
            consumed=0 if end_of_epoch else consumed,
            samples=self.progress.samples + len(rows),
            tokens=self.progress.tokens + tokens,
        )
        metrics = StepMetrics(
            step=step,
            total_steps=self.total_steps,
            position=(epoch, consumed),
            epoch=epoch + consumed / self.micro_batches,
            loss=logs["loss"],
            grad_norm=logs.get("grad_norm", 0.0),
            learning_rate=logs["learning_rate"],
            samples=len(rows),
            tokens=tokens,
            label_tokens=int(self.plans.table["label_tokens"].to_numpy()[rows].sum()),
            seconds=time.perf_counter() - self._mark,
            data_wait_seconds=sums["waited"] / dist.get_world_size(),
            memory_bytes=int(sums["memory"]),
            metrics={name: logs[TRL_NAMES.get(name, name)] for name in self.objective.metrics},
        )
        local = LocalSums(torch.zeros(()), torch.zeros(len(self.objective.metrics)))
        last = step == self.total_steps
        return StepInfo(progress, metrics, local, end_of_epoch, last, stopping=sums["stop"] > 0)

    def _index_rows(self, epoch: int, number: int, consumed: int) -> np.ndarray:
        """The index rows of the step `number` of an epoch, after which `consumed` micro-batches are trained."""
        batch = self.config.train.per_device_train_batch_size
        return self.plans[epoch].index_rows[number * self.config.global_batch * batch : consumed * batch]

    def _sums(self) -> dict[str, float]:
        """What TRL does not log, over all workers. Collective."""
        device = next(iter(self.parameters.values())).device
        return sum_over_workers({"waited": self._waited, "stop": float(self._stop())}, device)

    def _trainer(self, folder: str) -> Any:
        config, parameters, plans = self.config, self.parameters, self.plans
        pairs = self.objective.pairs
        data = shard_dataset(folder, plans.table, pairs)
        arguments = training_arguments(config, self.total_steps)
        base = DPOTrainer if pairs else SFTTrainer

        # The reference of a PeftModel is a copy of its fresh adapter, which adds nothing: TRL makes it.
        reference = {}
        if pairs and config.lora is None:
            reference["ref_model"] = copy.deepcopy(self.model).requires_grad_(False).eval()

        class InPlanOrder(base):  # type: ignore[misc, valid-type]
            def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
                return PlanOrder(plans)

            def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
                self.optimizer = build_optimizer(parameters, config.optimizer)
                return self.optimizer

        processor: Any = run_processor(config)
        return InPlanOrder(
            model=self.model,
            args=arguments,
            train_dataset=data,
            processing_class=processor,
            callbacks=[self],
            **reference,
        )


def training_arguments(config: RunConfig, total_steps: int) -> SFTConfig | DPOConfig:
    """The run's settings by TRL's names. Its checkpoints and logs are switched off: ours take their place."""
    accumulation = config.global_batch // dist.get_world_size()
    settings = _trainer_settings(config, total_steps, accumulation)
    if config.zero_stage:
        settings["deepspeed"] = deepspeed_config(config, clip=True) | {
            "train_micro_batch_size_per_gpu": config.train.per_device_train_batch_size,
            "gradient_accumulation_steps": accumulation,
        }

    if not config.traits.pairs:
        return SFTConfig(**settings, completion_only_loss=True)
    dpo = config.dpo
    return DPOConfig(
        **settings,
        beta=dpo.beta,
        loss_type=list(dpo.loss_type),
        loss_weights=list(dpo.loss_weights) if dpo.loss_weights else None,
        label_smoothing=dpo.label_smoothing,
    )


def _trainer_settings(config: RunConfig, total_steps: int, accumulation: int) -> dict[str, Any]:
    optimizer, train, model = config.optimizer, config.train, config.model
    compile_nothing()
    alone_on_cpu = config.zero_stage == 0 and not torch.cuda.is_available()
    # Without a GPU accelerate does not find a DeepSpeed worker by itself, so it gets the process group that is there.
    AcceleratorState._reset_state(reset_partial_state=True)
    with patch_environment(ACCELERATE_USE_DEEPSPEED=str(config.zero_stage > 0).lower()):
        PartialState(cpu=alone_on_cpu, backend=dist.get_backend())

    return {
        "output_dir": tempfile.mkdtemp(prefix="smolray-trl-"),
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps,
        "seed": config.seed,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": optimizer.lr_scheduler_type,
        "lr_scheduler_kwargs": optimizer.lr_scheduler_kwargs,
        "warmup_steps": optimizer.warmup_steps or round(optimizer.warmup_ratio * total_steps),
        "max_grad_norm": optimizer.max_grad_norm,
        "bf16": model.dtype == "bfloat16",
        "fp16": model.dtype == "float16",
        "max_length": None,
        "neftune_noise_alpha": train.neftune_noise_alpha,
        "gradient_checkpointing": bool(model.gradient_checkpointing),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "accelerator_config": {"use_configured_state": True},
        "use_cpu": alone_on_cpu,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
