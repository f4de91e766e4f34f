"""Pictures as they come: every mode, turned, damaged, with captions of every kind."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shira_diffusers import ShiraError
from shira_diffusers.dreambooth.pictures import find_pictures, read_picture

RED = (255, 0, 0)


def test_captions_beside_pictures_else_the_prompt(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.webp"):
        Image.new("RGB", (4, 4), RED).save(tmp_path / name)
    (tmp_path / "b.txt").write_text("a red\n square \n", encoding="utf-8")
    (tmp_path / "c.txt").write_text("  \n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a picture", encoding="utf-8")
    (tmp_path / ".hidden.png").write_bytes(b"not a picture")
    found = find_pictures(tmp_path, "a picture of sks")
    assert [(p.path.name, p.prompt) for p in found] == [
        ("a.JPG", "a picture of sks"),
        ("b.png", "a red square"),
        ("c.webp", "a picture of sks"),
    ]


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShiraError, match=r"no folder of pictures at '.*missing'"):
        find_pictures(tmp_path / "missing", "x")
    with pytest.raises(ShiraError, match=r"no pictures in .*expected files such as"):
        find_pictures(tmp_path, "x")


def test_corrupt_pictures_are_all_named(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("hello", encoding="utf-8")
    with pytest.raises(ShiraError, match=r"2 of 3 pictures(.|\n)*half.png(.|\n)*text.jpg: not a picture"):
        find_pictures(tmp_path, "x")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F"])
def test_every_mode_reads_as_the_same_grey(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tiff"
    if mode in ("I;16", "I", "F"):
        levels = {"I;16": (65535, np.uint16), "I": (65535, np.int32), "F": (1.0, np.float32)}[mode]
        Image.fromarray(np.full((4, 4), levels[0], levels[1])).save(path)
    elif mode == "YCbCr":
        path = path.with_suffix(".jpg")  # which is stored so
        Image.new("YCbCr", (4, 4), (255, 128, 128)).save(path)
    elif mode in ("HSV", "LA", "P"):
        path = path.with_suffix(".png")
        Image.new("RGB", (4, 4), "white").convert("RGB" if mode == "HSV" else mode).save(path)
    else:
        Image.new("RGB", (4, 4), "white").convert("L" if mode == "1" else "RGB").convert(mode).save(path)
    image = read_picture(path)
    assert image.mode == "RGB"
    assert np.asarray(image).min() >= 250


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "grey.png")
    assert np.asarray(read_picture(tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparent_parts_are_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (*RED, 255))
    path = tmp_path / "clear.png"
    image.convert(mode).save(path)
    assert np.asarray(read_picture(path))[0].tolist() == [[255, 255, 255], list(RED)]


def test_exif_orientation_turns_the_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    Image.new("RGB", (8, 4), RED).save(tmp_path / "phone.jpg", exif=exif)
    assert read_picture(tmp_path / "phone.jpg").size == (4, 8)


@pytest.mark.parametrize("name", ["palette.png", "grey.png", "true.png", "animated.gif", "still.webp"])
def test_every_kind_of_transparency_is_white(tmp_path: Path, name: str) -> None:
    """Palettes with one clear index or an alpha for each, a clear level or colour, frames that differ."""
    clear, red = Image.new("RGBA", (4, 2), (0, 0, 0, 0)), Image.new("RGBA", (4, 2), (*RED, 255))
    first = clear.copy()
    first.paste(red, (2, 0))
    path = tmp_path / name
    if name == "palette.png":
        image = Image.new("P", (4, 2), 0)
        image.putpalette([0, 0, 0, *RED])
        image.paste(1, (2, 0, 4, 2))
        image.save(path, transparency=bytes([0, 255]))
    elif name == "grey.png":
        image = Image.new("L", (4, 2), 7)
        image.paste(100, (2, 0, 4, 2))
        image.save(path, transparency=7)
    elif name == "true.png":
        first.convert("RGB").save(path, transparency=(0, 0, 0))
    elif name == "animated.gif":
        first.save(path, save_all=True, append_images=[red, clear], duration=100)
    else:
        first.save(path, lossless=True, exact=True)
    inked = [100] * 3 if name == "grey.png" else list(RED)
    assert np.asarray(read_picture(path))[0].tolist() == [[255] * 3] * 2 + [inked] * 2


def test_broken_exif_is_no_reason_to_refuse(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), RED).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    (found,) = find_pictures(tmp_path, "x")
    assert found.size == (8, 4)


# ---------------------------------------------------------------- folders as they come


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One good picture, and everything else that a folder may hold."""
    Image.effect_noise((64, 32), 50).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("hello", encoding="utf-8")
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "Ünïcødé 猫 🐈.png").write_bytes(whole)
    return tmp_path


