"""The service on Ray Serve, with two replicas on this machine: warm routing, and what happens when replicas go."""

import base64
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from shira_diffusers import ShiraError
from shira_diffusers.serving import app
from shira_diffusers.serving.local import joined, start
from shira_diffusers.serving.settings import Settings
from tests.serving.service import BODY, drawn_alone, free_port, make_service, pixels

SOON = 120.0  # seconds; on a busy machine a replica takes a while to start


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = make_service(tmp_path_factory.mktemp("service"))
    given = {"model": str(folder / "model"), "adapters": str(folder / "adapters"), "replicas": 2, "cpus": 0.5}
    return Settings.checked(given | {"pictures_per_minute": 10_000, "max_steps": 1000})


@pytest.fixture(scope="module")
def service(settings: Settings) -> Iterator[httpx.Client]:
    port = free_port()
    with joined(cpus=2):
        start(settings, "127.0.0.1", port)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SOON) as client:
            yield client


def ask(service: httpx.Client, **changes: Any) -> httpx.Response:
    return service.post("/v1/images", json={**BODY, **changes})


def figures(service: httpx.Client, name: str) -> dict[str, float]:
    """A figure of each replica."""
    start = f'shira_{name}{{replica="'
    lines = [line for line in service.get("/metrics").text.splitlines() if line.startswith(start)]
    return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines}


def wait_for(done: Callable[[], Any]) -> None:
    until = time.monotonic() + SOON
    while not done():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_only_this_machine_reaches_it(service: httpx.Client) -> None:
    assert service.get("/readyz").json() == {"status": "ready", "replicas": 2}
    processes = psutil.Process().children(recursive=True)
    listening = [each.laddr.ip for one in processes for each in one.net_connections() if each.status == "LISTEN"]
    assert len(listening) > 5 and {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


def test_requests_go_where_the_adapter_is_warm(service: httpx.Client, settings: Settings) -> None:
    for name in ("blue", "gold"):
        answer = ask(service, mix={name: 0.5})
        assert pixels(answer.content) == drawn_alone(settings, name, 0.5)
        time.sleep(1)  # the news must have spread
    for strength in range(1, 6):
        for name in ("blue", "gold"):
            assert ask(service, mix={name: strength / 4}).status_code == 200
    assert sorted(figures(service, "ram_misses_total").values()) == [1, 1]  # each file was read by one of the two
    assert sorted(figures(service, "finished_total").values()) == [6, 6]


def test_a_deadline_that_has_passed_before_a_replica_is_asked_is_told(service: httpx.Client) -> None:
    late = ask(service, timeout=1e-12)
    assert (late.status_code, late.json()["type"]) == (504, "deadline")


def test_a_warm_replica_with_many_requests_lets_others_have_some(service: httpx.Client) -> None:
    def draw(seed: int) -> int:
        return ask(service, mix={"blue": 0.5}, seed=seed, steps=100).status_code

    before = figures(service, "finished_total")
    with ThreadPoolExecutor(8) as clients:
        assert set(clients.map(draw, range(16))) == {200}
    assert all(now - before[name] > 3 for name, now in figures(service, "finished_total").items())


def test_clients_that_leave_cancel_their_jobs(service: httpx.Client) -> None:
    """All that a replica has, whether it draws them or they wait in its queue."""

    def leave(seed: int) -> None:
        with pytest.raises(httpx.ReadTimeout):
            service.post("/v1/images", json={**BODY, "steps": 900, "seed": seed}, timeout=3)

    with ThreadPoolExecutor(4) as clients:
        list(clients.map(leave, range(4)))
    wait_for(lambda: not any(figures(service, "running").values()))
    assert sum(figures(service, "cancelled_total").values()) == 4


def test_a_rolling_restart_keeps_answering(service: httpx.Client, settings: Settings) -> None:
    wait_for(lambda: len(figures(service, "running")) == 2)
    before, answers = set(figures(service, "running")), list[int]()
    changed = settings.model_copy(update={"revision": "2"})
    restart = threading.Thread(target=start, args=[changed, "127.0.0.1", service.base_url.port])
    restart.start()
    while restart.is_alive():
        answers.append(ask(service, mix={"gold": 1}).status_code)
        time.sleep(0.2)
    restart.join()
    assert set(answers) == {200} and len(answers) > 5
    wait_for(lambda: len(set(figures(service, "running")) - before) == 2)
    assert ask(service).status_code == 200


def test_a_picture_survives_its_replica(service: httpx.Client, settings: Settings) -> None:
    """After the restart, so that nothing waits for another replica to start."""
    import ray

    body = {**BODY, "steps": 200, "mix": {"blue": 0.5}, "response_format": "stream"}
    with service.stream("POST", "/v1/images", json=body) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: "))
        assert [json.loads(next(lines)) for _ in range(2)] == [{"step": 0, "of": 200}, {"step": 1, "of": 200}]
        (busy,) = [name for name, running in figures(service, "running").items() if running]
        ray.kill(ray.get_actor(f"SERVE_REPLICA::shira#Replica#{busy}", namespace="serve"))
        events = [json.loads(line) for line in lines]
    steps = [event["step"] for event in events[:-1]]
    assert steps[-201:] == list(range(201))  # it was drawn anew: the first two steps had been read
    (drawn,) = events[-1]["images"]
    assert pixels(base64.b64decode(drawn["b64_json"])) == drawn_alone(settings, "blue", 0.5, steps=200)


def test_the_documented_config_file_is_valid_and_all_settings_are_documented() -> None:
    from ray.serve.schema import ServeDeploySchema  # not before ``joined``

    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert Settings.checked(config.applications[0].args).max_replicas == 8
    assert config.applications[0].import_path == f"{app.__module__}:app"
    table = page.partition("## Settings")[2].partition("\n## ")[0]
    assert set(Settings.model_fields) == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.*?)\|", table, re.M))))


def test_a_config_file_with_other_args_is_refused(service: httpx.Client) -> None:
    """After the service has started: `app` imports Ray, which reads then what keeps it on this machine."""
    with pytest.raises(ShiraError, match=r"modle: .*not permitted"):
        app({"modle": "x"})
