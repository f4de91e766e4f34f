"""The entries that a mask must avoid, since other adapters of the model hold them."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.errors import AdapterMismatchError, listing
from shira_diffusers.weights.finder import WeightMap
from shira_diffusers.weights.targets import by_prefix


def avoided_entries(
    model: nn.Module | Mapping[str, nn.Module], weights: Mapping[str, Tensor], adapters: Sequence[ShiraAdapter]
) -> dict[str, list[Tensor]]:
    """Find what adapters hold of some weights, under whatever names they have them.

    Args:
        model: a module, or ``{component: module}``.
        weights: the weights ``(out, ...)`` by name, as ``targets.select`` gives them.
        adapters: adapters of the model; they may change other weights and other components too.

    Returns:
        ``{name: [indices]}``, int32 or int64 ``(nnz,)`` each, of all of the model's parameters of which anything is
        held.

    Raises:
        AdapterMismatchError: an adapter of whose names the model has none, or with another shape of a weight; all are
            named.
    """
    if not adapters:
        return {}
    names = _Names(model, weights)
    held: dict[str, list[Tensor]] = {}
    wrong: list[str] = []
    for number, adapter in enumerate(adapters):
        own = {name: found for name in adapter.deltas if (found := names.own(name))}
        if adapter.deltas and not own:
            expected, got = next(iter(weights)), adapter.names[0]
            wrong.append(f"avoid[{number}]: no name of the model among its own, expected such as {expected}, got {got}")
        for name, found in own.items():
            delta = adapter.deltas[name]
            if found in weights and delta.shape != weights[found].shape:
                shape = tuple(weights[found].shape)
                wrong.append(f"avoid[{number}]: {name}: expected {shape}, got {delta.shape}")
            held.setdefault(found, []).append(delta.indices)
    if wrong:
        raise AdapterMismatchError(
            "cannot avoid adapters that do not fit the model; avoid those of this model, and where their names begin "
            f"with components, give {{component: module}}:{listing(wrong)}"
        )
    return held


class _Names:
    """The names that a model has for parameters, of tied weights those in ``weights``."""

    def __init__(self, model: nn.Module | Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
        self._maps = {prefix: WeightMap(part) for prefix, part in by_prefix(model).items()}
        self._twins: dict[str, str] = {}
        for prefix, each in self._maps.items():
            own = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]
            self._twins |= {prefix + other: prefix + name for other, name in each.twins(own).items()}

    def own(self, name: str) -> str | None:
        """The model's name of a parameter that is named as in some adapter; None if the model has no such one."""
        prefix = next((prefix for prefix in self._maps if name.startswith(prefix)), None)
        if prefix is None:
            return None
        weights, inside = self._maps[prefix], name.removeprefix(prefix)
        try:
            layer, own = weights.layer(inside), prefix + weights.own_name(inside)
        except AdapterMismatchError:
            return None
        return None if getattr(layer, own.rpartition(".")[2], None) is None else self._twins.get(own, own)
