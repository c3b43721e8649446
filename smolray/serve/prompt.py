"""Prompts as the engine takes them: token ids, the tiles of the images, and the keys of the pages that they fill.

In: a conversation with encoded images, and the model's Encoder. Out: a Prompt, or an ApiError.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from smolray.data.encode import EncodeError, Encoder
from smolray.data.sample import Sample
from smolray.data.tiles import image_size
from smolray.serve.errors import ApiError
from smolray.serve.pages import PAGE

KEPT_IMAGES = 8  # of up to 17 tiles, 13 MB at 512 x 512 pixels


@dataclass(frozen=True, eq=False)
class PromptImage:
    """An image of a prompt. `digest` stands for its bytes; `tokens`: the image tokens that it fills."""

    digest: bytes
    tiles: np.ndarray  # (tiles, 3, side, side) uint8
    tokens: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids (length,) int32, and the images whose features stand at the image tokens, in order.

    `model`: the name of the model that is asked, of those that share a base.
    """

    ids: np.ndarray
    images: tuple[PromptImage, ...]
    is_image: np.ndarray  # (length,) bool
    model: str = ""

    @cached_property
    def keys(self) -> list[bytes]:
        """A key for each full page in front of the last token: a hash of model, tokens and images up to its end."""
        ends = np.cumsum([image.tokens for image in self.images])
        number = np.searchsorted(ends, np.cumsum(self.is_image) - 1, side="right")  # the image of each image token
        found: list[bytes] = []
        for start in range(0, (len(self.ids) - 1) // PAGE * PAGE, PAGE):
            page = slice(start, start + PAGE)
            digest = hashlib.blake2b(found[-1] if found else self.model.encode(), digest_size=16)
            digest.update(self.ids[page].tobytes())
            for image in np.unique(number[page][self.is_image[page]]):
                digest.update(self.images[image].digest)
            found.append(digest.digest())
        return found


class PromptMaker:
    """Makes prompts for one model. It keeps the tiles of the last images: many ask about the same one.

    `sees_as`: models of one base with the same have the same features of an image.
    """

    def __init__(self, encoder: Encoder, model: str = "", sees_as: str = ""):
        self.encoder, self.model, self.sees_as = encoder, model, sees_as
        self._image = lru_cache(maxsize=KEPT_IMAGES)(self._make_image)

    def __call__(self, sample: Sample) -> Prompt:
        """The prompt of a conversation that ends where an answer is expected. Raises ApiError (400)."""
        grids = [self.encoder.tiler.grid(*image_size(image)) for image in sample.images]
        try:
            ids = self.encoder.prompt(sample.conversation, grids)
        except EncodeError as error:
            raise ApiError(400, str(error), "not_encoded", "messages") from error
        is_image = ids == self.encoder.image_token_id
        return Prompt(ids, tuple(map(self._image, sample.images)), is_image, self.model)

    def _make_image(self, image: bytes) -> PromptImage:
        tiles = self.encoder.tiler.tiles(image)
        digest = hashlib.blake2b(self.sees_as.encode() + b"\0" + image, digest_size=16).digest()
        return PromptImage(digest, tiles, len(tiles) * self.encoder.processor.image_seq_len)


def check_length(prompt: Prompt, max_new_tokens: int, context: int) -> None:
    """Raise ApiError where prompt and answer are longer than the model's context."""
    if len(prompt.ids) + max_new_tokens > context:
        raise ApiError(
            400,
            f"the prompt has {len(prompt.ids)} tokens and the answer may have {max_new_tokens}; the model's context "
            f"holds {context}: lower max_tokens, or send fewer or smaller images",
            "context_length_exceeded",
            "messages",
        )


def image_tokens_before(prompt: Prompt, position: int) -> int:
    """The number of image tokens in front of a position."""
    return int(prompt.is_image[:position].sum())


def needed_images(prompt: Prompt, position: int) -> Sequence[PromptImage]:
    """The images with tokens at or behind a position."""
    before = image_tokens_before(prompt, position)
    ends = np.cumsum([image.tokens for image in prompt.images])
    return prompt.images[int(np.searchsorted(ends, before, side="right")) :]
