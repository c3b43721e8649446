"""Conversations -> token ids, with a mark on the tokens that are trained. This is text work: pixels are not touched.

The processor's chat template is rendered once for each structure of a conversation, with placeholders in place of the
user's text, and cut at its special tokens. The user's text is then tokenised by the bare model without any added token,
so a literal "<image>" in it stays text. The assistant turns are trained, unless they say otherwise, from the end of the
generation prompt to the end of the turn, as in TRL's completion-only loss.
"""

import json
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import Idefics3Processor

from smolray.config import AUTO_LENGTHS, ConfigError, DataConfig, ImageConfig, ModelConfig, RunConfig
from smolray.data.augment import Augmentation
from smolray.data.processor import load_processor
from smolray.data.sample import Conversation, Message
from smolray.data.tiles import Grid, Tiler
from smolray.pretrained import model_config

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters around the number of a text
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
MOST_TEMPLATES = 1000  # that are kept
_PROBE = " \t Ab \n<b>&amp;' \n"  # what a template that trims, escapes or recases would change


class EncodeError(ValueError):
    """A conversation cannot be turned into tokens; the message says why."""


@dataclass(frozen=True)
class Encoded:
    """One conversation. `input_ids`: (length,) int32; `trained`: (length,) bool, whether the loss counts it."""

    input_ids: np.ndarray
    trained: np.ndarray

    @property
    def label_tokens(self) -> int:
        return int(self.trained[1:].sum())


@dataclass(frozen=True)
class _Span:
    """A part of the template: a special token, the place of an image, or text.

    Text consists of literals of the template and of the user's texts, which are numbered.
    """

    special: int | None = None
    image: bool = False
    pieces: tuple[tuple[str, int, bool], ...] = ()  # (literal, number of the text or -1, trained)
    trained: bool = False


