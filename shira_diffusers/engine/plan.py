"""Plan the entries of a mix: its deltas end to end, so that a switch computes on few long tensors, not many short ones.

In: adapters and the weights that they are for. Out: one ``EntryPlan`` per device and dtype; nothing is written here.
"""

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.merge import plan_union
from shira_diffusers.adapters.scales import Scale
from shira_diffusers.errors import AdapterMismatchError
from shira_diffusers.weights.finder import identity
from shira_diffusers.weights.scatter import cast
from shira_diffusers.weights.steps import EntryPlan, Kind, SavedEntries
from shira_diffusers.weights.tiles import in_runs


@dataclass(frozen=True, slots=True)
class Mix:
    """Which adapters are active in a component, how strongly, and how they are merged.

    Args:
        component: its name in the scales; another owner of the module may have another name for it.
    """

    scales: dict[str, Scale] = field(default_factory=dict)
    method: str = "sum"
    component: str = ""

    def among(self, names: Container[str]) -> "Mix":
        """The same mix of some adapters only."""
        return replace(self, scales={n: s for n, s in self.scales.items() if n in names})


def plans_of(adapters: Sequence[ShiraAdapter], known: Iterable[tuple[EntryPlan, ...]]) -> list[tuple[EntryPlan, ...]]:
    """The plans among those made earlier that are of the same adapters, in the same order; for no adapters none.

    So a new strength, or coming back to a mix, plans nothing.
    """
    wanted = list(map(id, adapters))
    return [plans for plans in known if plans and wanted and wanted == list(map(id, plans[0].sources))]


def plan_entries(
    adapters: Sequence[ShiraAdapter], live: Mapping[str, Tensor], outgoing: Sequence[tuple[str, ...]] = ()
) -> tuple[EntryPlan, ...]:
    """Plan the entries of a mix: one plan per device and dtype among the adapted weights; nearly always one in all.

    Args:
        adapters: in the order in which they are added.
        live: all of their weights but quantized ones, each of any shape, dtype and device.
        outgoing: names by which weights are overwritten now; a tied weight keeps that name, so that it is one tile.

    Raises:
        AdapterMismatchError: an adapter with different deltas for one tied weight.
    """
    by_weight = {identity(live[name]): name for name in sorted(live, reverse=True)}  # the first name wins
    by_weight |= {identity(live[name]): name for names in outgoing for name in names}
    members = [_untied(adapter, live, by_weight) for adapter in adapters]
    kinds: dict[Kind, dict[str, None]] = {}
    for name in sorted({name for own in members for name in own.values()}):
        kinds.setdefault((live[name].device, live[name].dtype), {})[name] = None
    return tuple(_plan_kind(adapters, members, live, kind[0], list(names)) for kind, names in kinds.items())


def fits_now(plans: Sequence[EntryPlan], live: Mapping[str, Tensor], version: int) -> bool:
    """Whether the weights of each plan (any shape) still share one device and dtype that no other plan's have.

    False too for a plan by other names of tied weights than those in ``live``.
    """
    if not all([live.keys() >= set(plan.names) for plan in plans]):
        return False
    kinds = [kind for plan in plans for kind in plan.kinds(live, version)]
    devices = [plan.indices.device for plan in plans]
    return len(set(kinds)) == len(kinds) == len(plans) and devices == [device for device, _ in kinds]


def is_one_name_each(
    plans: Sequence[EntryPlan], outgoing: Sequence[tuple[str, ...]], live: Mapping[str, Tensor]
) -> bool:
    """Whether names still mean what they did: those of the plans, and of what leaves, one weight (any shape) each.

    Weights may have been tied or untied since, and adapters may have different names for one that is tied.

    Args:
        plans: of all adapters of a mix.
        outgoing: the names of what leaves.
        live: these weights, and all of the adapters, each of any shape.
    """
    planned = {name for plan in plans for name in plan.names}
    names = planned.union(*outgoing)
    adapted = {name for plan in plans for adapter in plan.sources for name in adapter.deltas}
    weights, own, theirs = ({identity(live[name]) for name in some} for some in (names, planned, adapted))
    return len(weights) == len(names) and own == theirs


