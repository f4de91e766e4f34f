"""The service on Ray Serve: replicas of a painter, and the ingress that sends requests to where adapters are warm."""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray._common.tls_utils import add_port_to_grpc_server
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve._private import replica
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RunningReplica

from shira_diffusers.serving.api import build_api
from shira_diffusers.serving.errors import ServiceError
from shira_diffusers.serving.events import Events, Pictures, Progress
from shira_diffusers.serving.painter import LOST, Painter
from shira_diffusers.serving.requests import ImageRequest
from shira_diffusers.serving.settings import Settings
from shira_diffusers.serving.store import open_store

ATTEMPTS = 3  # replicas that may be lost under one request
AHEAD = 2  # requests that a warm replica may have more than another
WARM = 64  # adapters and mixes per replica that routing remembers
_LEAVING = {"graceful_shutdown_timeout_s": 120.0, "graceful_shutdown_wait_loop_s": 0.1}
"""How long a replica which is to end may take for what it has begun, and how often it looks whether that is done."""
_SILENT = 5.0  # seconds after which a replica that does not answer is not ready
_LOOPBACK = "127.0.0.1"
_GONE = (RayActorError, ReplicaUnavailableError)


class Replica:
    """A painter in a process of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        _stay_local()
        checked = Settings.checked(settings)
        self._painter = Painter(checked, open_store(checked.adapter_source, checked.cache))
        self._name = serve.get_replica_context().replica_id.unique_id

    async def draw(self, request: ImageRequest) -> AsyncIterator[Progress | Pictures | ServiceError]:
        """As ``Painter.draw``; an error is the last event, since Ray would wrap it."""
        try:
            async with aclosing(self._painter.draw(request)) as events:
                async for event in events:
                    if request.mix and event == (0, request.steps):  # it has the adapters
                        await self._remember(mix_id(request.mix))
                    yield event
        except ServiceError as error:
            yield error

    @serve.multiplexed(max_num_models_per_replica=WARM)  # type: ignore[untyped-decorator]
    async def _remember(self, mix: str) -> str:
        """Tell the router that a mix is warm here. What is in memory is the library's choice."""
        return mix

    async def stats(self) -> tuple[str, dict[str, float]]:
        """Its name, and ``Painter.stats``."""
        return self._name, self._painter.stats()

    def __del__(self) -> None:
        if painter := getattr(self, "_painter", None):
            painter.close()


class Router(PowerOfTwoChoicesRequestRouter):
    """Ray's choice of replicas, which is a warm one; but not where it has many more requests than another.

    Ray sends a request elsewhere only once all that are warm have as many as they may: one replica worked through a
    queue while another had nothing to do, and stayed cold.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of candidates, those of the first before others."""
        chosen = await super().choose_replicas(candidate_replicas, pending_request)
        idlest = min(candidate_replicas, key=self._requests)
        is_behind = any(self._requests(idlest) + AHEAD < min(map(self._requests, group)) for group in chosen[:1])
        return [[idlest], *chosen] if is_behind else chosen

    def _requests(self, replica: RunningReplica) -> int:
        """Those that it works on, as far as this ingress knows; Ray asks replicas that it has not heard of lately."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def mix_id(mix: Mapping[str, float]) -> str:
    """What a mix is called for routing: its adapters, whatever their strengths, which cost nothing to change."""
    return "/".join(sorted(mix))


class Replicas:
    """The backend of an ingress: replicas, each of which may be lost.

    Args:
        handle: of ``Replica``.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def draw(self, request: ImageRequest) -> Events:
        """Draw where the mix is warm, and again elsewhere if that replica is lost; see ``Painter.draw``."""
        start = time.monotonic()
        for _ in range(ATTEMPTS):
            left = request.deadline and request.deadline - (time.monotonic() - start)
            if left is not None and left <= 0:
                late = (
                    f"the deadline has passed: expected pictures within {request.deadline:g} seconds; allow more time"
                )
                raise ServiceError("deadline", late, 504)
            try:
                async with aclosing(self._drawn(replace(request, deadline=left))) as events:
                    async for event in events:
                        yield event
                return
            except _GONE:
                continue
            except ServiceError as error:
                if error.type != LOST:
                    raise
            except (BackPressureError, DeploymentUnavailableError) as error:
                raise ServiceError("overloaded", f"no replica has room: {error}", 503, 5) from error
        raise ServiceError(LOST, "the replicas that drew this were lost; ask again", 503, 5)

    async def _drawn(self, request: ImageRequest) -> Events:
        handle = self._handle.options(stream=True, multiplexed_model_id=mix_id(request.mix))
        answer: Any = handle.draw.remote(request)
        try:
            async for event in answer:
                if isinstance(event, ServiceError):
                    raise event
                yield event
        finally:
            answer.cancel()

    async def stats(self) -> dict[str, dict[str, float]]:
        """See ``Backend.stats``."""
        try:
            answers = self._handle.broadcast("stats")
            found = await answers.results_async(timeout_s=_SILENT, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):
            return {}
        return dict(each for each in found if not isinstance(each, BaseException))


class Ingress:
    """A process that answers HTTP."""

    def __init__(self, settings: dict[str, Any], replicas: DeploymentHandle[Any]) -> None:
        _stay_local()
        self._settings, self._replicas = Settings.checked(settings), replicas

    def __serve_build_asgi_app__(self) -> FastAPI:
        settings = self._settings
        return build_api(settings, open_store(settings.adapter_source, settings.cache), Replicas(self._replicas))


def _stay_local() -> None:
    """Where only this machine reaches Ray, require the same of the server that each replica has for calls by gRPC.

    Ray 2.60 has "[::]" in its code for that one, and neither an option nor an environment variable for another address;
    with its token authentication it would ask for a token, but listen. So the function is replaced that opens the port.
    tests/serving/test_replicas.py lists all ports that are open, which is what fails if Ray opens this one otherwise.
    """
    if ray.util.get_node_ip_address() == _LOOPBACK:
        local = lambda server, _: add_port_to_grpc_server(server, f"{_LOOPBACK}:0")  # noqa: E731
        setattr(replica, "add_port_to_grpc_server", local)  # noqa: B010


def application(settings: Settings) -> Application:
    """The service as an application of Ray Serve."""
    given = settings.model_dump()
    gpus = float(settings.device.startswith("cuda")) if settings.gpus is None else settings.gpus
    deployed: Any = serve.deployment
    replicas = deployed(Replica).options(
        **_scaling(settings),
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": gpus},
        max_ongoing_requests=settings.max_running,
        max_queued_requests=settings.max_queued,
        request_router_config={"request_router_class": f"{__name__}.{Router.__name__}"},
        **_LEAVING,
    )
    ingress = deployed(serve.ingress()(Ingress)).options(
        num_replicas=settings.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
        **_LEAVING,
    )
    return ingress.bind(given, replicas.bind(given))


def _scaling(settings: Settings) -> dict[str, Any]:
    if settings.max_replicas <= settings.replicas:
        return {"num_replicas": settings.replicas}
    bounds = {"min_replicas": settings.replicas, "max_replicas": settings.max_replicas}
    return {"autoscaling_config": {**bounds, "target_ongoing_requests": settings.max_running / 4}}
