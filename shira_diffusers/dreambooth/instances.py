"""The training pictures of a run: from a folder, or from a data set of the ``datasets`` library."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.pictures import Found, Picture, examine, find_pictures, log_count
from shira_diffusers.errors import ShiraError

logger = logging.getLogger(__name__)

_SPLIT = "train"


def instance_pictures(config: TrainingConfig) -> list[Picture]:
    """The pictures to learn from, each ``repeats`` times.

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
    """The pictures of the training split of a data set, in its order; they are read from its files when needed.

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
        content: bytes = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        return content


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
