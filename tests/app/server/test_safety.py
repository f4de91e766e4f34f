"""Whatever a visitor sends, nothing outside the app's folders is read or written, and errors are sentences."""

import http.client
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.serve import main, parse
from app.server.access import AccessError, is_local, read_credentials, warn_if_open
from app.studio import Studio
from shira_diffusers import save_adapter
from tests import tiny
from tests.app.conftest import Folders, served

LIMIT = 1_000_000  # bytes of an upload
META = {"_type": "gradio.FileData"}
FILES = ("file", "image", "gallery", "uploadbutton", "imageslider", "multimodaltextbox")


@pytest.fixture(scope="module")
def studio(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    data = tmp_path_factory.mktemp("safe") / "data"
    studio = Studio.open(str(folders.base), folders.adapters, data, max_upload_mb=LIMIT / 1e6)
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def client(studio: Studio) -> Iterator[httpx.Client]:
    with served(studio) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid adapter in a folder that is none of the app's."""
    return save_adapter(tiny.adapter_for(tiny.pipeline(), 9), tmp_path_factory.mktemp("home") / "secret.safetensors")


def call(client: httpx.Client, name: str, data: list[Any]) -> tuple[str, str]:
    """The last event of a call of a named endpoint, and its data."""
    begun = client.post(f"/gradio_api/call/{name}", json={"data": data})
    if begun.status_code != 200:
        return "refused", begun.text
    lines = client.get(f"/gradio_api/call/{name}/{begun.json()['event_id']}").text.split("\n")
    events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    told = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return events[-1], told[-1]


def press(client: httpx.Client, number: int, data: list[Any]) -> dict[str, Any]:
    """The result of an event of the page, by its number."""
    visit = f"visit{number}"
    joined = client.post("/gradio_api/queue/join", json={"data": data, "fn_index": number, "session_hash": visit})
    if joined.status_code != 200:
        return {"success": False, "output": joined.text}
    with client.stream("GET", f"/gradio_api/queue/data?session_hash={visit}") as stream:
        for line in stream.iter_lines():
            told = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if told.get("msg") == "process_completed":
                return dict(told)
    raise AssertionError("the event never ended")


def get_raw(client: httpx.Client, path: str) -> tuple[int, bytes]:
    """Status and content at a path that is sent as it is: httpx would take its ``..`` away."""
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=60)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def upload(client: httpx.Client, name: str, content: bytes) -> httpx.Response:
    return client.post("/gradio_api/upload", files={"files": (name, content)})


# -------------------------------------------------------------------- reading


def test_no_file_outside_is_served(client: httpx.Client, studio: Studio, folders: Folders, secret: Path) -> None:
    library = studio.session.library
    own = library.add(secret, "own")
    cache = Path(upload(client, "x.txt", b"x").json()[0]).parent
    targets = [
        secret, folders.base / "model_index.json", folders.adapters / "bluefire.safetensors", own.path,
        Path("/etc/passwd"), Path("/proc/self/environ"), Path("app/drawing/session.py").resolve(), studio.data,
    ]  # fmt: skip
    forms = [form for target in targets for form in (
        f"{target}", f"/{target}", f"{cache}/..{'/..' * 12}{target}", f"{target}%00.png", f"file://{target}",
        f"{cache}/%2e%2e{'/%2e%2e' * 12}{target}", f"..{'/..' * 12}{target}", str(target).replace("/", "\\"),
        str(target).replace("/", "%2f"), f"{target}?x=.png", f"./{target}#.png",
    )]  # fmt: skip
    leading = ["/gradio_api/file=", "/gradio_api/file/", "/file=", "/static/", "/assets/", "/gradio_api/stream/"]
    for form in [*forms, "app/drawing/session.py", "app/page/style.css", "pyproject.toml"]:
        for lead in leading:
            status, content = get_raw(client, lead + form)
            assert status in (307, 400, 403, 404, 405, 422, 500), (lead + form, status)
            assert b"_class_name" not in content and b"root:" not in content and b"SHiRA" not in content
    library.delete("own")


