"""Files that are no safetensors files are called what they are, with the remedy, by all who read adapters."""

import gzip
import io
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from app.library.cards import Card, glanced
from shira_diffusers import AdapterFormatError, AdapterLibrary, ShiraError, load_adapter
from shira_diffusers.cli.base_model import open_pipeline
from shira_diffusers.formats.contents import guess
from shira_diffusers.formats.inspect import inspect_adapter
from shira_diffusers.formats.paths import similar
from tests import tiny

POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 14629788
"""


def saved(write: object, *args: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    write(buffer, *args, **options)  # type: ignore[operator]
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("gold.safetensors", b"x")
    return buffer.getvalue()


OTHERS = [
    (POINTER, "like a Git LFS pointer, in place of a file not downloaded yet; run git lfs pull"),
    (b"<!DOCTYPE html>\n<html><body>Sign in</body>", "like an HTML page.*download the file itself.*/resolve/"),
    (b"\n  <HTML lang='en'>", "like an HTML page"),
    (b"<!-- made by hand -->\n<html>", "like an HTML page"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "like an XML document, such as a server's error"),
    (b'{"error": "Repository not found"}', "like JSON text, such as a server's answer"),
    (b"Entry not found", "like text that begins 'Entry not found'; get an intact"),
    (b"", "got 0 bytes that look like an empty file; copy or download it again"),
    (
        saved(lambda f: torch.save({"a": torch.ones(2)}, f)),
        "like a pickle, which is never loaded.*as a .safetensors file",
    ),
    (
        saved(lambda f: torch.save({"a": torch.ones(2)}, f, _use_new_zipfile_serialization=False)),
        "like a pickle, which is never loaded",
    ),
    (pickle.dumps({"a": 1}), "like a pickle, which is never loaded"),
    (zipped(), "or another zip archive"),
    (gzip.compress(b"x", mtime=0), "like a compressed archive; unpack it first"),
    (b"GGUF\x03\x00\x00\x00", "like a GGUF model"),
    (saved(lambda f: Image.new("RGB", (4, 4)).save(f, "PNG")), "like a picture; name the adapter's file"),
    (saved(lambda f: Image.new("RGB", (4, 4)).save(f, "WEBP")), "like a picture"),
    (saved(lambda f: Image.new("RGB", (4, 4)).save(f, "JPEG")), "like a picture"),
    (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "like a side file that macOS made; name the file without"),
    (bytes(100), r"damaged or truncated \(.+\); get an intact .safetensors file"),
    (b"\x90\x01\x00\x00\x00\x00\x00\x00{", r"damaged or truncated \(.+\); get an intact"),
]


@pytest.mark.parametrize(("content", "message"), OTHERS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("name", ["gold.safetensors", "gold.bin"])
def test_what_is_no_adapter_is_called_what_it_is(content: bytes, message: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    expected = rf"^{file} cannot be read: expected a safetensors file, got {len(content)} bytes that look .*"
    for read in (load_adapter, inspect_adapter):
        with pytest.raises(AdapterFormatError, match=expected) as told:
            read(file)
        assert told.match(message)
    if name == "gold.safetensors":
        with AdapterLibrary(tmp_path, device="cpu") as library, pytest.raises(AdapterFormatError, match=message):
            library.get("gold")


@pytest.mark.parametrize(("content", "message"), OTHERS[:8], ids=lambda value: str(value)[:30])
def test_the_app_says_so_of_a_file_that_it_only_glances_at(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "gold.safetensors").write_bytes(content)
    card = glanced(Card("gold", tmp_path / "gold.safetensors", "bundled"))
    assert re.search(message, card.reason) and str(tmp_path) not in card.reason


def test_an_intact_file_seems_to_be_nothing_else(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    pipe.unet.save_pretrained(tmp_path)
    assert guess(tmp_path / "diffusion_pytorch_model.safetensors") is None


def test_a_base_that_was_cloned_without_its_large_files(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(POINTER)
    with pytest.raises(
        ShiraError, match=r"unet/diffusion_pytorch_model.safetensors looks like a Git LFS pointer.*lfs pull"
    ):
        open_pipeline(str(tmp_path / "base"))


def test_only_a_pipelines_own_folders_are_searched_for_what_is_wrong(tmp_path: Path) -> None:
    """Not all that is below a name such as ``/``; and a link to nothing is passed over."""
    (tmp_path / "home" / "models").mkdir(parents=True)
    (tmp_path / "home" / "models" / "x.safetensors").write_bytes(POINTER)
    (tmp_path / "a.safetensors").symlink_to("nowhere")
    for index in (None, "{"):
        if index:
            (tmp_path / "model_index.json").write_text(index)
        with pytest.raises(ShiraError, match="cannot load a pipeline from") as caught:
            open_pipeline(str(tmp_path))
        assert "Git LFS" not in str(caught.value)


def test_a_link_to_nothing_is_not_what_was_meant(tmp_path: Path) -> None:
    (tmp_path / "gold.safetensors").symlink_to("nowhere")
    (tmp_path / "golds.safetensors").write_bytes(b"")
    assert similar(tmp_path / "gold.safetensors") == [tmp_path / "golds.safetensors"]
    assert similar(tmp_path / "gold.safetensors" / "x")[0] == tmp_path / "gold.safetensors"


def test_a_mistyped_base_names_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "emoji-diffusion")
    monkeypatch.chdir(tmp_path)
    for base in ("emoji-difusion", "./emoji_diffusion", str(tmp_path / "emojidiffusion"), "nowhere/model.safetensors"):
        with pytest.raises(
            ShiraError, match=r"no base pipeline at .*: expected a diffusers folder or a Hub id"
        ) as told:
            open_pipeline(base)
        assert ("did you mean" in str(told.value)) == ("emoji" in base)
