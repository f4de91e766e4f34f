"""Adapters of PEFT's SHiRA tuner, which come as two files: merged into one of ours with what the config says."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from app.library.uploads import UploadError
from shira_diffusers import AdapterMismatchError, ShiraAdapter, ShiraError
from shira_diffusers.formats.peft import PEFT_CONFIG, PEFT_WEIGHTS, decode_peft_for, read_peft_folder
from shira_diffusers.integrations.pipelines import models_of

MAX_CONFIG = 1_000_000  # bytes


def with_config(pipe: Any, weights: Path, config: Path, shown: str) -> ShiraAdapter | None:
    """The adapter of both files, named by component; None if its layers are not in this pipeline.

    Args:
        weights: ``adapter_model.safetensors``, checked to be intact.
        config: ``adapter_config.json``, as it came.
        shown: what the user called it.

    Raises:
        UploadError: no config of PEFT's SHiRA, or weights that are none of PEFT's.
    """
    if config.stat().st_size > MAX_CONFIG:
        raise UploadError(f"the {PEFT_CONFIG} of {shown} is too large: {MAX_CONFIG} bytes at most")
    with tempfile.TemporaryDirectory(dir=weights.parent, prefix=".upload-") as name:
        folder = Path(name)
        shutil.copyfile(config, folder / PEFT_CONFIG)
        shutil.copyfile(weights, folder / PEFT_WEIGHTS)
        try:
            tensors, metadata = read_peft_folder(folder)
            return decode_peft_for(models_of(pipe), tensors, str(folder), metadata)
        except AdapterMismatchError:
            return None
        except (ShiraError, UnicodeDecodeError, RecursionError) as error:
            problem = str(error).partition("\n")[0].replace(f"{folder}/", "").replace(str(folder), shown)
            raise UploadError(f"{shown} and its {PEFT_CONFIG} do not go together: {problem}") from error