def test_the_server_fetches_nothing_for_visitors(client: httpx.Client) -> None:
    for path in (
        "file=http://example.com/",
        "file=HTTPS%3A//example.com/",
        "proxy=http://127.0.0.1:1/",
        "proxy=https://a",
    ):
        answer = client.get(f"/gradio_api/{path}")
        assert (answer.status_code, answer.text) == (403, "This app serves files of its own only."), path


def test_a_file_of_another_server_is_not_fetched(client: httpx.Client, secret: Path) -> None:
    file = {"path": "http://127.0.0.1:9/x.safetensors", "meta": META}
    for data in ([file, ""], [[{"deep": [file]}], ""], [{**file, "path": "HTTPS://example.com/x"}, ""]):
        assert call(client, "upload_adapter", data) == ("refused", "This app serves files of its own only.")
    escaped = json.dumps({"data": [file, ""]}).replace("http:", "\\u0068ttp:")
    headers = {"content-type": "application/json"}
    assert client.post("/gradio_api/call/upload_adapter", content=escaped, headers=headers).status_code == 403
    assert client.post("/gradio_api/call/upload_adapter", content=escaped).status_code == 403
    assert client.post("/gradio_api/call/library", content=b" " * (33 * 2**20), headers=headers).status_code == 403
    assert client.post("/gradio_api/call/library", content=b"[" * 10**5, headers=headers).status_code in (400, 422, 500)
    assert call(client, "library", [])[0] == "complete"


def test_no_event_takes_a_path_that_was_not_uploaded(client: httpx.Client, studio: Studio, secret: Path) -> None:
    """All events, those of the page too, that have a file among their inputs."""
    config = client.get("/config").json()
    kinds = {component["id"]: component["type"] for component in config["components"]}
    before = studio.session.library.entries
    tried = 0
    for event in config["dependencies"]:
        places = [kinds[number] for number in event["inputs"]]
        if not set(places) & set(FILES) or not event["backend_fn"]:
            continue
        for forged in ({"path": str(secret), "meta": META}, {"path": str(secret), "url": "x", "meta": META},
                       {"path": f"file://{secret}", "meta": META}, {"path": str(secret)}, str(secret)):  # fmt: skip
            data = [_forged(kind, forged) for kind in places]
            told = press(client, event["id"], data)
            assert not told["success"], (event["api_name"], forged, told)
            tried += 1
    assert tried >= 15
    assert studio.session.library.entries == before and studio.trainings.all == ()


def test_the_page_gets_errors_as_html_and_programs_as_text(client: httpx.Client) -> None:
    events = client.get("/config").json()["dependencies"]
    told = [press(client, each["id"], ["<i>&'"]) for each in events if each["api_name"] in ("delete_preset", "_apply")]
    assert [each["output"]["error"] for each in told] == [
        'The settings must be a JSON object, got "&lt;i&gt;&amp;\'"',
        'No preset named "<i>&\'"; there are none',
    ]


def test_what_the_page_shows_errors_of_is_private(client: httpx.Client) -> None:
    """So that they are escaped: no control that is seen calls what programs call."""
    config = client.get("/config").json()
    hidden = {each["id"] for each in config["components"] if each["props"].get("visible") is False}
    public = [each for each in config["dependencies"] if each["api_visibility"] != "private"]
    assert len(public) > 20
    for event in public:
        assert {target for target, _ in event["targets"] if target is not None} <= hidden, event["api_name"]


def _forged(kind: str, forged: Any) -> Any:
    if kind not in FILES:
        return None
    return [{"image": forged}] if kind == "gallery" else forged


def test_lists_of_files_are_checked_too(client: httpx.Client, studio: Studio, secret: Path) -> None:
    for pictures in ([{"path": str(secret), "meta": META}], [{"path": "/etc/passwd"}], ["/etc/passwd"]):
        event, told = call(client, "train", [pictures, {"prompt": "x"}, None])
        assert event == "error" and "root:" not in told
    assert studio.trainings.all == ()


