"""Embeddings in the form of OpenAI's.

In: an EmbeddingRequest with its images. Out: samples for the model, and the JSON of their vectors.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from smolray.data.sample import Conversation, Message, Part, Sample
from smolray.serve.model import Embedded
from smolray.serve.schema import EmbeddingRequest, checked


def embedding_samples(request: EmbeddingRequest, images: Sequence[bytes], image_prompt: str) -> list[Sample]:
    """A sample for each input: a text, or an image with the text that stands with every image. Raises ApiError."""
    left = iter(images)
    samples = []
    for one in request.inputs:
        is_text = isinstance(one, str)
        parts = (Part("text", str(one)),) if is_text else (Part("image"), Part("text", image_prompt))
        conversation = checked(Conversation("", (Message("user", parts),)))
        samples.append(Sample(() if is_text else (next(left),), conversation))
    return samples


def embedding_list(request: EmbeddingRequest, embedded: Embedded) -> dict[str, Any]:
    """The answer."""

    def shown(vector: list[float]) -> list[float] | str:
        if request.encoding_format == "float":
            return vector
        return base64.b64encode(np.array(vector, "<f4").tobytes()).decode()

    data = [
        {"object": "embedding", "index": number, "embedding": shown(vector)}
        for number, vector in enumerate(embedded.vectors)
    ]
    usage = {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}
