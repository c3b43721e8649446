"""Parts of a page that change while it is open, sent as server-sent events.

In: a function that reads the parts of a page. Out: a stream of those that have changed, as HTML that was escaped when
it was rendered.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from smolray.web.site import Ask

MOST_STREAMS = 200  # open pages
SIGN_OF_LIFE_SECONDS = 10.0


@dataclass(frozen=True)
class Part:
    """The content of the element `id`. It is sent where `version` has changed; default: where the content has."""

    id: str
    html: str
    version: str = ""

    @property
    def mark(self) -> str:
        """A short name of this content."""
        return hashlib.sha256((self.version or self.html).encode("utf-8", "replace")).hexdigest()[:16]


def stream(ask: Ask, read: Callable[[], Sequence[Part]]) -> Response:
    """The changes of a page, until the browser leaves or its session is over."""
    if ask.site.streams >= MOST_STREAMS:
        return PlainTextResponse("too many pages are open", 503)
    return StreamingResponse(_events(ask, read), media_type="text/event-stream")


async def _events(ask: Ask, read: Callable[[], Sequence[Part]]) -> AsyncIterator[str]:
    sent: dict[str, str] = {}
    spoke = 0.0
    ask.site.streams += 1
    try:
        while ask.site.sessions.find(ask.cookie):
            changed = []
            for part in await run_in_threadpool(read):
                if sent.get(part.id) != part.mark:
                    sent[part.id] = part.mark
                    changed.append({"id": part.id, "mark": part.mark, "html": part.html})

            if changed:
                yield f"data: {json.dumps(changed)}\n\n"
                spoke = time.monotonic()
            elif time.monotonic() - spoke > SIGN_OF_LIFE_SECONDS:
                yield "event: alive\ndata: 1\n\n"
                spoke = time.monotonic()
            await asyncio.sleep(ask.site.runs.poll)
        yield "event: over\ndata: 1\n\n"
    finally:
        ask.site.streams -= 1
