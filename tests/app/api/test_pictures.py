"""Endpoints for several pictures, presets and the history; and many visitors at once."""

import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from app.drawing.session import Session
from app.history.galleries import Visitor
from app.settings.picture import METADATA_KEY
from app.studio import Studio
from tests.app.conftest import SUGGESTION, assert_bits, bits_of, connect

MIX: dict[str, Any] = {"bluefire": 1.0, "paintings": 0.5}


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = connect(url, download_files=tmp_path_factory.mktemp("downloads"))
    yield client
    client.close()


def file_of(file: Any) -> str:
    return str(file if isinstance(file, str) else file["path"])


def pixels(answer: dict[str, Any]) -> bytes:
    return Image.open(file_of(answer["file"])).tobytes()


def test_compare_gives_the_base_each_style_and_the_mix(client: Client, session: Session) -> None:
    answers = client.predict(SUGGESTION, MIX, 3, 2, api_name="/compare")
    assert [answer["label"] for answer in answers] == ["base", "bluefire", "paintings", "mix"]
    mixes: list[dict[str, float]] = [{}, {"bluefire": 1.0}, {"paintings": 0.5}, MIX]
    for answer, mix in zip(answers, mixes, strict=True):
        assert pixels(answer) == session.generate(SUGGESTION, mix, 3, 2).image.tobytes()
        assert answer["report"]["mix"] == mix


