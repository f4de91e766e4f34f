"""Library, interference and training through gradio_client, as a notebook uses them."""

import time
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from app.library.cards import sha256_of
from shira_diffusers import save_adapter
from tests import loras, tiny
from tests.app.conftest import connect


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return connect(url)


@pytest.fixture
def moss(tmp_path: Path) -> Path:
    return save_adapter(tiny.adapter_for(tiny.pipeline(), 5), tmp_path / "moss.safetensors")


def test_an_adapter_comes_and_goes(client: Client, moss: Path) -> None:
    entry = client.predict(handle_file(str(moss)), "../wet moss", api_name="/upload_adapter")
    assert (entry["name"], entry["fits"], entry["origin"], entry["sha256"]) == (
        "wet moss", True, "yours", sha256_of(moss)
    )  # fmt: skip
    emoji = moss.rename(moss.with_stem("🌿 Ada's moss, 100 %"))
    assert client.predict(file=handle_file(str(emoji)), api_name="/upload_adapter")["name"] == emoji.stem
    client.predict(emoji.stem, api_name="/delete_adapter")
    emoji.rename(moss)
    assert client.predict(file=handle_file(str(moss)), api_name="/upload_adapter")["name"] == "moss"
    assert {"moss", "wet moss"} <= client.predict(api_name="/adapters")["adapters"].keys()
    assert sha256_of(Path(client.predict("moss", api_name="/download_adapter"))) == sha256_of(moss)
    told = client.predict("moss", api_name="/inspect_adapter")
    assert told["kind"] == "SHiRA adapter" and told["parameters"][0].keys() >= {"name", "shape", "nnz", "density"}
    assert client.predict("moss", "fern", api_name="/rename_adapter")["name"] == "fern"
    assert client.predict("fern", api_name="/delete_adapter")[0] == "fern"
    assert client.predict(api_name="/undo_delete")["name"] == "fern"
    for name in ("fern", "wet moss"):
        client.predict(name, api_name="/delete_adapter")
    listed = {entry["name"]: entry["fits"] for entry in client.predict(api_name="/library")}
    assert listed == {"bluefire": True, "paintings": True, "broken": False, "stranger": False}


def test_what_peft_wrote_comes_with_its_config(client: Client, tmp_path: Path) -> None:
    from peft import ShiraConfig, get_peft_model

    model = get_peft_model(tiny.unet(), ShiraConfig(r=2, target_modules=["to_q"], init_weights=False))
    model.save_pretrained(tmp_path / "peft")
    weights, config = (handle_file(str(tmp_path / "peft" / f"adapter_{name}")) for name in (
        "model.safetensors", "config.json",
    ))  # fmt: skip
    entry = client.predict(weights, config, "fern", api_name="/upload_peft_adapter")
    assert (entry["name"], entry["fits"], entry["mask"], entry["note"]) == ("fern", True, "rand", "")
    with pytest.raises(AppError, match=r"adapter_config\.json is not JSON"):
        client.predict(weights, weights, "x", api_name="/upload_peft_adapter")
    client.predict("fern", api_name="/delete_adapter")


def test_a_lora_is_converted(client: Client, tmp_path: Path) -> None:
    lora = loras.of_diffusers(tmp_path, loras.adapted(tiny.unet(), loras.UNET)) / "pytorch_lora_weights.safetensors"
    with pytest.raises(AppError, match="it looks like a LoRA"):
        client.predict(handle_file(str(lora)), "moss", api_name="/upload_adapter")
    entry = client.predict(handle_file(str(lora)), "moss", api_name="/convert_lora")
    assert (entry["name"], entry["fits"], entry["note"]) == ("moss", True, "")
    kept = [float(entry["metadata"][f"{what}_kept"]) for what in ("energy", "effect")]
    assert 0 < kept[0] < kept[1] < 1
    client.predict("moss", api_name="/delete_adapter")
    with pytest.raises(AppError, match="is a SHiRA adapter already"):
        file = save_adapter(tiny.adapter_for(tiny.pipeline()), tmp_path / "ours.safetensors")
        client.predict(handle_file(str(file)), "x", api_name="/convert_lora")


def test_interference_of_each_pair(client: Client) -> None:
    (pair,) = client.predict(["bluefire", "paintings"], api_name="/interference")
    assert pair["first"] == "bluefire" and 0 < pair["overlap"] < 1 and pair["words"] and pair["layers"]
    with pytest.raises(AppError) as caught:
        client.predict(["bluefire"], api_name="/interference")
    assert caught.value.message == "Choose at least two adapters to compare"


def test_a_training(client: Client, tmp_path: Path) -> None:
    told = client.predict({"steps": 4}, api_name="/estimate_training")
    assert told["settings"]["steps"] == 4 and told["estimate"].keys() >= {"entries", "megabytes", "seconds"}
    pictures = []
    for color in ("red", "blue"):
        Image.new("RGB", (16, 16), color).save(tmp_path / f"{color}.png")
        pictures.append(handle_file(str(tmp_path / f"{color}.png")))
    settings = {"name": "api style", "prompt": "a sks cat", "steps": 4, "batch": 1, "sample_prompt": "a cat"}
    with pytest.raises(AppError, match="No setting named 'step'"):
        client.predict(pictures, {"step": 4}, None, api_name="/train")
    (tmp_path / "lonely.caption").write_text("of no picture")
    files = [*pictures, handle_file(str(tmp_path / "lonely.caption"))]
    started = client.predict(files, settings, ["a red cat"], api_name="/train")
    assert started["left"] == ["lonely.caption"] and started["pictures"] == 2
    assert started["state"] == "running" and started["pictures"] == 2
    status: dict[str, Any] = started
    end = time.time() + 90
    while status["state"] == "running" and time.time() < end:
        time.sleep(0.2)  # a training has the time that asking takes
        status = client.predict(api_name="/training_status")
    assert (status["state"], status["adapter"], status["step"]) == ("finished", "api style", 4)
    assert len(status["loss"]) == 4 and Image.open(status["samples"][0]["picture"]).size == (16, 16)
    assert "api style" in client.predict(api_name="/adapters")["adapters"]
    assert [each["id"] for each in client.predict(api_name="/trainings")] == [status["id"]]
    assert client.predict(status["id"], api_name="/discard_training") == []
    with pytest.raises(AppError, match="Nothing was trained here yet"):
        client.predict(api_name="/training_status")
