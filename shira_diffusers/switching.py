"""Carry out a switch, all of it or nothing.

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
from shira_diffusers.locate import Locator, unwrap
from shira_diffusers.scales import Scale, scale_of
from shira_diffusers.scatter import bits_of, cast, gather
from shira_diffusers.state import Layout, Mix, Overwritten, ShiraState, ensure_state
from shira_diffusers.weights import Weights


@dataclass(slots=True)
class Plan:
    """One module's part of a switch; ``fresh`` grows as base bits become known, ``current`` is what is there before."""

    component: str
    module: nn.Module
    state: ShiraState
    mix: Mix
    disabled: Mix | None
    weights: Weights
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
    weights = Weights(located)
    current = read_current(component, state.overwritten, weights)
    layouts = lay_out(adapters, located, [tuple(group.layout for group in current), *state.remembered])
    state.remember(layouts)
    return Plan(component, module, state, mix, disabled, weights, current, layouts, merge_method(mix.method))


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
        if plan.weights.located:
            _reset_step_cache(plan.module)


def _carry_out(plan: Plan) -> None:
    """Restore what leaves, save what is overwritten next, overwrite it."""
    kept = {id(layout) for layout in plan.layouts}
    leaving = [group for group in plan.current if id(group.layout) not in kept]
    staying = {id(group.layout): group for group in plan.current}
    for group in leaving:
        plan.weights.write(group.layout, group.base)
    for layout in plan.layouts:
        held = staying.get(id(layout))
        base = plan.weights.read(layout) if held is None else plan.weights.as_now(layout, held.base)
        plan.fresh.append(Overwritten(layout, base, _mixed(plan, layout, base)))
    for group in plan.fresh:
        plan.weights.write(group.layout, group.written)


@torch.inference_mode(False)
@torch.no_grad()
def _mixed(plan: Plan, layout: Layout, base: Tensor) -> Tensor:
    """``round(base + sum of scale * delta)``, ``[n]``, of the base's dtype."""
    values, scales, places = [], [], []
    for k, name in enumerate(sorted(plan.mix.scales)):
        if layout.members[k]:
            values.append(layout.values[k])
            scales.append(_scales(plan, layout, k, plan.mix.scales[name]))
            places.append(layout.places[k])
    total = plan.merge(Union(layout.indices, tuple(places)), values, scales)
    wide = base if base.dtype == torch.float64 else base.float()
    return (wide + total).to(base.dtype)


def _scales(plan: Plan, layout: Layout, adapter: int, scale: Scale) -> float | Tensor:
    """One number where all weights have the same scale, else float32 ``[nnz]``."""
    if isinstance(scale, int | float):
        return float(scale)
    by_weight = [scale_of(scale, plan.component, weight) for weight in layout.members[adapter]]
    sizes = torch.tensor([layout.adapters[adapter].deltas[name].nnz for name in layout.members[adapter]])
    return torch.tensor(by_weight, dtype=torch.float32).repeat_interleave(sizes).to(layout.indices.device)


def _take_back(plan: Plan) -> None:
    """Put back every bit as it was before the switch, wherever that broke off."""
    for group in plan.fresh:
        plan.weights.write(group.layout, group.base)
    for group in plan.current:
        plan.weights.write(group.layout, group.written)


def read_current(component: str, groups: Iterable[Overwritten], weights: Weights) -> list[Overwritten]:
    """The overwritten entries with the bits that are there now: what was written, or the base again.

    The base is there where somebody has put back what ``state_dict`` gave, as accelerate does when it offloads.

    Raises:
        ResidentStateError: names the weights that somebody else has written.
    """
    current: list[Overwritten] = []
    foreign: list[str] = []
    for group in groups:
        if _same_bits(now := weights.read(group.layout), group.written):
            current.append(group)
            continue
        current.append(replace(group, written=now))
        foreign += [
            join_name(component, name)
            for name, entry in group.entries()
            if not _holds_any(weights.located[name].weight, entry.indices, (entry.written, entry.base))
        ]
    if foreign:
        raise _written_by_others(foreign)
    return current


def require_written(component: str, groups: Iterable[Overwritten], weights: Weights) -> None:
    """Require that overwritten entries hold what was written.

    Raises:
        ResidentStateError: names the weights that somebody else has written.
    """
    foreign = [
        join_name(component, name)
        for group in groups
        for name, entry in group.entries()
        if not _holds_any(weights.located[name].weight, entry.indices, [entry.written])
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


def _holds_any(weight: Tensor, indices: Tensor, values: Iterable[Tensor]) -> bool:
    now = gather(weight, indices)
    return any(_same_bits(now, bits) for bits in values)


def _same_bits(now: Tensor, written: Tensor) -> bool:
    """Whether a weight's values are those that were written, after the same cast if it was cast since."""
    return torch.equal(bits_of(now), bits_of(cast(written, now)))


def _reset_step_cache(module: nn.Module) -> None:
    """Step caches (first-block cache and the like) hold activations of the weights before."""
    reset = getattr(module, "_reset_stateful_cache", None)
    if callable(reset):
        reset()
