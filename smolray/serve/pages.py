"""The bookkeeping of a bounded cache of keys and values: which page holds what, and who uses it.

A page holds PAGE tokens of every layer. Pages with the same content are shared: a full page of a prompt has a key,
which stands for all tokens and images up to its end. A page that nobody uses keeps its content until its place is
needed.
"""

from collections import OrderedDict
from collections.abc import Sequence

PAGE = 16  # tokens
SCRATCH = 0  # the page that padding is written to


class PagePool:
    """Pages by number. `size`: how many there are for use; SCRATCH comes on top."""

    def __init__(self, size: int):
        self.size = size
        self._free = list(range(size, 0, -1))
        self._users = [0] * (size + 1)
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # pages with a key and no user, the oldest first

    @property
    def available(self) -> int:
        """Pages without a user."""
        return len(self._free) + len(self._idle)

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """The pages that hold the longest known beginning of `keys`; the caller becomes their user."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._users[page] += 1
            self._idle.pop(page, None)
            found.append(page)
        return found

    def take(self, count: int) -> list[int]:
        """`count` pages for new content, at most `available`; of those that hold something, the oldest go first."""
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._users[page] = 1
            taken.append(page)
        return taken

    def publish(self, page: int, key: bytes) -> None:
        """Say what a page holds, so that others may share it."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """End the use of pages. The last of a prompt is forgotten first: without the first, no other is found."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)
