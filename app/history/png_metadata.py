"""Settings in a PNG's metadata: written, and read from files that strangers may have made."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from app.settings.checks import SettingsError
from app.settings.picture import METADATA_KEY, Picture

MAX_BYTES = 64_000_000  # of a file; the largest picture of SDXL takes 3 MB
MAX_TEXT = 100_000  # characters of the settings


def write_png(picture: Picture, path: Path) -> None:
    """Write a picture with its report as JSON text under ``METADATA_KEY``."""
    text = PngImagePlugin.PngInfo()
    text.add_text(METADATA_KEY, json.dumps(dict(picture.report)))
    picture.image.save(path, "png", pnginfo=text)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a PNG carries; its pixels are never decoded, and nothing in it is trusted.

    Returns:
        A dictionary with text keys; what is in it must still be checked.

    Raises:
        SettingsError: no PNG, too large, or one without settings of this app.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SettingsError(f"the picture's file is too large: {MAX_BYTES / 1e6:g} MB at most")
        with Image.open(path, formats=("png",)) as image:  # reads chunks up to the pixels; Pillow limits texts to 1 MB
            text = image.info.get(METADATA_KEY)
    except (UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError, OSError) as error:
        raise SettingsError("this is no PNG that can be read; drop one that this app has drawn") from error
    if not isinstance(text, str):
        raise SettingsError("this picture carries no settings; drop one that this app has drawn, unchanged")
    return parse_settings(text)


def parse_settings(text: str) -> dict[str, Any]:
    """Settings from JSON text of a stranger, as a dictionary that must still be checked.

    Raises:
        SettingsError: too long, or no JSON object.
    """
    if len(text) > MAX_TEXT:
        raise SettingsError(f"the settings are too long: {MAX_TEXT} characters at most, got {len(text)}")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"the settings must be a JSON object, got {text[:40]!r}") from error
    if not isinstance(settings, dict):
        raise SettingsError(f"the settings must be a JSON object, got {text[:40]!r}")
    return settings
