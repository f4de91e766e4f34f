"""Open a base pipeline for the command line, and take the fingerprints of its weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from shira_diffusers.integrations.open_pipeline import open_pipeline

__all__ = ["fingerprints", "open_pipeline"]


def fingerprints(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """A hash of the bits of every parameter, by ``component.name``: less memory than a copy of the weights."""
    found: dict[str, str] = {}
    for part, model in models.items():
        for name, parameter in model.named_parameters():
            raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            found[f"{part}.{name}"] = hashlib.blake2b(raw.data, digest_size=16).hexdigest()
    return found
