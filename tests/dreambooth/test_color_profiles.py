"""Colour profiles: pictures become sRGB by them, as colour science has it; broken ones are told and ignored."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, features

from shira_diffusers.dreambooth.pictures import find_pictures, read_picture
from tests.dreambooth import colour_science as science

P3 = science.rgb_profile(science.DISPLAY_P3, science.SRGB_CURVE)
ADOBE = science.rgb_profile(science.ADOBE_RGB, science.ADOBE_CURVE)

pytestmark = pytest.mark.skipif(not features.check("littlecms2"), reason="Pillow without lcms")


def saved(image: Image.Image, kind: str, profile: bytes | None, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, icc_profile=profile, **options)
    file.seek(0)
    return file


def read(image: Image.Image, kind: str, profile: bytes | None, **options: object) -> NDArray[np.uint8]:
    return np.asarray(read_picture(saved(image, kind, profile, **options)))


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("profile", "primaries", "curve"),
    [
        (P3, science.DISPLAY_P3, science.SRGB_CURVE),
        (ADOBE, science.ADOBE_RGB, science.ADOBE_CURVE),
        (science.rgb_profile(science.SRGB, (1.0, 1.0, 0.0, 1.0, 0.0)), science.SRGB, (1.0, 1.0, 0.0, 1.0, 0.0)),
    ],
    ids=["display p3", "adobe rgb", "linear"],
)
@pytest.mark.parametrize(("kind", "options"), [("png", {}), ("tiff", {}), ("webp", {"lossless": True})])
def test_colours_of_other_displays(
    profile: bytes, primaries: tuple[tuple[float, float], ...], curve: tuple[float, ...], kind: str,
    options: dict[str, object],
) -> None:  # fmt: skip
    pixels = noise(64, 64, 3)
    pixels[0, :3] = [[255, 0, 0], [0, 255, 0], [255, 255, 255]]
    expected = science.rgb_to_srgb(pixels, primaries, curve)
    np.testing.assert_allclose(read(Image.fromarray(pixels), kind, profile, **options), expected, atol=0.75)
    assert np.abs(expected - pixels).max() > 50  # ignoring the profile would not do


def test_the_known_values_of_display_p3() -> None:
    """What macOS shows for sRGB's red, green and blue in Display P3: #EA3323, #75FB4C and #0000F5."""
    pixels = np.array([[[0xEA, 0x33, 0x23], [0x75, 0xFB, 0x4C], [0x00, 0x00, 0xF5]]], np.uint8)
    expected = [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    result = read(Image.fromarray(pixels), "png", P3)
    np.testing.assert_allclose(result, expected, atol=3)  # half a level of the bright one is three of a dark one


def test_pictures_that_are_srgb_keep_their_numbers() -> None:
    """By whatever version of sRGB's profile: no rounding of a conversion that changes nothing."""
    pixels = noise(64, 64, 3)
    pillows = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (None, pillows, science.rgb_profile(science.SRGB, science.SRGB_CURVE)):
        np.testing.assert_array_equal(read(Image.fromarray(pixels), "png", profile), pixels)
    grey = noise(64, 64)
    np.testing.assert_array_equal(read(Image.fromarray(grey), "png", pillows)[..., 1], grey)


def test_palettes_greys_and_bits_by_a_display_profile() -> None:
    colours = [(255, 0, 0), (0, 200, 30), (9, 9, 200)]
    image = Image.new("P", (3, 1))
    image.putpalette([level for colour in colours for level in colour])
    image.putdata(range(3))
    expected = science.rgb_to_srgb(np.array([colours], np.uint8), science.ADOBE_RGB, science.ADOBE_CURVE)
    np.testing.assert_allclose(read(image, "png", ADOBE), expected, atol=0.75)
    grey = np.arange(256, dtype=np.uint8)[None]
    expected = science.encode(science.linear(grey / 255, science.ADOBE_CURVE))
    np.testing.assert_allclose(read(Image.fromarray(grey), "png", ADOBE)[..., 0], expected, atol=0.75)
    assert read(Image.new("1", (2, 2), 1), "png", ADOBE).min() == 255


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.2])
def test_grey_by_its_own_profile(gamma: float) -> None:
    profile, grey = science.grey_profile(gamma), np.arange(256, dtype=np.uint8)[None]
    for image in (Image.fromarray(grey), Image.merge("LA", (Image.fromarray(grey), Image.new("L", (256, 1), 255)))):
        result = read(image, "png", profile)
        expected = science.encode((grey / 255.0) ** gamma)[..., None].repeat(3, axis=-1)
        np.testing.assert_allclose(result, expected, atol=0.75)


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("gamma", [1.0, 2.2])
def test_sixteen_bits_of_grey_keep_dark_tones(kind: str, gamma: float) -> None:
    levels = np.array([[0, 100, 500, 1000, 30000, 65535]], np.uint16)
    expected = science.encode((levels / 65535) ** gamma)[..., None].repeat(3, axis=-1)
    profile = science.grey_profile(gamma)
    np.testing.assert_allclose(read(Image.fromarray(levels), kind, profile), expected, atol=1.5)


