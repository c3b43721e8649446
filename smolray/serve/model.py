"""One model in this process, or several runs on one base, for many requests at a time.

In: samples, and how they are to be answered. Out: pieces of answers, or embeddings. A thread of its own runs the
engine; another makes prompts, so that neither waits for the other.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from smolray.data.collate import Group, collate_prompts
from smolray.data.sample import Sample, ShardRow, image_key
from smolray.inference.image_search import Embedder
from smolray.inference.predictor import ModelSource
from smolray.inference.shared import SharedModel, sees_as
from smolray.model.decoding import stop_ids_of
from smolray.serve.answer import Answer, Asked, Piece
from smolray.serve.engine import Engine, EngineLimits
from smolray.serve.errors import ApiError
from smolray.serve.prompt import Prompt, PromptMaker, check_length

EMBEDDED_AT_ONCE = 16


@dataclass(frozen=True)
class Embedded:
    """Unit vectors (inputs, width), and the tokens of all inputs."""

    vectors: list[list[float]]
    tokens: int


class ServedModel:
    """A model that answers, or one of method retrieval that embeds. It holds two threads until `close`.

    `sources`: one by the name that requests use, or several that share a base (inference.shared.groups).
    """

    def __init__(self, sources: Mapping[str, ModelSource], limits: EngineLimits, device: torch.device):
        source = next(iter(sources.values()))
        self.encoder = source.encoder()
        self._make_prompt = {n: PromptMaker(s.encoder(), n, sees_as(n, s)) for n, s in sources.items()}
        self.fault = ""
        self._prompts = ThreadPoolExecutor(1, "prompts")
        self._closed = False
        if source.config.traits.embeds:
            self.embedder: Embedder | None = Embedder(source, device)
            return

        self.embedder = None
        shared = SharedModel(sources, device)
        self.engine = Engine(shared.model, stop_ids_of(shared.model, self.encoder), limits, device, shared.use)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def chat(
        self, sample: Sample, asked: Asked, max_new_tokens: int | None, stream: bool
    ) -> AsyncIterator[Piece]:
        """The answer to a sample, piece by piece, or without `stream` in one.

        `max_new_tokens`: None for those of `asked`, or what is left of the context. Leaving the iterator frees the
        slot. Raises ApiError.
        """
        if self.embedder is not None:
            raise ApiError(400, "this model embeds and does not chat: POST /v1/embeddings", "wrong_endpoint", "model")
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        prompt, asked = await loop.run_in_executor(self._prompts, self._prepared, sample, asked, max_new_tokens)

        def tell(piece: Piece) -> None:
            loop.call_soon_threadsafe(told.put_nowait, piece)

        answer = Answer(prompt, asked, self.encoder.tokenizer, tell, stream)
        self.engine.submit(answer)
        piece = Piece()
        try:
            while not piece.finish:
                self.check()
                piece = await told.get()
                if piece.finish == "error":
                    raise ApiError(503, piece.error, "engine_error", retry_after=1)
                yield piece
        finally:
            self.engine.cancel(answer)  # of one that has ended nothing is left to free

    async def embed(self, samples: Sequence[Sample]) -> Embedded:
        """The embedding of each sample. Raises ApiError."""
        if self.embedder is None:
            raise ApiError(
                400, "this model answers and has no embeddings: POST /v1/chat/completions", "wrong_endpoint", "model"
            )
        return await asyncio.get_running_loop().run_in_executor(self._prompts, self._embedded, samples)

    def state(self) -> dict[str, int]:
        """Numbers for operators."""
        return {} if self.embedder is not None else self.engine.state()

    async def states(self) -> list[dict[str, int]]:
        """The states of all replicas: of this one."""
        return [self.state()]

    def check(self) -> None:
        """Raise ApiError where the engine has failed and answers nothing any more."""
        if self.fault:
            raise ApiError(503, f"the engine has failed: {self.fault}", "engine_error", retry_after=5)

    def close(self) -> None:
        """End the threads; answers that are not finished fail."""
        self._closed = True
        self._prompts.shutdown(wait=False, cancel_futures=True)
        if self.embedder is None:
            self.engine.work.set()
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closed:
                self.engine.work.wait()
                self.engine.step()
            self.fault = "it was closed"
        except Exception as error:
            self.fault = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
            raise
        finally:
            self.engine.fail_all(self.fault)

    def _prepared(self, sample: Sample, asked: Asked, max_new_tokens: int | None) -> tuple[Prompt, Asked]:
        prompt, context = self._make_prompt[asked.model](sample), self.encoder.max_length
        room = max(1, context - len(prompt.ids))
        wanted = min(asked.max_new_tokens, room) if max_new_tokens is None else max_new_tokens
        check_length(prompt, wanted, context)
        return prompt, replace(asked, max_new_tokens=wanted)

    def _embedded(self, samples: Sequence[Sample]) -> Embedded:
        assert self.embedder is not None
        vectors, tokens = list[list[float]](), 0
        (make_prompt,) = self._make_prompt.values()
        for some in _batched(samples, EMBEDDED_AT_ONCE):
            for sample in some:
                prompt = make_prompt(sample)
                check_length(prompt, 0, self.encoder.max_length)
                tokens += len(prompt.ids)
            rows = [ShardRow(image_key(s.images, s.conversation), s.images, (s.conversation,)) for s in some]
            vectors += self.embedder(collate_prompts([Group(row, (0,)) for row in rows], self.encoder)).tolist()
        return Embedded(vectors, tokens)


def _batched(samples: Sequence[Any], count: int) -> list[Sequence[Any]]:
    return [samples[start : start + count] for start in range(0, len(samples), count)]
