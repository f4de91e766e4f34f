"""A picture and how it was made."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

METADATA_KEY = "shira"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture and its report: plain data for JSON, enough to draw it again."""

    image: Image
    report: Mapping[str, Any]

    def signed(self) -> Image:
        """A copy that carries the report as JSON text under ``METADATA_KEY`` in its ``info``, so in a PNG's text."""
        image = self.image.copy()
        image.info[METADATA_KEY] = json.dumps(dict(self.report))
        return image
