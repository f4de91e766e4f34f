"""Recognize the base an adapter was trained on, its siblings and other models by a few of the base's values."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shira_diffusers.adapters.base_match import ROUNDING, UNDERFLOW, BaseMatch, match
from shira_diffusers.adapters.delta import SparseDelta

__all__ = ["BaseMatch", "match_base", "probe_base", "probed_names"]

_PROBED_WEIGHTS = 8  # with 64 entries each, 512 values: 1 KiB per file
_PROBED_ENTRIES = 64


def probe_base(deltas: Mapping[str, SparseDelta], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the base's first values at the masked entries of a few parameters.

    Args:
        deltas: the adapter's deltas.
        base: the unadapted weights ``(out, ...)`` by the same names, at least those that are probed.

    Returns:
        ``{name: float16 (k,)}``, k at most 64, on the CPU.
    """
    probes = {}
    for name in probed_names(deltas):
        indices = deltas[name].indices[:_PROBED_ENTRIES].long().to(base[name].device)
        values = base[name].detach().flatten()[indices].float()
        probes[name] = values.to(torch.float16).cpu()
    return probes


def probed_names(deltas: Mapping[str, SparseDelta]) -> list[str]:
    """Choose the parameters whose base values are kept: evenly spread, at most eight."""
    names = sorted(name for name, delta in deltas.items() if delta.nnz)
    step = max(1, -(-len(names) // _PROBED_WEIGHTS))
    return names[::step]


def match_base(pairs: list[tuple[Tensor, Tensor]]) -> BaseMatch:
    """Compare probes with a model's values at the same entries.

    Args:
        pairs: per probed parameter the probe, float16 ``(k,)``, and the model's values, any dtype, ``(k,)``.

    Returns:
        ``same`` when they differ by no more than the rounding of the model's dtype, ``sibling`` (a fine-tune of the
        same model) when they point the same way, else ``other``.
    """
    expected = torch.cat([probe.double().cpu() for probe, _ in pairs])
    got = torch.cat([values.double().cpu() for _, values in pairs])
    allowed = torch.cat(
        [_rounding(values.dtype) * probe.double().cpu().abs() + _underflow(values) for probe, values in pairs]
    )
    return match(expected.numpy(), got.numpy(), allowed.numpy())


def _rounding(dtype: torch.dtype) -> float:
    """Largest relative difference of a float16 probe and the same value stored in ``dtype``."""
    return ROUNDING + (torch.finfo(dtype).eps if dtype.is_floating_point else 0.0)


def _underflow(values: Tensor) -> float:
    """The largest difference by underflow: subnormals of float16 and of 8-bit floats."""
    return 2.0**-9 if values.dtype.itemsize == 1 else UNDERFLOW
