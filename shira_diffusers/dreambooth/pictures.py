"""Find and read training pictures: any mode that Pillow opens, upright, in sRGB, with their captions."""

import io
import logging
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from shira_diffusers.dreambooth.color_profiles import Note, flatten, silent
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.picture_folder import FOREIGN, list_pictures, read_captions
from shira_diffusers.errors import ShiraError, counted, listing, verb

logger = logging.getLogger(__name__)

Size = tuple[int, int]
"""Width and height in pixels."""

OnBad = Literal["error", "skip"]

DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, MemoryError, RuntimeError,
    struct.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders and EXIF reader raise on damaged files."""

# formats whose further frames are a film; in others they are pages, or a phone's depth map
_FILMS = {"GIF", "PNG", "WEBP", "AVIF"}


@dataclass(frozen=True, slots=True)
class Picture:
    """A training picture and its prompt.

    Args:
        path: of the file; for a row of a data set, which has none, a name.
        prompt: its caption, or the prompt of all pictures.
        size: of the upright picture.
        content: gives the file's bytes; None reads them from ``path``.
    """

    path: Path
    prompt: str
    size: Size
    content: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)

    def read(self) -> Image.Image:
        """Read the picture, see ``read_picture``."""
        return read_picture(self.path if self.content is None else io.BytesIO(self.content()))


@dataclass(frozen=True, slots=True)
class Found:
    """What may be a picture: a path or name, what to say about it, and how its bytes are read."""

    path: Path
    prompt: str
    content: Callable[[], bytes] | None = None


def find_pictures(folder: str | Path, prompt: str, on_bad: OnBad = "error") -> list[Picture]:
    """Find the pictures of a folder, each with the caption in the ``.txt`` or ``.caption`` of its name, or else
    ``prompt``.

    Logs how many there are and what in the folder was skipped; see ``list_pictures``.

    Args:
        folder: holds the pictures.
        prompt: of those that have no caption.
        on_bad: ``skip`` warns of pictures that cannot be read and goes on without them.

    Raises:
        ShiraError: no such folder, no pictures in it, pictures that cannot be read or captions that are not UTF-8; all
            are named.
    """
    contents = list_pictures(folder)
    if not contents.pictures:
        raise ShiraError(
            f"no pictures in {str(folder)!r}; expected files such as .png, .jpg or .webp{listing(contents.left)}"
        )
    captions = read_captions(contents)
    found = [Found(path, captions.get(path, prompt)) for path in contents.pictures]
    pictures = examine(found, str(folder), on_bad)
    log_count(pictures, sum(picture.path in captions for picture in pictures), str(folder))
    if contents.left:
        logger.warning("skipped in %s:%s", folder, listing(contents.left))
    return pictures


_SPLIT = "train"


def instance_pictures(config: TrainingConfig) -> list[Picture]:
    """Find the pictures to learn from, each ``repeats`` times.

    Raises:
        ShiraError: no such folder or data set, no pictures in it, or pictures that cannot be read.
    """
    if config.dataset_name is not None:
        pictures = dataset_pictures(config, config.dataset_name)
    elif config.instance_data_dir is not None:
        pictures = find_pictures(config.instance_data_dir, config.instance_prompt, config.on_bad_image)
    else:
        raise ShiraError("no training pictures: give instance_data_dir or dataset_name")
    return [picture for picture in pictures for _ in range(config.repeats)]


def dataset_pictures(config: TrainingConfig, name: str) -> list[Picture]:
    """Find the pictures of the training split of a data set, in its order; their bytes are read when needed.

    Args:
        config: the data set's configuration, columns and cache.
        name: an id on the Hub, or a folder, as ``datasets.load_dataset`` takes it.

    Raises:
        ShiraError: ``datasets`` is not installed, the data set cannot be loaded or has no training split, or lacks a
            column of pictures or captions.
    """
    library = _datasets()
    try:
        splits = library.load_dataset(name, config.dataset_config_name, cache_dir=config.cache_dir)
    except (OSError, ValueError, LookupError, RuntimeError, library.exceptions.DatasetsError) as error:
        raise ShiraError(
            f"cannot load the data set {name!r}, expected a Hub id that can be reached, or a folder that "
            f"datasets.load_dataset takes: {error}"
        ) from error
    if _SPLIT not in splits:
        raise ShiraError(f"the data set {name!r} has no split {_SPLIT!r}, but {', '.join(splits)}")
    rows = splits[_SPLIT]
    _require_columns(library, config, name, rows.features)
    if config.caption_column is None:
        logger.info(
            "no --caption_column: every picture gets the instance prompt; columns: %s", ", ".join(rows.features)
        )
    captions = rows[config.caption_column] if config.caption_column else [None] * len(rows)
    rows = rows.cast_column(config.image_column, library.Image(decode=False))
    texts = [" ".join((caption or "").split()) for caption in captions]
    found = [
        Found(
            Path(f"{config.image_column} of row {number}"),
            text or config.instance_prompt,
            Cell(rows, number, config.image_column),
        )
        for number, text in enumerate(texts)
    ]
    if not found:
        raise ShiraError(f"the split {_SPLIT!r} of the data set {name!r} is empty")
    own = {one.path for one, text in zip(found, texts, strict=True) if text}
    pictures = examine(found, f"data set {name!r}", config.on_bad_image)
    log_count(pictures, sum(picture.path in own for picture in pictures), f"data set {name!r}")
    return pictures


@dataclass(frozen=True, slots=True)
class Cell:
    """The bytes of one picture of a data set, which stays on disk."""

    rows: Any
    number: int
    column: str

    def __call__(self) -> bytes:
        """Read them.

        Raises:
            ValueError: the row has no picture.
        """
        value = self.rows[self.number][self.column]
        if value is None:
            raise ValueError("no picture in this row")
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def _require_columns(library: Any, config: TrainingConfig, name: str, features: Any) -> None:
    kinds: list[tuple[str, str | None, Callable[[Any], bool], str]] = [
        ("image_column", config.image_column, lambda kind: isinstance(kind, library.Image), "pictures"),
        ("caption_column", config.caption_column, _is_text, "captions"),
    ]
    wrong = [
        f"{flag} {column!r} "
        + (f"holds {features[column]}, expected {what}" if column in features else "does not exist")
        for flag, column, fits, what in kinds
        if column is not None and not (column in features and fits(features[column]))
    ]
    if wrong:
        hint = "; pictures with .txt captions beside them go with instance_data_dir" if Path(name).is_dir() else ""
        raise ShiraError(f"the data set {name!r} has the columns {', '.join(features)}: {'; '.join(wrong)}{hint}")


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ShiraError("dataset_name needs the datasets library: pip install datasets, or give a folder") from error
    return datasets


def log_count(pictures: Sequence[Picture], captions: int, source: str) -> None:
    """Log how many pictures were found, and how many of them have captions of their own."""
    logger.info("%s, %d with captions, in %s", counted(len(pictures), "picture"), captions, source)


def examine(found: Iterable[Found], source: str, on_bad: OnBad) -> list[Picture]:
    """Read each picture once, to know its size and that it can be read.

    Raises:
        ShiraError: pictures that cannot be read, with ``error``, or if there are no others; all are named.
    """
    pictures, bad, notes = [], [], []
    for one in found:
        messages: list[str] = []
        try:
            size = read_picture(one.path if one.content is None else io.BytesIO(one.content()), messages.append).size
        except DAMAGED as error:
            bad.append(f"{one.path}: {_problem(one.path, error)}")
            continue
        notes += [f"{one.path}: {message}" for message in messages]
        pictures.append(Picture(one.path, one.prompt, size, one.content))
    count = f"{counted(len(bad), 'picture', of=len(bad) + len(pictures))} in {source}"
    if bad and (on_bad == "error" or not pictures):
        remedy = ", or skip them with --on_bad_image skip" if pictures else ""
        them = verb(len(bad), "it", "them")
        raise ShiraError(f"{count} cannot be read; repair or remove {them}{remedy}:{listing(bad, shown=len(bad))}")
    if bad:
        are = verb(len(bad), "is", "are")
        logger.warning("%s cannot be read and %s skipped:%s", count, are, listing(bad, shown=len(bad)))
    if notes:
        logger.warning("used from %s anyway:%s", source, listing(notes))
    return pictures


def _problem(path: Path, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels, save it smaller"
    if "MAX_TEXT_CHUNK" in str(error):
        return "its texts or colour profile are larger than a megabyte, save it without metadata"
    if path.suffix.lower() in FOREIGN and isinstance(error, UnidentifiedImageError):
        return f"{path.suffix} is not read here, save it as .png or .jpg"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def read_picture(file: Path | BinaryIO, note: Note = silent, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Open a picture of any mode as RGB: upright by its EXIF orientation, in sRGB by its embedded colour profile,
    transparent parts white, the first of many.

    Args:
        file: a path, or a file that is open in binary mode.
        note: called with what a user may want to know about a picture that is read anyway.
        formats: Pillow's names of those to accept; None for all.

    Raises:
        OSError: not a picture, or a damaged one; for some damage Pillow raises another of ``DAMAGED``.
    """
    with Image.open(file, formats=formats) as opened:
        if opened.format in _FILMS and note is not silent and getattr(opened, "is_animated", False):
            note("it is animated: its first frame is used")
        return flatten(ImageOps.exif_transpose(opened), note)
