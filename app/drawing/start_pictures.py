"""Pictures to start from, kept under the SHA-256 of their file, by which settings name them."""

import hashlib
import io
import threading
from pathlib import Path

from PIL import Image

from app.settings.checks import SettingsError
from app.settings.picture_files import FORMATS, problem_of
from shira_diffusers.atomic_write import write_atomically
from shira_diffusers.dreambooth.pictures import read_picture

MOST = 500
MAX_SIDE = 2048  # pixels, of what is kept


class StartPictures:
    """PNG files in a folder; beyond ``most`` the one that was not used for longest goes. Safe to use from several
    threads.

    Args:
        folder: made with the first picture; without one none can be added.
    """

    def __init__(self, folder: Path | None, most: int = MOST) -> None:
        self._folder, self._most = folder, most
        self._changing = threading.Lock()

    def add(self, file: Path) -> str:
        """Keep the pixels of a picture file, and nothing else of it; returns the SHA-256 by which settings name it.

        Raises:
            SettingsError: no picture, or one that is too large.
            OSError: it cannot be written.
        """
        if not self._folder:
            raise SettingsError("pictures to start from need a data folder; start the app with --data")
        problem = problem_of(file)
        if problem:
            raise SettingsError(f"this is no picture to start from: {problem}")
        image = read_picture(file, formats=FORMATS)
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        content = io.BytesIO()
        Image.frombytes("RGB", image.size, image.tobytes()).save(content, "png")
        sha256 = hashlib.sha256(content.getvalue()).hexdigest()
        with self._changing:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / f"{sha256}.png", content.getvalue())
            for old in sorted(self._folder.glob("*.png"), key=lambda each: each.stat().st_mtime_ns)[: -self._most]:
                old.unlink()
        return sha256

    def path(self, sha256: str) -> Path | None:
        """The file of a picture; None where it is not here (any more)."""
        path = self._folder / f"{sha256}.png" if self._folder else None
        return path if path and path.is_file() else None

    def read(self, sha256: str) -> Image.Image:
        """The pixels of a picture, which now was used last. Raises SettingsError: it is not here (any more)."""
        path = self.path(sha256)
        if path is None:
            raise SettingsError("the picture to start from is not kept here, add it again")
        path.touch()
        with Image.open(path) as image:
            return image.convert("RGB")
