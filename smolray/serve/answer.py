"""One answer while it is decoded: its tokens, its text, and when it ends.

In: what is asked of the engine, and token after token. Out: Pieces with the new text. All pieces together are the text
that `smolray generate` gives for the same tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream

from smolray.model.sampling import Sampler
from smolray.serve.prompt import Prompt

Finish = Literal["", "stop", "length", "error"]


@dataclass(frozen=True)
class Asked:
    """How an answer is decoded.

    Attributes:
        model: the name of the model that is asked.
        max_new_tokens: how many tokens it may have.
        name: with `seed` it decides the random numbers.
        stop: texts at which the answer ends; they are not part of it.
        top_logprobs: log-probabilities of so many tokens are told for each token; None for not even its own.
    """

    model: str = ""
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    name: str = ""
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Piece:
    """New text of an answer.

    Attributes:
        tokens: those of the answer so far.
        cached_tokens: those of the prompt that had been computed before.
        finish: why the answer ends with it; empty where it goes on.
    """

    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    logprobs: tuple[dict[str, Any], ...] = ()
    finish: Finish = ""
    error: str = ""


@dataclass(eq=False)
class Answer:
    """An answer in the engine. `tell` is called with each Piece, in the engine's thread.

    Without `stream` there is one piece, at the end. `pages`: where its keys and values are; `past`: the tokens that are
    there.
    """

    prompt: Prompt
    asked: Asked
    tokenizer: Any
    tell: Callable[[Piece], None]
    stream: bool = True
    ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    past: int = 0
    cached_tokens: int = 0
    cancelled: bool = False

    def __post_init__(self) -> None:
        asked = self.asked
        self.sampler: Sampler | None = None
        if asked.temperature:
            self.sampler = Sampler([asked.name], asked.max_new_tokens, asked.temperature, asked.top_p, asked.seed)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._text, self._told, self._stopped = "", 0, False
        self._untold: list[dict[str, Any]] = []  # log-probabilities

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt.ids) + len(self.ids)

    def take(self, token: int, logits: torch.Tensor, stop_ids: frozenset[int]) -> bool:
        """Add the next token and tell of it; returns whether the answer has ended. `logits`: (vocabulary,)."""
        if token in stop_ids:
            return self._end("stop", ())

        self.ids.append(token)
        logprobs = () if self.asked.top_logprobs is None else (self._logprobs(token, logits),)
        # blanks in front of an answer are no part of it
        self._text = (self._text + (self._stream.step(self.tokenizer.backend_tokenizer, token) or "")).lstrip()
        if self._found_stop():
            return self._end("stop", logprobs)
        if len(self.ids) == self.asked.max_new_tokens:
            return self._end("length", logprobs)
        self._tell(self._settled(), "", logprobs)
        return False

    def fail(self, message: str) -> None:
        """Tell that there will be no more of the answer."""
        self.tell(Piece(finish="error", error=message))

    def _end(self, finish: Finish, logprobs: tuple[dict[str, Any], ...]) -> bool:
        whole = self._text
        if not self._stopped:
            # a character that the end has cut is shown as `generate` shows it
            whole = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self._tell(whole.strip(), finish, logprobs)
        return True

    def _tell(self, visible: str, finish: Finish, logprobs: tuple[dict[str, Any], ...]) -> None:
        self._untold += logprobs
        if not (self.stream or finish):
            return
        new, self._told = visible[self._told :], max(self._told, len(visible))
        if new or finish or self._untold:
            counts = (len(self.prompt.ids), self.cached_tokens, len(self.ids))
            self.tell(Piece(new, *counts, tuple(self._untold), finish))
            self._untold = []

    def _found_stop(self) -> bool:
        """Whether one of the stop texts stands in the text, which then ends before the first of them."""
        places = [place for stop in self.asked.stop if (place := self._text.find(stop)) >= 0]
        if places:
            self._text, self._stopped = self._text[: min(places)], True
        return self._stopped

    def _settled(self) -> str:
        """The text that stays, whatever comes: without outer blanks and without the beginning of a stop text."""
        text = self._text
        longest = max(map(len, self.asked.stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.asked.stop):
                text = text[:-size]
                break
        return text.strip()

    def _logprobs(self, token: int, logits: torch.Tensor) -> dict[str, Any]:
        of_all = logits.float().log_softmax(-1)
        values, ids = of_all.topk(self.asked.top_logprobs or 0)
        top = [self._logprob(i, value) for i, value in zip(ids.tolist(), values.tolist(), strict=True)]
        return self._logprob(token, float(of_all[token])) | {"top_logprobs": top}

    def _logprob(self, token: int, value: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}


def rows_of(answers: Sequence[Answer]) -> tuple[list[list[int]], list[int], list[int]]:
    """Pages, tokens in the cache and new tokens of each answer, for kv_cache.Rows."""
    return [a.pages for a in answers], [a.past for a in answers], [a.length - a.past for a in answers]