# -------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    "name", ["../../x.safetensors", "/tmp/shira-x.safetensors", "..\\..\\x.safetensors", "%2e%2e%2fx.safetensors",
             "a\u2215b\uff0e\uff0e.safetensors", "CON.safetensors", "x" * 250 + ".safetensors"],
)  # fmt: skip
def test_an_uploads_name_chooses_no_place(client: httpx.Client, studio: Studio, secret: Path, name: str) -> None:
    answer = upload(client, name, secret.read_bytes())
    if answer.status_code != 200:
        assert answer.status_code in (400, 413, 422, 500)
        return
    (path,) = answer.json()
    cache = Path(os.environ.get("GRADIO_TEMP_DIR", "/tmp/gradio")).resolve()
    assert Path(path).resolve().is_relative_to(cache)
    event, told = call(client, "upload_adapter", [{"path": path, "meta": META}, ""])
    assert event == "complete", told
    entry = studio.session.library.entry(json.loads(told)[0]["name"])
    assert entry.path.parent == studio.data / "adapters"
    assert not Path("/tmp/shira-x.safetensors").exists() and not (studio.data.parent / "x.safetensors").exists()
    studio.session.library.delete(entry.name)


def test_names_in_calls_choose_no_place(client: httpx.Client, studio: Studio, secret: Path) -> None:
    library = studio.session.library
    library.add(secret, "own")
    everything = {path for path in studio.data.parent.rglob("*") if path.is_file()}
    for name in (
        "../own",
        "own\0",
        str(library.entry("own").path),
        "own.safetensors",
        "..",
        "",
        "~/own",
        {"a": 1},
        None,
    ):
        for endpoint in ("inspect_adapter", "delete_adapter", "download_adapter"):
            event, told = call(client, endpoint, [name])
            assert event in ("error", "refused") and "Traceback" not in told, (endpoint, name, told)
        for endpoint in ("training_status", "resume_training", "discard_training"):
            assert call(client, endpoint, [name or "x"])[0] in ("error", "refused")
    assert {path for path in studio.data.parent.rglob("*") if path.is_file()} >= everything
    event, told = call(client, "rename_adapter", ["own", "../../../own"])
    assert event == "error" or json.loads(told)[0]["name"] == "own"
    library.delete("own")


def test_too_large_an_upload_is_refused(client: httpx.Client) -> None:
    answer = upload(client, "x.safetensors", bytes(LIMIT + 1))
    assert answer.status_code == 413
    assert upload(client, "x.safetensors", bytes(LIMIT - 1)).status_code == 200


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evil.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"),
        ("evil.html", b"<script>alert(1)</script>"),
        ("evil.xml", b"<?xml version='1.0'?><x:script xmlns:x='http://www.w3.org/1999/xhtml'>alert(1)</x:script>"),
        ("evil.png", b"<script>alert(1)</script>"),
    ],
)
def test_what_is_sent_never_runs_in_a_browser(client: httpx.Client, name: str, content: bytes) -> None:
    (path,) = upload(client, name, content).json()
    answer = client.get(f"/gradio_api/file={path}")
    kind, disposition = answer.headers["content-type"], answer.headers.get("content-disposition", "")
    assert answer.status_code in (403, 404) or kind == "image/png" or disposition.startswith("attachment"), (
        answer.headers
    )
    event, told = call(client, "train", [[{"path": path, "meta": META}], {"prompt": "x"}, None])
    assert event == "error" and "cannot be used: evil" in told


# -------------------------------------------------------------------- errors


def test_nonsense_is_answered_in_a_sentence(client: httpx.Client) -> None:
    """All named endpoints, with arguments of other kinds: an answer or a sentence, and no trace of the code."""
    named = client.get("/gradio_api/info").json()["named_endpoints"]
    assert {"/upload_adapter", "/train", "/interference", "/training_status", "/generate"} <= named.keys()
    for name, endpoint in named.items():
        count = len(endpoint["parameters"])
        for nonsense in ("\0\u202e", -1, {"__class__": "x"}, [[]] * 3):
            event, told = call(client, name.removeprefix("/"), [nonsense] * count)
            assert "Traceback" not in told and "/app/" not in told and ".py" not in told, (name, nonsense, told)
            assert len(told) < 5000 or event == "complete", (name, told[:200])
            assert event == "complete" or json.loads(told)["error"], (name, nonsense)
        told = call(client, name.removeprefix("/"), [])[1]
        assert not endpoint["parameters"] or "didn't receive enough" in told, (name, told)