class Encoder:
    """Encodes conversations with one processor and the settings that change token counts.

    `max_length` and `overlong` decide what happens to a conversation that is too long. `context`: the model's, which
    limits data.max_length=auto.
    """

    def __init__(
        self, processor: Idefics3Processor, data: DataConfig, image: ImageConfig, context: int = AUTO_LENGTHS[1]
    ):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.tiler = Tiler(processor.image_processor, image)
        self.max_length = min(AUTO_LENGTHS[1], context) if data.max_length == "auto" else data.max_length
        self.overlong = data.overlong
        self.packing = data.packing
        self.image_token_id = int(processor.image_token_id)
        self.pad_token_id = int(self.tokenizer.pad_token_id)

        self._special = {t.content: i for i, t in self.tokenizer.added_tokens_decoder.items()}
        self._plain = _without_added_tokens(self.tokenizer.backend_tokenizer)
        self._cut = re.compile("|".join(re.escape(t) for t in sorted(self._special, key=len, reverse=True)))
        self._templates: dict[tuple, tuple[_Span, ...]] = {}
        self._text_ids: dict[str, np.ndarray] = {}
        self.image_block = lru_cache(maxsize=256)(self._image_block)

        if (least := len(self.image_block(Grid(0, 0)))) >= self.max_length:
            raise ConfigError(
                f"data.max_length = {self.max_length} is shorter than one image of one tile ({least} tokens) "
                f"and a word; nearest: data.max_length={2 * least}"
            )

    def branches(self, conversation: Conversation, grids: Sequence[Grid]) -> list[Encoded] | None:
        """The sequences to train on: the conversation itself, or both endings (chosen, rejected) of preference data.

        `grids`: one for each image. Returns None where a sequence is too long to train on. Raises EncodeError
        where it is too long and `overlong` is "error".
        """
        if not conversation.is_preference:
            fitted = self._fit(conversation.id, *self._tokens(conversation.messages, grids))
            return None if fitted is None else [fitted]

        found = []
        for ending in (conversation.chosen, conversation.rejected):
            ids, trained = self._tokens((*conversation.messages, *ending), grids)
            # answers inside the prompt are not trained
            trained[: len(self._tokens(conversation.messages, grids, generation_prompt=True)[0])] = False
            found.append(self._fit(conversation.id, ids, trained))
        return None if None in found else found  # type: ignore[return-value]

    def length(self, conversation: Conversation, grids: Sequence[Grid]) -> int:
        """Tokens of the longest sequence of a conversation, before it is left out or cut."""
        endings = (conversation.chosen, conversation.rejected) if conversation.is_preference else ((),)
        return max(len(self._tokens((*conversation.messages, *ending), grids)[0]) for ending in endings)

    def prompt(self, conversation: Conversation, grids: Sequence[Grid]) -> np.ndarray:
        """Tokens up to the last trained assistant turn, generation prompt included: what decoding starts from.

        (length,) int32
        """
        messages = (*conversation.messages, *conversation.chosen)
        last = max((i for i, m in enumerate(messages) if m.role == "assistant" and m.trained), default=len(messages))
        if last == 0:  # there is no question: the prompt is the head of the assistant turn
            ids, trained = self._tokens(messages[:1], grids)
            return ids[: int(trained.argmax())]
        return self._tokens(messages[:last], grids, generation_prompt=True)[0]

    def _tokens(
        self, messages: Sequence[Message], grids: Sequence[Grid], generation_prompt: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        texts = [p.text for m in messages for p in m.content if p.type == "text"]
        ids: list[np.ndarray] = []
        trained: list[np.ndarray] = []
        image = iter(grids)

        for span in self._template(messages, generation_prompt):
            if span.image:
                new = self.image_block(next(image))
                marks = np.zeros(len(new), bool)
            elif span.special is not None:
                new, marks = np.array([span.special], np.int32), np.array([span.trained])
            else:
                new, marks = self._span_tokens(span, texts)
            ids.append(new)
            trained.append(marks)

        return np.concatenate(ids), np.concatenate(trained)

    def _span_tokens(self, span: _Span, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        text, edges = "", []
        for literal, number, trained in span.pieces:
            text += literal if number < 0 else texts[number]
            edges.append((len(text), trained))

        if not text:
            return np.zeros(0, np.int32), np.zeros(0, bool)

        if len({trained for _, trained in edges}) == 1:
            ids = self._text_ids.get(text)
            if ids is None:
                ids = np.array(self._tokenize(text).ids, np.int32)
                if len(self._text_ids) < 20_000 and len(text) < 200:
                    self._text_ids[text] = ids
            return ids, np.full(len(ids), edges[0][1])

        out = self._tokenize(text)
        ends = np.array([end for end, _ in edges])
        starts = np.array([start for start, _ in out.offsets])
        piece = np.searchsorted(ends, starts, side="right").clip(max=len(edges) - 1)
        return np.array(out.ids, np.int32), np.array([trained for _, trained in edges])[piece]

    def _tokenize(self, text: str) -> Encoding:
        return self._plain.encode(text, add_special_tokens=False)

    def _template(self, messages: Sequence[Message], generation_prompt: bool) -> tuple[_Span, ...]:
        structure = (*((m.role, tuple(p.type for p in m.content), m.trained) for m in messages), generation_prompt)
        if structure not in self._templates:
            if len(self._templates) == MOST_TEMPLATES:  # conversations of a service may have any structure
                self._templates.clear()
            self._templates[structure] = self._compile(messages, generation_prompt)
        return self._templates[structure]

    def _compile(self, messages: Sequence[Message], generation_prompt: bool) -> tuple[_Span, ...]:
        numbered: list[dict[str, Any]] = []
        number = 0
        for message in messages:
            content = []
            for part in message.content:
                content.append(
                    {"type": "image"} if part.type == "image" else {"type": "text", "text": f"{_OPEN}{number}{_CLOSE}"}
                )
                number += part.type == "text"
            numbered.append({"role": message.role, "content": content})

        whole = self._render(numbered, generation_prompt)
        # A probe replaces the text: a template may leave one text as it is and change the next one.
        probes = [
            {**m, "content": [p | {"text": _PROBE} if "text" in p else p for p in m["content"]]} for m in numbered
        ]
        if _PLACEHOLDER.sub(lambda _: _PROBE, whole) != self._render(probes, generation_prompt):
            raise EncodeError(
                "the chat template changes the text it is given (trim, replace …): it cannot be encoded exactly"
            )

        regions = []
        for i, turn in enumerate(numbered):
            if turn["role"] == "assistant" and messages[i].trained:
                start, end = self._before_answer(numbered[:i], whole), self._render(numbered[: i + 1], False)
                if not whole.startswith(start) or not whole.startswith(end):
                    raise EncodeError(
                        "the chat template is not prefix-preserving, so the start of an assistant turn is unknown"
                    )
                regions.append((len(start), len(end)))

        return tuple(self._spans(whole, regions))

    def _spans(self, whole: str, regions: list[tuple[int, int]]):
        position = 0
        for match in self._cut.finditer(whole):
            if match.start() > position:
                yield _Span(pieces=tuple(_pieces(whole, position, match.start(), regions)))
            token = self._special[match.group()]
            yield (
                _Span(image=True)
                if token == self.image_token_id
                else _Span(special=token, trained=_inside(match.start(), regions))
            )
            position = match.end()

        if position < len(whole):
            yield _Span(pieces=tuple(_pieces(whole, position, len(whole), regions)))

    def _render(self, messages: list[dict], generation_prompt: bool) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=generation_prompt, tokenize=False)

    def _before_answer(self, messages: list[dict], whole: str) -> str:
        """The rendering up to where an assistant turn after `messages` begins."""
        if messages:
            return self._render(messages, True)
        asked = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]  # templates may look at messages[0]
        header = self._render(asked, True).removeprefix(self._render(asked, False))
        before, found, _ = whole.partition(header) if header else ("", "", "")
        return before + found

    @cached_property
    def end_of_turn(self) -> int | None:
        """The special token that ends an assistant turn; None where the template ends it with plain text."""
        turns = [
            {"role": role, "content": [{"type": "text", "text": f"{_OPEN}{number}{_CLOSE}"}]}
            for number, role in enumerate(("user", "assistant"))
        ]
        _, _, rest = self._render(turns, False).partition(f"{_OPEN}1{_CLOSE}")
        match = self._cut.match(rest.lstrip())
        return self._special[match.group()] if match else None

    def _image_block(self, grid: Grid) -> np.ndarray:
        """Token ids that stand for one image (Idefics3Processor.replace_image_token)."""
        text = self.processor.replace_image_token({"rows": [[grid.rows]], "cols": [[grid.columns]]}, 0)
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def _fit(self, name: str, ids: np.ndarray, trained: np.ndarray) -> Encoded | None:
        if len(ids) <= self.max_length:
            return Encoded(ids, trained)
        if self.overlong == "error":
            remedy = "raise it, lower image.max_tiles, or set data.overlong"
            raise EncodeError(f"{name}: {len(ids)} tokens, data.max_length = {self.max_length}; {remedy}")

        last_image = int(np.flatnonzero(ids == self.image_token_id)[-1]) if (ids == self.image_token_id).any() else -1
        kept = trained[: self.max_length]
        if self.overlong == "truncate_text" and last_image < self.max_length - 1 and kept[1:].any():
            return Encoded(ids[: self.max_length], kept)
        return None


