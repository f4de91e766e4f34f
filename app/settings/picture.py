"""A picture and how it was made."""

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