def as_now(saved: SavedEntries, live: Mapping[str, Tensor], version: int) -> list[SavedEntries]:
    """Saved entries for the dtype and device that each weight (any shape) has now: some may have been cast or moved."""
    plan = saved.plan
    kinds = plan.kinds(live, version)
    if len(kinds) > 1:
        return [
            _part(saved, {n for n in plan.names if (live[n].device, live[n].dtype) == kind}, kind) for kind in kinds
        ]
    weight = live[plan.names[0]]
    if plan.indices.device != weight.device:  # offloading moves weights, but not what we keep
        plan = plan.moved(weight.device)
    elif saved.base.dtype == weight.dtype:
        return [saved]
    return [SavedEntries(plan, cast(saved.base, weight), cast(saved.written, weight))]


def _part(saved: SavedEntries, names: Collection[str], kind: Kind) -> SavedEntries:
    """The entries of some of the weights, as these are now."""
    held = [(part, numel) for part, numel in zip(saved.parts(), saved.plan.numels, strict=True) if part[0] in names]
    kept, indices, base, written = zip(*[part for part, _ in held], strict=True)
    bounds = tuple(accumulate(map(len, indices), initial=0))
    plan = EntryPlan(kept, tuple(numel for _, numel in held), bounds, torch.cat(indices).to(kind[0]))
    return SavedEntries(plan, torch.cat(base).to(*kind), torch.cat(written).to(*kind))


def _untied(
    adapter: ShiraAdapter, live: Mapping[str, Tensor], by_weight: Mapping[tuple[Any, ...], str]
) -> dict[str, str]:
    """The adapter's names -> the one name by which each weight is written; other names of a tied weight are dropped."""
    chosen: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, delta in adapter.deltas.items():
        if name not in live:  # quantized
            continue
        weight = by_weight[identity(live[name])]
        twin = first.setdefault(weight, name)
        if twin == name:
            chosen[name] = weight
        elif adapter.deltas[twin] != delta:
            raise AdapterMismatchError(
                f"the adapter has different deltas for {twin} and {name}, which are one tied weight here; "
                "use it with a model whose weights are not tied"
            )
    return chosen


def _plan_kind(
    adapters: Sequence[ShiraAdapter],
    members: Sequence[Mapping[str, str]],
    live: Mapping[str, Tensor],
    device: torch.device,
    names: list[str],
) -> EntryPlan:
    """The plan of the weights ``names`` of one device and dtype; ``members`` are what ``_untied`` gave."""
    own = [{weight: name for name, weight in chosen.items()} for chosen in members]
    held = [[its[name] for name in names if name in its] for its in own]
    values = [_values(adapter, its).to(device) for adapter, its in zip(adapters, held, strict=True)]
    numels = tuple(live[name].numel() for name in names)
    if len(adapters) == 1:
        deltas = [adapters[0].deltas[name] for name in held[0]]
        bounds = tuple(accumulate((delta.nnz for delta in deltas), initial=0))
        indices = end_to_end([delta.indices for delta in deltas]).to(device)
        runs = in_runs(indices, bounds, numels)
        own_names = (tuple(held[0]),)
        return EntryPlan(tuple(names), numels, bounds, indices, tuple(adapters), own_names, (values[0],), (None,), runs)
    starts = list(accumulate(numels, initial=0))
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
    held_names = tuple(map(tuple, held))
    return EntryPlan(
        tuple(names), numels, bounds, indices, tuple(adapters), held_names, tuple(values), union.places, runs
    )


def _values(adapter: ShiraAdapter, names: Sequence[str]) -> Tensor:
    return end_to_end([adapter.deltas[name].values for name in names]) if names else torch.empty(0, device="cpu")


def end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors ``(n,)`` of one dtype and device: a view if they are adjacent in memory, else a copy."""
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
