"""Lay out the deltas of a mix end to end, so that a switch computes on a few long tensors, not on many short ones."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.merge import plan_union
from shira_diffusers.engine.state import Layout
from shira_diffusers.errors import AdapterMismatchError
from shira_diffusers.weights.finder import Located
from shira_diffusers.weights.tiles import in_runs

_Kind = tuple[torch.device, torch.dtype]


def lay_out(
    adapters: Sequence[ShiraAdapter], located: Mapping[str, Located], known: Iterable[tuple[Layout, ...]]
) -> tuple[Layout, ...]:
    """One layout for each device and dtype among the adapted weights; nearly always one in all.

    Args:
        adapters: in the order in which they are added.
        located: all of their weights.
        known: layouts made earlier, returned again where they are of the same adapters, so that a new strength, or
            coming back to a mix, plans nothing.

    Raises:
        AdapterMismatchError: an adapter with different deltas for one tied weight.
    """
    for layouts in known:
        if layouts and _same_adapters(adapters, layouts[0]) and _are_one_a_kind(layouts, located):
            return layouts
    members = [_untied(adapter, located) for adapter in adapters]
    kinds: dict[_Kind, dict[str, None]] = {}
    for name in sorted({name for own in members for name in own.values()}):
        kinds.setdefault(_kind_of(located[name].weight), {})[name] = None
    return tuple(_one_layout(adapters, members, located, kind, list(names)) for kind, names in kinds.items())


def _same_adapters(adapters: Sequence[ShiraAdapter], layout: Layout) -> bool:
    return len(adapters) == len(layout.adapters) and all(
        mine is theirs for mine, theirs in zip(adapters, layout.adapters, strict=True)
    )


def _are_one_a_kind(layouts: Sequence[Layout], located: Mapping[str, Located]) -> bool:
    """Whether the weights of each layout still are of one kind, and no other layout's are: they may have been cast."""
    kinds = [{_kind_of(located[name].weight) for name in layout.names} for layout in layouts]
    one_each = sum(map(len, kinds)) == len(set().union(*kinds)) == len(layouts)
    devices = [layout.indices.device for layout in layouts]
    return one_each and devices == [device for own in kinds for device, _ in own]


def _kind_of(weight: Tensor) -> _Kind:
    return weight.device, weight.dtype


def _untied(adapter: ShiraAdapter, located: Mapping[str, Located]) -> dict[str, str]:
    """The adapter's names -> the one name by which each weight is written; other names of a tied weight are dropped."""
    by_weight = {located[name].key: name for name in sorted(located, reverse=True)}  # the first name wins
    chosen: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, delta in adapter.deltas.items():
        weight = by_weight[located[name].key]
        twin = first.setdefault(weight, name)
        if twin == name:
            chosen[name] = weight
        elif adapter.deltas[twin] != delta:
            raise AdapterMismatchError(
                f"the adapter has different deltas for {twin} and {name}, which are one tied weight here; "
                "use it with a model whose weights are not tied"
            )
    return chosen


def _one_layout(
    adapters: Sequence[ShiraAdapter],
    members: Sequence[Mapping[str, str]],
    located: Mapping[str, Located],
    kind: _Kind,
    names: list[str],
) -> Layout:
    device = kind[0]
    own = [{weight: name for name, weight in chosen.items()} for chosen in members]
    held = [[its[name] for name in names if name in its] for its in own]
    values = [_values(adapter, its).to(device) for adapter, its in zip(adapters, held, strict=True)]
    numels = [located[name].weight.numel() for name in names]
    if len(adapters) == 1:
        deltas = [adapters[0].deltas[name] for name in held[0]]
        bounds = _cumulative([delta.nnz for delta in deltas])
        indices = end_to_end([delta.indices for delta in deltas]).to(device)
        runs = in_runs(indices, bounds, numels)
        return Layout(tuple(names), bounds, indices, tuple(adapters), (tuple(held[0]),), (values[0],), (None,), runs)
    starts = _cumulative(numels)
    start_of = dict(zip(names, starts[:-1], strict=True))
    keys = [
        torch.cat([adapter.deltas[name].indices.to(device).long() + start_of[chosen[name]] for name in its])
        if its
        else torch.empty(0, dtype=torch.int64, device=device)
        for adapter, chosen, its in zip(adapters, members, held, strict=True)
    ]
    union = plan_union(keys)
    edges = torch.tensor(starts, device=device)
    cuts = torch.searchsorted(union.indices, edges)
    local = union.indices - edges[:-1].repeat_interleave(cuts.diff())
    widest = max(
        adapter.deltas[name].indices.dtype.itemsize for adapter, its in zip(adapters, held, strict=True) for name in its
    )
    indices = local.to(torch.int32 if widest == 4 else torch.int64)
    bounds = tuple(cuts.tolist())
    runs = in_runs(indices, bounds, numels)
    members_held = tuple(map(tuple, held))
    return Layout(tuple(names), bounds, indices, tuple(adapters), members_held, tuple(values), union.places, runs)


def _values(adapter: ShiraAdapter, names: Sequence[str]) -> Tensor:
    return end_to_end([adapter.deltas[name].values for name in names]) if names else torch.empty(0, device="cpu")


def end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one dimension as one: a view where they lie so in memory, as those of one file do, else a copy."""
    held = [part for part in parts if part.numel()]
    if not held:
        return parts[0]
    first = held[0]
    storage = first.untyped_storage().data_ptr()
    following = first.data_ptr()
    for part in held:
        adjoins = part.data_ptr() == following and part.dtype == first.dtype and part.is_contiguous()
        if not (adjoins and part.untyped_storage().data_ptr() == storage):
            return torch.cat(held)
        following += part.nbytes
    return first.as_strided((sum(map(len, held)),), (1,))


def _cumulative(sizes: Sequence[int]) -> tuple[int, ...]:
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return tuple(ends)
