"""Who may use the service, and how often."""

import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shira_diffusers.errors import ShiraError
from shira_diffusers.serving.errors import ServiceError

_EXPECTED = "expected lines CLIENT:KEY, or CLIENT:KEY:admin for those that may upload and delete"


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks: a name, by which turns and rates are shared, and whether it may change the adapters."""

    name: str
    admin: bool


class Keys:
    """The clients by the hash of their key. Without a file there are no keys, and everybody may do everything.

    Args:
        file: holds a line ``CLIENT:KEY`` or ``CLIENT:KEY:admin`` per client; blank lines and those that begin with
            # are ignored.

    Raises:
        ShiraError: no such file, a malformed line, or a client or key twice; the message holds no key.
    """

    def __init__(self, file: str | None) -> None:
        self._clients: Mapping[bytes, Client] | None = None if file is None else _read(Path(file).expanduser())

    def client(self, authorization: str | None, address: str) -> Client:
        """The client of a request.

        Args:
            authorization: the header: ``Bearer KEY``.
            address: names the client where there are no keys.

        Raises:
            ServiceError: 401, no key or an unknown one. Comparing takes the same time whatever the key is.
        """
        if self._clients is None:
            return Client(address, admin=True)
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        found = [client for digest, client in self._clients.items() if hmac.compare_digest(digest, given)]
        if scheme.lower() != "bearer" or not found:
            got = "none" if authorization is None else "another"
            raise ServiceError("unauthorized", f"expected the header 'Authorization: Bearer KEY', got {got}", 401)
        return found[0]


def _read(file: Path) -> dict[bytes, Client]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ShiraError(f"cannot read the keys in {file}: {why}; {_EXPECTED}") from None
    clients: dict[bytes, Client] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split(":")]
        if len(parts) < 2 or not all(parts) or parts[2:] not in ([], ["admin"]):
            raise ShiraError(f"line {number} of {file} is malformed; {_EXPECTED}")
        name, key = parts[:2]
        if _digest(key) in clients or name in (client.name for client in clients.values()):
            raise ShiraError(f"line {number} of {file} has a client or a key a second time; {_EXPECTED}")
        clients[_digest(key)] = Client(name, admin=len(parts) == 3)
    if not clients:
        raise ShiraError(f"{file} names no client; {_EXPECTED}")
    return clients


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class RateLimit:
    """A bucket of pictures per client, which fills at a rate and holds a minute's worth.

    Args:
        per_minute: pictures.
        clock: seconds.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = per_minute, clock
        self._left: dict[str, tuple[float, float]] = {}  # of clients whose bucket is not full: left, when

    def take(self, client: str, pictures: int) -> None:
        """Take pictures out of a client's bucket.

        Raises:
            ServiceError: 429, there are not so many; nothing is taken. More than the bucket holds take all of it.
        """
        now, cost = self._clock(), min(pictures, self._most)
        left = self._now(client, now)
        if cost > left:
            wait = 60 * (cost - left) / self._most
            message = f"{client} may ask for {self._most:g} pictures per minute; ask again in {wait:.1f} s"
            raise ServiceError("rate_limited", message, 429, max(wait, 0.1))
        self._left = {name: was for name, was in self._left.items() if self._now(name, now) < self._most}
        self._left[client] = left - cost, now

    def _now(self, client: str, now: float) -> float:
        left, then = self._left.get(client, (self._most, now))
        return min(self._most, left + (now - then) * self._most / 60)
