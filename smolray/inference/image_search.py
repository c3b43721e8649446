"""Image search by text: builds an index of image embeddings, and finds the images nearest to a text.

In: a ModelSource (of a run of method retrieval) and QuestionTasks, then texts. Out: a folder with images.parquet (id,
path), vectors.faiss (inner products of unit vectors, so cosines) and, written last, index.json; then Hits.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from smolray import storage
from smolray.config import ConfigError, load_config
from smolray.data.batch import Batch
from smolray.data.collate import Group, collate_prompts
from smolray.data.sample import Conversation, Message, Part, ShardRow
from smolray.inference.job import InferenceJob, run_job
from smolray.inference.predictor import Decoding, ModelSource, Predictor
from smolray.inference.questions import PlacedQuestion, PromptSettings, QuestionTask
from smolray.objectives.contrastive import embeddings
from smolray.run import checkpoint

IMAGES, VECTORS, MANIFEST = "images.parquet", "vectors.faiss", "index.json"


@dataclass(frozen=True)
class Hit:
    """An image that was found. `similarity`: cosine of its embedding and the text's, -1..1."""

    similarity: float
    id: str
    path: str


def require_faiss() -> Any:
    """The module faiss. Raises ConfigError where it is not installed."""
    try:
        import faiss  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise ConfigError(
            "the index of `smolray search` needs FAISS, which is not installed; run: pip install 'smolray[search]'"
        ) from None
    return faiss


class Embedder:
    """A model on a device. In: a Batch of prompts. Out: embeddings of length 1."""

    def __init__(self, source: ModelSource, device: torch.device):
        self.predictor = Predictor(source, Decoding(), device)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> np.ndarray:
        """(conversations, hidden) float32, in the order of the batch."""
        model = self.predictor.model
        return embeddings(model, batch.to(next(model.parameters()).device)).cpu().numpy()

    def rows(self, batch: Batch | None, questions: Sequence[PlacedQuestion]) -> pa.Table:
        """A row for each question: id, path, error, vector."""
        vectors = self(batch) if batch is not None else np.zeros((0, 0), np.float32)
        return pa.table(
            {
                "id": [question.id for question in questions],
                "path": [question.path for question in questions],
                "error": pa.array([question.error or None for question in questions], pa.string()),
                "vector": pa.array(
                    [vectors[question.place] if question.place >= 0 else None for question in questions],
                    pa.list_(pa.float32()),
                ),
            }
        )


def build_index(
    source: ModelSource,
    question_tasks: Sequence[QuestionTask],
    prompt_settings: PromptSettings,
    out: str,
    batch_size: int,
    workers: int | None = None,
) -> Counter[str]:
    """Write the index of the images in `question_tasks`, each with the one prompt of `prompt_settings`.

    Returns the number of images that were left out, by reason. Raises ConfigError where no image is left, or without
    FAISS.
    """
    faiss = require_faiss()
    (prompt,) = prompt_settings.prompts
    job = InferenceJob(source, question_tasks, prompt_settings, batch_size, 0, partial(Embedder, source))

    vectors, ids, paths, errors = list[np.ndarray](), list[str](), list[str](), Counter[str]()
    for table in run_job(job, workers):
        for row in table.to_pylist():
            if row["error"]:
                errors[row["error"].partition(":")[0]] += 1
                continue
            vectors.append(np.array(row["vector"], np.float32))
            ids.append(row["id"])
            paths.append(row["path"])
    if not vectors:
        reasons = ", ".join(f"{reason} {count}" for reason, count in errors.most_common())
        raise ConfigError(f"no image could be read: {reasons}")

    index = faiss.IndexFlatIP(len(vectors[0]))
    index.add(np.stack(vectors))

    storage.delete(storage.join(out, MANIFEST))  # without this file the index counts as incomplete
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": ids, "path": paths}), sink, compression="zstd")
    storage.write_bytes(storage.join(out, IMAGES), sink.getvalue().to_pybytes())
    storage.write_bytes(storage.join(out, VECTORS), faiss.serialize_index(index).tobytes())

    about = {
        "images": len(ids),
        "width": index.d,
        "prompt": prompt,
        "config": source.config.model_dump(mode="json"),
        "checkpoint": source.checkpoint and source.checkpoint.uri,
    }
    storage.write_bytes(storage.join(out, MANIFEST), json.dumps(about, indent=1).encode())
    return errors


class ImageSearch:
    """An index with its model, ready for texts.

    Raises ConfigError where the folder has no index, or without FAISS; CheckpointError where the checkpoint is gone.
    """

    def __init__(self, folder: str):
        faiss = require_faiss()
        try:
            about: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder, MANIFEST)))
        except FileNotFoundError:
            raise ConfigError(
                f"{folder} holds no index of images ({MANIFEST}); "
                f"make one with `smolray search build MODEL IMAGES --out {folder}`"
            ) from None

        self.source = ModelSource(
            load_config(base=about["config"]),
            checkpoint.verify(about["checkpoint"]) if about["checkpoint"] else None,
        )
        self.index = faiss.deserialize_index(np.frombuffer(storage.read_bytes(storage.join(folder, VECTORS)), np.uint8))
        self.images = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(folder, IMAGES))))
        self.embed = Embedder(self.source, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def find(self, texts: Sequence[str], top: int = 10) -> Iterator[list[Hit]]:
        """For each text the `top` images nearest to it, the best first."""
        rows = [ShardRow(text, (), (Conversation(text, (Message("user", (Part("text", text),)),)),)) for text in texts]
        vectors = self.embed(collate_prompts([Group(row, (0,)) for row in rows], self.source.encoder()))

        similarities, numbers = self.index.search(vectors, min(top, self.index.ntotal))
        for row, found in zip(similarities.tolist(), numbers.tolist(), strict=True):
            hits = self.images.take(found).to_pylist()
            yield [Hit(similarity, hit["id"], hit["path"]) for similarity, hit in zip(row, hits, strict=True)]
