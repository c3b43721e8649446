"""Continuous batching: answers join and leave the running batch between two tokens.

In: Answers that wait for their first token. Out: what Answer.tell is called with. A step takes in as many waiting
answers as there is room for, all their prompts in one pass, and then decodes one token of every running answer. Prompts
that begin alike share the pages of their beginning: an image is encoded once for all questions about it, and its keys
and values are computed and kept once. Runs that share a base have passes of their own.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from smolray.model.decoding import most_likely
from smolray.model.forward import run_layers, tile_features
from smolray.model.load import base_model
from smolray.serve.answer import Answer, rows_of
from smolray.serve.errors import ApiError
from smolray.serve.kv_cache import FoldedRows, KVShape, PagedKV, Rows
from smolray.serve.pages import PAGE, PagePool
from smolray.serve.prefixes import shared_prefixes
from smolray.serve.prompt import PromptImage, image_tokens_before, needed_images

PREFILL_TOKENS = 4096  # of prompts in one pass, padding counted; a longer prompt has a pass of its own
FEATURE_BYTES = 256 * 2**20  # features of images that are kept, the newest
GPU_SHARE, CPU_BYTES = 0.7, 2**30  # the rest of a GPU is for activations


@dataclass(frozen=True)
class EngineLimits:
    """What an engine may hold.

    Attributes:
        slots: answers that are decoded at a time.
        queue: answers that wait for a slot at most.
        kv_bytes: memory for keys and values; None: GPU_SHARE of a GPU's free memory, CPU_BYTES without a GPU.
    """

    slots: int = 32
    queue: int = 64
    kv_bytes: int | None = None


@dataclass
class Counts:
    """What an engine has done since it started."""

    answers: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    images_encoded: int = 0
    passes: int = 0


class Engine:
    """A model that decodes many answers. `use` is called with the name of the model that the next pass is for.

    `submit`, `cancel` and `state` may be called from any thread, `step` from one.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: frozenset[int],
        limits: EngineLimits,
        device: torch.device,
        use: Callable[[str], None] = lambda name: None,
    ):
        self.model, self.stop_ids, self.limits, self.device, self.use = model, stop_ids, limits, device, use
        self.text = base_model(model).model.text_model
        shape = KVShape.of(self.text)
        self.pool = PagePool(self._pages(shape))
        self.memory = PagedKV(shape, self.pool.size, device)
        self.running: list[Answer] = []
        self.counts = Counts()
        self.work = threading.Event()  # set while there may be something to do
        self._waiting: deque[Answer] = deque()
        self._lock = threading.Lock()
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def submit(self, answer: Answer) -> None:
        """Put an answer in line. Raises ApiError: it can never fit (400), or the line is full (429)."""
        pages = self._pages_of(answer)
        if pages > self.pool.size:
            raise ApiError(
                400,
                f"the prompt has {len(answer.prompt.ids)} tokens and the answer may have "
                f"{answer.asked.max_new_tokens}; this service has memory for {self.pool.size * PAGE}: lower max_tokens",
                "context_length_exceeded",
            )
        with self._lock:
            under_way = len(self._waiting) + len(self.running)
            if under_way >= self.limits.slots + self.limits.queue:
                raise ApiError(429, f"{under_way} requests are under way; try again soon", "queue_full", retry_after=1)
            self._waiting.append(answer)
        self.work.set()

    def cancel(self, answer: Answer) -> None:
        """Nobody waits for the answer any more: its slot is free before the next token."""
        answer.cancelled = True
        self.work.set()

    def state(self) -> dict[str, int]:
        """Numbers for operators: what is in use now, and the counts."""
        now = {
            "running": len(self.running),
            "waiting": len(self._waiting),
            "pages": self.pool.size,
            "pages_in_use": self.pool.size - self.pool.available,
        }
        return now | asdict(self.counts)

    @torch.inference_mode()
    def step(self) -> None:
        """Take in waiting answers, and decode a token of every running one; clears `work` where there is none."""
        self._drop_cancelled()
        if group := self._next_group():
            self._guarded(group, self._prefill)
        for together in _by_model(self.running):
            self._guarded(together, self._decode)

        with self._lock:
            if not self.running and not self._waiting:
                self.work.clear()

    def fail_all(self, message: str) -> None:
        """End every answer with an error."""
        with self._lock:
            answers = [*self.running, *self._waiting]
            self._waiting.clear()
        self._fail(answers, message)

    def _pages(self, shape: KVShape) -> int:
        """As many as there is memory for; no more than all slots could fill with whole contexts."""
        room = self.limits.kv_bytes
        if room is None:
            room = int(GPU_SHARE * torch.cuda.mem_get_info(self.device)[0]) if self.device.type == "cuda" else CPU_BYTES
        context = self.text.config.max_position_embeddings
        return max(1, min(room // shape.page_bytes, self.limits.slots * -(-context // PAGE)))

    def _pages_of(self, answer: Answer) -> int:
        # the last token is never read again
        return -(-(len(answer.prompt.ids) + answer.asked.max_new_tokens - 1) // PAGE)

    def _drop_cancelled(self) -> None:
        with self._lock:
            gone = [answer for answer in (*self.running, *self._waiting) if answer.cancelled]
            if not gone:
                return
            self._waiting = deque(answer for answer in self._waiting if not answer.cancelled)
        for answer in gone:
            self._leave(answer)
        self.counts.cancelled += len(gone)

    def _next_group(self) -> list[Answer]:
        """The waiting answers that join now, in order, with their pages: all of the model that the first one asks.

        One whose prompt begins as that of another in the group waits for the next step, and finds the pages ready.
        """
        group: list[Answer] = []
        begun, longest = set[bytes](), 0
        with self._lock:
            for answer in list(self._waiting):
                if len(self.running) + len(group) == self.limits.slots:
                    break
                if group and answer.prompt.model != group[0].prompt.model:
                    continue
                shared = self.pool.share(answer.prompt.keys)
                rest = answer.prompt.keys[len(shared) :]
                if rest and rest[0] in begun:
                    self.pool.release(shared)
                    continue

                new = len(answer.prompt.ids) - len(shared) * PAGE
                needed = self._pages_of(answer) - len(shared)
                too_long = group and max(longest, new) * (len(group) + 1) > PREFILL_TOKENS
                if too_long or needed > self.pool.available:
                    self.pool.release(shared)
                    break
                answer.pages = shared + self.pool.take(needed)
                answer.past = answer.cached_tokens = len(shared) * PAGE
                group.append(answer)
                begun.update(rest)
                longest = max(longest, new)
                self._waiting.remove(answer)
        return group

    def _prefill(self, group: Sequence[Answer]) -> None:
        """The first token of each answer, from its prompt."""
        self.use(group[0].prompt.model)
        features = self._features_of(group)
        tables, past, new = rows_of(group)
        rows = Rows(self.memory, tables, past, new)
        ids = torch.zeros(len(group), max(new), dtype=torch.int64)
        is_image = torch.zeros(ids.shape, dtype=torch.bool)
        for row, answer in enumerate(group):
            ids[row, : new[row]] = torch.from_numpy(answer.prompt.ids[past[row] :])
            is_image[row, : new[row]] = torch.from_numpy(answer.prompt.is_image[past[row] :])

        embeds = self.text.embed_tokens(ids.to(self.device))
        if features is not None:
            embeds = embeds.masked_scatter(is_image.to(self.device)[..., None], features.to(embeds.dtype))
        ends = torch.tensor([row * ids.shape[1] + count - 1 for row, count in enumerate(new)], device=self.device)
        logits = self._logits(embeds, rows, ends)

        for answer in group:
            for page, key in zip(answer.pages, answer.prompt.keys, strict=False):
                self.pool.publish(page, key)
            self.counts.prompt_tokens += len(answer.prompt.ids)
            self.counts.cached_tokens += answer.cached_tokens
            answer.past = len(answer.prompt.ids)
        self.running.extend(group)
        self._take(group, logits)

    def _decode(self, answers: Sequence[Answer]) -> None:
        """The next token of each answer, from the one before."""
        self.use(answers[0].prompt.model)
        tables, past, new = rows_of(answers)
        beginnings = [a.pages[: (len(a.prompt.ids) - 1) // PAGE] for a in answers]
        prefixes = shared_prefixes(beginnings)
        if len(prefixes) < len(answers):
            rows: Rows = FoldedRows(self.memory, tables, past, prefixes)
        else:
            rows = Rows(self.memory, tables, past, new)
        last = torch.tensor([[answer.ids[-1]] for answer in answers], device=self.device)
        ends = torch.arange(len(answers), device=self.device)
        logits = self._logits(self.text.embed_tokens(last), rows, ends)
        for answer in answers:
            answer.past += 1
        self._take(answers, logits)

    def _logits(self, embeds: torch.Tensor, rows: Rows, ends: torch.Tensor) -> torch.Tensor:
        """(answers, vocabulary) at the flat positions `ends`."""
        self.counts.passes += 1
        inputs = {"attention_mask": rows.mask, "past_key_values": rows, "use_cache": True}
        if isinstance(rows, FoldedRows):
            inputs["cache"] = rows
        hidden = run_layers(self.text, embeds, rows.position_ids, ends, **inputs)
        return base_model(self.model).lm_head(hidden)  # type: ignore[no-any-return]

    def _take(self, answers: Sequence[Answer], logits: torch.Tensor) -> None:
        """Choose the next token of each answer; those that end leave."""
        tokens = most_likely(logits, 0).tolist()
        for row, answer in enumerate(answers):
            if answer.sampler is not None:
                tokens[row] = int(answer.sampler(logits[row : row + 1], len(answer.ids)))
            self.counts.answer_tokens += 1
            if answer.take(tokens[row], logits[row], self.stop_ids):
                self._leave(answer)
                self.counts.answers += 1

    def _features_of(self, group: Sequence[Answer]) -> torch.Tensor | None:
        """The features of the new image tokens of a group in order: (image tokens, hidden); None without any."""
        needed = [needed_images(answer.prompt, answer.past) for answer in group]
        features = self._encoded({image.digest: image for images in needed for image in images})
        parts = []
        for answer, images in zip(group, needed, strict=True):
            if images:
                skipped = image_tokens_before(answer.prompt, answer.past)
                skipped -= sum(image.tokens for image in answer.prompt.images[: -len(images)])
                parts.append(torch.cat([features[image.digest] for image in images])[skipped:])
        return torch.cat(parts) if parts else None

    def _encoded(self, images: dict[bytes, PromptImage]) -> dict[bytes, torch.Tensor]:
        """The features (tokens, hidden) of images by their digest; those that are not kept are computed."""
        new = {digest: image for digest, image in images.items() if digest not in self._features}
        if new:
            tiles = torch.cat([torch.from_numpy(image.tiles) for image in new.values()]).to(self.device)
            split = tile_features(self.model, tiles).split([len(image.tiles) for image in new.values()])
            self._features |= {digest: part.flatten(0, 1).clone() for digest, part in zip(new, split, strict=True)}
            self.counts.images_encoded += len(new)
        for digest in images:
            self._features.move_to_end(digest)
        found = {digest: self._features[digest] for digest in images}

        while sum(kept.nbytes for kept in self._features.values()) > FEATURE_BYTES:
            self._features.popitem(last=False)
        return found

    def _guarded(self, answers: Sequence[Answer], work: Any) -> None:
        """Do work for answers. Where it fails, they are told; where only memory ran out, the others go on."""
        try:
            work(answers)
        except torch.OutOfMemoryError as error:
            message = f"out of memory: {str(error).splitlines()[0]}; send fewer or smaller images"
            self._fail([answer for answer in answers if answer.pages], message)
        except Exception as error:
            self._fail([answer for answer in answers if answer.pages], f"{type(error).__name__}: {error}")
            raise

    def _fail(self, answers: Sequence[Answer], message: str) -> None:
        for answer in answers:
            self._leave(answer)
            answer.fail(message)
        self.counts.failed += len(answers)

    def _leave(self, answer: Answer) -> None:
        """Give the slot and the pages of an answer back."""
        if answer in self.running:
            self.running.remove(answer)
        self.pool.release(answer.pages)
        answer.pages = []


def _by_model(answers: Sequence[Answer]) -> list[list[Answer]]:
    """The answers of each model, in the order of the first."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.prompt.model, []).append(answer)
    return list(found.values())
