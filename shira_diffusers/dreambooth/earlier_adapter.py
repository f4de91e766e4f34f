"""Going on from an earlier adapter: its entries are trained further, from its values."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.engine.resident import Resident
from shira_diffusers.errors import AdapterMismatchError, ShiraError
from shira_diffusers.formats.shira_file import load_adapter
from shira_diffusers.training.tuner import SparseTuner

_KEPT = ("mask", "mask_budget", "mask_seed", "targets")  # metadata on the entries, which stay the earlier adapter's


def read_earlier(config: TrainingConfig) -> ShiraAdapter | None:
    """Read the adapter of ``resume_from_adapter``; None where none is given.

    Raises:
        ShiraError: no adapter there, or one of another density.
    """
    if config.resume_from_adapter is None:
        return None
    adapter = load_adapter(config.resume_from_adapter)
    told = adapter.metadata.get("density") == f"{config.density:g}"
    if not told and not math.isclose(adapter.density, config.density, rel_tol=0.05):  # masks have whole numbers
        raise ShiraError(
            f"the adapter {config.resume_from_adapter!r} has density {adapter.density:.2g}, got --density "
            f"{config.density:g}: it is gone on from with its own entries, so give --density {adapter.density:.2g}"
        )
    return adapter


def require_fit(adapter: ShiraAdapter, models: Mapping[str, nn.Module], config: TrainingConfig) -> None:
    """Require that an earlier adapter was trained on this base, and changes only what is trained.

    Raises:
        AdapterMismatchError: it was not; it changes other components; or its weights have other names or shapes.
    """
    file, base = config.resume_from_adapter, config.pretrained_model_name_or_path
    if others := [part for part in adapter.component_names() if part not in models]:
        remedy = "add --train_text_encoder" if others[0].startswith("text_encoder") else "take its own base"
        raise AdapterMismatchError(
            f"the adapter {file!r} changes {', '.join(others)}, expected {', '.join(models)} alone: {remedy}"
        )
    if Resident(models).check(adapter) in ("sibling", "other"):
        named = adapter.metadata.get("base_model", "unknown")
        raise AdapterMismatchError(
            f"the adapter {file!r} was trained on another base ({named!r}) than {base!r}: go on from it on its own base"
        )


def start_from(tuner: SparseTuner, adapter: ShiraAdapter) -> None:
    """Start a tuner, whose masks are the adapter's, from the adapter's values."""
    masks = tuner.masks
    deltas = torch.cat([adapter.deltas[name].values.float() for name in masks])
    tuner.load_state_dict({"deltas": deltas, "masks": masks})


def inherited(adapter: ShiraAdapter) -> dict[str, str]:
    """Return the metadata that an adapter takes over from the earlier one."""
    return {name: adapter.metadata[name] for name in _KEPT if name in adapter.metadata}
