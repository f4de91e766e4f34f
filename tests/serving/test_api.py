"""The HTTP interface over a real pipeline in this process: what it answers, refuses, and leaves as it was."""

import asyncio
import base64
import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from diffusers import DDIMScheduler
from starlette.testclient import TestClient

from shira_diffusers import save_adapter
from shira_diffusers.serving.api import MAX_BODY, _answer, build_api
from shira_diffusers.serving.errors import ServiceError
from shira_diffusers.serving.events import Events
from shira_diffusers.serving.painter import Painter
from shira_diffusers.serving.requests import ImageRequest
from shira_diffusers.serving.settings import Settings
from shira_diffusers.serving.store import open_store
from tests import tiny
from tests.serving.service import BODY, drawn_alone, make_service, pixels

ADMIN, USER = {"authorization": "Bearer key-of-ann"}, {"authorization": "Bearer key-of-bob"}


class InProcess:
    """The backend of one painter."""

    def __init__(self, painter: Painter) -> None:
        self.painter = painter

    def draw(self, request: ImageRequest) -> Events:
        return self.painter.draw(request)

    async def stats(self) -> dict[str, dict[str, float]]:
        return {"one": self.painter.stats()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_service(tmp_path_factory.mktemp("service"))


@pytest.fixture(scope="module")
def settings(folder: Path) -> Settings:
    return Settings.checked(
        {
            "model": str(folder / "model"),
            "adapters": str(folder / "adapters"),
            "keys": str(folder / "keys"),
            "pictures_per_minute": 10_000,
            "max_steps": 50,
            "max_upload_bytes": 500_000,
        }
    )


@pytest.fixture(scope="module")
def painter(settings: Settings) -> Iterator[Painter]:
    painter = Painter(settings, open_store(settings.adapter_source))
    yield painter
    painter.close()


@pytest.fixture
def client(settings: Settings, painter: Painter) -> TestClient:
    return client_of(settings, painter)


def client_of(settings: Settings, painter: Painter, **changes: Any) -> TestClient:
    changed = settings.model_copy(update=changes)
    app = build_api(changed, open_store(changed.adapter_source), InProcess(painter))
    return TestClient(app, raise_server_exceptions=False, headers=USER)


def assert_refused(answer: httpx.Response, status: int, kind: str, *words: str) -> None:
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert set(told) == {"type", "message"} and told["type"] == kind
    for word in words:
        assert word in told["message"]


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_picture_is_what_its_settings_give_alone(client: TestClient, settings: Settings) -> None:
    answer = client.post("/v1/images", json={**BODY, "mix": {"blue": 0.8}})
    assert answer.headers["content-type"] == "image/png"
    assert (answer.headers["x-shira-seed"], answer.headers["x-shira-batch"]) == ("5", "1")
    assert pixels(answer.content) == drawn_alone(settings, "blue", 0.8)


def test_several_pictures_come_as_json(client: TestClient, settings: Settings) -> None:
    answer = client.post("/v1/images", json={**BODY, "mix": {"gold": 1}, "n": 2})
    found = answer.json()
    assert [each["seed"] for each in found["images"]] == [5, 6] and found["batch"] == 2
    pngs = [base64.b64decode(each["b64_json"]) for each in found["images"]]
    assert pixels(*pngs) == drawn_alone(settings, "gold", 1, 2)


def test_progress_is_streamed(client: TestClient, settings: Settings) -> None:
    answer = client.post("/v1/images", json={**BODY, "mix": {"blue": 0.8}}, headers={"accept": "text/event-stream"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [part.split("\n") for part in answer.text.strip().split("\n\n")]
    found = [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in events]
    assert found[:-1] == [("progress", {"step": step, "of": 2}) for step in range(3)]
    assert found[-1][0] == "done"
    assert pixels(base64.b64decode(found[-1][1]["images"][0]["b64_json"])) == drawn_alone(settings, "blue", 0.8)


def test_a_random_seed_is_told_and_draws_the_same_again(client: TestClient) -> None:
    first = client.post("/v1/images", json={**BODY, "seed": None})
    again = client.post("/v1/images", json={**BODY, "seed": int(first.headers["x-shira-seed"])})
    assert again.content == first.content


@pytest.mark.parametrize(
    ("accept", "wanted", "kind"),
    [
        ("*/*", None, "image/png"),
        ("image/png", None, "image/png"),
        ("text/html, application/json;q=0.9", None, "application/json"),
        ("image/png", "json", "application/json"),
        ("image/png", "stream", "text/event-stream; charset=utf-8"),
    ],
)
def test_the_format_is_the_clients_choice(client: TestClient, accept: str, wanted: str | None, kind: str) -> None:
    answer = client.post("/v1/images", json={**BODY, "response_format": wanted}, headers={"accept": accept})
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, ["prompt", "at least 1 character"]),
        ({"prompt": None}, ["prompt", "string"]),
        ({"steps": 0}, ["steps", "greater than or equal to 1, got 0"]),
        ({"steps": "20"}, ["steps", "valid integer"]),
        ({"steps": 51}, ["steps: expected at most 50, got 51"]),
        ({"seed": -1}, ["seed"]),
        ({"seed": 2**32}, ["seed"]),
        ({"n": 5}, ["n: expected at most 4, got 5"]),
        ({"size": "16x"}, ["size: expected WIDTHxHEIGHT, as 512x512, got '16x'"]),
        ({"size": "1\u0666x16"}, ["size: expected WIDTHxHEIGHT"]),
        ({"size": "16x16\n"}, ["size: expected WIDTHxHEIGHT"]),
        ({"size": [16, 16]}, ["size: expected WIDTHxHEIGHT, as 512x512, got [16, 16]"]),
        ({"size": "16x12", "steps": 51}, ["steps: expected", "size: expected multiples of 8, got '16x12'"]),
        ({"size": "99999x99999"}, ["pixels", "1,048,576"]),
        ({"guidance": 31}, ["guidance"]),
        ({"mix": {"blue": 11}}, ["-10 to 10", "11", "blue"]),
        ({"mix": {"blue": "1"}}, ["mix.blue", "number"]),
        ({"mix": {str(k): 1 for k in range(9)}}, ["adapters in mix: expected at most 8, got 9"]),
        ({"timeout": 0}, ["timeout"]),
        ({"unknown": 1, "steps": -1}, ["unknown", "steps"]),
        ({"n": 2, "response_format": "png"}, ["n=2", "json"]),
    ],
)
def test_bad_settings_are_refused(client: TestClient, change: dict[str, Any], words: list[str]) -> None:
    assert_refused(client.post("/v1/images", json={**BODY, **change}), 422, "invalid_request", *words)


