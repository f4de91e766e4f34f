"""The loss of Ray's head: `shira serve` ends with one clear line, and the same command serves the same again."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from shira_diffusers.serving.settings import Settings
from tests.serving.service import BODY, drawn_alone, free_port, make_service, pixels

SOON = 300.0  # seconds; on a busy machine a service takes a while to start

pytestmark = pytest.mark.nightly


@contextmanager
def serving(folder: Path, log: Path) -> Iterator[tuple[psutil.Popen, httpx.Client]]:
    port = str(free_port())
    command = ["serve", str(folder / "model"), "--adapters", str(folder / "adapters"), "--port", port]
    with log.open("w") as out, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SOON) as client:
        server = psutil.Popen(
            [sys.executable, "-m", "shira_diffusers.cli", *command], stdout=out, stderr=subprocess.STDOUT
        )
        try:
            until = time.monotonic() + SOON
            while "ready at" not in log.read_text():
                assert server.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.5)
            yield server, client
        finally:
            with suppress(psutil.NoSuchProcess):
                server.terminate()
            server.wait(SOON)


def test_a_service_without_its_head_ends_and_starts_again_with_what_was_uploaded(tmp_path: Path) -> None:
    folder = make_service(tmp_path)
    settings = Settings.checked({"adapters": str(folder / "adapters")})
    uploaded = (folder / "adapters" / "blue.safetensors").read_bytes()
    with serving(folder, tmp_path / "log") as (server, client):
        assert client.put("/v1/adapters/new", content=uploaded).status_code == 201
        processes = server.children(recursive=True)
        (head,) = [each for each in processes if each.name() == "raylet"]
        head.kill()
        assert server.wait(SOON) == 1
        assert (tmp_path / "log").read_text().splitlines()[-1].startswith("error: Ray has ended")
        with pytest.raises(httpx.TransportError):
            client.post("/v1/images", json=BODY)
        assert not psutil.wait_procs(processes, timeout=60)[1]
    with serving(folder, tmp_path / "log") as (_, client):
        assert [each["name"] for each in client.get("/v1/adapters").json()["adapters"]] == ["blue", "gold", "new"]
        picture = client.post("/v1/images", json={**BODY, "mix": {"new": 0.5}})
        assert pixels(picture.content) == drawn_alone(settings, "new", 0.5)
