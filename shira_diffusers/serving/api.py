"""The HTTP interface: a FastAPI app over whatever draws. It knows neither Ray nor models."""

import asyncio
import base64
import json
import logging
import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from shira_diffusers._version import __version__
from shira_diffusers.serving.body import ImageBody, parse
from shira_diffusers.serving.errors import ServiceError, invalid
from shira_diffusers.serving.events import Backend, Events, Pictures, Progress
from shira_diffusers.serving.keys import Client, Keys, RateLimit
from shira_diffusers.serving.metrics import CONTENT_TYPE, Measured, Metrics
from shira_diffusers.serving.settings import Settings
from shira_diffusers.serving.store import FolderStore

logger = logging.getLogger(__name__)

MAX_BODY = 256 * 1024  # bytes of JSON
_SCHEMA = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": ImageBody.model_json_schema()}}}
}


def build_api(settings: Settings, store: FolderStore, backend: Backend) -> FastAPI:
    """The app of one ingress.

    Args:
        settings: limits, and the file of keys.
        store: the adapters.
        backend: draws.

    Raises:
        ShiraError: keys that cannot be read.
    """
    keys, rates, metrics = Keys(settings.keys), RateLimit(settings.pictures_per_minute), Metrics()
    app = FastAPI(title="shira_diffusers", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Measured, metrics=metrics)
    app.add_exception_handler(ServiceError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(RequestValidationError, _bad_query)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _failed)

    def client(request: Request) -> Client:
        return keys.client(request.headers.get("authorization"), request.client.host if request.client else "local")

    Known = Annotated[Client, Depends(client)]

    def admin(who: Known) -> Client:
        if not who.admin:
            raise ServiceError("forbidden", f"{who.name} may not change adapters: expected a key of an admin", 403)
        if settings.adapters is None:
            raise ServiceError("forbidden", "the bundled adapters stay: serve a folder of yours with --adapters", 403)
        return who

    Admin = Annotated[Client, Depends(admin)]

    @app.post("/v1/images", openapi_extra=_SCHEMA)
    async def images(request: Request, who: Known) -> Response:
        body = await _body(request, settings)
        kind = body.format(request.headers.get("accept", ""))
        rates.take(who.name, body.n)
        events = metrics.timed(backend.draw(body.request(who.name)))
        if kind == "stream":
            first = await anext(events)  # what is refused has a status of its own
            return StreamingResponse(_sent(first, events), media_type="text/event-stream", headers=_UNBUFFERED)
        pictures = await _finished(events)
        if kind == "png":
            headers = {"x-shira-seed": str(pictures.seeds[0]), "x-shira-batch": str(pictures.batch)}
            return Response(pictures.pngs[0], media_type="image/png", headers=headers)
        return JSONResponse(_shown(pictures))

    @app.get("/v1/adapters")
    async def adapters(_: Known) -> dict[str, Any]:
        sizes = await asyncio.to_thread(store.sizes)
        return {"adapters": [{"name": name, "bytes": size} for name, size in sizes.items()]}

    @app.put("/v1/adapters/{name:path}", status_code=201)
    async def upload(name: str, request: Request, _: Admin, replace: bool = False) -> dict[str, Any]:
        _require_length(request, settings.max_upload_bytes)
        size = await store.add(name, request.stream(), settings.max_upload_bytes, replace=replace)
        return {"name": name, "bytes": size}

    @app.delete("/v1/adapters/{name:path}", status_code=204)
    async def delete(name: str, _: Admin) -> None:
        await asyncio.to_thread(store.remove, name)

    @app.get("/healthz")
    async def healthy() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def ready() -> dict[str, Any]:
        replicas = await backend.stats()
        if not replicas:
            raise ServiceError("not_ready", "no replica of the model answers", 503, 5)
        return {"status": "ready", "replicas": len(replicas)}

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(metrics.text(await backend.stats()), media_type=CONTENT_TYPE)

    return app


_UNBUFFERED = {"cache-control": "no-store", "x-accel-buffering": "no"}  # proxies pass each event on at once


async def _body(request: Request, settings: Settings) -> ImageBody:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ServiceError("unsupported_media_type", f"expected content-type application/json, got {kind!r}", 415)
    _require_length(request, MAX_BODY)
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY:
            raise _too_large(MAX_BODY)
    return parse(bytes(raw), settings)


def _require_length(request: Request, most: int) -> None:
    """Refuse what says that it is too long, before it is read."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise _too_large(most)


def _too_large(most: int) -> ServiceError:
    return ServiceError("too_large", f"the body may have {most:,} bytes", 413)


async def _finished(events: Events) -> Pictures:
    async with aclosing(events):
        return [event async for event in events if isinstance(event, Pictures)][-1]


async def _sent(first: Progress | Pictures, events: Events) -> AsyncIterator[str]:
    """Server-sent events: ``progress``, at the end ``done`` with the pictures, or ``error``."""
    async with aclosing(events):
        try:
            yield _event(first)
            async for event in events:
                yield _event(event)
        except ServiceError as error:
            yield _written("error", _told(error))
        except Exception:
            logger.exception("a request failed")
            yield _written("error", _told(_INTERNAL))


def _event(event: Progress | Pictures) -> str:
    if isinstance(event, Progress):
        return _written("progress", event._asdict())
    return _written("done", _shown(event))


def _written(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


def _shown(pictures: Pictures) -> dict[str, Any]:
    pairs = zip(pictures.seeds, pictures.pngs, strict=True)
    shown = [{"seed": seed, "b64_json": base64.b64encode(png).decode("ascii")} for seed, png in pairs]
    return {"images": shown, "batch": pictures.batch}


_INTERNAL = ServiceError("internal", "the service has failed; its log says how", 500)


def _told(error: ServiceError) -> dict[str, str]:
    return {"type": error.type, "message": error.message}


def _answer(error: ServiceError) -> JSONResponse:
    headers = {"retry-after": str(math.ceil(error.retry_after))} if error.retry_after else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(_told(error), error.status, headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return _answer(error)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    remedy = "" if kind == "invalid_request" else "; GET /openapi.json lists what there is"
    message = f"{error.detail}: {request.method} {request.url.path[:80]}{remedy}"
    answer = _answer(ServiceError(kind, message, error.status_code))
    answer.headers.update(error.headers or {})  # Allow, of a 405
    return answer


async def _bad_query(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    places = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return _answer(invalid("; ".join(places)))


async def _left(_: Request, error: Exception) -> Response:
    """Of a client that has left while it sent its body: nobody reads it, but metrics count the status."""
    return Response(status_code=499)


async def _failed(_: Request, error: Exception) -> Response:
    return _answer(_INTERNAL)
