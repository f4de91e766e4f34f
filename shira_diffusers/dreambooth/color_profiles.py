"""Colours of pictures: any mode, depth and colour profile that Pillow reads, converted to 8-bit sRGB."""

import io
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

Note = Callable[[str], None]
"""Called with what a user may want to know about a picture that is used anyway."""

# colour space of a profile -> the mode whose channels it describes
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
# modes that are not RGB in another form
_KINDS = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK", "LAB": "LAB"}


class _Conversion(NamedTuple):
    """What a colour profile asks for: pictures of ``mode`` as sRGB; None where they are sRGB already."""

    mode: str
    transform: ImageCms.ImageCmsTransform | None

    def __call__(self, image: Image.Image) -> Image.Image:
        plain = image.convert(self.mode)
        return self.transform.apply(plain) if self.transform else plain.convert("RGB")


def silent(_: str) -> None:
    """Ignore a note."""


def flatten(image: Image.Image, note: Note = silent) -> Image.Image:
    """Convert a picture to RGB: sRGB by its embedded colour profile, transparent parts white.

    Without a profile its values are taken as sRGB, or as Adobe RGB if its EXIF says so. A profile that is broken or
    describes other channels than the picture's is ignored with a ``note``. A picture whose profile is sRGB keeps its
    values.
    """
    convert = _conversion_of(image, note)
    if image.mode.startswith(("I", "F")):
        colours, alpha = _from_levels(image, convert)
    else:
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        colours = convert(_opaque(image)) if convert else _opaque(image).convert("RGB")
    if alpha is None:
        return colours
    colours.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def _opaque(image: Image.Image) -> Image.Image:
    """Without transparency, in the channels that it is stored in where these are no form of RGB."""
    kind = _KINDS.get(image.mode, "RGB")
    if image.has_transparency_data and kind == "RGB":
        image = image.convert("RGBA")  # first, as a clear colour is one of the picture's own
    return image if image.mode == kind else image.convert(kind)


def _conversion_of(image: Image.Image, note: Note) -> _Conversion | None:
    """What the picture's profile asks for; None if it has none, or none that can be used."""
    if "icc_profile" not in image.info and not _says_adobe_rgb(image):
        return None
    try:
        conversion = _read_profile(image.info.get("icc_profile", _ADOBE_RGB) or b"")
    except (OSError, ValueError, TypeError, ImportError, ImageCms.PyCMSError) as error:
        note(f"its colour profile is broken ({error}) and is ignored: colours are taken for sRGB")
        return None
    kind = "L" if image.mode.startswith(("I", "F")) else _KINDS.get(image.mode, "RGB")
    if conversion.mode not in (kind, "RGB" if kind == "L" else kind):
        note(f"its colour profile is for {conversion.mode}, the picture is {kind}; it is ignored")
        return None
    return conversion


def _says_adobe_rgb(image: Image.Image) -> bool:
    """Whether EXIF names Adobe RGB, as cameras that are set to it do in place of embedding a profile."""
    try:
        return image.getexif().get_ifd(ExifTags.IFD.Interop).get(1) == "R03"
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):  # broken EXIF names nothing
        return False


def _adobe_rgb() -> bytes:
    """Adobe RGB (1998) as an ICC profile: its primaries as XYZ under D50, and a gamma of 563 / 256."""
    primaries = {
        b"r": (0.60974, 0.31111, 0.01947),
        b"g": (0.20528, 0.62567, 0.06087),
        b"b": (0.14919, 0.06322, 0.74457),
    }
    curve = struct.pack(">4s4xIHxx", b"curv", 1, 563)
    tags = {name + b"XYZ": b"XYZ " + bytes(4) + _fixed(xyz) for name, xyz in primaries.items()}
    tags |= {name + b"TRC": curve for name in primaries}
    start, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(data), len(content))
        data += content
    kinds = struct.pack(">4s4s4s12x4s28x", b"mntr", b"RGB ", b"XYZ ", b"acsp")
    head = struct.pack(">I4xI", start + len(data), 0x02100000) + kinds + _fixed((0.9642, 1.0, 0.8249))
    return head.ljust(128, b"\0") + table + data


def _fixed(values: Sequence[float]) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


_ADOBE_RGB = _adobe_rgb()


@lru_cache(maxsize=8)
def _read_profile(content: bytes) -> _Conversion:
    """The conversion that an ICC profile describes.

    Raises:
        OSError, ValueError, TypeError, ImportError, PyCMSError: it is broken, or Pillow was built without lcms.
    """
    profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
    space = profile.profile.xcolor_space.strip()
    if space not in _MODES:
        raise ValueError(f"of the colour space {space!r}")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    mode, flags = _MODES[space], ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode == "L":  # the simplified curves that lcms makes for grey are up to nine levels off in dark tones
        flags |= ImageCms.Flags.NOOPTIMIZE
    transform = ImageCms.buildTransform(profile, srgb, mode, "RGB", intent, flags)
    return _Conversion(mode, None if _changes_nothing(transform, mode) else transform)


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether colours across the cube move by one level at most, as those of the many versions of sRGB's profile."""
    if mode not in ("RGB", "L"):
        return False
    levels = np.linspace(0, 255, 16).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(64, 64, 3)
    probe = Image.fromarray(cube) if mode == "RGB" else _ramp()
    after = np.asarray(transform.apply(probe), dtype=np.int16)
    return bool(np.abs(after - np.asarray(probe.convert("RGB"), dtype=np.int16)).max() <= 1)


def _ramp() -> Image.Image:
    """All levels of grey in a row."""
    return Image.fromarray(np.arange(256, dtype=np.uint8)[None])


def _from_levels(image: Image.Image, convert: _Conversion | None) -> tuple[Image.Image, Image.Image | None]:
    """Grey of more than 8 bits as RGB, and its alpha where one level is clear; dark tones keep their depth until the
    profile has been applied."""
    values = np.asarray(image, dtype=np.float32)
    tones = np.asarray(convert(_ramp()) if convert else _ramp().convert("RGB"), dtype=np.float32)[0]  # (256, 3)
    levels = _to_255(values, image.mode)
    grey = np.stack([np.interp(levels, np.arange(256), tones[:, channel]) for channel in range(3)], axis=-1)
    clear = image.info.get("transparency")
    alpha = None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return Image.fromarray(grey.round().astype(np.uint8)), alpha


def _to_255(values: NDArray[np.float32], mode: str) -> NDArray[np.float32]:
    """Pillow would clip wide grey levels at 255: scale them, 16-bit ones by their range, floats of 0 to 1 by theirs."""
    top = 65535.0 if mode.startswith("I") else 1.0 if values.max(initial=0) <= 1 else 255.0
    return np.clip(values * np.float32(255.0 / top), 0, 255)
