"""What a folder of pictures holds: pictures, their captions, and what is neither, by their names alone."""

import os
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath

from PIL import Image

from shira_diffusers.errors import ShiraError, counted, listing, verb
from shira_diffusers.formats.paths import is_hidden, shown_in

CAPTIONS = (".txt", ".caption")
"""Suffixes of captions; where a picture has both, the first is taken."""

# pictures that not every Pillow opens: an error that names them beats skipping them silently
FOREIGN = frozenset({".heic", ".heif", ".avif", ".jxl", ".webp"})
# formats that Pillow identifies but cannot decode: films, tables of numbers
_STUBS = {"BUFR", "GRIB", "HDF5", "MPEG"}
_TABLES = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}


def is_picture(name: str) -> bool:
    """Whether a file of this name should be a picture, by its suffix in any case."""
    return not is_hidden(name) and PurePath(name).suffix.lower() in _suffixes()


def is_caption(name: str) -> bool:
    """Whether a file of this name may be a caption, by its suffix in any case."""
    return not is_hidden(name) and PurePath(name).suffix.lower() in CAPTIONS


@cache
def _suffixes() -> frozenset[str]:
    formats = Image.registered_extensions()
    return FOREIGN | {suffix for suffix, kind in formats.items() if kind in Image.OPEN and kind not in _STUBS}


def name_key(name: str) -> str:
    """Normalize a file name: no suffix, one case, one Unicode form (macOS decomposes ``ä``, others do not)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", PurePath(name).stem).casefold())


def pair_captions(pictures: Iterable[str], captions: Iterable[str]) -> dict[str, str]:
    """Pair pictures with their captions by file names.

    Names match by ``name_key``. Of several captions that match, the one in the picture's own spelling is taken, then
    ``.txt``.
    """
    found: dict[str, list[str]] = {}
    for caption in captions:
        found.setdefault(name_key(caption), []).append(caption)

    def rank(picture: str, caption: str) -> tuple[bool, int, str]:
        own = PurePath(caption).stem == PurePath(picture).stem
        return not own, CAPTIONS.index(PurePath(caption).suffix.lower()), caption

    candidates = {picture: found.get(name_key(picture), []) for picture in pictures}
    return {
        picture: min(those, key=lambda caption: rank(picture, caption))
        for picture, those in candidates.items()
        if those
    }


@dataclass(frozen=True, slots=True)
class Contents:
    """What a folder holds.

    Args:
        pictures: files that are pictures by their names, in order.
        captions: files with the captions of those that have one.
        left: all else but hidden files, each with the reason why it is skipped.
    """

    pictures: tuple[Path, ...]
    captions: Mapping[Path, Path]
    left: tuple[str, ...]


def list_pictures(folder: str | Path) -> Contents:
    """List the pictures of a folder by their names, without sub-folders. Opens no file.

    Raises:
        ShiraError: no such folder, or one that cannot be read.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ShiraError(f"no folder of pictures at {str(folder)!r}; expected a folder, check the path")
    try:
        entries = shown_in(place)
    except OSError as error:
        raise ShiraError(f"the folder of pictures {str(folder)!r} cannot be read: {error.strerror}") from error
    files = [path for path in entries if not path.is_dir() and (path.is_file() or path.is_symlink())]
    pictures = [path for path in files if is_picture(path.name)]
    captions = [path for path in files if is_caption(path.name)]
    pairs = pair_captions([path.name for path in pictures], [path.name for path in captions])
    taken = {*pictures, *(place / name for name in pairs.values())}
    left = [_why_left(path) for path in files if path not in taken]
    left += [message for path in entries if path.is_dir() and (message := _within(path))]
    return Contents(tuple(pictures), {place / name: place / caption for name, caption in pairs.items()}, tuple(left))


def _why_left(path: Path) -> str:
    if is_caption(path.name):
        return f"{path.name}: no picture takes it for its caption"
    if path.name.lower() in _TABLES:
        return f"{path.name}: tables of captions are read with --dataset_name {path.parent} and --caption_column"
    return f"{path.name}: not a picture by its name"


def _within(folder: Path) -> str:
    """What to say about a folder in the folder; nothing if no pictures are in it."""
    count = 0
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        count += sum(map(is_picture, files))
    return f"{folder.name}{os.sep}: {counted(count, 'picture')} in a sub-folder" if count else ""


def read_captions(contents: Contents) -> dict[Path, str]:
    """Read each picture's caption as one line; pictures with an empty caption are left out.

    Raises:
        ShiraError: captions that are not UTF-8 or cannot be read; all are named.
    """
    texts, bad = {}, []
    for picture, file in contents.captions.items():
        try:
            texts[picture] = " ".join(file.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            bad.append(f"{file}: byte {error.object[error.start]:#04x} at {error.start}")
        except OSError as error:
            bad.append(f"{file}: {error.strerror}")
    if bad:
        raise ShiraError(
            f"{counted(len(bad), 'caption')} {verb(len(bad), 'is', 'are')} not UTF-8 that can be read; save "
            f"{verb(len(bad), 'it', 'them')} as UTF-8:{listing(bad, shown=len(bad))}"
        )
    return {picture: text for picture, text in texts.items() if text}