def training_encoder(config: RunConfig, epoch: int) -> Encoder:
    """The encoder of a run for the batches of an epoch that are trained: with augmented images."""
    encoder = cached_encoder(config.model, config.data, config.image)
    if not config.data.augment:
        return encoder
    augmented = copy(encoder)
    augmentation = Augmentation(config.data.augment, config.seed, epoch)
    augmented.tiler = Tiler(encoder.tiler.processor, encoder.tiler.config, augmentation)
    return augmented


def cached_encoder(model: ModelConfig, data: DataConfig, image: ImageConfig) -> Encoder:
    """The encoder of a run, built once per process: which parts of a model are trained and how is nothing to it."""
    return _encoder(ModelConfig(path=model.path, revision=model.revision), data, image)


@lru_cache(maxsize=2)
def _encoder(files: ModelConfig, data: DataConfig, image: ImageConfig) -> Encoder:
    context = model_config(files).text_config.max_position_embeddings if data.max_length == "auto" else None
    return Encoder(_processor(files), data, image, context or AUTO_LENGTHS[1])


_processor = lru_cache(maxsize=2)(load_processor)  # encoders of two lengths share it


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer without added tokens, special or not, and without a post-processor that moves offsets."""
    record = json.loads(tokenizer.to_str()) | {
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    return Tokenizer.from_str(json.dumps(record))


def _inside(position: int, regions: list[tuple[int, int]]) -> bool:
    return any(start <= position < end for start, end in regions)


def _pieces(whole: str, start: int, end: int, regions: list[tuple[int, int]]):
    """Cut whole[start:end] at placeholders and at the edges of trained regions."""
    cuts = {start, end} | {e for region in regions for e in region if start < e < end}
    for match in _PLACEHOLDER.finditer(whole, start, end):
        cuts |= {match.start(), match.end()}
    ordered = sorted(cuts)
    for a, b in pairwise(ordered):
        found = _PLACEHOLDER.fullmatch(whole, a, b)
        yield ("", int(found.group(1)), _inside(a, regions)) if found else (whole[a:b], -1, _inside(a, regions))
