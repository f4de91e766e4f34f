"""What can be wrong at the start of the service is one clear line, before any process is started."""

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shira_diffusers import ShiraError
from shira_diffusers.cli.__main__ import main
from shira_diffusers.serving.errors import ServiceError
from shira_diffusers.serving.keys import Client, Keys, RateLimit
from shira_diffusers.serving.local import start
from shira_diffusers.serving.settings import Settings


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model_index.json").write_text("{}")
    return str(tmp_path)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["serve", *arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such/model"], ["no model at no/such/model"]),
        ([str(Path(__file__).parent)], ["is no pipeline", "model_index.json"]),
        (["--adapters", "no/such/folder"], ["no folder of adapters at no/such/folder"]),
        (["--adapters", "hf://styles"], ["cannot use the adapters at styles", "namespace/name", "expected an address"]),
        (["--keys", "no/such/file"], ["cannot read the keys in no/such/file", "CLIENT:KEY"]),
        (["--set", "max_steps=0", "--set", "max_step=1"], ["max_steps", "greater", "max_step:", "not permitted"]),
        (["--set", "max_steps"], ["NAME=VALUE", "max_steps"]),
    ],
)
def test_bad_settings(arguments: list[str], words: list[str], model: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = [] if arguments[0].startswith(("no", "/")) else [model]
    line = refusal(capsys, *own, *arguments)
    for word in words:
        assert word in line


def test_an_installed_package_says_what_to_name(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shira_diffusers.serving.settings.ASSETS", tmp_path / "site-packages" / "assets")
    line = refusal(capsys)
    assert "not with an installed package: name your own with MODEL and --adapters FOLDER, or" in line
    assert "name your own with --adapters FOLDER, or" in refusal(capsys, model)


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str], model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refusal(capsys, model, "--port", port)
    assert f"cannot listen at 127.0.0.1, port {port}" in line and "--port" in line


@pytest.mark.nightly
def test_a_model_that_replicas_cannot_load(model: str, tmp_path: Path) -> None:
    """Their reason is told, which Ray keeps to the status of its deployments."""
    arguments = ["serve", model, "--adapters", str(tmp_path), "--port", "8123"]
    ended = subprocess.run([sys.executable, "-m", "shira_command", *arguments], capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"error: the service cannot start: cannot load a pipeline from '{model}'" in ended.stderr


def test_a_machine_that_is_too_busy_for_ray_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**_: object) -> None:
        raise TimeoutError("HTTP proxies not available after 60s")

    monkeypatch.setattr("ray.serve.start", late)
    with pytest.raises(ShiraError, match=r"Ray Serve does not start: HTTP proxies .* 60s; the machine may be too busy"):
        start(Settings.checked({}), "127.0.0.1", 8000)


def test_without_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find_spec = importlib.util.find_spec
    absent = lambda name, *rest: None if name == "ray" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr("shira_diffusers.serving.local.find_spec", absent)
    assert "pip install 'shira-diffusers[serve]'" in refusal(capsys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no client"),
        ("ann", "line 1 .* is malformed"),
        ("# a\nann:k\nbob:", "line 3 .* is malformed"),
        ("ann:k:root", "line 1 .* is malformed"),
        ("ann:k\nbob:k", "line 2 .* a second time"),
        ("ann:k\nann:m", "line 2 .* a second time"),
    ],
)
def test_malformed_keys(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ShiraError, match=words):
        Keys(str(tmp_path / "keys"))


def test_a_byte_order_mark_belongs_to_no_client(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ann:k\n", encoding="utf-8-sig")  # as editors on Windows save it
    assert Keys(str(tmp_path / "keys")).client("Bearer k", "") == Client("ann", admin=False)


def test_without_keys_everybody_is_an_admin() -> None:
    assert Keys(None).client(None, "10.0.0.1") == Client("10.0.0.1", admin=True)


def test_a_bucket_fills_at_its_rate() -> None:
    now = [0.0]
    rates = RateLimit(6, lambda: now[0])
    rates.take("ann", 4)
    rates.take("bob", 6)
    with pytest.raises(ServiceError, match=r"again in 10\.0 s") as caught:
        rates.take("ann", 3)
    assert caught.value.retry_after == 10
    now[0] = 10.0
    rates.take("ann", 3)
    with pytest.raises(ServiceError):
        rates.take("ann", 1)
    now[0] = 1000.0
    rates.take("ann", 100)  # more than the bucket holds takes all of it
    with pytest.raises(ServiceError):
        rates.take("ann", 1)
