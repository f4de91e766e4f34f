"""ICC profiles as bytes, and what their colours are in sRGB by the textbook: numpy only, neither Pillow nor lcms."""

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

D50 = np.array([0.9642, 1.0, 0.8249])
D65 = (0.3127, 0.3290)
# xy of red, green and blue
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
ADOBE_CURVE = (563 / 256, 1.0, 0.0, 1.0, 0.0)

_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def _xyz_of(xy: Sequence[float]) -> Floats:
    x, y = xy
    return np.array([x / y, 1.0, (1 - x - y) / y])


def to_xyz(primaries: Sequence[Sequence[float]]) -> Floats:
    """Linear RGB of a D65 display -> XYZ under D50, ``(3, 3)``, adapted as ICC asks for."""
    columns, white = np.stack([_xyz_of(xy) for xy in primaries], axis=1), _xyz_of(D65)
    adapted = np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ D50) / (_BRADFORD @ white)) @ _BRADFORD
    return adapted @ columns * np.linalg.solve(columns, white)


def linear(values: Floats, curve: Sequence[float]) -> Floats:
    """Encoded values in [0, 1] -> linear ones, by ICC's parametric curve of type 3."""
    g, a, b, c, d = curve
    return np.where(values >= d, (a * values + b) ** g, c * values)


def encode(values: Floats) -> Floats:
    """Linear values -> sRGB's levels, 0 to 255, not rounded."""
    values = np.clip(values, 0, 1)
    return 255 * np.where(values <= 0.0031308, 12.92 * values, 1.055 * values ** (1 / 2.4) - 0.055)


def xyz_to_srgb(xyz: Floats) -> Floats:
    """XYZ under D50, ``(..., 3)``, -> sRGB's levels."""
    return encode(xyz @ np.linalg.inv(to_xyz(SRGB)).T)


def rgb_to_srgb(pixels: NDArray[np.uint8], primaries: Sequence[Sequence[float]], curve: Sequence[float]) -> Floats:
    """Levels of another display, ``(..., 3)``, -> sRGB's levels."""
    return xyz_to_srgb(linear(pixels / 255.0, curve) @ to_xyz(primaries).T)


def lab_to_srgb(lab: Sequence[float]) -> Floats:
    """CIELAB under D50 -> sRGB's levels, ``(3,)``."""
    y = (lab[0] + 16) / 116
    f = np.array([y + lab[1] / 500, y, y - lab[2] / 200])
    return xyz_to_srgb(np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50)


# -------------------------------------------------------------------- profiles


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _point(xyz: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(*xyz)


def _curve(curve: Sequence[float]) -> bytes:
    return b"para" + bytes(4) + struct.pack(">HH", 3, 0) + _fixed(*curve)


def _text(text: str) -> bytes:
    content = text.encode("utf-16-be")
    return b"mluc" + bytes(4) + struct.pack(">II4sII", 1, 12, b"enUS", len(content), 28) + content


def _profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", between: bytes = b"XYZ ") -> bytes:
    tags = {b"desc": _text("test"), b"cprt": _text("none"), b"wtpt": _point(D50.tolist()), **tags}
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    size = 128 + len(table) + len(data)
    head = struct.pack(">I4sI4s4s4s12s4s28s", size, b"", 0x04300000, kind, space, between, b"", b"acsp", b"")
    return (head + _fixed(*D50)).ljust(128, b"\0") + table + data


def rgb_profile(primaries: Sequence[Sequence[float]], curve: Sequence[float]) -> bytes:
    """A display's profile, of primaries under D65 and one curve."""
    columns = to_xyz(primaries).T.tolist()
    points = {name: _point(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)}
    return _profile(b"RGB ", points | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(curve)))


def grey_profile(gamma: float) -> bytes:
    """A profile of grey with a plain gamma."""
    return _profile(b"GRAY", {b"kTRC": _curve((gamma, 1.0, 0.0, 1.0, 0.0))})


def ink_lab(cyan: float, magenta: float, yellow: float, black: float) -> tuple[float, float, float]:
    """The colour of ``ink_profile``'s inks, 0 or 1 each, in whole numbers that 8 bits hold."""
    light = (100 - 40 * cyan - 30 * magenta - 10 * yellow) * (1 - 0.8 * black)
    return light, -20 * cyan + 30 * magenta, -20 * cyan + 40 * yellow


def ink_profile() -> bytes:
    """A press's profile: a table of CMYK's 16 corners in CIELAB."""
    corners = [ink_lab(*((number >> bit) & 1 for bit in (3, 2, 1, 0))) for number in range(16)]
    grid = b"".join(bytes([round(light * 2.55), round(a + 128), round(b + 128)]) for light, a, b in corners)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += bytes(range(256)) * 4 + grid + bytes(range(256)) * 3
    return _profile(b"CMYK", {b"A2B0": table}, b"prtr", b"Lab ")


def broken_profiles() -> dict[str, bytes]:
    """Profiles that cannot be used, by what is wrong with them."""
    whole = rgb_profile(DISPLAY_P3, SRGB_CURVE)
    return {
        "noise": b"\x17" * 300,
        "cut": whole[:-40],
        "no tags": _profile(b"RGB ", {}),
        "another space": _profile(b"HSV ", {}),
    }
