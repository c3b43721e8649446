"""The input of the planner: a run, its data and the GPUs, with the choices that are open.

In: RunConfig, ModelShape, DataStatistics, Inventory. Out: the sizes of micro-batches worth trying, and for each of them
the Workloads of its mean and of its largest micro-batch.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from smolray.config import RunConfig
from smolray.config.rules import faults
from smolray.planner import assumptions as a
from smolray.planner.decoding import prompt_bytes
from smolray.planner.gpu_sets import GPUMesh, Place
from smolray.planner.gpus import GPU
from smolray.planner.inventory import Inventory
from smolray.planner.memory import Workload
from smolray.planner.shapes import ModelShape, Training, left_out
from smolray.planner.statistics import DataStatistics, Load

STEP_MAY_DIFFER = 0.05  # of the conversations in an optimizer step, for a micro-batch of another size


@dataclass(frozen=True)
class PlanningProblem:
    """A run to plan.

    Attributes:
        config: the run as it is written.
        shape: its model; groups whose features are precomputed are left out of it.
        statistics: its data.
        inventory: the GPUs.
        sizes: the micro-batch sizes to try; None: the planner chooses them.
        checkpointing: the values of model.gradient_checkpointing to try; None: the planner chooses them.
    """

    config: RunConfig
    shape: ModelShape
    statistics: DataStatistics
    inventory: Inventory
    sizes: tuple[int, ...] | None = None
    checkpointing: tuple[bool | int, ...] | None = None
    _allowed: dict[tuple[tuple[str, object], ...], bool] = field(default_factory=dict, init=False)
    _loads: dict[int, tuple[Load, Load]] = field(default_factory=dict, init=False)
    _workloads: dict[tuple[int, bool], list[tuple[Workload, Workload]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", replace(self.shape, left_out=left_out(self.config)))

    @cached_property
    def samples(self) -> float:
        """Conversations in an optimizer step of the run as it is written. Every plan keeps their number."""
        return self.config.global_batch * self.load(self.config.train.per_device_train_batch_size)[0].samples

    @cached_property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """Sizes to try, in conversations, the largest first.

        The run's own size, its halves, two and four times it, and whole images, where a step of such micro-batches has
        nearly as many conversations as the run's own.
        """
        if self.sizes is not None:
            return self.sizes

        own, image = self.config.train.per_device_train_batch_size, max(1, round(self.statistics.questions_per_row))
        halves = {own >> n for n in range(1, 8) if own >> n}
        tried = {own, own << 1, own << 2} | halves | {image << n for n in range(4)}
        kept = {size for size in tried if size <= self.samples and self._keeps_step(size)}
        return tuple(sorted({1, own, *kept}, reverse=True))

    def _keeps_step(self, micro_batch: int) -> bool:
        mean = self.load(micro_batch)[0]
        conversations = self.micro_batches(mean) * mean.samples
        return abs(self.samples - conversations) <= STEP_MAY_DIFFER * self.samples

    def load(self, micro_batch: int) -> tuple[Load, Load]:
        """The mean and the largest micro-batch of at most `micro_batch` conversations."""
        if micro_batch not in self._loads:
            self._loads[micro_batch] = self.statistics.loads(self.config, micro_batch)
        return self._loads[micro_batch]

    def micro_batches(self, mean: Load) -> int:
        """Micro-batches in a step when their mean is `mean`."""
        return max(1, round(self.samples / mean.samples))

    def workloads(self, micro_batch: int, pipeline: bool = False) -> list[tuple[Workload, Workload]]:
        """The workload of the mean and of the largest micro-batch, for each choice of checkpointing.

        `pipeline`: with the adapters of a pipeline, not those of ZeRO.
        """
        training = Training.of(self.config, pipeline)
        key = (micro_batch, training.fp32_adapters)
        if key not in self._workloads:
            self._workloads[key] = self._make_workloads(micro_batch, training)
        return self._workloads[key]

    def _make_workloads(self, micro_batch: int, training: Training) -> list[tuple[Workload, Workload]]:
        config = self.config
        embeds = config.traits.embeds
        # embeddings are taken before the head: no logits
        mean, largest = (replace(load, label_tokens=0) if embeds else load for load in self.load(micro_batch))
        own = config.model.gradient_checkpointing
        copy = config.reference_model == "copy"
        reference = config.reference_model in ("adapter", "copy")
        prompt = prompt_bytes(config, self.shape.text, self.statistics.longest)

        found = []
        for checkpointing in self.checkpointing or tuple(dict.fromkeys((False, True, own))):
            work = Workload(
                self.shape,
                training,
                mean,
                checkpointing,
                config.optimizer.name,
                copy,
                reference,
                embeds,
                prompt,
                context=max((gpu.context for gpu in self.kinds), default=a.CUDA_CONTEXT),
                fragmentation=max((gpu.fragmentation for gpu in self.kinds), default=a.FRAGMENTATION),
            )
            found.append((work, replace(work, load=largest)))
        return found

    def allowed(self, **engine: object) -> bool:
        """Whether the run may have these settings of its engine (config/rules.py)."""
        key = tuple(engine.items())
        if key not in self._allowed:
            settings = {"gpus": None, "partition": None, **engine}
            found = faults(self.config.replace({f"engine.{name}": value for name, value in settings.items()}))
            self._allowed[key] = not any("engine" in fault for fault in found)
        return self._allowed[key]

    @cached_property
    def seconds_per_byte(self) -> dict[GPUMesh, np.ndarray]:
        """A cache of the links between the stages of a mesh (pipelines.py)."""
        return {}

    @cached_property
    def kinds(self) -> tuple[GPU, ...]:
        """The different GPUs of the inventory."""
        return tuple(dict.fromkeys(self.inventory.gpus))

    @cached_property
    def refused(self) -> dict[GPU, str]:
        """The kinds of GPUs that cannot run this run, each with the reason."""
        reasons = {gpu: gpu.cannot_run(self.config.model.dtype) for gpu in self.kinds}
        return {gpu: reason for gpu, reason in reasons.items() if reason}

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """The GPUs that can run it, in the order of the inventory."""
        return tuple(place for place in self.kind_of if self.gpu(place) not in self.refused)

    @cached_property
    def kind_of(self) -> dict[Place, int]:
        """The number of each GPU's kind among `kinds`."""
        numbers = {gpu: number for number, gpu in enumerate(self.kinds)}
        return {(n, g): numbers[gpu] for n, node in enumerate(self.inventory.nodes) for g, gpu in enumerate(node.gpus)}

    def gpu(self, place: Place) -> GPU:
        return self.inventory.nodes[place[0]].gpus[place[1]]

    def host_memory(self, places: tuple[Place, ...]) -> float:
        """Main memory of the nodes that hold these GPUs for each of them, the least; infinite where it is not known."""
        memory = {node: self.inventory.nodes[node].memory for node, _ in places}
        used = Counter(node for node, _ in places)
        return min((m / used[node] for node, m in memory.items() if m is not None), default=math.inf)

    def cpus(self, places: tuple[Place, ...]) -> int:
        """CPU cores of the nodes that hold these GPUs."""
        return sum(self.inventory.nodes[node].cpus for node in {node for node, _ in places})
