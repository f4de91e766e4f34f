"""Sheets and zips to take away: where pictures and labels stand, and what the files are called."""

import zipfile
from pathlib import Path

from PIL import Image, ImageChops

from app.history.archive import write_sheet, write_zip
from app.history.history import History
from app.history.sheet_picture import MOST, PAD, sheet_picture
from app.settings.axes import Axis, sheet_of
from app.settings.picture import Picture
from app.settings.series import prompt_series
from app.settings.settings import Settings

SETTINGS = Settings.checked("a red cat", {}, 7, 20, 3)
RED, BLUE = (Image.new("RGB", (64, 48), color) for color in ("red", "blue"))


def written(image: Image.Image, box: tuple[int, int, int, int]) -> bool:
    """Whether there is anything but paper in a part of a sheet."""
    part = image.crop(box)
    return ImageChops.difference(part, Image.new("RGB", part.size, "white")).getbbox() is not None


def test_pictures_stand_in_rows_and_columns_under_labels() -> None:
    sheet = sheet_of(SETTINGS, [Axis.checked("seed", [1, 2]), Axis.checked("steps", [3, 4])])
    image = sheet_picture(sheet, [RED, BLUE, BLUE, RED])
    colors = [image.crop((0, top, image.width, top + 1)).getcolors(99) or [] for top in range(image.height)]
    rows = [top for top, found in enumerate(colors) if {color for _, color in found} >= {(255, 0, 0), (0, 0, 255)}]
    assert len(rows) == 2 * 48
    left = min(x for x in range(image.width) if image.getpixel((x, rows[0])) == (255, 0, 0))
    assert image.getpixel((left + 64 + PAD, rows[0])) == (0, 0, 255) == image.getpixel((left, rows[-1]))
    assert written(image, (left, 0, image.width, rows[0] - PAD))  # columns
    assert written(image, (0, rows[0], left - PAD, rows[0] + 20))  # rows


def test_of_a_sheet_that_was_stopped_what_was_drawn_is_shown() -> None:
    sheet = prompt_series(SETTINGS, ["a cat", "a dog", "an owl"], 2)
    assert sheet_picture(sheet, [RED] * 3).height < sheet_picture(sheet, [RED] * 6).height
    z = sheet_of(SETTINGS, [Axis.checked(kind, [1, 2]) for kind in ("seed", "steps", "guidance")])
    assert sheet_picture(z, [RED] * 4).height < sheet_picture(z, [RED] * 5).height


def test_a_sheet_of_large_pictures_is_not_larger_than_a_screen_can_show() -> None:
    sheet = sheet_of(SETTINGS, [Axis.checked("seed", "1 to 8 (8)")])
    image = sheet_picture(sheet, [Image.new("RGB", (1024, 1024), "red")] * 8)
    assert MOST < image.width < MOST + 10 * PAD and image.height < 1000


def test_a_zip_has_the_sheet_and_the_pictures_with_their_settings(tmp_path: Path) -> None:
    history = History(tmp_path / "history")
    sheet = prompt_series(SETTINGS, ['a "red/cat"', "x" * 200], 1)
    paths = [
        history.add(Picture(image, settings.as_dict())).path
        for image, (_, settings) in zip((RED, BLUE), sheet.cells, strict=True)
    ]
    picture, archive = write_sheet(sheet, paths, tmp_path)
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        assert names == ["001 a red cat · seed 7.png", f"002 {'x' * 80}.png", "003 sheet.png"]
        assert opened.read(names[0]) == paths[0].read_bytes() and opened.read(names[2]) == picture.read_bytes()
        assert opened.testzip() is None
    write_zip([("..", tmp_path / "gone.png"), ("", paths[0])], archive)
    with zipfile.ZipFile(archive) as opened:
        assert opened.namelist() == ["002.png"]
