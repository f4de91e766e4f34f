"""Pictures that visitors train on: checked, and encoded again, so that nothing else of the uploaded file is kept."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from app.settings.checks import SettingsError
from app.settings.picture_files import FORMATS, problem_of
from shira_diffusers.cli.terminal import printable
from shira_diffusers.dreambooth.picture_folder import is_caption, pair_captions
from shira_diffusers.dreambooth.pictures import read_picture
from shira_diffusers.formats.paths import is_hidden

logger = logging.getLogger(__name__)

MAX_PICTURES = 200
MAX_BYTES = 25 * 2**20  # of a file
MAX_SIDE = 2048  # of what is kept
MAX_CAPTION = 1000  # characters


@dataclass(frozen=True, slots=True)
class Sent:
    """Files as they came: pictures with what the visitor called them, and captions by picture's name.

    Args:
        left: captions of no picture.
    """

    pictures: tuple[tuple[str, Path], ...]
    captions: Mapping[str, str]
    left: tuple[str, ...] = ()


def sort_out(files: Sequence[tuple[str, Path]]) -> Sent:
    """Tell pictures from captions: a ``.txt`` or ``.caption`` is that of the picture of its name.

    Files that systems leave behind, such as ``.DS_Store``, are passed over.

    Raises:
        SettingsError: too many or too large files, or captions that are not UTF-8.
    """
    files = [(name, path) for name, path in files if not _is_left_behind(name)]
    wrong = [name for name, path in files if path.stat().st_size > MAX_BYTES]
    if wrong:
        raise SettingsError(f"{named(wrong)}: larger than {MAX_BYTES // 2**20} MiB per file")
    pictures = tuple((name, path) for name, path in files if not is_caption(os.path.basename(name)))
    if len(pictures) > MAX_PICTURES:
        raise SettingsError(f"expected at most {MAX_PICTURES} pictures, got {len(pictures)}")
    texts = {name: _read_caption(name, path) for name, path in files if is_caption(os.path.basename(name))}
    pairs = pair_captions((name for name, _ in pictures), texts)
    left = tuple(name for name in texts if name not in pairs.values())
    return Sent(pictures, {name: texts[caption] for name, caption in pairs.items()}, left)


def _is_left_behind(name: str) -> bool:
    """Whether the file, or a folder that it was in, is none of the visitor's own."""
    return any(is_hidden(part) for part in Path(name).parts if part not in (".", ".."))


def _read_caption(name: str, path: Path) -> str:
    try:
        return tidy_caption(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SettingsError(f"{named([name])}: expected a caption in UTF-8") from error


def captions_of(sent: Sent) -> list[str]:
    """The caption of each picture, empty where none came with it."""
    return [sent.captions.get(name, "") for name, _ in sent.pictures]


def tidy_caption(text: str) -> str:
    """A caption on one line. Raises SettingsError: it is too long."""
    caption = " ".join(text.split())
    if len(caption) > MAX_CAPTION:
        raise SettingsError(f"a caption is too long: {MAX_CAPTION} characters at most, got {len(caption)}")
    return caption


def require_pictures(sent: Sent) -> None:
    """Require at least one picture, and that all can be read.

    Raises:
        SettingsError: there is none, or names those that cannot be read and why.
    """
    if not sent.pictures:
        raise SettingsError("no pictures to learn from: add some, 5 of a subject or 20 to 70 of a style work well")
    wrong = [f"{_short(name)} ({problem})" for name, path in sent.pictures if (problem := problem_of(path))]
    if wrong:
        raise SettingsError(f"{len(wrong)} of {len(sent.pictures)} files cannot be used: {'; '.join(wrong[:5])}")


def write_pictures(sent: Sent, captions: Sequence[str], folder: Path) -> None:
    """Write each picture as a PNG without metadata and its caption, if it has one, beside it.

    Raises:
        SettingsError: as ``require_pictures``, or more captions than pictures.
    """
    if len(captions) > len(sent.pictures):
        raise SettingsError(f"expected a caption for each picture, got {len(captions)} for {len(sent.pictures)}")
    require_pictures(sent)
    folder.mkdir(parents=True)
    for number, (name, path) in enumerate(sent.pictures):
        notes: list[str] = []
        image = read_picture(path, notes.append, FORMATS)
        for note in notes:
            logger.warning("%s: %s", printable(_short(name)), note)
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        target = folder / f"{number:04d}.png"
        Image.frombytes("RGB", image.size, image.tobytes()).save(target)
        caption = tidy_caption(captions[number]) if number < len(captions) else ""
        if caption:
            target.with_suffix(".txt").write_text(caption, encoding="utf-8")


def _short(name: str) -> str:
    return os.path.basename(name)[:60]


def named(names: Sequence[str]) -> str:
    """Names of files for a sentence, the first five."""
    return ", ".join(map(_short, names[:5]))