def test_a_size_is_refused_in_words(client: TestClient) -> None:
    told = client.post("/v1/images", json={**BODY, "size": "128"}).json()
    assert told == {"type": "invalid_request", "message": "size: expected WIDTHxHEIGHT, as 512x512, got '128'"}


def test_unknown_fields_are_answered_with_those_that_there_are(client: TestClient) -> None:
    told = client.post("/v1/images", json={**BODY, "Step": 1, "n": 0, "width": 16}).json()
    assert told["message"] == (
        "n: Input should be greater than or equal to 1, got 0; expected the fields prompt, mix, seed, steps, guidance, "
        "size, n, timeout, response_format, got 'Step' (did you mean 'steps'?), 'width'"
    )
    many = client.post("/v1/images", json={**BODY, **{f"a{k}" * 50: 1 for k in range(1000)}})
    assert_refused(many, 422, "invalid_request", "'a7a7", "992 more")
    assert len(many.text) < 700


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000])
def test_what_is_not_json_is_refused(client: TestClient, raw: bytes) -> None:
    answer = client.post("/v1/images", content=raw, headers={"content-type": "application/json"})
    assert_refused(answer, 422, "invalid_request")


def test_other_bodies_and_routes_are_refused(client: TestClient) -> None:
    large = b" " * (MAX_BODY + 1)
    assert_refused(client.post("/v1/images", content=b"prompt=x"), 415, "unsupported_media_type", "application/json")
    for content in (large, iter([large])):  # with and without its length told
        answer = client.post("/v1/images", content=content, headers={"content-type": "application/json"})
        assert_refused(answer, 413, "too_large", "262,144")
    html = client.post("/v1/images", json=BODY, headers={"accept": "text/html"})
    assert_refused(html, 406, "not_acceptable", "image/png")
    other = client.get("/v1/images")
    assert_refused(other, 405, "method_not_allowed", "GET /v1/images", "GET /openapi.json lists")
    assert other.headers["allow"] == "POST"
    assert_refused(client.get("/v2"), 404, "not_found", "GET /v2", "GET /openapi.json lists")
    assert_refused(client.put("/v1/adapters/x?replace=perhaps", headers=ADMIN), 422, "invalid_request", "replace")