def test_a_path_in_place_of_a_file_is_told_in_a_sentence(client: httpx.Client, secret: Path) -> None:
    for file in (str(secret), {"path": str(secret), "meta": META}, {"path": str(secret)}, 1):
        event, told = call(client, "upload_adapter", [file, ""])
        assert event == "error" and "A file must be uploaded first" in told and str(secret) not in told
    assert json.loads(call(client, "upload_adapter", [None, ""])[1])["error"] == "No file was sent"


def test_what_nobody_has_thought_of_is_a_sentence_and_the_log_has_the_rest(
    client: httpx.Client, studio: Studio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(type(studio.presets), "names", property(lambda presets: 1 / 0))
    assert "The app could not do that: division by zero" in call(client, "presets", [])[1]
    assert "ZeroDivisionError" in caplog.text and "Traceback" in caplog.text


# -------------------------------------------------------------------- who may come in


def test_signing_in(studio: Studio) -> None:
    with served(studio, auth=[("ada", "engine")]) as url, httpx.Client(base_url=url) as client:
        assert client.get("/config").status_code == 401
        assert client.get("/gradio_api/info").status_code == 401
        assert upload(client, "x.txt", b"x").status_code == 401
        assert client.post("/gradio_api/call/library", json={"data": []}).status_code == 401
        assert client.post("/login", data={"username": "ada", "password": "difference"}).status_code == 400
        assert client.post("/login", data={"username": "ada", "password": "engine"}).status_code == 200
        assert call(client, "library", [])[0] == "complete"


def test_credentials(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_credentials(None, None) is None
    assert read_credentials("ada:a:b c", None) == [("ada", "a:b c")]
    file = tmp_path / "users"
    file.write_text("# who\n\nada:engine\nbob:x\n")
    file.chmod(0o600)
    assert read_credentials(None, file) == [("ada", "engine"), ("bob", "x")] and not caplog.text
    file.chmod(0o644)
    read_credentials(None, file)
    assert "chmod 600" in caplog.text
    file.write_text("ada:engine\n", encoding="utf-8-sig")  # as editors on Windows save it
    assert read_credentials(None, file) == [("ada", "engine")]


@pytest.mark.parametrize(
    ("auth", "content", "message"),
    [
        ("ada", None, "--auth must be USER:PASSWORD, got no password"),
        (":hunter2", None, "got no user"),
        (None, "ada:x\nhunter2\n", "line 2 of .* must be USER:PASSWORD"),
        (None, "# nobody\n", "names no user"),
        ("ada:x", "ada:hunter2", "both given"),
    ],
)
def test_bad_credentials_are_refused_without_telling_them(
    tmp_path: Path, auth: str | None, content: str | None, message: str
) -> None:
    file = tmp_path / "users"
    if content:
        file.write_text(content)
    with pytest.raises(AccessError, match=message) as caught:
        read_credentials(auth, file if content else None)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(AccessError, match="cannot read --auth-file"):
        read_credentials(None, tmp_path / "missing")


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("[::1]", True), ("127.9.9.9", True),
     ("0.0.0.0", False), ("::", False), ("192.168.1.5", False), ("example.com", False)],
)  # fmt: skip
def test_a_warning_where_others_can_reach_the_app(host: str, local: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert is_local(host) is local
    warn_if_open(host, share=False, guarded=False)
    assert bool(caplog.records) is not local
    caplog.clear()
    warn_if_open(host, share=True, guarded=False)
    assert caplog.records[0].levelno == logging.WARNING and "without signing in" in caplog.text
    caplog.clear()
    warn_if_open(host, share=True, guarded=True)
    assert not caplog.records


def test_sharing_and_passwords_are_asked_for(folders: Folders, tmp_path: Path) -> None:
    options = parse([])
    assert (options.share, options.auth, options.auth_file, options.max_upload_mb) == (False, None, None, 512)
    with pytest.raises(SystemExit) as caught:
        main(["--auth", "hunter2", "--data", str(tmp_path), "--base", str(folders.base)])
    assert str(caught.value) == "error: --auth must be USER:PASSWORD, got no password"
