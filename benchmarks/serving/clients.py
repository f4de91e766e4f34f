"""Clients of a picture server: a number of them ask at once, some leave, and what each got is kept.

In: the base address, and requests in their order. Out: an ``Answer`` per request. It knows no server's inside.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import httpx

from shira_diffusers.serving.requests import ImageRequest

CLIENTS = 16
LEAVES = 0.25  # seconds that a client stays who leaves: long enough for its request to reach a replica
SECONDS = 300.0  # that a client waits


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Args:
        request: what was asked for.
        outcome: "200", another status with the error's type, "left", or "connection lost".
        seconds: from asking to the whole answer.
        png: the picture.
        batch: how many pictures were drawn together, where the server tells.
    """

    request: ImageRequest
    outcome: str
    seconds: float
    png: bytes = b""
    batch: int = 1


def body_of(request: ImageRequest) -> dict[str, object]:
    return {
        "prompt": request.prompt,
        "mix": dict(request.mix),
        "seed": request.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "size": f"{request.width}x{request.height}",
    }


def ask_all(
    address: str,
    requests: Iterable[ImageRequest],
    *,
    leaving: int = 0,
    at: Mapping[int, Callable[[], object]] | None = None,
) -> list[Answer]:
    """Let ``CLIENTS`` ask for pictures, each for the next as soon as it has one.

    Args:
        leaving: of this many requests one is left by its client; 0 is none.
        at: what to do just before the request of a number is sent; one at a time, in their order.
    """
    return asyncio.run(_ask_all(address, enumerate(requests), leaving, at or {}))


async def _ask_all(
    address: str, todo: "enumerate[ImageRequest]", leaving: int, at: Mapping[int, Callable[[], object]]
) -> list[Answer]:
    answers: list[Answer] = []
    in_turn = asyncio.Lock()

    async def client(service: httpx.AsyncClient) -> None:
        for number, request in todo:  # all clients share it
            if number in at:
                async with in_turn:
                    await asyncio.to_thread(at[number])
            leaves = leaving and number % leaving == leaving - 1
            answers.append(await _ask(service, request, LEAVES if leaves else None))

    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=address, timeout=SECONDS, limits=limits) as service:
        await asyncio.gather(*(client(service) for _ in range(CLIENTS)))
    return answers


async def _ask(service: httpx.AsyncClient, request: ImageRequest, patience: float | None) -> Answer:
    began = time.perf_counter()

    def answered(outcome: str, png: bytes = b"", batch: int = 1) -> Answer:
        return Answer(request, outcome, time.perf_counter() - began, png, batch)

    try:
        got = await asyncio.wait_for(service.post("/v1/images", json=body_of(request)), patience)
    except TimeoutError:
        return answered("left")
    except httpx.TransportError:
        return answered("connection lost")
    if got.status_code == 200:
        return answered("200", got.content, int(got.headers.get("x-shira-batch", 1)))
    is_json = got.headers.get("content-type", "").startswith("application/json")
    return answered(f"{got.status_code} {got.json().get('type', '') if is_json else ''}".strip())
