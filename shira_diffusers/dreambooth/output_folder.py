"""Where a run writes, checked before it begins: nothing is created here."""

import logging
import shutil
import tempfile
from pathlib import Path

from shira_diffusers.dreambooth.checkpoints import list_checkpoints, require_only_checkpoints
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.model_card import CARD_NAME
from shira_diffusers.errors import AdapterFormatError, ShiraError, listing
from shira_diffusers.formats.inspect import inspect_adapter
from shira_diffusers.formats.shira_file import WEIGHTS_NAME

logger = logging.getLogger(__name__)

_ENTRY = 4  # bytes of an entry in an adapter's file, at most about
_ENTRY_SAVED = 20  # in a checkpoint: delta and two moments in float32, index, and the adapter


def require_outputs(config: TrainingConfig) -> None:
    """Refuse a run that could not write its results.

    Raises:
        ShiraError: a folder that cannot be written into or is a file, or something in the way of a file, all of it; or
            an adapter of another prompt that would be replaced, and of which there are no checkpoints.
    """
    output = Path(config.output_dir)
    wrong = _unwritable("output_dir", output)
    if config.with_prior_preservation and config.class_data_dir:
        wrong += _unwritable("class_data_dir", Path(config.class_data_dir))
    if not wrong:
        files = [output / WEIGHTS_NAME, output / CARD_NAME]
        folders = [output / "validation"] if config.validation_prompt else []
        folders += [output / config.logging_dir] if config.report_to != "none" else []
        wrong += [
            f"{path} is a folder, expected to write a file there: move it away" for path in files if path.is_dir()
        ]
        wrong += [
            f"{path} is a file, expected a folder: move it away"
            for path in folders
            if path.exists() and not path.is_dir()
        ]
    if wrong:
        raise ShiraError(f"the results could not be written; nothing was trained:{listing(wrong)}")
    require_only_checkpoints(output)
    if not list_checkpoints(output):
        _require_no_other_adapter(output, config.instance_prompt)


def _require_no_other_adapter(output: Path, prompt: str) -> None:
    try:
        was = inspect_adapter(output / WEIGHTS_NAME).metadata.get("instance_prompt")
    except (FileNotFoundError, AdapterFormatError):
        return  # no adapter
    if was != prompt:
        raise ShiraError(
            f"{output} holds {WEIGHTS_NAME} of another run, with instance_prompt {was!r}, got {prompt!r}; it would be "
            "replaced: move it away, or choose another --output_dir"
        )


def _unwritable(flag: str, folder: Path) -> list[str]:
    """Why no file can be made in a folder, or the folder itself where it is not there; nothing if all is well."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not place.is_dir():
        return [f"--{flag} {str(folder)!r}: {place} is not a folder; choose another"]
    try:
        with tempfile.TemporaryFile(dir=place):
            return []
    except OSError as error:
        return [f"--{flag} {str(folder)!r}: cannot write into {place}: {error.strerror or error}; choose another"]


def require_room(output: Path, entries: int, checkpoints: int) -> None:
    """Refuse a run whose adapter does not fit on the disk; warn where it fits, but not with its checkpoints.

    Args:
        entries: that are trained.
        checkpoints: that will be kept.

    Raises:
        ShiraError: the adapter does not fit.
    """
    place = next(path for path in (output, *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < entries * _ENTRY:
        raise ShiraError(
            f"the disk of {output} has {_mib(free)} left, and the adapter needs about {_mib(entries * _ENTRY)}; make "
            "room, lower --density, or choose another --output_dir"
        )
    needed = entries * (_ENTRY + checkpoints * _ENTRY_SAVED)
    if free < needed:
        logger.warning(
            "the disk of %s has %s left, and adapter and checkpoints (%d) need about %s; make room, or lower "
            "--checkpoints_total_limit", output, _mib(free), checkpoints, _mib(needed)
        )  # fmt: skip


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
