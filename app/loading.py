"""A pipeline from a folder or the Hub, on its device."""

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from shira_diffusers import ShiraError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Dtype = Literal["float32", "float16", "bfloat16"]


def load_pipeline(base: str, device: str = "cpu", dtype: Dtype = "float32") -> Any:
    """Load a pipeline.

    Args:
        base: a folder, or a Hub id.
        device: as torch names it.
        dtype: of the weights.

    Raises:
        ShiraError: no such folder, no pipeline in it, or no such device.
    """
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ShiraError(f"no folder of a pipeline at {base}; name one with --base")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer diffusers call it dtype, older ones do not know that
            pipe = DiffusionPipeline.from_pretrained(base, torch_dtype=DTYPES[dtype])
    except (OSError, ValueError) as error:
        raise ShiraError(
            f"cannot load a pipeline from {base!r}, expected a diffusers folder or a Hub id; "
            f"name one with --base ({error})"
        ) from error
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        raise ShiraError(f"cannot use the device {device!r}; name another with --device ({error})") from error
