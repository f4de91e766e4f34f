"""Carry out a switch: the only module that writes the weights of a model at inference.

Everything is planned and checked first; then the entries are overwritten. Nothing is ever subtracted: the bits that
were overwritten are saved and written back.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from shira_diffusers.errors import ResidentStateError, listing
from shira_diffusers.fitting import join_name
from shira_diffusers.fuse import MergeMethod, Union, merge_method
from shira_diffusers.layout import lay_out
from shira_diffusers.locate import Located, Locator, unwrap
from shira_diffusers.scales import scale_of
from shira_diffusers.scatter import gather, overwrite
from shira_diffusers.state import Layout, Mix, Overwritten, ShiraState, ensure_state


@dataclass(slots=True)
class Plan:
    """One module's part of a switch; ``fresh`` grows as base bits become known, ``current`` is what is there before."""

    component: str
    module: nn.Module
    state: ShiraState
    mix: Mix
    disabled: Mix | None
    located: dict[str, Located]
    current: list[Overwritten]
    layouts: tuple[Layout, ...]
    merge: MergeMethod
    fresh: list[Overwritten] = field(default_factory=list)


def plan_switch(component: str, model: nn.Module, mix: Mix, disabled: Mix | None = None) -> Plan:
    """Find everything that a switch of one component needs, and check it. Nothing is written.

    Args:
        component: its name, empty for a bare module.
        model: the component, compiled or not.
        mix: what shall be active.
        disabled: the mix to remember as put aside.

    Raises:
        AdapterMismatchError: an adapter with different deltas for one tied weight.
        ResidentStateError: weights that cannot be overwritten now or that somebody else has written.
    """
    module = unwrap(model)
    state = ensure_state(module)
    adapters = [state.adapters[name] for name in sorted(mix.scales)]
    names = {name for adapter in adapters for name in adapter.deltas}
    names |= {name for group in state.overwritten for name in group.layout.names}
    locator = Locator(model)
    if names:
        locator.require_not_frozen()
    located = {name: locator.locate(name) for name in sorted(names)}
    current = read_current(component, state.overwritten, located)
    layouts = lay_out(adapters, located, [tuple(group.layout for group in current), *state.remembered])
    state.remember(layouts)
    return Plan(component, module, state, mix, disabled, located, current, layouts, merge_method(mix.method))


def run(plans: Sequence[Plan]) -> None:
    """Carry out the plans of all components, or none: on any exception what was written is taken back.

    Only masked entries change; no tensor is replaced, so addresses stay. The caller holds the models' write locks.
    """
    try:
        for plan in plans:
            _carry_out(plan)
    except BaseException:
        for plan in plans:
            _take_back(plan)
        raise
    for plan in plans:
        plan.state.mix, plan.state.disabled = plan.mix, plan.disabled
        plan.state.overwritten = tuple(plan.fresh)
        if plan.located:
            _reset_step_cache(plan.module)


def _carry_out(plan: Plan) -> None:
    """Restore what leaves, save what is overwritten next, overwrite it."""
    kept = {id(layout) for layout in plan.layouts}
    leaving = [group for group in plan.current if id(group.layout) not in kept]
    staying = {id(group.layout): group for group in plan.current}
    for group in leaving:
        _write(plan.located, group.layout, group.base)
    for layout in plan.layouts:
        held = staying.get(id(layout))
        base = read(plan.located, layout) if held is None else _as_now(plan.located, held.layout, held.base)
        plan.fresh.append(Overwritten(layout, base, _mixed(plan, layout, base)))
    for group in plan.fresh:
        _write(plan.located, group.layout, group.written)


@torch.inference_mode(False)
@torch.no_grad()
def _mixed(plan: Plan, layout: Layout, base: Tensor) -> Tensor:
    """``round(base + sum of scale * delta)``, ``[n]``, of the base's dtype."""
    values, scales, places = [], [], []
    for k, name in enumerate(sorted(plan.mix.scales)):
        members = layout.members[k]
        if members:
            by_weight = [scale_of(plan.mix.scales[name], plan.component, weight) for weight in members]
            values.append(torch.cat([layout.adapters[k].deltas[weight].values for weight in members]).to(base.device))
            scales.append(_scales(layout, k, by_weight))
            places.append(layout.places[k])
    total = plan.merge(Union(layout.indices, tuple(places)), values, scales)
    wide = base if base.dtype == torch.float64 else base.float()
    return (wide + total).to(base.dtype)


