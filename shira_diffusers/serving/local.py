"""Run the service on this machine, or on the cluster that RAY_ADDRESS names, until the process is told to end."""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_diffusers.errors import ShiraError
from shira_diffusers.formats.paths import did_you_mean, is_hub_id

if TYPE_CHECKING:
    from shira_diffusers.serving.settings import Settings

_APP = "shira"
_STARTS = 3  # Ray gives up after 30 seconds, which may be too few where much else runs
_LOOK = 5.0  # seconds after which the service looks again whether Ray is there
_OBJECTS = 256 * 2**20  # bytes of shared memory: pictures on their way
_PRIVATE = {  # read by Ray when it is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: a node that only this machine reaches
}


def require_model(model: str) -> None:
    """Require that there may be such a pipeline, before minutes are spent on starting replicas.

    Raises:
        ShiraError: no such folder, or a folder that is no pipeline.
    """
    path = Path(model)
    if not path.exists() and not is_hub_id(model):
        raise ShiraError(f"no model at {model}: expected a diffusers folder or a Hub id owner/name{did_you_mean(path)}")
    if path.exists() and not (path / "model_index.json").is_file():
        raise ShiraError(f"{model} is no pipeline: expected a diffusers folder with a model_index.json")


def run(
    given: dict[str, Any], host: str, port: int, report: Callable[[str], object], ready: Callable[[str], object]
) -> None:
    """Serve until SIGINT or SIGTERM; then what is being drawn is finished, and all processes end.

    Args:
        given: see ``Settings``.
        host, port: of HTTP.
        report: called with a line when the service starts and ends, and with warnings.
        ready: called with the address when the service answers.

    Raises:
        ShiraError: Ray Serve is not installed, wrong settings, or a service that cannot start or has lost Ray.
    """
    if find_spec("ray") is None or find_spec("fastapi") is None:
        raise ShiraError("the service runs on Ray Serve, which is not installed: pip install 'shira-diffusers[serve]'")
    from shira_diffusers.serving.keys import Keys
    from shira_diffusers.serving.settings import Settings
    from shira_diffusers.serving.store import open_store

    settings = Settings.checked(given)
    require_model(settings.model)
    Keys(settings.keys)
    if not open_store(settings.adapter_source, settings.cache).sizes():
        report(f"warning: there are no adapters at {settings.adapter_source}")
    cluster = os.environ.get("RAY_ADDRESS")
    if cluster is None:
        _require_free(host, port)
    if settings.keys is None and not host.startswith(("127.", "localhost", "::1")):
        report(f"warning: everybody who reaches {host} can draw, upload and delete; ask for keys with --keys FILE")
    report(f"starting {settings.model} with the adapters of {settings.adapter_source}")
    _end_on_signals()
    with suppress(KeyboardInterrupt), joined(cluster, settings.replicas * settings.cpus):
        _end_on_signals()  # in the place of Ray's own handlers, which abort
        start(settings, host, port)
        ready(f"http://{host}:{port}")
        while _is_alive():
            time.sleep(_LOOK)
        raise ShiraError(
            "Ray has ended, and the service with it; its logs in /tmp/ray say why. Start the service again"
        )
    report("ended")


def _is_alive() -> bool:
    """Whether a node of the cluster is; without its head's store, Ray ends this process after a minute."""
    import ray

    return any(node["Alive"] for node in ray.nodes())


def _require_free(host: str, port: int) -> None:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ShiraError(
            f"cannot listen at {host}, port {port}: {error.strerror}; choose others with --host and --port"
        ) from error


def _end_on_signals() -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _interrupt)


def _interrupt(*_: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # what has begun to end does so
    raise KeyboardInterrupt


@contextmanager
def joined(address: str | None = None, cpus: float = 1) -> Iterator[None]:
    """Join a cluster of Ray, or start one that ends with the block and that only this machine reaches.

    At the end the service is taken down, once what it draws is finished.

    Args:
        address: of the cluster; None starts one.
        cpus: that a new one has at least.

    Raises:
        ShiraError: Ray does not start, or there is no such cluster.
    """
    if address is None:
        for name, value in _PRIVATE.items():
            os.environ.setdefault(name, value)
    import ray
    from ray import serve

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": max(cpus, os.cpu_count() or 1), "object_store_memory": _OBJECTS}
        options |= {"include_dashboard": False}
    for left in reversed(range(_STARTS)):
        try:
            ray.init(address or "local", **options)
            break
        except Exception as error:  # Ray has no type for this
            ray.shutdown()
            if not left:
                raise ShiraError(f"Ray does not start: {error}; the machine may be too busy, try again") from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        yield
    finally:
        if _is_alive():
            serve.delete(_APP)  # Serve itself stays where others may use it, and ends with a cluster of our own
        ray.shutdown()


def start(settings: "Settings", host: str, port: int) -> None:
    """Start or change the service, and wait until it answers.

    Raises:
        ShiraError: it cannot start.
    """
    from ray import serve
    from ray.exceptions import RayError

    from shira_diffusers.serving.deployment import application

    try:
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
    except (RuntimeError, TimeoutError, RayError) as error:
        raise ShiraError(f"Ray Serve does not start: {error}; the machine may be too busy, try again") from error
    try:
        serve.run(application(settings), name=_APP, logging_config={"log_level": "WARNING"})
    except RuntimeError as error:
        failed = serve.status().applications.get(_APP)
        details = [deployment.message for deployment in failed.deployments.values()] if failed else []
        raise ShiraError(f"the service cannot start: {_reason([str(error), *details])}") from error


def _reason(texts: list[str]) -> str:
    """The last error that texts with tracebacks name, without the type of ours."""
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if "Error: " in line), lines[-1])
    return reason.removeprefix("shira_diffusers.errors.ShiraError: ")