def png16(pixels: NDArray[np.uint16], profile: bytes) -> io.BytesIO:
    """A PNG of 16 bits a channel, which Pillow reads but does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = {b"IHDR": head, b"iCCP": b"x\0\0" + zlib.compress(profile), b"IDAT": zlib.compress(rows), b"IEND": b""}
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items()))


def test_sixteen_bits_a_channel() -> None:
    pixels = noise(8, 8, 3)
    expected = science.rgb_to_srgb(pixels, science.DISPLAY_P3, science.SRGB_CURVE)
    np.testing.assert_allclose(read_picture(png16(pixels.astype(np.uint16) * 257, P3)), expected, atol=0.75)


def test_transparent_parts_are_white_beside_converted_colours() -> None:
    pixels = np.array([[[255, 0, 0, 255], [0, 200, 30, 0], [0, 200, 30, 128]]], np.uint8)
    colours = science.rgb_to_srgb(pixels[..., :3], science.DISPLAY_P3, science.SRGB_CURVE)
    alpha = pixels[..., 3:] / 255.0
    expected = colours * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(read(Image.fromarray(pixels), "png", P3), expected, atol=1.25)
    keyed = Image.fromarray(np.array([[[255, 0, 0], [0, 200, 30]]], np.uint8))
    result = read(keyed, "png", P3, transparency=(0, 200, 30))  # a colour of the file's, not of sRGB's
    np.testing.assert_allclose(result, [[colours[0, 0], [255] * 3]], atol=0.75)


def test_sixteen_bits_of_grey_with_a_clear_level() -> None:
    result = read(Image.fromarray(np.array([[1000, 65535, 0]], np.uint16)), "png", None, transparency=1000)
    assert result[0, :, 0].tolist() == [255, 255, 0]


@pytest.mark.parametrize(("kind", "options"), [("tiff", {}), ("jpeg", {"quality": 100})])
def test_inks_by_their_profile(kind: str, options: dict[str, object]) -> None:
    inks = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (1, 1, 0, 0), (0, 0, 0, 1)]
    pixels = 255 * np.array(inks, np.uint8).repeat(16, axis=0)[None].repeat(16, axis=0)
    image = Image.frombytes("CMYK", (96, 16), pixels.tobytes())
    result = read(image, kind, science.ink_profile(), **options)[8, 8::16]
    expected = [science.lab_to_srgb(science.ink_lab(*each)) for each in inks]
    np.testing.assert_allclose(result, expected, atol=2.5 if kind == "jpeg" else 1.25)
    assert np.abs(result - np.asarray(image.convert("RGB"), np.int16)[8, 8::16]).max() > 50


def test_lab_with_and_without_a_profile() -> None:
    image = Image.new("LAB", (1, 1), (153, 168, 98))  # L 60, a 40, b -30
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for embedded in (None, profile):
        np.testing.assert_allclose(read(image, "tiff", embedded)[0, 0], science.lab_to_srgb((60, 40, -30)), atol=1.25)


def test_a_turned_picture_is_converted_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = noise(4, 8, 3)
    expected = science.rgb_to_srgb(np.rot90(pixels, -1), science.DISPLAY_P3, science.SRGB_CURVE)
    np.testing.assert_allclose(read(Image.fromarray(pixels), "png", P3, exif=exif), expected, atol=0.75)


@pytest.mark.parametrize(("index", "orientation"), [("R03", 1), ("R03", 6), ("R98", 1)])
def test_cameras_that_name_adobe_rgb_without_a_profile(index: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {1: index}  # R98 is sRGB
    pixels = noise(4, 8, 3)
    turned = np.rot90(pixels, -1) if orientation == 6 else pixels
    expected = science.rgb_to_srgb(turned, science.ADOBE_RGB, science.ADOBE_CURVE) if index == "R03" else turned
    np.testing.assert_allclose(read(Image.fromarray(pixels), "png", None, exif=exif), expected, atol=0.75)
    again = read(Image.fromarray(pixels), "png", P3, exif=exif)  # an embedded profile goes first
    expected = science.rgb_to_srgb(turned, science.DISPLAY_P3, science.SRGB_CURVE)
    np.testing.assert_allclose(again, expected, atol=0.75)


# -------------------------------------------------------------------- profiles that cannot be used


@pytest.mark.parametrize("wrong", science.broken_profiles())
def test_a_broken_profile_is_told_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: str) -> None:
    pixels = noise(4, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "odd.png", icc_profile=science.broken_profiles()[wrong])
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    odd, _ = find_pictures(tmp_path, "x")
    np.testing.assert_array_equal(odd.read(), pixels)
    assert "odd.png: its colour profile is broken (" in caplog.text and "is ignored" in caplog.text
    assert "plain.png" not in caplog.text


@pytest.mark.parametrize(
    ("mode", "profile", "told"),
    [
        ("RGB", science.grey_profile(1.0), "is for L, the picture is RGB"),
        ("RGB", science.ink_profile(), "is for CMYK, the picture is RGB"),
        ("L", science.ink_profile(), "is for CMYK, the picture is L"),
        ("CMYK", P3, "is for RGB, the picture is CMYK"),
    ],
)
def test_a_profile_of_other_channels_is_told_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, profile: bytes, told: str
) -> None:
    image = Image.fromarray(noise(4, 4, 3)).convert(mode)
    image.save(tmp_path / "odd.tiff", icc_profile=profile)
    (odd,) = find_pictures(tmp_path, "x")
    np.testing.assert_array_equal(odd.read(), np.asarray(image.convert("RGB")))
    assert f"odd.tiff: its colour profile {told}; it is ignored" in caplog.text


def test_a_profile_that_does_not_unpack_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = png16(noise(4, 4, 3).astype(np.uint16) * 257, P3).getvalue()
    at = content.index(b"iCCP")
    damaged = content[: at + 7] + b"\xff\xff\xff" + content[at + 10 :]
    end = at + 4 + int.from_bytes(content[at - 4 : at], "big")
    damaged = damaged[:end] + struct.pack(">I", zlib.crc32(damaged[at:end])) + damaged[end + 4 :]
    (tmp_path / "odd.png").write_bytes(damaged)
    find_pictures(tmp_path, "x")
    assert "odd.png: its colour profile is broken (" in caplog.text


def test_notes_are_told_once_not_at_each_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "odd.png", icc_profile=b"junk")
    (odd,) = find_pictures(tmp_path, "x")
    caplog.clear()
    odd.read()
    assert not caplog.records