def _scales(layout: Layout, adapter: int, by_weight: list[float]) -> float | Tensor:
    """One number where all weights have the same scale, else float32 ``[nnz]``."""
    if len(set(by_weight)) <= 1:
        return by_weight[0] if by_weight else 1.0
    sizes = torch.tensor([layout.adapters[adapter].deltas[name].nnz for name in layout.members[adapter]])
    return torch.tensor(by_weight, dtype=torch.float32).repeat_interleave(sizes).to(layout.indices.device)


def _take_back(plan: Plan) -> None:
    """Put back every bit as it was before the switch, wherever that broke off."""
    for group in plan.fresh:
        _write(plan.located, group.layout, group.base)
    for group in plan.current:
        _write(plan.located, group.layout, group.written)


@torch.inference_mode(False)
@torch.no_grad()
def read(located: dict[str, Located], layout: Layout) -> Tensor:
    """The weights' values at a layout's entries, ``[n]``."""
    parts = zip(layout.names, layout.indices.long().split(layout.sizes), strict=True)
    return torch.cat([gather(located[name].weight, indices) for name, indices in parts])


def _write(located: dict[str, Located], layout: Layout, values: Tensor) -> None:
    """Write ``[n]`` values to a layout's entries, in the weights and in all that holds them."""
    parts = zip(layout.names, layout.indices.long().split(layout.sizes), values.split(layout.sizes), strict=True)
    with torch.inference_mode():  # both normal and inference tensors can be written in it
        for name, indices, bits in parts:
            for holder in located[name].holders:
                overwrite(holder.tensor, indices, _cast(bits, holder.tensor), holder.offset)


def _as_now(located: dict[str, Located], layout: Layout, values: Tensor) -> Tensor:
    """Saved bits of a group as its weights are now: they may have been cast or moved since."""
    return _cast(values, located[layout.names[0]].weight)


def _cast(values: Tensor, weight: Tensor) -> Tensor:
    if values.dtype == weight.dtype and values.device == weight.device:
        return values
    return values.to(weight.device, weight.dtype)


def read_current(component: str, groups: Iterable[Overwritten], located: dict[str, Located]) -> list[Overwritten]:
    """The overwritten entries with the bits that are there now: what was written, or the base again.

    The base is there where somebody has put back what ``state_dict`` gave, as accelerate does when it offloads.

    Raises:
        ResidentStateError: names the weights that somebody else has written.
    """
    current: list[Overwritten] = []
    foreign: list[str] = []
    for group in groups:
        if _same_bits(now := read(located, group.layout), group.written):
            current.append(group)
            continue
        current.append(replace(group, written=now))
        foreign += [
            join_name(component, name)
            for name, entry in group.entries()
            if not any(_same_bits(gather(located[name].weight, entry.indices), b) for b in (entry.written, entry.base))
        ]
    if foreign:
        raise _written_by_others(foreign)
    return current


def require_written(component: str, groups: Iterable[Overwritten], located: dict[str, Located]) -> None:
    """Require that overwritten entries hold what was written.

    Raises:
        ResidentStateError: names the weights that somebody else has written.
    """
    foreign = [
        join_name(component, name)
        for group in groups
        for name, entry in group.entries()
        if not _same_bits(gather(located[name].weight, entry.indices), entry.written)
    ]
    if foreign:
        raise _written_by_others(foreign)


def _written_by_others(names: Sequence[str]) -> ResidentStateError:
    return ResidentStateError(
        f"{len(names)} adapted weights were written by somebody else while adapters were active "
        "(load_state_dict, fuse_lora, training), so restoring would mix two bases; expected what the last switch "
        "wrote. Undo that write, or keep the new weights as the base with bake_shira() (Resident.bake()):"
        f"{listing(names)}"
    )


def _same_bits(now: Tensor, written: Tensor) -> bool:
    """Whether a weight's values are those that were written, after the same cast if it was cast since."""
    then = _cast(written, now)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[now.dtype.itemsize]
    return torch.equal(now.view(kind), then.view(kind))


def _reset_step_cache(module: nn.Module) -> None:
    """Step caches (first-block cache and the like) hold activations of the weights before."""
    reset = getattr(module, "_reset_stateful_cache", None)
    if callable(reset):
        reset()
