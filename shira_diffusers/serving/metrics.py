"""What Prometheus reads: requests of this ingress, and the figures of each replica."""

import time
from collections.abc import Mapping
from contextlib import aclosing

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shira_diffusers.serving.events import Events, Pictures

__all__ = ["CONTENT_TYPE", "Measured", "Metrics"]

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)


class Metrics:
    """Counters of one ingress."""

    def __init__(self) -> None:
        disable_created_metrics()
        self._registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self.requests = Counter("shira_requests", "Requests answered.", labels, registry=self._registry)
        self._open = Gauge("shira_drawing", "Requests for pictures that are not answered yet.", registry=self._registry)
        self._pictures = Counter("shira_pictures", "Pictures sent.", registry=self._registry)
        self._first = Histogram(
            "shira_first_step_seconds", "From a request to its first step.", buckets=_SECONDS, registry=self._registry
        )
        self._whole = Histogram(
            "shira_request_seconds", "From a request to its last picture.", buckets=_SECONDS, registry=self._registry
        )

    async def timed(self, events: Events) -> Events:
        """The same events, measured."""
        start, waiting = time.monotonic(), True
        with self._open.track_inprogress():
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Pictures):
                        self._pictures.inc(len(event.pngs))
                    elif waiting and event.step:
                        waiting = False
                        self._first.observe(time.monotonic() - start)
                    yield event
        self._whole.observe(time.monotonic() - start)

    def text(self, replicas: Mapping[str, Mapping[str, float]]) -> bytes:
        """All in Prometheus' format.

        Args:
            replicas: figures of each; those that end in ``_total`` are counters.
        """
        registry = CollectorRegistry()
        registry.register(_Replicas(replicas))
        return generate_latest(self._registry) + generate_latest(registry)


class _Replicas:
    def __init__(self, replicas: Mapping[str, Mapping[str, float]]) -> None:
        self._replicas = replicas

    def collect(self) -> list[CounterMetricFamily | GaugeMetricFamily]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for replica, figures in self._replicas.items():
            for name, value in figures.items():
                kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                family = families.setdefault(name, kind(f"shira_{name}", "See docs/serving.md.", labels=["replica"]))
                family.add_metric([replica], value)
        return list(families.values())


class Measured:
    """ASGI middleware that counts requests by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count it once it is answered or its client has left (status 499)."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 499

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"  # clients may make up any
            self._metrics.requests.labels(method, route, status).inc()
