"""Find the model of a pipeline that is called at each denoising step."""

from typing import Any

from torch import nn

_DENOISERS = ("unet", "transformer")


def denoiser_of(pipe: Any) -> tuple[str, nn.Module] | None:
    """A pipeline's denoiser, compiled or not, with its component's name; None where it has none that is known."""
    name = next((name for name in _DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)), None)
    return None if name is None else (name, getattr(pipe, name))
