"""One name for each parameter of adapters that name CLIP's text encoders with ``text_model.`` and without it."""

from collections.abc import Collection, Iterable

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.weights.text_model import other_full_names


def _named_as(adapter: ShiraAdapter, names: Collection[str]) -> ShiraAdapter:
    """The adapter, its parameters by those of ``names`` that mean them; one that has both names of one keeps them."""
    renamed = {
        name: own
        for name in adapter.deltas
        if name not in names
        for own in other_full_names(name)
        if own in names and own not in adapter.deltas
    }
    return adapter.renamed(renamed) if renamed else adapter


def named_alike(adapters: Iterable[ShiraAdapter]) -> list[ShiraAdapter]:
    """The adapters, each parameter by the name that the first of them with it has."""
    names: set[str] = set()
    found = []
    for adapter in adapters:
        found.append(_named_as(adapter, names))
        names.update(found[-1].deltas)
    return found
