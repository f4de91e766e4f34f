"""The adapted weights of one module as they lie now: their entries are read, and overwritten, layout by layout."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shira_diffusers.locate import Located
from shira_diffusers.scatter import cast, overwrite
from shira_diffusers.sites import Sites, find, key_of, sites_of
from shira_diffusers.state import Layout


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights by name; made anew for each operation, since offloading moves tensors."""

    located: dict[str, Located]
    _sites: dict[int, Sites] = field(default_factory=dict)

    @torch.inference_mode(False)
    @torch.no_grad()
    def read(self, layout: Layout) -> Tensor:
        """The values at a layout's entries, ``[n]``."""
        return self._at(layout).read()

    def write(self, layout: Layout, values: Tensor) -> None:
        """Write ``[n]`` values to a layout's entries, in the weights and in all that holds them; addresses stay."""
        values = self.as_now(layout, values)
        with torch.inference_mode():  # both normal and inference tensors can be written in it
            self._at(layout).write(values)
            for name, indices, bits in self._copied(layout, values):
                for holder in self.located[name].holders[1:]:
                    overwrite(holder.tensor, indices, cast(bits, holder.tensor), holder.offset)

    def as_now(self, layout: Layout, values: Tensor) -> Tensor:
        """Saved bits of a layout as its weights are now: they may have been cast or moved since."""
        return cast(values, self.located[layout.names[0]].weight)

    def _copied(self, layout: Layout, values: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Names, indices and values of the weights that are held elsewhere too: fused, or offloaded."""
        if any(len(self.located[name].holders) > 1 for name in layout.names):
            sizes = layout.sizes
            yield from zip(layout.names, layout.indices.split(sizes), values.split(sizes), strict=True)

    def _at(self, layout: Layout) -> Sites:
        if id(layout) not in self._sites:
            self._sites[id(layout)] = self._find(layout)
        return self._sites[id(layout)]

    def _find(self, layout: Layout) -> Sites:
        """Where the entries lie in memory is computed again only when the weights have moved."""
        weights = [self.located[name].weight for name in layout.names]
        key = key_of(weights)
        if key not in layout.positions:
            layout.positions.clear()
            layout.positions[key] = find(weights, layout.sizes, layout.indices)
        return sites_of(weights, layout.sizes, layout.indices, layout.positions[key])
