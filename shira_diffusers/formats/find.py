"""Find an adapter's file on this machine: by its own name, or in a folder, as written by us or by PEFT."""

import os
from collections.abc import Iterable
from pathlib import Path

from shira_diffusers.formats.paths import SUFFIX, did_you_mean, shown_in

WEIGHTS_NAME = "pytorch_shira_weights.safetensors"
LORA_NAME = "pytorch_lora_weights.safetensors"  # of diffusers' save_lora_weights
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_peft_folder(path: Path) -> bool:
    """Whether a folder was written by PEFT's ``save_pretrained``."""
    return path.is_dir() and (path / PEFT_CONFIG).is_file()


def file_to_write(target: Path) -> Path:
    """The file that a name for an adapter means: itself, or the default one in a folder of that name."""
    return target if target.suffix.lower() == SUFFIX else target / WEIGHTS_NAME


def safetensors_in(folder: Path) -> list[Path]:
    """The ``.safetensors`` files that a folder shows, sorted; none where there is no such folder.

    Hidden ones are left out, such as the side files ``._NAME.safetensors`` that macOS makes. The suffix counts in any
    case, but beside ``NAME.safetensors`` another spelling of it does not.
    """
    return safetensors_among(shown_in(folder))


def safetensors_among(shown: Iterable[Path]) -> list[Path]:
    """Those of the paths of a folder that ``safetensors_in`` lists."""
    files = [path for path in shown if path.suffix.lower() == SUFFIX and os.path.isfile(path)]
    usual = {path.stem for path in files if path.suffix == SUFFIX}
    return [path for path in files if path.suffix == SUFFIX or path.stem not in usual]


def find_local(path: Path, weight_name: str | None = None) -> Path:
    """The adapter file, or the folder that PEFT wrote, that a path means.

    Args:
        weight_name: a name inside the folder ``path``.

    Raises:
        FileNotFoundError: as ``find_file``.
    """
    if weight_name and path.is_dir():
        path = path / weight_name
    if is_peft_folder(path) and not (path / WEIGHTS_NAME).is_file():
        return path
    return find_file(path)


def find_lora(path: Path) -> Path:
    """The LoRA file that a path means: itself or one in a folder; of PEFT's, the folder with its config.

    Raises:
        FileNotFoundError: there is none, or several.
    """
    folder = path.parent if path.name == PEFT_WEIGHTS else path
    return folder if is_peft_folder(folder) else find_file(path, LORA_NAME)


def find_file(path: Path, usual: str = WEIGHTS_NAME) -> Path:
    """The adapter file that ``path`` means: itself, or the one in a folder, which may have a usual name.

    Raises:
        FileNotFoundError: there is none, or several.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"no adapter at {path}: expected a .safetensors file or a folder that holds one{did_you_mean(path)}"
        )
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a file nor a folder, expected one of them; name an adapter file")
    if (path / usual).is_file():
        return path / usual
    files = safetensors_in(path)
    if len(files) == 1:
        return files[0]
    names = ", ".join(file.name for file in files) or "none"
    raise FileNotFoundError(
        f"folder {path} has no {usual}; expected it or a single .safetensors file, got {names}; name the file"
    )
