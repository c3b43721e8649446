"""A model that answers questions. It is loaded once in a process and used batch by batch.

In: the name of a run, a folder or a hub id, and overrides. Out: a ModelSource, from which any process loads the same
model. Then Batches of prompts in, texts out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolray import storage
from smolray.config import ConfigError, ModelConfig, RunConfig, load_config
from smolray.data.batch import Batch
from smolray.data.encode import Encoder, cached_encoder
from smolray.inference.names import find_run
from smolray.inference.questions import PlacedQuestion
from smolray.model.decoding import Choose, decode, most_likely, stop_ids_of
from smolray.model.load import check_weights, load_model
from smolray.model.sampling import Sampler
from smolray.model.trained import trained_model
from smolray.pretrained import DTYPES, model_config
from smolray.run.checkpoint import Checkpoint, chosen_checkpoint
from smolray.run.folder import RunFolder

# The data settings of a run that are kept. The others describe its own data; new data may have another layout.
KEPT_DATA = ("prompt", "max_image_pixels", "num_cpus_per_task")


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded; temperature 0 is greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class ModelSource:
    """What a process needs to load the model: a small value, the same in all processes.

    Without a checkpoint the model is the folder `config.model.path`.
    """

    config: RunConfig
    checkpoint: Checkpoint | None = None

    def encoder(self) -> Encoder:
        """The encoder of the model; its `max_length` is the model's context."""
        return cached_encoder(self.config.model, self.config.data, self.config.image)

    @property
    def quantised(self) -> bool:
        """Whether bitsandbytes decides where the weights are."""
        return self.config.model.load_in_4bit or self.config.model.load_in_8bit

    def load(self, device: torch.device) -> Any:
        """The model in evaluation mode, on a device."""
        if self.checkpoint:
            model: Any = trained_model(self.config, self.checkpoint)
        else:
            model = load_model(self.config.model).eval()
        return model if self.quantised else model.to(device)


def find_model(
    name: str, storage_uri: str, overrides: Sequence[str] = (), checkpoint: str | None = None
) -> ModelSource:
    """Find a model by the name or folder of a run, or else by a folder or hub id for transformers.

    Of a run, `checkpoint` is taken; default: the best, else the newest. Image settings, dtype and data.prompt are those
    of the run. A folder has the dtype of its files. `overrides` are applied last.

    Raises ConfigError, CheckpointError, RunNotFoundError, OSError.
    """
    run_dir = find_run(name, storage_uri)
    if run_dir is None:
        if checkpoint:
            raise ConfigError(
                f"checkpoint {checkpoint}: {name} is not a run under {storage_uri}; only runs have checkpoints"
            )
        model = {"path": name, "dtype": _dtype_of(name)}
        return _with_whole_context(load_config(None, overrides, {"model": model}))

    chosen = chosen_checkpoint(run_dir, checkpoint)
    stored = load_config(RunFolder(run_dir).config).model_dump(mode="json")
    base = {part: stored[part] for part in ("seed", "method", "model", "lora", "image")}
    base["model"] |= {"vision_features": "compute", "gradient_checkpointing": False}
    base["data"] = {key: stored["data"][key] for key in KEPT_DATA}
    return _with_whole_context(load_config(None, overrides, base), chosen)


class Predictor:
    """A model on a device, which answers Batches of prompts."""

    def __init__(self, source: ModelSource, decoding: Decoding, device: torch.device):
        self.model = source.load(device)
        encoder = source.encoder()
        self.tokenizer, self.decoding = encoder.tokenizer, decoding
        self.stop_ids = stop_ids_of(self.model, encoder)

    def answers(self, batch: Batch, names: Sequence[str]) -> list[str]:
        """The text of each conversation in the order of the batch.

        `names`: one for each conversation, which seeds its random numbers. Raises ConfigError where the batch does not
        fit into memory.
        """
        decoding, device = self.decoding, next(self.model.parameters()).device
        limit = decoding.max_new_tokens
        choose: Choose = most_likely
        if decoding.temperature:
            choose = Sampler(names, limit, decoding.temperature, decoding.top_p, decoding.seed)

        try:
            ids = decode(self.model, batch.to(device), limit, self.stop_ids, choose)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{len(names)} questions at a time do not fit into the memory of {device} "
                f"({str(error).splitlines()[0]}); nearest: a smaller --batch-size, or image.max_tiles=5"
            ) from None
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def answer_rows(
    predictor: Predictor, batch: Batch | None, questions: Sequence[PlacedQuestion]
) -> list[dict[str, str | None]]:
    """A row for each question: id, path, prompt, and text or error."""
    texts: list[str] = []
    if batch is not None:
        names = {question.place: f"{question.id}\0{question.prompt}" for question in questions if question.place >= 0}
        texts = predictor.answers(batch, [names[place] for place in range(len(names))])

    return [
        {
            "id": question.id,
            "path": question.path,
            "prompt": question.prompt,
            "text": texts[question.place] if question.place >= 0 else None,
            "error": question.error or None,
        }
        for question in questions
    ]


def _with_whole_context(config: RunConfig, chosen: Checkpoint | None = None) -> ModelSource:
    """The source with the model's whole context as data.max_length, whose usual value is a limit of training.

    Raises ConfigError and OSError where there is no model.
    """
    path = _absolute(config.model.path)
    model = config.model.replace({"path": path})
    check_weights(model)
    longest = int(model_config(model).text_config.max_position_embeddings)
    return ModelSource(config.replace({"model.path": path, "data.max_length": longest}), chosen)


def _dtype_of(path: str) -> str:
    """The dtype in which a folder or hub id was saved. Raises ConfigError or OSError where it is no model."""
    saved = model_config(ModelConfig(path=path))
    name = str(getattr(saved, "dtype", None)).removeprefix("torch.")
    return name if name in DTYPES else "bfloat16"


def _absolute(path: str) -> str:
    return storage.absolute(path) if "://" not in path and Path(path).expanduser().exists() else path
