"""Folders as people have them: what counts as a picture or a caption, and what is said about the rest."""

import logging
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from shira_diffusers import ShiraError
from shira_diffusers.dreambooth.picture_folder import is_caption, is_picture, list_pictures
from shira_diffusers.dreambooth.pictures import Picture, find_pictures
from shira_diffusers.formats.paths import is_hidden

SIDE = (".DS_Store", "Thumbs.db", "desktop.ini", "._a.png", ".hidden.jpg")
SIDE_FOLDERS = (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    place.mkdir()
    return place


def draw(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((8, 8), 50).save(path, "png")


def litter(folder: Path) -> None:
    """What systems and tools leave behind."""
    for name in SIDE:
        (folder / name).write_bytes(b"\0\0\0\1Bud1")
    for name in SIDE_FOLDERS:
        draw(folder / name / "left.png")


def prompts(found: list[Picture]) -> dict[str, str]:
    return {picture.path.name: picture.prompt for picture in found}


# -------------------------------------------------------------------- captions


def test_captions_of_every_suffix(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(*(folder / name for name in ("a.png", "b.png", "c.PNG", "d.png", "e.jpg")))
    for name in ("a.caption", "b.TXT", "c.Caption", "d.txt"):
        (folder / name).write_text(f"words of {name}", encoding="utf-8")
    with caplog.at_level(logging.INFO):
        found = prompts(find_pictures(folder, "x"))
    assert found == {
        "a.png": "words of a.caption", "b.png": "words of b.TXT", "c.PNG": "words of c.Caption",
        "d.png": "words of d.txt", "e.jpg": "x",
    }  # fmt: skip
    assert f"5 pictures, 4 with captions, in {folder}" in caplog.text
    assert "skipped in" not in caplog.text


@pytest.mark.parametrize(("picture", "caption"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_either_unicode_form(folder: Path, picture: str, caption: str) -> None:
    draw(folder / (unicodedata.normalize(picture, "Kätzchen é") + ".png"))
    (folder / (unicodedata.normalize(caption, "Kätzchen é") + ".txt")).write_text("a cat", encoding="utf-8")
    (found,) = find_pictures(folder, "x")
    assert found.prompt == "a cat"


def test_names_match_in_any_case_but_the_own_spelling_first(folder: Path) -> None:
    draw(folder / "One.png", folder / "two.png", folder / "TWO.png")
    for name in ("one.txt", "two.txt", "TWO.txt"):
        (folder / name).write_text(name, encoding="utf-8")
    assert prompts(find_pictures(folder, "x")) == {"One.png": "one.txt", "two.png": "two.txt", "TWO.png": "TWO.txt"}


def test_txt_goes_before_caption_and_the_other_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(folder / "a.png")
    (folder / "a.txt").write_text("by hand", encoding="utf-8")
    (folder / "a.caption").write_text("by a machine", encoding="utf-8")
    assert prompts(find_pictures(folder, "x")) == {"a.png": "by hand"}
    assert "a.caption: no picture takes it for its caption" in caplog.text


def test_what_is_left_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(folder / "a.png", folder / "10_sks dog" / "b.png", folder / "10_sks dog" / "c.JPG", folder / "empty" / "x.md")
    draw(folder / "deep" / "d.png")
    for name in ("lonely.txt", "a.png.caption", "notes.md", "film.mpg", "raw.CR2"):
        (folder / name).write_text("words", encoding="utf-8")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "words"}', encoding="utf-8")
    litter(folder)
    with caplog.at_level(logging.INFO):
        find_pictures(folder, "x")
    assert f"1 picture, 0 with captions, in {folder}" in caplog.text
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert set(warning.splitlines()[1:]) == {
        "  - a.png.caption: no picture takes it for its caption",
        "  - lonely.txt: no picture takes it for its caption",
        "  - film.mpg: not a picture by its name",
        "  - notes.md: not a picture by its name",
        "  - raw.CR2: not a picture by its name",
        f"  - metadata.jsonl: tables of captions are read with --dataset_name {folder} and --caption_column",
        f"  - 10_sks dog{os.sep}: 2 pictures in a sub-folder",
        f"  - deep{os.sep}: 1 picture in a sub-folder",
    }


def test_pictures_in_sub_folders_alone_are_an_error_that_names_them(folder: Path) -> None:
    draw(folder / "10_sks dog" / "a.png")
    with pytest.raises(ShiraError, match=r"no pictures in (.|\n)*10_sks dog.: 1 picture in a sub-folder"):
        find_pictures(folder, "x")


def test_captions_that_cannot_be_read_are_all_named(folder: Path) -> None:
    draw(folder / "a.png", folder / "b.png")
    (folder / "a.txt").symlink_to(folder / "missing")
    (folder / "b.txt").write_bytes(b"\xff")
    with pytest.raises(ShiraError, match=r"2 captions(.|\n)*a.txt: No such file(.|\n)*b.txt: byte 0xff at 0"):
        find_pictures(folder, "x")


# -------------------------------------------------------------------- pictures


def test_side_files_are_no_pictures(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    litter(folder)
    assert list_pictures(folder).pictures == ()
    draw(folder / "a.png")
    assert [picture.path.name for picture in find_pictures(folder, "x")] == ["a.png"]
    assert not caplog.records
    assert all(map(is_hidden, (*SIDE, *SIDE_FOLDERS)))
    assert not any(is_picture(name) or is_caption(name) for name in (*SIDE, "._a.txt", ".a.caption"))


def test_links_are_followed_and_broken_ones_named(folder: Path, tmp_path: Path) -> None:
    draw(tmp_path / "store" / "0a1b")
    (folder / "a.png").symlink_to(tmp_path / "store" / "0a1b")
    assert [picture.size for picture in find_pictures(folder, "x")] == [(8, 8)]
    (folder / "b.png").symlink_to(tmp_path / "missing")
    (folder / "c.png").symlink_to(folder / "c.png")  # to itself
    with pytest.raises(ShiraError, match=r"2 of 3 pictures(.|\n)*b.png: No such file or directory(.|\n)*c.png: "):
        find_pictures(folder, "x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_what_is_no_file_is_not_opened(folder: Path) -> None:
    """Reading a named pipe would wait for ever."""
    draw(folder / "a.png")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "a.txt")
    assert prompts(find_pictures(folder, "x")) == {"a.png": "x"}


def test_films_say_that_one_frame_is_taken(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for name in ("a.gif", "b.webp", "c.png"):
        first.save(folder / name, save_all=True, append_images=[second], duration=100)
    first.save(folder / "pages.tiff", save_all=True, append_images=[second])
    first.save(folder / "still.gif")
    found = find_pictures(folder, "x")
    for picture in found:
        red, _, blue = picture.read().getpixel((4, 4))  # type: ignore[misc]
        assert red > 240 > 15 > blue
    for name in ("a.gif", "b.webp", "c.png"):
        assert f"{folder / name}: it is animated: its first frame is used" in caplog.text
    assert "still.gif" not in caplog.text and "pages.tiff" not in caplog.text


def test_pictures_too_large_for_pillow_say_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (3000, 1500)).save(folder / "big.png")
    draw(folder / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)
    with pytest.raises(ShiraError, match=r"1 of 2(.|\n)*big.png: more than 4 million pixels, save it smaller"):
        find_pictures(folder, "x")


def test_a_folder_that_cannot_be_listed_is_an_error_of_ours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)  # tests may run as root, whom no permission stops
    with pytest.raises(ShiraError, match="cannot be read: Permission denied"):
        list_pictures(folder)
