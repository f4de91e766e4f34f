"""SHiRA adapters for diffusers: train 1-2 % of a model's weights, switch and mix the results bit-exactly.

Importing the package adds ``load_shira``, ``set_shira`` and their family to every ``DiffusionPipeline``. On a device
without torch it offers its errors and ``shira_diffusers.edge``, which runs exported models.
Source: Sparse High Rank Adapters, https://arxiv.org/abs/2406.13175.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from shira_diffusers._version import __version__
from shira_diffusers.errors import AdapterFormatError, AdapterMismatchError, ResidentStateError, ShiraError

if find_spec("torch") is not None:
    from shira_diffusers.adapters import MERGE_METHODS, ShiraAdapter, SparseDelta, fuse
    from shira_diffusers.engine import Resident
    from shira_diffusers.formats import convert_lora, load_adapter, save_adapter
    from shira_diffusers.integrations import (
        ShiraAttnProcessor,
        extract_adapter,
        install,
        remove_shira_attn_processors,
        set_shira_attn_processors,
    )
    from shira_diffusers.library import AdapterLibrary
    from shira_diffusers.masks import build_masks
    from shira_diffusers.training import mask_gradients

    install()
elif not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(
                f"shira_diffusers.{name} needs torch and diffusers, which are not installed: install them, or use "
                "shira_diffusers.edge, which needs onnxruntime in their place"
            )
        raise AttributeError(f"module 'shira_diffusers' has no attribute {name!r}")


__all__ = [
    "MERGE_METHODS",
    "AdapterFormatError",
    "AdapterLibrary",
    "AdapterMismatchError",
    "Resident",
    "ResidentStateError",
    "ShiraAdapter",
    "ShiraAttnProcessor",
    "ShiraError",
    "SparseDelta",
    "__version__",
    "build_masks",
    "convert_lora",
    "extract_adapter",
    "fuse",
    "load_adapter",
    "mask_gradients",
    "remove_shira_attn_processors",
    "save_adapter",
    "set_shira_attn_processors",
]


def __dir__() -> list[str]:
    return sorted(__all__)
