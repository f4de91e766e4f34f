"""The endpoints, driven with gradio_client against a served app, with good and bad input."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from app.drawing.session import Session
from app.page.page import build
from app.server.messages import readable
from app.settings.picture import METADATA_KEY
from app.studio import Studio
from tests.app.conftest import SUGGESTION, connect

PLAIN: dict[str, Any] = {"prompt": SUGGESTION, "seed": 3, "steps": 2}


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = connect(url, download_files=tmp_path_factory.mktemp("downloads"))
    yield client
    client.close()


def generate(client: Client, **changed: Any) -> tuple[Image.Image, dict[str, Any]]:
    file, report = client.predict(**PLAIN | changed, api_name="/generate")
    assert file.endswith(".png")
    return Image.open(file), report


def test_the_endpoints_that_notebooks_use_keep_their_parameters(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert endpoints.keys() >= {"/adapters", "/generate", "/compare", "/sweep", "/presets", "/history"}
    names = [parameter["parameter_name"] for parameter in endpoints["/generate"]["parameters"]]
    before = ["prompt", "mix", "seed", "steps", "guidance", "method"]
    assert names == [*before, "negative", "width", "height", "start_image", "change", "negative_mix"]
    required = [p["parameter_name"] for p in endpoints["/generate"]["parameters"] if not p["parameter_has_default"]]
    assert required == ["prompt"]


def test_all_endpoints_and_parameters_are_described_and_require_the_same(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    required: dict[str, set[str]] = {}
    for name, endpoint in endpoints.items():
        assert endpoint["description"], name
        for parameter in endpoint["parameters"]:
            assert len(parameter["python_type"]["description"]) > 5, (name, parameter["parameter_name"])
            assert "FileData class" not in parameter["python_type"]["description"]
        required[name] = {p["parameter_name"] for p in endpoint["parameters"] if not p["parameter_has_default"]}
    assert required["/compare"] == required["/generate"] == {"prompt"}
    assert required["/sweep"] == {"prompt", "adapter", "strengths"}
    assert required["/upload_adapter"] == required["/convert_lora"] == {"file"}
    assert required["/train"] == {"pictures", "settings"}


def test_adapters_tells_what_is_loaded(client: Client) -> None:
    answer = client.predict(api_name="/adapters")
    assert answer["model"] == "tiny-diffusion"
    assert answer["adapters"].keys() == {"bluefire", "paintings"}
    bluefire = answer["adapters"]["bluefire"]
    assert bluefire["trigger"] == "sks fire"
    assert bluefire["metadata"]["base_model"] == "tiny"
    assert bluefire["entries"] > 0
    assert answer["refused"].keys() == {"broken", "stranger"}


def test_generate_gives_the_picture_and_its_report(client: Client, session: Session) -> None:
    picture, report = generate(client, mix={"bluefire": 1.0}, guidance=4.5)
    alone = session.generate(SUGGESTION, {"bluefire": 1.0}, 3, 2, 4.5)
    assert picture.tobytes() == alone.image.tobytes()
    timings = {"switch_ms", "generation_s"}
    assert {k: v for k, v in report.items() if k not in timings} == {
        k: v for k, v in alone.report.items() if k not in timings
    }
    assert all(report[key] > 0 for key in timings)
    assert json.loads(picture.info[METADATA_KEY]) == report


def test_the_mix_may_be_json_text(client: Client) -> None:
    as_object, _ = generate(client, mix={"bluefire": 1, "paintings": -0.5})
    as_text, report = generate(client, mix='{"paintings": -0.5, "bluefire": 1}')
    assert as_text.tobytes() == as_object.tobytes()
    assert report["mix"] == {"bluefire": 1.0, "paintings": -0.5}


@pytest.mark.parametrize("mix", [None, "", " ", {}, "{}"])
def test_no_mix_is_the_base(client: Client, mix: Any) -> None:
    picture, report = generate(client, mix=mix)
    assert (report["mix"], report["entries_changed"]) == ({}, 0)
    assert picture.tobytes() == generate(client)[0].tobytes()


def test_whole_numbers_may_come_as_floats(client: Client) -> None:
    _, report = generate(client, seed=3.0, steps=2.0, guidance=3)
    assert (report["seed"], report["steps"], report["guidance"]) == (3, 2, 3.0)


def test_without_a_seed_one_is_drawn_and_told(client: Client) -> None:
    picture, report = generate(client, seed=None)
    assert generate(client, seed=report["seed"])[0].tobytes() == picture.tobytes()


def test_two_visitors_at_once_get_what_each_gets_alone(client: Client, url: str) -> None:
    mixes = [{"bluefire": 1.0}, {"paintings": 2.0}, {}]
    alone = [generate(client, mix=mix)[0].tobytes() for mix in mixes]
    other = connect(url)
    clients = [client, other] * 3
    with ThreadPoolExecutor(6) as pool:
        drawn = list(pool.map(lambda who, mix: generate(who, mix=mix)[0].tobytes(), clients, mixes * 2))
    assert drawn == alone * 2
    other.close()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mix": {"gold": 1.0}}, "No style named 'gold'; there are 'bluefire', 'paintings'"),
        ({"mix": [1]}, "mix must map each style to its strength"),
        ({"mix": "[1]"}, "mix must map each style to its strength"),
        ({"mix": "bluefire"}, "mix must be JSON like"),
        ({"mix": 3}, "mix must map each style to its strength"),
        ({"mix": "[" * 100_000}, "mix must be JSON like"),
        ({"mix": '{"bluefire": NaN}'}, "strength of 'bluefire' must be a number from -1 to 2, got nan"),
        ({"mix": '{"bluefire": 1e999}'}, "got inf"),
        ({"mix": {"bluefire": 2.5}}, "from -1 to 2, got 2.5"),
        ({"mix": {"bluefire": "1"}}, "strength of 'bluefire' must be a number"),
        ({"seed": -2}, "seed must be a whole number from 0 to 4294967295, or -1 to draw one, got -2"),
        ({"seed": 2**32}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": "seven"}, "seed must be a whole number"),
        ({"steps": 0}, "Steps must be a whole number from 1 to 100"),
        ({"steps": 101.0}, "Steps must be a whole number"),
        ({"steps": None}, "Steps must be a whole number"),
        ({"guidance": 31}, "Guidance must be a number from 0 to 30"),
        ({"guidance": "high"}, "Guidance must be a number"),
        ({"prompt": ""}, "prompt must say what to draw"),
        ({"prompt": None}, "prompt must say what to draw"),
        ({"prompt": "abcdefghijklmno"}, "prompt is too long: the model reads 16 tokens, got 17"),
        ({"prompt": "x" * 100_000}, "prompt is too long: 2000 characters at most"),
        ({"mix": {"<b>": 1.0}}, "No style named '<b>'"),  # a program shows it as text
    ],
)
def test_bad_input_gets_one_readable_sentence(client: Client, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(AppError) as caught:
        generate(client, **changed)
    told = str(caught.value)
    assert message in told
    assert "Traceback" not in told and "\n" not in told and len(told) < 300


def test_after_bad_input_the_app_goes_on(client: Client, session: Session) -> None:
    with pytest.raises(AppError):
        generate(client, mix={"gold": 1.0})
    assert session.active == {}
    assert generate(client)[0].size == (16, 16)


def test_nothing_is_told_to_others(studio: Studio) -> None:
    assert not build(studio).analytics_enabled


def test_a_fault_inside_is_told_in_one_sentence(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory\n  at a line\n  at another")

    monkeypatch.setattr(studio.session, "draw", out_of_memory)
    endpoints = {fn.api_name: fn.fn for fn in build(studio).fns.values()}
    with pytest.raises(gr.Error) as caught:
        asyncio.run(endpoints["generate"](gr.Request(session_hash="a"), SUGGESTION))
    assert caught.value.message == "The picture could not be drawn: out of memory; see the log of the app for details"


def test_a_full_disk_is_told_without_the_apps_folders() -> None:
    with pytest.raises(gr.Error) as caught, readable():
        raise OSError(28, "No space left on device", "/home/ada/pictures/.1.tmp")
    assert caught.value.message.startswith("The picture could not be drawn: No space left on device; ")
    with pytest.raises(gr.Error, match=r"^'told'$"), readable():
        raise gr.Error("told")
