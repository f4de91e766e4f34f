"""Whether an adapter fits a model: names, shapes, and the base it was trained on. Nothing is written here."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shira_diffusers.adapter import ShiraAdapter
from shira_diffusers.errors import AdapterMismatchError, ResidentStateError, listing
from shira_diffusers.locate import Locator, unwrap
from shira_diffusers.probes import BaseMatch, match_base
from shira_diffusers.scatter import gather, is_byte_dtype
from shira_diffusers.state import Entry, state_of


def join_name(component: str, name: str) -> str:
    """A parameter's full name; the component is empty for a bare module."""
    return f"{component}.{name}" if component else name


def trained_on(adapter: ShiraAdapter) -> str:
    """A clause for messages that tells the adapter's base, where it is known."""
    base = adapter.metadata.get("base_model")
    return f"; it was trained on {base!r}" if base else ""


def _split(adapter: ShiraAdapter, models: Mapping[str, nn.Module]) -> dict[str, ShiraAdapter]:
    """The adapter's part for each component.

    Raises:
        AdapterMismatchError: an adapter without deltas, or with names under no component.
    """
    if not adapter.deltas:
        raise AdapterMismatchError("the adapter holds no deltas: there is nothing to apply")
    if "" in models:
        return {"": adapter}
    lost = [name for name in adapter.deltas if name.partition(".")[0] not in models]
    if lost:
        raise AdapterMismatchError(
            f"adapter does not fit: {len(lost)} of {len(adapter.deltas)} parameters belong to no component of this "
            f"model, which has {', '.join(models) or 'none'}"
            f"{trained_on(adapter)}{_bare(lost[0], models)}:{listing(lost)}"
        )
    return {part: adapter.part(part) for part in adapter.component_names()}


def _bare(name: str, models: Mapping[str, nn.Module]) -> str:
    """A clause with the way out for an adapter of a bare module, whose names are those of one component."""
    of = [part for part, model in models.items() if name in dict(unwrap(model).named_parameters())]
    return f"; an adapter of a bare module is named by adapter.prefixed({of[0]!r})" if of else ""


def fit(adapter: ShiraAdapter, models: Mapping[str, nn.Module]) -> dict[str, ShiraAdapter]:
    """The adapter's part for each component, by the names that the component's own parameters have.

    Args:
        adapter: named by component and parameter.
        models: by component, compiled ones too; under the empty name one bare module, for plain parameter names.

    Raises:
        AdapterMismatchError: it fits nothing or fits in part; all offenders are named.
        ResidentStateError: weights that cannot be overwritten; all offenders are named.
    """
    fitted: dict[str, ShiraAdapter] = {}
    wrong: list[str] = []
    unusable: list[str] = []
    owners: dict[tuple[object, ...], str] = {}
    for part, its_own in _split(adapter, models).items():
        locator = Locator(models[part])
        renamed: dict[str, str] = {}
        for name, delta in its_own.deltas.items():
            try:
                located = locator.locate(name)
            except AdapterMismatchError as error:
                wrong.append(join_name(part, str(error)))
            except ResidentStateError as error:
                unusable.append(join_name(part, str(error)))
            else:
                shape = tuple(located.weight.shape)
                if shape != delta.shape:
                    wrong.append(f"{join_name(part, name)}: expected {shape}, got {delta.shape}")
                if located.name in renamed.values():
                    wrong.append(f"{join_name(part, name)}: means the same parameter as another name in the adapter")
                owner = owners.setdefault(located.key, part)
                if owner != part:
                    wrong.append(f"{join_name(part, name)}: one tied weight with {owner}, which has deltas for it too")
                renamed[name] = located.name
        fitted[part] = its_own.renamed(renamed)
    if wrong:
        raise AdapterMismatchError(
            f"adapter does not fit: {len(wrong)} of {len(adapter.deltas)} parameters differ"
            f"{trained_on(adapter)}; use it with the model it was trained for:{listing(wrong)}"
        )
    if unusable:
        raise ResidentStateError(
            f"{len(unusable)} of {len(adapter.deltas)} weights cannot be overwritten:{listing(unusable)}"
        )
    return fitted


def compare_base(parts: Mapping[str, ShiraAdapter], models: Mapping[str, nn.Module]) -> BaseMatch | None:
    """Whether the models are the base that an adapter was trained on, whatever is active; None if it does not tell.

    Args:
        parts: what ``fit`` returned.
        models: as for ``fit``.
    """
    pairs = []
    for part, its_own in parts.items():
        locator, state = Locator(models[part]), state_of(unwrap(models[part]))
        for name, probe in its_own.base_probes.items():
            indices = its_own.deltas[name].indices[: probe.numel()]
            entry = state.entries.get(name) if state else None
            pairs.append((probe, base_values(locator.locate(name).weight, indices, entry)))
    return match_base(pairs) if pairs else None


def base_values(weight: Tensor, indices: Tensor, entry: Entry | None) -> Tensor:
    """The unadapted values at sorted ``indices``, whatever is active."""
    values = gather(weight, indices)
    if entry is None or not entry.indices.numel():
        return values
    wanted = indices.to(entry.indices.device, entry.indices.dtype)
    place = torch.searchsorted(entry.indices, wanted).clamp_(max=entry.indices.numel() - 1)
    saved = entry.base[place].to(weight.device, weight.dtype)
    is_saved = (entry.indices[place] == wanted).to(weight.device)
    if is_byte_dtype(weight.dtype):
        return torch.where(is_saved, saved.float(), values.float())
    return torch.where(is_saved, saved, values)
