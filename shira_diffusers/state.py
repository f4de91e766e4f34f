"""What a module remembers about its adapters: carried by the module, so by copies of it too."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from shira_diffusers.adapter import ShiraAdapter
from shira_diffusers.delta import SparseDelta
from shira_diffusers.scales import Scale

ATTRIBUTE = "_shira"


@dataclass(frozen=True, slots=True)
class Entry:
    """The overwritten entries of one weight.

    Args:
        indices: int32 or int64 ``[n]``, sorted flat positions.
        base: the bits that were there, ``[n]``, of the weight's dtype.
        written: the bits that are there now, ``[n]``; another value in the weight means somebody else wrote it.
        sources: the deltas whose union the indices are.
    """

    indices: Tensor
    base: Tensor
    written: Tensor
    sources: tuple[SparseDelta, ...]


@dataclass(frozen=True, slots=True)
class Mix:
    """Which adapters are active, how strongly, and how they are merged."""

    scales: dict[str, Scale] = field(default_factory=dict)
    method: str = "sum"

    def without(self, name: str) -> "Mix":
        """The same mix less one adapter."""
        return replace(self, scales={n: s for n, s in self.scales.items() if n != name})


class ShiraState(nn.Module):
    """Adapters, active mix and saved bits of one module.

    A submodule without parameters, buffers or forward: casts and moves of the module (``.to``, ``.half``) reach the
    saved bits through ``_apply``, so that restoring equals casting an unadapted model; ``deepcopy`` carries it;
    ``state_dict`` does not see it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, ShiraAdapter] = {}
        self.mix = Mix()
        self.disabled: Mix | None = None
        self.entries: dict[str, Entry] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ShiraState":
        self.entries = {
            name: Entry(fn(entry.indices), fn(entry.base), fn(entry.written), entry.sources)
            for name, entry in self.entries.items()
        }
        return self

    def extra_repr(self) -> str:
        """The names of the adapters, for ``print(model)``."""
        return ", ".join(self.adapters)


def state_of(module: nn.Module) -> ShiraState | None:
    """The state that an unwrapped module carries, if any."""
    found: Any = module._modules.get(ATTRIBUTE)
    return found if isinstance(found, ShiraState) else None
