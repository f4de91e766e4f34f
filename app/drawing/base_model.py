"""A pipeline from a folder or the Hub, on its device."""

from typing import Any, Literal

import torch

from shira_diffusers import ShiraError
from shira_diffusers.cli.base_model import open_pipeline

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Dtype = Literal["float32", "float16", "bfloat16"]


def load_pipeline(base: str, device: str = "cpu", dtype: Dtype = "float32") -> Any:
    """Load a pipeline.

    Args:
        base: a folder, or a Hub id ``owner/name``.
        device: as torch names it.
        dtype: of the weights.

    Raises:
        ShiraError: there is none, it cannot be loaded, or no such device.
    """
    pipe = open_pipeline(base, DTYPES[dtype])
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        raise ShiraError(f"cannot use the device {device!r}; name another with --device ({error})") from error
