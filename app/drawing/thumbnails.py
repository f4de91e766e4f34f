"""A small picture of each adapter: one that lies beside its file, or one drawn when the queue is empty."""

import logging
from pathlib import Path

from PIL import Image, ImageOps

from app.drawing.fair_queue import BACKGROUND
from app.drawing.session import Session
from app.library.cards import Card
from app.settings.checks import SettingsError
from app.settings.settings import DEFAULT_GUIDANCE, Settings
from shira_diffusers.dreambooth.picture_folder import name_key
from shira_diffusers.dreambooth.pictures import DAMAGED, read_picture
from shira_diffusers.formats.paths import is_hidden

logger = logging.getLogger(__name__)

SIDE = 128  # pixels: the page shows 56, phones have two or three per pixel of the page
SEED, STEPS = 7, 20
BESIDE = (".webp", ".png", ".jpg", ".jpeg")


class _Later(Exception):
    """Somebody waits for a picture."""


class Thumbnails:
    """WebP files in a folder, named by the SHA-256 of the adapter's file, so that each is made once.

    Args:
        session: draws those that have no picture beside their file.
        folder: made if needed.
    """

    def __init__(self, session: Session, folder: Path) -> None:
        self._session = session
        self._asked: set[str] = set()
        self.folder = folder
        self.version = 0
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, card: Card) -> Path | None:
        """The thumbnail of an adapter; None while there is none yet, which asks for it."""
        if not card.opened:
            return None  # its turn comes when it was looked at
        path = self.folder / f"{card.sha256}.webp"
        if path.is_file():
            return path
        if card.sha256 not in self._asked:
            self._asked.add(card.sha256)
            self._session.queue.submit(BACKGROUND, lambda: self._make(card, path))
        return None

    def _make(self, card: Card, path: Path) -> None:
        try:
            image = self._beside(card) or self._session.draw(self._settings(card), self._give_way).image
            thumbnail = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE))
            temporary = path.with_suffix(".tmp")
            thumbnail.save(temporary, "webp", quality=80)
            temporary.replace(path)
            self.version += 1
        except _Later:
            self._session.queue.submit(BACKGROUND, lambda: self._make(card, path))
        except DAMAGED:  # which ShiraError is one of
            logger.warning("no thumbnail of %r", card.name, exc_info=True)

    def _give_way(self, done: int, of: int) -> None:
        if self._session.queue.wanted:
            raise _Later

    def _beside(self, card: Card) -> Image.Image | None:
        found = picture_beside(card.path)
        return read_picture(found) if found else None

    def _settings(self, card: Card) -> Settings:
        for prompt in (card.trigger, self._session.suggestions[0]):
            try:
                return self._session.checked(prompt, {card.name: 1.0}, SEED, STEPS, DEFAULT_GUIDANCE)
            except SettingsError:  # no trigger, or one too long for this model
                continue
        raise SettingsError(f"no prompt for a picture of {card.name!r}")


def picture_beside(path: Path) -> Path | None:
    """The picture of a file's name in its folder, its suffix in any case; of several the first kind of ``BESIDE``."""
    key = name_key(path.name)
    files = [file for file in path.parent.iterdir() if file.suffix.lower() in BESIDE and name_key(file.name) == key]
    found = [file for file in files if file.is_file() and not is_hidden(file.name)]
    return min(found, key=lambda file: (file.stem != path.stem, BESIDE.index(file.suffix.lower())), default=None)
