"""All targeted weights as one vector, so that an adapter is one vector beside it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shira_diffusers.weights.targets import named_weights, select

SMALL = "+small"

TARGETS: dict[str, str | list[str]] = {
    "all": "all",
    "attention+ff": "attention+ff",
    "cross": ["*attn2.to_*"],
    "linear": "all-linear",
    "up": ["up_blocks.*", "conv_out"],
    "mid+up": ["mid_block.*", "up_blocks.*", "conv_out"],
    "outer": ["conv_in", "conv_out", "time_embedding.*", "down_blocks.0.*", "up_blocks.2.*"],
    "resnets": ["*resnets.*", "conv_in", "conv_out", "*samplers.*"],
}
"""By name: what `weights.targets.select` takes. `SMALL` behind one adds norms and biases; alone it is those."""


@dataclass(frozen=True)
class Layout:
    """Where each parameter of a UNet lies in the vector of all; those of one dimension come last."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, unet: nn.Module) -> "Layout":
        parameters = named_weights(unet, every=True)
        names = sorted(parameters, key=lambda name: (parameters[name].ndim == 1, parameters[name].numel() % 8 > 0))
        return cls(tuple(names), tuple(parameters[name].shape for name in names))

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    @property
    def numel(self) -> int:
        return sum(self.sizes)

    def spans(self) -> Iterator[tuple[str, torch.Size, int]]:
        """Name, shape and start of each weight."""
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            yield name, shape, start
            start += shape.numel()

    def flat(self, unet: nn.Module) -> Tensor:
        """A UNet's parameters, float32 ``[numel]``."""
        weights = named_weights(unet, every=True)
        return torch.cat([weights[name].float().flatten() for name in self.names])

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector of all weights -> weights by name; gradients come back as one vector."""
        parts = flat.split(self.sizes)
        return {name: part.view(shape) for name, shape, part in zip(self.names, self.shapes, parts, strict=True)}

    def chosen(self, unet: nn.Module, targets: str) -> list[bool]:
        """Which weights `targets` of `TARGETS` names."""
        large = targets.removesuffix(SMALL) if targets != SMALL else ""
        names = select(unet, TARGETS[large]) if large else {}
        small = targets.endswith(SMALL)
        return [
            name in names or (small and len(shape) == 1) for name, shape in zip(self.names, self.shapes, strict=True)
        ]


def bind(unet: nn.Module, layout: Layout, flat: Tensor) -> None:
    """Make a UNet's weights views of `flat`, which then is all there is to write."""
    views = layout.views(flat)
    for name, parameter in unet.named_parameters():
        if name in views:
            parameter.data = views[name]
