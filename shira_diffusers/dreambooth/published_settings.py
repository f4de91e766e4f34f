"""Settings as they may be published: names of folders and files in place of paths on the user's machine."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from shira_diffusers.dreambooth.config import TrainingConfig

_PATHS = {
    "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "instance_data_dir", "dataset_name",
    "cache_dir", "class_data_dir", "output_dir", "logging_dir", "avoid_adapters", "resume_from_checkpoint",
    "resume_from_adapter",
}  # fmt: skip


def public_name(path: str) -> str:
    """Reduce a path that leads out of the working directory to its last part; Hub ids and paths inside it stay.

    ``/home/me/models/sd15`` and ``../models/sd15`` become ``sd15``; ``org/sd15`` and ``assets/sd15`` stay.
    """
    absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive or path.startswith("~")
    if not absolute and ".." not in PurePosixPath(path).parts:
        return path
    return PureWindowsPath(path).name if PureWindowsPath(path).drive else Path(path).resolve().name or path


def public_settings(config: TrainingConfig) -> Mapping[str, Any]:
    """Return all settings but secrets by name, with ``public_name`` in place of paths."""
    names = [setting.name for setting in fields(config) if not setting.metadata.get("secret")]
    return {name: _public(getattr(config, name)) if name in _PATHS else getattr(config, name) for name in names}


def _public(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(public_name, value))
    return value if value is None else public_name(value)
