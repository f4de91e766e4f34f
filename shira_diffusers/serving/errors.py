"""The errors that clients of the service see: a type to program against, a message to read, an HTTP status."""

from dataclasses import dataclass
from typing import Any

from shira_diffusers.errors import ShiraError


@dataclass(eq=False)
class ServiceError(ShiraError):
    """A request that is refused or fails.

    Args:
        type: a name that stays, such as ``"rate_limited"``.
        message: offender, expected, got, remedy.
        status: of HTTP.
        retry_after: seconds after which the same request may succeed; 0 where waiting does not help.
    """

    type: str
    message: str
    status: int
    retry_after: float = 0.0

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return ServiceError, (self.type, self.message, self.status, self.retry_after)


def invalid(message: str) -> ServiceError:
    """A request that can never succeed as it is."""
    return ServiceError("invalid_request", message, 422)


def not_found(name: str) -> ServiceError:
    """An adapter that the service does not have."""
    message = f"no adapter named {name[:80]!r}: expected one of those that GET /v1/adapters lists"
    return ServiceError("adapter_not_found", message, 404)


def one_line(error: BaseException) -> str:
    """An error's message with its listing on the same line."""
    return " ".join(str(error).replace(":\n  - ", ": ").replace("\n  - ", "; ").split())
