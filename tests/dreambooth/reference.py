"""The slow, dense way to train a SHiRA adapter: the oracle. It uses none of the library's code."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def train_dense(
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    loss: Callable[[int], Tensor],
    steps: int,
    *,
    accumulation: int = 1,
    scale: float = 1.0,
    **adamw: float,
) -> dict[str, Tensor]:
    """AdamW over dense float32 deltas whose gradients are multiplied by a dense mask; each weight is base + delta.

    Args:
        parameters: all that are adapted, by name; they hold the trained weights afterwards.
        loss: of the how-manieth batch.
        scale: what the loss is multiplied by before backward, and gradients divided by after it.

    Returns:
        The dense deltas.
    """
    base = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    deltas = {name: nn.Parameter(torch.zeros(weight.shape)) for name, weight in base.items()}
    chosen = {name: dense_mask(weight.shape, masks[name]) for name, weight in base.items()}
    optimizer = torch.optim.AdamW(deltas.values(), **adamw)
    for step in range(steps):
        for part in range(accumulation):
            (loss(step * accumulation + part) * scale / accumulation).backward()
            for name, parameter in parameters.items():
                masked = parameter.grad.float() * chosen[name]
                deltas[name].grad = masked if part == 0 else deltas[name].grad + masked
                parameter.grad = None
        for delta in deltas.values():
            delta.grad /= scale
        optimizer.step()
        for name, parameter in parameters.items():
            parameter.data.copy_((base[name].float() + deltas[name].detach()).to(parameter.dtype))
    return {name: delta.detach() for name, delta in deltas.items()}


def dense_mask(shape: torch.Size, indices: Tensor) -> Tensor:
    """float32 of ``shape``, 1 at the flat indices, else 0."""
    mask = torch.zeros(shape.numel())
    for index in indices.tolist():
        mask[index] = 1.0
    return mask.view(shape)
