"""The requests of OpenAI's API that are answered, checked field by field.

In: the JSON of a request. Out: a ChatRequest or EmbeddingRequest, or an ApiError that names the field. A field that
would change the answer and is not supported is refused; fields for bookkeeping are ignored.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from smolray.data.formats.turns import assistant_turn, check_text
from smolray.data.sample import Conversation, Message, Part, SampleError
from smolray.serve.errors import ApiError

MOST_MESSAGES, MOST_PARTS, MOST_STOPS, MOST_TEXTS = 100, 200, 4, 256
# Who asks, where it is stored, how it is billed.
IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
}
NEUTRAL: dict[str, Sequence[Any]] = {
    "n": (1,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

Request = TypeVar("Request", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImageURL(_Strict):
    """`detail` is accepted and means nothing: the tiles are those of training."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """An image, at its place among the texts."""

    type: Literal["image_url"]
    image_url: ImageURL


AnyPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Turn(_Strict):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[AnyPart], Field(min_length=1, max_length=MOST_PARTS)]
    name: str | None = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(_Strict):
    """`include_usage`: the last chunk tells the tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(BaseModel):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MOST_MESSAGES)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if any(not text for text in ([stop] if isinstance(stop, str) else stop or ())):
            raise ValueError("a stop text is empty")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def image_urls(self) -> list[str]:
        """The images in order."""
        return [part.image_url.url for turn in self.messages for part in turn.parts if isinstance(part, ImagePart)]

    def conversation(self) -> Conversation:
        """The turns, and an empty one for the answer. Raises ApiError (400)."""
        if self.messages[-1].role == "assistant":
            raise ApiError(400, "the last message is the assistant's; expected a question", "", "messages")
        turns = [Message(ROLES[turn.role], tuple(map(_placed, turn.parts))) for turn in self.messages]
        if any(part.type == "image" for turn in turns if turn.role != "user" for part in turn.content):
            raise ApiError(400, "an image stands in a message that is not the user's", "", "messages")
        return checked(Conversation("", (*turns, assistant_turn(""))))


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings. Beside texts, `input` takes image parts as those of a chat."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    input: str | Annotated[list[str | ImagePart], Field(min_length=1, max_length=MOST_TEXTS)]
    encoding_format: Literal["float", "base64"] = "float"

    @property
    def inputs(self) -> list[str | ImagePart]:
        return [self.input] if isinstance(self.input, str) else self.input


def parse(kind: type[Request], body: Any) -> Request:
    """A request from its JSON. Raises ApiError (400) that names the first field at fault."""
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in fault["loc"])[:200]
        raise ApiError(400, f"{param or 'the request'}: {fault['msg']}", "", param) from None
    for name, value in (request.model_extra or {}).items():
        if name not in IGNORED and value not in NEUTRAL.get(name, ()) and value not in (None, 0, False, "", [], {}):
            raise ApiError(
                400, f"{name[:100]} is not supported by this service; leave it out", "unsupported", name[:100]
            )
    return request


def checked(conversation: Conversation) -> Conversation:
    """The conversation, where its texts can be encoded. Raises ApiError (400)."""
    try:
        check_text(conversation)
    except SampleError as error:
        raise ApiError(400, f"{error.reason}: {error}", "invalid_text", "messages") from error
    return conversation


def _placed(part: TextPart | ImagePart) -> Part:
    return Part("text", part.text) if isinstance(part, TextPart) else Part("image")