def test_bad_pictures_are_refused_all_by_name(folder: Path) -> None:
    with pytest.raises(ShiraError, match=r"^4 of 6 pictures in .* cannot be read(.|\n)*--on_bad_image skip") as caught:
        find_pictures(folder, "x")
    message = str(caught.value)
    for told in ("half.png: ", "empty.png: not a picture", "text.jpg: not a picture", "phone.HEIC: .HEIC is not read"):
        assert told in message
    assert "good.png" not in message


def test_bad_pictures_are_skipped_all_by_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = find_pictures(folder, "x", "skip")
    assert [picture.path.name for picture in found] == ["good.png", "Ünïcødé 猫 🐈.png"]
    assert [picture.size for picture in found] == [(64, 32)] * 2
    for name in ("half.png", "empty.png", "text.jpg", "phone.HEIC"):
        assert name in caplog.text


def test_nothing_but_bad_pictures_is_an_error_even_when_skipped(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(ShiraError, match=r"1 of 1 picture(.|\n)*empty.png: not a picture"):
        find_pictures(tmp_path, "x", "skip")


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "tiff", "bmp", "ppm", "tga", "ico", "jp2"])
def test_damage_of_any_kind_is_an_error_of_ours(tmp_path: Path, kind: str) -> None:
    """Bytes overwritten and files cut at random: what Pillow raises then is told as a picture that cannot be read."""
    buffer = io.BytesIO()
    Image.effect_noise((32, 32), 50).convert("RGB").save(buffer, {"jpg": "jpeg", "jp2": "jpeg2000"}.get(kind, kind))
    whole, generator = buffer.getvalue(), np.random.default_rng(0)
    for number in range(40):
        damaged = bytearray(whole)
        for _ in range(generator.integers(1, 9)):
            damaged[generator.integers(min(len(whole), 300))] = generator.integers(256)
        cut = generator.integers(len(whole)) if number % 2 else len(whole)
        (tmp_path / f"{number:02d}.{kind}").write_bytes(damaged[:cut])
    Image.new("RGB", (4, 4)).save(tmp_path / "whole.png")
    found = find_pictures(tmp_path, "x", "skip")
    assert 1 <= len(found) <= 41


# ---------------------------------------------------------------- captions as they come


@pytest.mark.parametrize(
    "content",
    [b"a red cat", b"\xef\xbb\xbfa red cat", b"a red\r\ncat\r\n", b" \ta  red\rcat\n\n"],
    ids=["plain", "bom", "crlf", "spaces"],
)
def test_captions_of_every_editor(tmp_path: Path, content: bytes) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "ä.png")
    (tmp_path / "ä.txt").write_bytes(content)
    assert [picture.prompt for picture in find_pictures(tmp_path, "x")] == ["a red cat"]


def test_captions_that_are_not_utf_8_are_all_named(tmp_path: Path) -> None:
    for name in ("latin", "utf16", "good"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / "latin.txt").write_bytes("ein Kätzchen".encode("latin-1"))
    (tmp_path / "utf16.txt").write_bytes("a cat".encode("utf-16"))
    (tmp_path / "good.txt").write_text("ein Kätzchen", encoding="utf-8")
    with pytest.raises(ShiraError, match=r"2 captions are not UTF-8(.|\n)*latin.txt: byte 0xe4 at 5(.|\n)*utf16.txt"):
        find_pictures(tmp_path, "x", "skip")


def test_a_folder_named_like_a_caption_is_none(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").mkdir()
    assert [picture.prompt for picture in find_pictures(tmp_path, "x")] == ["x"]
