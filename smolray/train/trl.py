"""The same run by TRL's own SFTTrainer or DPOTrainer, with its DeepSpeed integration: an alternative, an oracle, a peer
for benchmarks.

In: the run's model, plans and shards. Out: the Moments that our loop gives its hooks, so that events, evaluation,
checkpoints and export are those of every run. TRL's ways apply: no packing, every image through the stock processor, of
many turns only the last answer is trained, an epoch's last batch is filled up from its start, and a run that was
interrupted begins again: exactly-once and elastic are not to be had here.
"""

import copy
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
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.models.utils import unwrap_model_for_generation

from smolray.config import RunConfig
from smolray.data.plan import EpochPlan
from smolray.data.processor import run_processor
from smolray.data.reader import ShardReader
from smolray.data.sample import Conversation, Message, ShardRow
from smolray.data.tiles import decode
from smolray.engine.base import LocalSums
from smolray.engine.optim import build_optimizer
from smolray.engine.zero import deepspeed_config
from smolray.model.adapters import trainable
from smolray.objectives.registry import objective_of
from smolray.run.checkpoint import Progress
from smolray.run.state import EngineState, canonical_name, load_weights
from smolray.train.loop import Hook, StepInfo, StepMetrics, peak_memory_bytes

STOP_POLL_SECONDS = 2.0
TRL_NAMES = {"token_accuracy": "mean_token_accuracy"}  # where TRL calls a metric otherwise


