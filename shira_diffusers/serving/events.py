"""What drawing tells while it goes on; sent from a replica to the ingress."""

from collections.abc import AsyncGenerator, Mapping
from typing import NamedTuple, Protocol

from shira_diffusers.serving.requests import ImageRequest


class Progress(NamedTuple):
    """Steps that are done; the first event says with 0 that the request was accepted."""

    step: int
    of: int


class Pictures(NamedTuple):
    """The last event: the pictures, encoded as PNG, the seed of each, and how many were drawn as one batch.

    The bits of a picture depend on the size of its batch, and on nothing else but its settings.
    """

    seeds: list[int]
    pngs: list[bytes]
    batch: int


Events = AsyncGenerator[Progress | Pictures, None]


class Backend(Protocol):
    """What draws: one painter in this process, or replicas elsewhere."""

    def draw(self, request: ImageRequest) -> Events:
        """Draw; closing the iterator cancels it. Raises ServiceError."""

    async def stats(self) -> Mapping[str, Mapping[str, float]]:
        """Figures by replica, of those that answer: where it is empty, none is ready."""
