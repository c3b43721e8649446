"""What a client is told when a request is not answered, in the form of OpenAI's errors."""

from dataclasses import dataclass
from typing import Any


@dataclass
class ApiError(Exception):
    """A request that is refused or fails.

    Attributes:
        status: the HTTP status.
        message: what was found, what is expected, what to do.
        code: a word for programs; empty where there is none.
        param: the field of the request at fault.
        retry_after: seconds after which trying again makes sense; 0 where it does not.
    """

    status: int
    message: str
    code: str = ""
    param: str = ""
    retry_after: int = 0

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param or None, "code": self.code or None}
        return {"error": error}