class TrlRun(TrainerCallback):
    """Stands where an Engine and a Loop stand otherwise.

    `state`: weights of a finished run; one that is not finished begins again.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        state: EngineState | None,
        plans: Sequence[EpochPlan],
        folder: str,
        progress: Progress,
        hooks: Sequence[Hook] = (),
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self.config, self.model, self.plans, self.hooks, self.stop_requested = (
            config,
            model,
            plans,
            hooks,
            stop_requested,
        )
        self.objective = objective_of(config)
        self.parameters = {canonical_name(name): p for name, p in trainable(model).items()}
        self.micro_batches = -(-plans[0].samples // config.train.per_device_train_batch_size)  # of an epoch
        finished = progress.step >= self.total_steps
        self.progress = progress if finished else Progress(data=progress.data)
        if state is not None and finished:
            load_weights(self.parameters, state.weights)
        self.trainer = self._trainer(folder) if not finished else None
        self._polled = self._mark = time.perf_counter()
        self._waited = 0.0
        self._tokens = 0.0

    @property
    def total_steps(self) -> int:
        steps, limit = self._epoch_steps * len(self.plans), self.config.train.max_steps
        return min(steps, limit) if limit > 0 else steps

    @property
    def _epoch_steps(self) -> int:
        return -(-self.micro_batches // self.config.global_batch)

    def run(self) -> Progress:
        """Train to the end or to a stop."""
        assert self.trainer is not None  # the caller asks for steps that are left
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
        """The weights, as they compute; TRL's optimizer states are not kept. Collective."""
        state = EngineState()
        with self.gathered():
            for name, p in self.parameters.items() if dist.get_rank() == 0 else ():
                state.weights[name] = p.detach().to("cpu", torch.float32, copy=True)
        return state

    # What TRL's trainer calls.

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._waited = time.perf_counter() - self._mark

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:  # the trainer's summary at its end
            return
        step_info = self._step_info(state.global_step, logs)
        self.progress = step_info.progress
        for hook in self.hooks:
            hook(step_info)
        control.should_training_stop = step_info.stopping or step_info.last
        self._mark = time.perf_counter()

    def _step_info(self, step: int, logs: dict[str, float]) -> StepInfo:
        epoch, number = divmod(step - 1, self._epoch_steps)
        size, batch, plan = self.config.global_batch, self.config.train.per_device_train_batch_size, self.plans[epoch]
        consumed = min((number + 1) * size, self.micro_batches)
        lines = plan.index_rows[number * size * batch : consumed * batch]
        device = next(iter(self.parameters.values())).device
        sums = torch.tensor([self._waited, float(self._stop())], dtype=torch.float64, device=device)
        memory = torch.tensor([float(peak_memory_bytes(device))], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        tokens, self._tokens = int(logs["num_tokens"] - self._tokens), logs["num_tokens"]
        done, before = consumed == self.micro_batches, self.progress
        progress = replace(
            before,
            step=step,
            epoch=epoch + done,
            consumed=0 if done else consumed,
            samples=before.samples + len(lines),
            tokens=before.tokens + tokens,
        )
        metrics = StepMetrics(
            step=step,
            total_steps=self.total_steps,
            position=(epoch, consumed),
            epoch=epoch + consumed / self.micro_batches,
            loss=logs["loss"],
            grad_norm=logs.get("grad_norm", 0.0),
            learning_rate=logs["learning_rate"],
            samples=len(lines),
            tokens=tokens,
            label_tokens=int(plan.index["label_tokens"].to_numpy()[lines].sum()),
            seconds=time.perf_counter() - self._mark,
            data_wait_seconds=sums[0].item() / dist.get_world_size(),
            memory_bytes=int(memory.item()),
            metrics={name: logs[TRL_NAMES.get(name, name)] for name in self.objective.metrics},
        )
        local = LocalSums(torch.zeros(()), torch.zeros(len(self.objective.metrics)))
        return StepInfo(
            progress, metrics, local, end_of_epoch=done, last=step == self.total_steps, stopping=sums[1].item() > 0
        )

    def _stop(self) -> bool:
        if dist.get_rank() or time.perf_counter() - self._polled < STOP_POLL_SECONDS:
            return False
        self._polled = time.perf_counter()
        return self.stop_requested()

    # Wiring.

    def _trainer(self, folder: str) -> Any:
        config, parameters, plans = self.config, self.parameters, self.plans
        data, arguments = (
            shard_dataset(folder, plans[0], pairs=self.objective.pairs),
            training_arguments(config, self.total_steps),
        )
        base = DPOTrainer if self.objective.pairs else SFTTrainer
        # The reference of a PeftModel is a copy of its fresh adapter, which adds nothing: TRL makes it.
        frozen = (
            copy.deepcopy(self.model).requires_grad_(False).eval()
            if self.objective.pairs and config.lora is None
            else None
        )
        reference = {"ref_model": frozen} if frozen is not None else {}

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


class PlanOrder(Sampler[int]):
    """Lines of the index in the order of the epoch's plan."""

    def __init__(self, plans: Sequence[EpochPlan]):
        self.plans, self.epoch = plans, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.plans[0].samples

    def __iter__(self) -> Iterator[int]:
        return iter(self.plans[min(self.epoch, len(self.plans) - 1)].index_rows.tolist())


def shard_dataset(folder: str, plan: EpochPlan, pairs: bool) -> Dataset:
    """A line of the index is an example; its row is read from the shards when it is asked for."""
    reader = ShardReader.open(folder)
    places = np.stack([plan.index[name].to_numpy() for name in ("shard", "row_group", "row", "conversation")], axis=1)
    held: dict[tuple[int, int], list[ShardRow]] = {}

    def rows(shard: int, row_group: int) -> list[ShardRow]:
        if (shard, row_group) not in held:
            while len(held) >= 16:
                held.pop(next(iter(held)))  # neighbours in the plan share row groups
            held[shard, row_group] = reader.row_group(shard, row_group)
        return held[shard, row_group]

    def read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        examples = []
        for shard, row_group, row, conversation in places[batch["line"]].tolist():
            found = rows(shard, row_group)[row]
            examples.append(example(found, found.conversations[conversation], pairs))
        return {name: [one[name] for one in examples] for name in examples[0]}

    return Dataset.from_dict({"line": np.arange(len(places))}).with_transform(read)


def example(row: ShardRow, conversation: Conversation, pairs: bool) -> dict[str, Any]:
    """TRL's conversational format: images (PIL), prompt, and completion or chosen and rejected.

    The last assistant turn is the completion.
    """
    images = {"images": [decode(image) for image in row.images]}
    if pairs:
        endings = {"chosen": conversation.chosen, "rejected": conversation.rejected}
        return (
            images
            | {"prompt": _turns(conversation.messages)}
            | {name: _turns(ending) for name, ending in endings.items()}
        )
    last = max(i for i, message in enumerate(conversation.messages) if message.role == "assistant")
    return images | {
        "prompt": _turns(conversation.messages[:last]),
        "completion": _turns(conversation.messages[last : last + 1]),
    }


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [
        {
            "role": m.role,
            "content": [
                {"type": "image"} if p.type == "image" else {"type": "text", "text": p.text} for p in m.content
            ],
        }
        for m in messages
    ]


def training_arguments(config: RunConfig, total_steps: int) -> SFTConfig | DPOConfig:
    """The run's settings by TRL's names. Its checkpoints and logs are left to us."""
    optimizer, train, model = config.optimizer, config.train, config.model
    accumulation, alone_on_cpu = (
        config.global_batch // dist.get_world_size(),
        config.engine.stage == 0 and not torch.cuda.is_available(),
    )
    # Left to itself accelerate sees no DeepSpeed worker where there is no GPU: it is told of the process group that is
    # there.
    AcceleratorState._reset_state(reset_partial_state=True)
    with patch_environment(ACCELERATE_USE_DEEPSPEED=str(config.engine.stage > 0).lower()):
        PartialState(cpu=alone_on_cpu, backend=dist.get_backend())
    settings: dict[str, Any] = {
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
    if config.engine.stage:
        zero = deepspeed_config(config, clip=True)
        zero |= {
            "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
            "gradient_accumulation_steps": accumulation,
        }
        settings["deepspeed"] = zero
    if config.method == "sft":
        return SFTConfig(**settings, completion_only_loss=True)
    dpo = config.dpo
    return DPOConfig(
        **settings,
        beta=dpo.beta,
        loss_type=list(dpo.loss_type),
        loss_weights=list(dpo.loss_weights) if dpo.loss_weights else None,
        label_smoothing=dpo.label_smoothing,
    )
