"""Several pictures as files to take away: a labelled sheet, and a zip under names that say what they are."""

import re
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from PIL import Image

from app.history.sheet_picture import sheet_picture
from app.settings.sheets import Sheet

_UNSAFE = re.compile(r'[\x00-\x1f<>:"/\\|?*]+')  # in names of files, on any system
MAX_NAME = 80


def write_zip(pictures: Iterable[tuple[str, Path]], target: Path) -> None:
    """Write PNG files under their labels, numbered in their order; a file that is gone by now is left out.

    PNGs are stored as they are: they are compressed, and carry their settings.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for place, (label, path) in enumerate(pictures, start=1):
            if path.is_file():
                tidy = " ".join(_UNSAFE.sub(" ", label).split())[:MAX_NAME].strip(" .")
                archive.write(path, f"{place:03} {tidy}.png" if tidy else f"{place:03}.png")


def write_sheet(sheet: Sheet, paths: Sequence[Path], folder: Path) -> tuple[Path, Path]:
    """Write the sheet as a picture, and a zip of it and the pictures; returns both files.

    Args:
        paths: of the pictures that were drawn, at least one, in the sheet's order.
        folder: is there.

    Raises:
        OSError: one of the pictures is gone, or the files cannot be written.
    """
    picture, archive = folder / "sheet.png", folder / "pictures.zip"
    with ExitStack() as opened:
        images = [opened.enter_context(Image.open(path)) for path in paths]
        sheet_picture(sheet, images).save(picture)
    labelled = zip((label for label, _ in sheet.cells), paths, strict=False)
    write_zip([*labelled, ("sheet", picture)], archive)
    return picture, archive
