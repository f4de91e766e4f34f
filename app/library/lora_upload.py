"""LoRAs that visitors send: converted to adapters, with or without the config that PEFT wrote beside them."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from app.library.cards import one_sentence
from app.library.peft_upload import MAX_CONFIG
from app.library.uploads import UploadError
from shira_diffusers import ShiraAdapter, ShiraError, convert_lora
from shira_diffusers.cli.convert import CALIBRATION_PROMPTS, calibration_of
from shira_diffusers.formats.peft import PEFT_CONFIG, PEFT_WEIGHTS

DENSITY = 0.02


def converted(pipe: Any, weights: Path, config: Path | None, shown: str) -> ShiraAdapter:
    """A LoRA as an adapter of 2 % of the entries, calibrated on a few pictures; its metadata says how much that keeps.

    Args:
        pipe: what it is for. Nobody draws meanwhile.
        weights: the LoRA's file, whose header was checked.
        config: ``adapter_config.json``, of PEFT's.
        shown: what the user called it.

    Raises:
        UploadError: a LoRA of another model, or one that cannot be read.
    """
    if config and config.stat().st_size > MAX_CONFIG:
        raise UploadError(f"the {PEFT_CONFIG} of {shown} is too large: {MAX_CONFIG} bytes at most")
    with tempfile.TemporaryDirectory(dir=weights.parent, prefix=".upload-") as name:
        source = weights
        if config:
            source = Path(name)
            shutil.copyfile(weights, source / PEFT_WEIGHTS)
            shutil.copyfile(config, source / PEFT_CONFIG)
        try:
            draw = calibration_of(pipe, CALIBRATION_PROMPTS)
            found = convert_lora(source, pipe, DENSITY, calibration=draw, dtype=torch.float16)
        except (ShiraError, UnicodeDecodeError, RecursionError) as error:
            raise UploadError(one_sentence(error).replace(str(source), shown)) from error
    return found.adapter.with_metadata(lora=shown)
