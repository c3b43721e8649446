"""Who is logged in: keys of `smolray key`, and the cookies that stand for them.

In: a key. Out: a Session, found again by its cookie. A session ends with its key, after a day, and with this process.
"""

import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from smolray.serve.keys import SCOPES, Key, KeyRing

COOKIE = "smolray_session"
SECONDS = 24 * 3600.0
MOST_SESSIONS = 1000  # then the oldest is logged out


@dataclass(frozen=True)
class Session:
    """One browser. `token`: in each of its forms, so that no other site can send them."""

    name: str
    scopes: tuple[str, ...]
    token: str

    def may(self, scope: str) -> bool:
        """Whether the key is good for a scope."""
        return Key("", "", 0, self.scopes).may(scope)


class Sessions:
    """The browsers that are logged in. Without `keys` everyone who reaches the pages may do everything.

    `scopes`: a key opens a page where it has one of them.
    """

    def __init__(self, keys: KeyRing | None, scopes: tuple[str, ...] = ("view",)):
        self.keys, self.scopes = keys, scopes
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._digests: OrderedDict[str, tuple[str, float]] = OrderedDict()  # cookie -> hash of its key, end

    def begin(self, key: str) -> str | None:
        """The cookie of a new session; None where the key is not known, or opens no page."""
        known = self.keys.find(key) if self.keys else None
        if known is None or not any(known.may(scope) for scope in self.scopes):
            return None
        cookie = secrets.token_urlsafe(32)
        with self._lock:
            self._digests[cookie] = known.sha256, time.time() + SECONDS
            while len(self._digests) > MOST_SESSIONS:
                self._digests.popitem(last=False)
        return cookie

    def find(self, cookie: str) -> Session | None:
        """The session of a cookie; None where there is none, it is over, or its key was revoked."""
        if self.keys is None:
            return Session("this machine", SCOPES, self.token("this machine"))
        digest, end = self._digests.get(cookie, ("", 0.0))
        known = self.keys.known(digest) if time.time() < end else None
        return Session(known.name, known.scopes, self.token(cookie)) if known else None

    def end(self, cookie: str) -> None:
        """Log out."""
        with self._lock:
            self._digests.pop(cookie, None)

    def token(self, cookie: str) -> str:
        """What the forms of a page carry, for the browser with this cookie."""
        return hmac.new(self._secret, cookie.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()

    def is_token(self, cookie: str, token: str) -> bool:
        """Whether a form is one of ours, for this browser."""
        cookie = cookie if self.keys else "this machine"
        return hmac.compare_digest(self.token(cookie).encode(), token.encode("utf-8", "surrogatepass"))
