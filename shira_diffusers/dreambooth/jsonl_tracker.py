"""``--report_to jsonl``: the figures of each step as a line of JSON, for programs that follow a run."""

import json
import time
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

JSONL_NAME = "steps.jsonl"


class JsonlTracker(GeneralTracker):
    """Appends for each step ``{"step": 1, "time": ..., "loss": ..., "lr": ..., "images_per_second": ...,
    "peak_memory_gib": ...}``; the time is in seconds since 1970.

    A run that resumes from a checkpoint writes the steps after it once more: of a step, the last line counts.

    Args:
        folder: made if needed; the lines go to ``steps.jsonl`` in it.
    """

    name = "jsonl"
    requires_logging_directory = True

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path = folder / JSONL_NAME

    @property
    def tracker(self) -> Path:
        """The file."""
        return self._path

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Append a line, so that concurrent readers see whole lines and at most one unfinished at the end."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
