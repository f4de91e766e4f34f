"""The slow, dense way to do what the library does fast: the oracle of the tests. It uses none of the library's code."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def dense(indices: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """float32, ``shape``."""
    full = torch.zeros(int(torch.tensor(shape).prod()))
    for index, value in zip(indices.tolist(), values.float().tolist(), strict=True):
        full[index] = value
    return full.view(*shape)


def scale_for(scale: object, name: str) -> float:
    """The number that one parameter ``component.block....weight`` gets from a scale as users give it."""
    component, _, rest = name.partition(".")
    if isinstance(scale, Mapping):
        scale = scale.get(component, 1.0)
    if isinstance(scale, Mapping):
        block = "down" if rest.startswith("down_blocks.") else "up" if rest.startswith("up_blocks.") else "other"
        scale = scale.get("mid" if rest.startswith("mid_block.") else block, 1.0)
    _, number, _, layer, *_ = rest.split(".") + [""] * 3
    if isinstance(scale, Mapping):
        scale = scale.get(f"block_{number}", 1.0)
    if isinstance(scale, list):
        scale = scale[0] if len(scale) == 1 else scale[int(layer)]
    return scale


def apply(
    base: Mapping[str, Tensor], adapters: Mapping[str, object], scales: Mapping[str, object]
) -> dict[str, Tensor]:
    """What every parameter must be: ``acc = 0; acc += scale * delta`` in the order of names, added in float32.

    Args:
        base: all parameters by full name.
        adapters: by name, anything with ``deltas``.
        scales: of the active ones.
    """
    result = {}
    for parameter, weight in base.items():
        total = torch.zeros(weight.shape)
        changed = torch.zeros(weight.shape, dtype=torch.bool)
        for name in sorted(scales):
            delta = adapters[name].deltas.get(parameter)
            if delta is not None:
                full = torch.zeros(weight.numel())
                full[delta.indices.long()] = delta.values.float()
                total += scale_for(scales[name], parameter) * full.view(weight.shape)
                changed.view(-1)[delta.indices.long()] = True
        wide = weight if weight.dtype == torch.float64 else weight.float()
        result[parameter] = torch.where(changed, (wide + total).to(weight.dtype), weight)
    return result


def code_gaps(indices: Sequence[int], top: int | None) -> list[int]:
    """Indices as the file format codes them: ``top`` is 255 or 65535, None is int32."""
    coded, last = [], -1
    for index in indices:
        gap, last = index - last - 1, index
        if top is not None:
            coded += [top] * (gap // top)
            gap %= top
        coded.append(gap)
    return coded


def indices_of_gaps(coded: Sequence[int], top: int | None) -> list[int]:
    """The inverse of ``code_gaps``."""
    indices, last, gap = [], -1, 0
    for element in coded:
        gap += element
        if element != top:
            last += gap + 1
            indices.append(last)
            gap = 0
    return indices


def mask_rank(mask: Tensor) -> int:
    """Rank of a random matrix that is zero outside ``mask``, (out, in): the rank a delta can have."""
    values = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    return int(torch.linalg.matrix_rank(values * mask))