def test_a_sweep_is_a_strip_or_a_grid(client: Client, session: Session) -> None:
    strip = client.predict(SUGGESTION, "bluefire", [0, 1], seed=3, steps=1, api_name="/sweep")
    assert [answer["report"]["mix"] for answer in strip] == [{"bluefire": 0.0}, {"bluefire": 1.0}]
    assert pixels(strip[0]) == session.generate(SUGGESTION, {}, 3, 1).image.tobytes()
    grid = client.predict(SUGGESTION, "bluefire", [0.5, 1], "paintings", "[1, 2]", seed=3, steps=1, api_name="/sweep")
    told = [(answer["report"]["mix"]["bluefire"], answer["report"]["mix"]["paintings"]) for answer in grid]
    assert told == [(0.5, 1.0), (1.0, 1.0), (0.5, 2.0), (1.0, 2.0)]
    mixed = client.predict(SUGGESTION, "bluefire", [1], mix={"paintings": 2}, steps=1, api_name="/sweep")
    assert mixed[0]["report"]["mix"] == {"bluefire": 1.0, "paintings": 2.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapter": "gold", "strengths": [1]}, "No style named 'gold'"),
        ({"adapter": "bluefire", "strengths": []}, "needs a list of strengths"),
        ({"adapter": "bluefire", "strengths": "high"}, "strengths must be JSON"),
        ({"adapter": "bluefire", "strengths": [1, 3]}, "from -1 to 2, got 3"),
        ({"adapter": "bluefire", "strengths": [1] * 101}, "100 pictures at most"),
        ({"adapter": "bluefire", "strengths": [1], "other_strengths": [1]}, "needs the name of a style, got None"),
        ({"adapter": "bluefire", "strengths": [1], "other": [], "other_strengths": [1]}, "needs the name of a style"),
        (
            {"adapter": "bluefire", "strengths": [1], "other": "bluefire", "other_strengths": [1]},
            "two different styles",
        ),
        (
            {"adapter": "bluefire", "strengths": [1] * 11, "other": "paintings", "other_strengths": [1] * 10},
            "100 pictures at most, got 110",
        ),
    ],
)
def test_a_sweep_that_cannot_be_is_a_sentence(client: Client, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(AppError, match=message):
        client.predict(SUGGESTION, **arguments, api_name="/sweep")


def test_strengths_may_be_given_by_component(client: Client, session: Session) -> None:
    mix = {"bluefire": {"unet": {"up": 0.5}, "text_encoder": 0}}
    file, report = client.predict(SUGGESTION, json.dumps(mix), 3, 1, api_name="/generate")
    assert Image.open(file).tobytes() == session.generate(SUGGESTION, mix, 3, 1).image.tobytes()
    assert report["mix"] == {"bluefire": {"unet": {"up": 0.5}, "text_encoder": 0.0}}
    with pytest.raises(AppError, match="names no component that it changes: 'vae2'"):
        client.predict(SUGGESTION, {"bluefire": {"vae2": 1}}, api_name="/generate")


def test_a_negative_prompt_a_size_and_a_picture_to_start_from(client: Client, session: Session, tmp_path: Path) -> None:
    Image.effect_noise((20, 30), 90).convert("RGB").save(tmp_path / "start.png")
    start = client.predict(handle_file(str(tmp_path / "start.png")), api_name="/add_start_image")
    more = {"negative": "dark", "width": 24, "height": 8, "start_image": start, "change": 0.5, "negative_mix": 0.5}
    file, report = client.predict(SUGGESTION, {}, 3, 4, **more, api_name="/generate")
    expected = session.generate(SUGGESTION, {}, 3, 4, **more)
    assert Image.open(file).size == (24, 8) and Image.open(file).tobytes() == expected.image.tobytes()
    assert {key: report[key] for key in more} == more
    strip = client.predict(SUGGESTION, "bluefire", [0], seed=3, steps=4, **more, api_name="/sweep")
    pair = client.predict(SUGGESTION, {"bluefire": 1}, 3, 4, **more, api_name="/compare")
    assert pixels(strip[0]) == pixels(pair[0]) == expected.image.tobytes()
    client.predict("from a picture", {"prompt": SUGGESTION, **more}, api_name="/save_preset")
    assert client.predict(api_name="/presets")["from a picture"].items() >= more.items()
    client.predict("from a picture", api_name="/delete_preset")
    (tmp_path / "start.txt").write_text("no picture")
    with pytest.raises(AppError, match="This is no picture to start from: not a picture of PNG"):
        client.predict(handle_file(str(tmp_path / "start.txt")), api_name="/add_start_image")


def test_a_series_comes_as_pictures_a_sheet_and_a_zip(client: Client, session: Session) -> None:
    settings = {"mix": {"bluefire": 1}, "seed": 3, "steps": 1}
    answer = client.predict("a red cat\na big dog", 2, "next", settings, api_name="/series")
    assert [each["report"]["seed"] for each in answer["pictures"]] == [3, 4, 5, 6]
    alone = session.generate("a big dog", {"bluefire": 1}, 5, 1)
    assert pixels(answer["pictures"][2]) == alone.image.tobytes()
    assert answer["shared"] == "bluefire · steps 1 · guidance 3"
    with zipfile.ZipFile(file_of(answer["zip"])) as archive:
        assert archive.namelist()[2:] == ["003 a big dog · seed 5.png", "004 a big dog · seed 6.png", "005 sheet.png"]
    assert Image.open(file_of(answer["sheet"])).width > 2 * 16
    random = client.predict(["a cat"], 2, "random", settings, api_name="/series")["pictures"]
    assert random[1]["report"]["seed"] == (random[0]["report"]["seed"] + 1) % 2**32


def test_a_sheet_has_any_axes(client: Client, session: Session) -> None:
    axes = [{"kind": "strength", "style": "bluefire", "values": [0, 1]}, {"kind": "words", "values": "red, big"}]
    answer = client.predict({"prompt": SUGGESTION, "seed": 3, "steps": 1}, axes, api_name="/sheet")
    assert [each["label"] for each in answer["pictures"]] == [
        "bluefire 0, words red", "bluefire 1, words red", "bluefire 0, words big", "bluefire 1, words big",
    ]  # fmt: skip
    assert pixels(answer["pictures"][3]) == session.generate("a big cat", {"bluefire": 1}, 3, 1).image.tobytes()


@pytest.mark.parametrize(
    ("endpoint", "arguments", "message"),
    [
        ("/series", ("", 1), "No prompt: write one per line"),
        ("/series", ("a cat", 1, "next", {"step": 1}), "No setting named 'step'; there are prompt, mix"),
        ("/series", ("a cat\nabcdefghijklmno", 1), "the model reads 16 tokens, got 17"),
        ("/sheet", ({"prompt": "a cat"}, []), "Axes must be a list of one to three objects"),
        ("/sheet", ({"prompt": "a cat"}, [{"kind": "style", "values": "gold"}]), "No style named 'gold'"),
        ("/sheet", ({"prompt": "a cat"}, ["seed"]), "The axis must be a JSON object"),
        ("/sheet", ({"prompt": "a cat"}, [{"kind": "style", "values": [["a"]]}]), r"'style' must be text, got \['a'\]"),
        ("/history", (1, 5), "Words must be text, got 5"),
        ("/add_start_image", (None,), "There is no picture to start from: send a file, got None"),
    ],
)
def test_what_is_no_sheet_is_a_sentence(client: Client, endpoint: str, arguments: Any, message: str) -> None:
    with pytest.raises(AppError, match=message):
        client.predict(*arguments, api_name=endpoint)


def test_presets_come_and_go(client: Client) -> None:
    settings = {"prompt": SUGGESTION, "mix": MIX, "seed": 3}
    assert client.predict("  my  mix ", settings, api_name="/save_preset") == "my mix"
    kept = client.predict(api_name="/presets")
    assert kept["my mix"]["mix"] == MIX and kept["my mix"]["steps"] == 20
    with pytest.raises(AppError, match="needs a name of 1 to 60"):
        client.predict(" ", settings, api_name="/save_preset")
    with pytest.raises(AppError, match="settings must be a JSON object"):
        client.predict("list", "[1]", api_name="/save_preset")
    with pytest.raises(AppError, match="No style named 'gold'; there are 'bluefire', 'paintings'"):
        client.predict("gone", {**settings, "mix": {"gold": 1}}, api_name="/save_preset")
    with pytest.raises(
        AppError, match=r"No setting named 'promt', 'sed'; .*negative_mix; did you mean prompt and seed\?$"
    ):
        client.predict("my mix", {"promt": SUGGESTION, "sed": 3}, api_name="/save_preset")
    assert client.predict(api_name="/presets") == kept
    assert client.predict("my mix", {**kept["my mix"], "seed": 4}, api_name="/save_preset") == "my mix"
    assert client.predict("my mix", api_name="/delete_preset") == []
    with pytest.raises(AppError, match="No preset named 'my mix'"):
        client.predict("my mix", api_name="/delete_preset")


def test_the_history_holds_what_was_drawn(client: Client, studio: Studio) -> None:
    file, report = client.predict(SUGGESTION, MIX, 4, 1, api_name="/generate")
    newest = client.predict(api_name="/history")[0]
    assert newest["settings"] == report
    assert pixels(newest) == Image.open(file).tobytes()
    assert client.predict(newest["name"], api_name="/star_picture") is True
    (found,) = client.predict(words="seed 4 paintings", favourites=True, api_name="/history")
    assert found["name"] == newest["name"] and found["favourite"] is True
    assert client.predict(words="nothing like it", api_name="/history") == []
    client.predict("as drawn", report, api_name="/save_preset")
    assert client.predict(api_name="/presets")["as drawn"]["seed"] == 4
    client.predict("as drawn", api_name="/delete_preset")
    left = len(studio.galleries.of(Visitor(""))) - 1
    assert client.predict(newest["name"], api_name="/delete_picture") == left
    assert client.predict(api_name="/history")[0]["name"] != newest["name"]
    for name in (newest["name"], "../presets.json", "/etc/passwd", ""):
        with pytest.raises(AppError, match="No picture named"):
            client.predict(name, api_name="/delete_picture")
    with pytest.raises(AppError, match="Page must be a whole number"):
        client.predict(0, api_name="/history")


def test_eight_visitors_get_what_each_would_get_alone(url: str, session: Session) -> None:
    strengths: list[dict[str, Any]] = [
        {},
        {"bluefire": 1.0},
        {"paintings": 2.0},
        {"bluefire": -0.5, "paintings": 1.0},
        {"bluefire": {"unet": 0.5, "text_encoder": 1.5}},
    ]
    orders = [(mix, seed) for seed in range(2) for mix in strengths]
    bits = bits_of(session)
    alone = [session.generate(SUGGESTION, mix, seed, 1).image.tobytes() for mix, seed in orders]
    assert len(set(alone)) == len(alone)
    clients = [connect(url) for _ in range(8)]
    jobs = [
        (k % len(orders), clients[k % 8].submit(SUGGESTION, *orders[k % len(orders)], 1, api_name="/generate"))
        for k in range(40)
    ]
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda job: (job[0], Image.open(job[1].result(300)[0])), jobs))
    assert all(picture.tobytes() == alone[order] for order, picture in drawn)
    assert all(json.loads(picture.info[METADATA_KEY])["mix"] == orders[order][0] for order, picture in drawn)
    assert session.active == {}
    assert_bits(session, bits)
    for client in clients:
        client.close()