def test_unknown_and_broken_adapters_are_refused(client: TestClient, folder: Path) -> None:
    for name in ("red", "../adapters/blue", "blue\0", "x" * 300, ""):
        answer = client.post("/v1/images", json={**BODY, "mix": {name: 1}})
        assert_refused(answer, 404, "adapter_not_found")
        assert len(answer.text) < 250
    refused = client.post("/v1/images", json={**BODY, "mix": {"red": 1}}, headers={"accept": "text/event-stream"})
    assert_refused(refused, 404, "adapter_not_found", "red")  # not in the stream
    broken, other = folder / "adapters" / "broken.safetensors", folder / "adapters" / "other.safetensors"
    broken.write_bytes(b"nonsense")
    save_adapter(tiny.adapter_for(tiny.linears(), only=("0",)), other)
    try:
        assert_refused(client.post("/v1/images", json={**BODY, "mix": {"broken": 1}}), 422, "invalid_adapter")
        assert_refused(client.post("/v1/images", json={**BODY, "mix": {"other": 1}}), 422, "adapter_mismatch")
    finally:
        broken.unlink(), other.unlink()
    assert client.post("/v1/images", json=BODY).status_code == 200


def test_what_the_pipeline_refuses_is_told(settings: Settings, tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    pipe.scheduler = DDIMScheduler(num_train_timesteps=5)
    pipe.save_pretrained(tmp_path)
    painter = Painter(settings.model_copy(update={"model": str(tmp_path)}), open_store(settings.adapter_source))
    refused = client_of(settings, painter).post("/v1/images", json={**BODY, "steps": 6})
    assert_refused(refused, 422, "invalid_request", "`num_inference_steps`: 6 cannot be larger")
    painter.close()


def test_unreadable_adapters_are_logged_at_the_start_and_headers_are_kept(
    settings: Settings, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    styles = shutil.copytree(folder / "adapters", tmp_path / "styles")
    (styles / "broken.safetensors").write_bytes(b"nonsense")
    for file in styles.iterdir():
        os.utime(file, (1, 1))  # what is young is read again
    styles.chmod(0o555)
    for _ in range(2):
        painter = Painter(settings, open_store(str(styles), str(tmp_path)))
        wait_for(lambda: "1 of 3 adapters cannot be read" in caplog.text and "broken" in caplog.text)
        painter.close()
        caplog.clear()
    (index,) = tmp_path.glob("shira-adapters-*.index")
    with closing(sqlite3.connect(index)) as database:
        assert database.execute("SELECT count(*) FROM headers").fetchone() == (2,)


def test_keys_are_asked_for(client: TestClient) -> None:
    for headers in ({"authorization": ""}, {"authorization": "Bearer wrong"}, {"authorization": "Basic key-of-bob"}):
        for answer in (
            client.post("/v1/images", json=BODY, headers=headers),
            client.get("/v1/adapters", headers=headers),
        ):
            assert_refused(answer, 401, "unauthorized", "Bearer KEY")
            assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/healthz", headers={"authorization": ""}).json() == {"status": "ok"}
    assert_refused(client.put("/v1/adapters/new", content=b""), 403, "forbidden", "bob")
    assert_refused(client.delete("/v1/adapters/blue"), 403, "forbidden", "bob")


def test_rates_are_limited_per_client(settings: Settings, painter: Painter) -> None:
    client = client_of(settings, painter, pictures_per_minute=3)
    assert client.post("/v1/images", json={**BODY, "n": 2}).status_code == 200
    refused = client.post("/v1/images", json={**BODY, "n": 2})
    assert_refused(refused, 429, "rate_limited", "bob", "3 pictures per minute")
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert _answer(ServiceError("rate_limited", "wait", 429, 1.2)).headers["retry-after"] == "2"
    assert client.post("/v1/images", json=BODY).status_code == 200
    assert client.post("/v1/images", json={**BODY, "n": 2}, headers=ADMIN).status_code == 200


def test_a_deadline_that_passes_is_told(client: TestClient) -> None:
    answer = client.post("/v1/images", json={**BODY, "steps": 50, "timeout": 0.05})
    assert_refused(answer, 504, "deadline")


def test_adapters_are_uploaded_used_and_deleted(client: TestClient, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "new.safetensors"
    save_adapter(tiny.adapter_for(tiny.pipeline(), 7), file)
    created = client.put("/v1/adapters/new-1", content=file.read_bytes(), headers=ADMIN)
    assert (created.status_code, created.json()) == (201, {"name": "new-1", "bytes": file.stat().st_size})
    listed = client.get("/v1/adapters").json()["adapters"]
    assert [each["name"] for each in listed] == ["blue", "gold", "new-1"]
    assert client.post("/v1/images", json={**BODY, "mix": {"new-1": 1}}).status_code == 200
    again = client.put("/v1/adapters/new-1", content=file.read_bytes(), headers=ADMIN)
    assert_refused(again, 409, "conflict", "new-1", "replace=true")
    assert client.put("/v1/adapters/new-1?replace=true", content=file.read_bytes(), headers=ADMIN).status_code == 201
    assert client.delete("/v1/adapters/new-1", headers=ADMIN).status_code == 204
    assert_refused(client.delete("/v1/adapters/new-1", headers=ADMIN), 404, "adapter_not_found")
    assert_refused(client.post("/v1/images", json={**BODY, "mix": {"new-1": 1}}), 404, "adapter_not_found")


def test_bad_uploads_leave_nothing(client: TestClient, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    whole = (folder / "adapters" / "blue.safetensors").read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for raw in (b"", b"nonsense", whole[:-9], flipped, (2**62).to_bytes(8, "little") + b"{}"):
        assert_refused(client.put("/v1/adapters/new", content=raw, headers=ADMIN), 422, "invalid_adapter", "new")
    for content in (b"x" * 500_001, iter([b"x" * 200_000] * 3)):
        assert_refused(client.put("/v1/adapters/new", content=content, headers=ADMIN), 413, "too_large", "500,000")
    for name in ("..%2Fnew", "a/b", ".hidden", "%2e%2e", "x" * 65, "new.safetensors", "a%00b", "a b", "-x"):
        assert_refused(client.put(f"/v1/adapters/{name}", content=whole, headers=ADMIN), 422, "invalid_request", "name")
        assert_refused(client.delete(f"/v1/adapters/{name}", headers=ADMIN), 422, "invalid_request", "name")
    assert sorted(folder.rglob("*")) == before


def test_the_bundled_adapters_stay(settings: Settings, painter: Painter) -> None:
    client = client_of(settings, painter, adapters=None)
    assert {"bluefire", "gold"} <= {each["name"] for each in client.get("/v1/adapters").json()["adapters"]}
    assert_refused(client.delete("/v1/adapters/gold", headers=ADMIN), 403, "forbidden", "--adapters")


def test_a_client_that_leaves_cancels_its_job(settings: Settings, painter: Painter) -> None:
    app = build_api(settings, open_store(settings.adapter_source), InProcess(painter))

    async def leave(accept: str) -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            asked = client.post("/v1/images", json={**BODY, "steps": 50}, headers=USER | {"accept": accept})
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asked, 0.1)

    for accept in ("image/png", "text/event-stream"):
        before = painter.stats()["cancelled_total"]
        asyncio.run(leave(accept))
        wait_for(lambda: not painter.stats()["running"] + painter.stats()["waiting"])
        assert painter.stats()["cancelled_total"] == before + 1


@pytest.mark.parametrize("path", ["/v1/adapters/cut", "/v1/images"])
def test_a_body_that_is_cut_off_leaves_nothing_and_is_no_failure(
    settings: Settings, painter: Painter, folder: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    app, before = build_api(settings, open_store(settings.adapter_source), InProcess(painter)), [*folder.rglob("*")]
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    headers = [(b"authorization", ADMIN["authorization"].encode()), (b"content-type", b"application/json")]
    method = "PUT" if "cut" in path else "POST"
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": headers,
        "query_string": b"",
        "http_version": "1",
    }

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def send(message: dict[str, Any]) -> None:
        pass

    asyncio.run(app(scope, receive, send))
    assert [*folder.rglob("*")] == before
    assert not caplog.records
    counted = TestClient(app).get("/metrics").text
    assert f'method="{method}"' in counted and 'status="499"} 1.0' in counted and 'status="500"' not in counted


def test_an_adapter_that_is_deleted_before_its_job_begins_is_not_found(
    client: TestClient, painter: Painter, folder: Path
) -> None:
    file = folder / "adapters" / "gone.safetensors"
    save_adapter(tiny.adapter_for(tiny.pipeline(), 3), file)
    has = painter._store.has
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(painter._store, "has", lambda name: has(name) and not file.unlink())
        assert_refused(client.post("/v1/images", json={**BODY, "mix": {"gone": 1}}), 404, "adapter_not_found", "gone")


def test_made_up_methods_share_a_counter(client: TestClient) -> None:
    """Anybody may send them: a counter of each would fill the memory."""
    for number in range(3):
        assert_refused(client.request(f"X{number}", "/v1/images"), 405, "method_not_allowed")
    counted = client.get("/metrics").text
    assert 'method="other"' in counted and 'method="X0"' not in counted


def test_clients_at_once_each_get_their_own(client: TestClient, settings: Settings) -> None:
    answers: dict[str, httpx.Response] = {}

    def ask(name: str) -> None:
        answers[name] = client.post("/v1/images", json={**BODY, "mix": {name: 0.5}})

    threads = [threading.Thread(target=ask, args=[name]) for name in ("blue", "gold")]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for name, answer in answers.items():
        assert pixels(answer.content) == drawn_alone(settings, name, 0.5)


def test_metrics_and_readiness(client: TestClient) -> None:
    client.post("/v1/images", json={**BODY, "mix": {"blue": 1}})
    client.get("/v1/nothing")
    assert client.get("/readyz").json() == {"status": "ready", "replicas": 1}
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert lines['shira_requests_total{method="POST",route="/v1/images",status="200"}'] == "1.0"
    assert lines['shira_requests_total{method="GET",route="other",status="404"}'] == "1.0"
    assert lines["shira_pictures_total"] == lines["shira_first_step_seconds_count"] == "1.0"
    of_replica = (
        "waiting running finished_total switches_total switch_seconds_total steps_total step_seconds_total "
        "device_hits_total device_misses_total device_bytes ram_hits_total ram_misses_total ram_bytes"
    )
    for name in of_replica.split():
        assert float(lines[f'shira_{name}{{replica="one"}}']) >= 0
    assert float(lines['shira_ram_bytes{replica="one"}']) > 0


def test_nobody_is_ready_without_replicas(settings: Settings, painter: Painter) -> None:
    class Nobody(InProcess):
        async def stats(self) -> dict[str, dict[str, float]]:
            return {}

    client = TestClient(build_api(settings, open_store(settings.adapter_source), Nobody(painter)))
    assert_refused(client.get("/readyz"), 503, "not_ready")
