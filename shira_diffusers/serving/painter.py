"""Painter: one resident pipeline, its adapters and its scheduler, behind coroutines. It knows neither HTTP nor Ray."""

import asyncio
import io
import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import torch
from PIL.Image import Image

from shira_diffusers.errors import AdapterFormatError, AdapterMismatchError, ShiraError, listing
from shira_diffusers.integrations.open_pipeline import open_pipeline
from shira_diffusers.library import AdapterLibrary
from shira_diffusers.serving.errors import ServiceError, not_found, one_line
from shira_diffusers.serving.events import Events, Pictures, Progress
from shira_diffusers.serving.jobs import Job
from shira_diffusers.serving.requests import ClosedError, DeadlineError, ImageRequest, QueueFullError, RequestError
from shira_diffusers.serving.scheduler import StepScheduler
from shira_diffusers.serving.settings import Settings
from shira_diffusers.serving.store import FolderStore

logger = logging.getLogger(__name__)

LOST = "replica_lost"
_ANSWERS: dict[type[Exception], tuple[str, int, float]] = {  # type, status, when to ask again; the first that fits
    RequestError: ("invalid_request", 422, 0),
    QueueFullError: ("overloaded", 503, 5),
    DeadlineError: ("deadline", 504, 0),
    ClosedError: (LOST, 503, 5),
    AdapterFormatError: ("invalid_adapter", 422, 0),
    AdapterMismatchError: ("adapter_mismatch", 422, 0),
    ShiraError: ("cannot_draw", 422, 0),
    OSError: ("storage", 503, 5),
}


class Painter:
    """Draws for many clients, with the adapters of a store.

    Args:
        settings: the model, its device and budgets.
        store: the adapters.

    Raises:
        ShiraError: a model that cannot be loaded, or a device that is not there.
    """

    def __init__(self, settings: Settings, store: FolderStore) -> None:
        self._store = store
        pipe = _load(settings)
        self._library = AdapterLibrary(
            store.folder,
            ram_bytes=settings.ram_bytes,
            device_bytes=settings.device_bytes,
            device=settings.device,
            index=store.index,
        )
        threading.Thread(target=_warn_of_broken, args=[self._library], daemon=True).start()
        self._scheduler = StepScheduler(
            pipe, self._library, max_batch=settings.max_pictures, cuda_graphs=settings.cuda_graphs
        )

    async def draw(self, request: ImageRequest) -> Events:
        """Draw; the first event says that the request was accepted. Closing the iterator cancels the job.

        Raises:
            ServiceError: an adapter that is not there or cannot be used, a deadline that has passed, no room.
        """
        with _explained():
            await asyncio.to_thread(self._store.fetch, request.mix)
            self._require(request.mix)
            job, steps = self._submit(request)
            try:
                yield Progress(0, request.steps)
                while (done := await steps.get()) is not None:
                    yield Progress(done, request.steps)
                yield await asyncio.to_thread(_encoded, job)
            except (ShiraError, OSError):
                self._require(request.mix)  # it may have been deleted while the job waited
                raise
            finally:
                job.cancel()

    def _require(self, names: Iterable[str]) -> None:
        missing = [name for name in names if not self._store.has(name)]
        if missing:
            raise not_found(missing[0])

    def _submit(self, request: ImageRequest) -> tuple[Job, asyncio.Queue[int | None]]:
        """Submit; the steps that are done come out of the queue, None at the end."""
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[int | None]()

        def put(done: int | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(steps.put_nowait, done)

        job = self._scheduler.submit(request, put)
        job.future.add_done_callback(lambda _: put(None))
        return job, steps

    def stats(self) -> dict[str, float]:
        """Figures of the scheduler and of both tiers of the library; those that end in ``_total`` only grow."""
        now = {"waiting", "running"}
        jobs = {
            name if name in now else f"{name}_total": value for name, value in asdict(self._scheduler.stats()).items()
        }
        library = self._library.stats()
        for tier, found in (("device", library.device), ("ram", library.ram)):
            jobs |= {f"{tier}_adapters": found.adapters, f"{tier}_bytes": found.nbytes}
            jobs |= {f"{tier}_{name}_total": getattr(found, name) for name in ("hits", "misses", "evictions")}
        return jobs

    def close(self) -> None:
        """End what is drawn, and give memory back."""
        self._scheduler.close()
        self._library.close()


def _load(settings: Settings) -> Any:
    pipe = open_pipeline(settings.model, getattr(torch, settings.dtype))
    try:
        return pipe.to(settings.device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        raise ShiraError(f"cannot use the device {settings.device!r}: {error}") from error


def _warn_of_broken(library: AdapterLibrary) -> None:
    """Read all headers, which takes a while at the first start, and log which adapters requests will be refused."""
    try:
        names = library.names
        if broken := set(names) - library.headers().keys():
            logger.warning("%d of %d adapters cannot be read:%s", len(broken), len(names), listing(sorted(broken)))
    except OSError as error:
        logger.warning("the adapters cannot be read: %s", error)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn errors of drawing into those that clients see; others are logged, without details for clients."""
    try:
        yield
    except ServiceError:
        raise
    except Exception as error:
        kind, status, again = next((told for base, told in _ANSWERS.items() if isinstance(error, base)), ("", 500, 0))
        if kind:
            raise ServiceError(kind, one_line(error), status, again) from error
        logger.exception("drawing failed")
        raise ServiceError("internal", "drawing failed; the service's log says how", status) from error


def _encoded(job: Job) -> Pictures:
    pngs = [_png(image) for image in job.result(0)]
    return Pictures([job.request.seed + k for k in range(len(pngs))], pngs, job.batch)


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
