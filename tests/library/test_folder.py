"""Which entries of a folder are adapters, and what they are called: one list for the library, the app and the demo."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from shira_diffusers import AdapterLibrary, ShiraAdapter, SparseDelta, load_adapter, save_adapter
from shira_diffusers.formats.shira_file import WEIGHTS_NAME, find_file
from shira_diffusers.library.folder import adapters_in, weights_file
from tests import tiny

APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "


def tiny_adapter(value: float = 1.0) -> ShiraAdapter:
    return ShiraAdapter({"unet.a.weight": SparseDelta(torch.tensor([3]), torch.tensor([value]), (4, 4))})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One adapter of each kind, and what macOS, Windows and editors leave beside them."""
    folder = tmp_path / "styles"
    for name in ("file.safetensors", "inner", "UPPER.SAFETENSORS"):
        save_adapter(tiny_adapter(), folder / name)
    (folder / "peft").mkdir()
    (folder / "peft" / "adapter_config.json").write_text('{"peft_type": "SHIRA"}')
    (folder / "peft" / "adapter_model.safetensors").write_bytes(b"")
    for name in ("._file.safetensors", "._UPPER.SAFETENSORS", ".hidden.safetensors", "file.SAFETENSORS"):
        (folder / name).write_bytes(APPLE_DOUBLE)
    for name in ("notes.txt", ".DS_Store", "Thumbs.db", "file.safetensors.part", "file.safetensors~", "file.webp"):
        (folder / name).write_bytes(b"")
    save_adapter(tiny_adapter(), folder / ".cache")
    (folder / "folder.safetensors").mkdir()
    (folder / "empty").mkdir()
    (folder / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    return folder


def test_all_kinds_of_adapters_and_nothing_else(folder: Path) -> None:
    assert adapters_in(folder) == [
        ("UPPER", folder / "UPPER.SAFETENSORS"),
        ("file", folder / "file.safetensors"),
        ("inner", folder / "inner" / WEIGHTS_NAME),
        ("peft", folder / "peft"),
    ]
    assert weights_file(folder / "peft") == folder / "peft" / "adapter_model.safetensors"
    assert weights_file(folder / "file.safetensors") == folder / "file.safetensors"
    assert adapters_in(folder / "empty") == adapters_in(folder / "nowhere") == adapters_in(folder / "notes.txt") == []


def test_the_library_has_the_same_names(folder: Path) -> None:
    with AdapterLibrary(folder, device="cpu") as library:
        assert library.names == [name for name, _ in adapters_in(folder)]
        assert library.broken == {}
        for name in ("file", "UPPER", "inner"):
            assert library.get(name).deltas == tiny_adapter().deltas


@pytest.mark.parametrize("name", ["styled.safetensors", "styled.SAFETENSORS", WEIGHTS_NAME])
def test_a_folder_with_one_file_has_side_files_too(name: str, pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapter = tiny.adapter_for(pipe, 1)
    save_adapter(adapter, tmp_path / name)
    for other in (f"._{name}", ".hidden.safetensors"):
        (tmp_path / other).write_bytes(APPLE_DOUBLE)
    assert find_file(tmp_path) == tmp_path / name
    pipe.load_shira(tmp_path, "style")
    assert pipe.get_active_shira() == {"style": 1.0}


@pytest.mark.parametrize("name", ["a.SAFETENSORS", "a.SafeTensors"])
def test_a_suffix_in_any_case_is_a_file_to_write(name: str, tmp_path: Path) -> None:
    """Not a folder of that name."""
    assert save_adapter(tiny_adapter(), tmp_path / name) == tmp_path / name
    assert load_adapter(tmp_path / name).deltas == tiny_adapter().deltas
