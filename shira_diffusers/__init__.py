"""SHiRA adapters for diffusers: train 1-2 % of a model's weights, switch and mix the results bit-exactly.

Importing the package adds ``load_shira``, ``set_shira`` and their family to every ``DiffusionPipeline``.
Source: Sparse High Rank Adapters, https://arxiv.org/abs/2406.13175.
"""

from shira_diffusers._version import __version__
from shira_diffusers.adapter import ShiraAdapter
from shira_diffusers.attention import (
    ShiraAttnProcessor,
    remove_shira_attn_processors,
    set_shira_attn_processors,
)
from shira_diffusers.delta import SparseDelta
from shira_diffusers.errors import AdapterFormatError, AdapterMismatchError, ResidentStateError, ShiraError
from shira_diffusers.files import load_adapter, save_adapter
from shira_diffusers.fuse import MERGE_METHODS, fuse
from shira_diffusers.gradients import mask_gradients
from shira_diffusers.library import AdapterLibrary
from shira_diffusers.masks import build_masks
from shira_diffusers.pipeline import install
from shira_diffusers.resident import Resident

install()

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
    "fuse",
    "load_adapter",
    "mask_gradients",
    "remove_shira_attn_processors",
    "save_adapter",
    "set_shira_attn_processors",
]


def __dir__() -> list[str]:
    return sorted(__all__)
