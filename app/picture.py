"""A picture and how it was made."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

METADATA_KEY = "shira"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture and its report: plain data for JSON, enough to draw it again."""

    image: Image
    report: Mapping[str, Any]

    def save(self, path: Path) -> Path:
        """Write a PNG that carries the report as text under ``METADATA_KEY``."""
        info = PngInfo()
        info.add_text(METADATA_KEY, json.dumps(dict(self.report)))
        self.image.save(path, format="PNG", pnginfo=info)
        return path
