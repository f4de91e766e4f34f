"""Carry out a switch, all of it or nothing.

Everything is planned and checked first; then the entries are overwritten. Nothing is ever subtracted: the bits that
were overwritten are saved and written back.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.merge import MergeMethod, Union, merge_method, sum_deltas
from shira_diffusers.adapters.scales import Scale, scale_of
from shira_diffusers.engine.fit import join_name
from shira_diffusers.engine.offloading import note_offload
from shira_diffusers.engine.plan import lay_out
from shira_diffusers.engine.sharing import claims, conflicts
from shira_diffusers.engine.state import (
    Entry,
    Layout,
    Mix,
    Overwritten,
    ShiraState,
    ensure_state,
    written_by_others,
    written_since,
)
from shira_diffusers.engine.steps import Change, Kind, Weights
from shira_diffusers.errors import ResidentStateError, ShiraError, counted, listing, verb
from shira_diffusers.weights.finder import Located, locator_of, unwrap
from shira_diffusers.weights.sweep_cpu import Step
from shira_diffusers.weights.sweep_triton import sweeps_of


@dataclass(slots=True)
class Plan:
    """One module's part of a switch; ``fresh`` is what will be overwritten after it."""

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
        ResidentStateError: weights that cannot be overwritten now, or that share memory by now.
    """
    module = unwrap(model)
    state = ensure_state(module)
    adapters = [state.adapters[name] for name in sorted(mix.scales)]
    names = {name for adapter in adapters for name in adapter.deltas}
    names |= {name for group in state.overwritten for name in group.layout.names}
    locator = locator_of(model)
    if names:
        locator.require_not_frozen()
    located = {name: locator.locate(name) for name in sorted(names)}
    weights = Weights(located, state.spares)
    current = [part for group in state.overwritten for part in weights.as_now(group)]
    if adapters and any(len(weight.holders) > 1 for weight in located.values()):
        _require_apart(component, located)  # ``add`` has seen to all that was not fused since
    layouts = lay_out(adapters, located, [tuple(group.layout for group in current), *state.remembered])
    state.remember(layouts)
    return Plan(component, module, state, mix, disabled, weights, current, layouts, merge_method(mix.method))


def _require_apart(component: str, located: Mapping[str, Located]) -> None:
    """Require that no two weights share memory, as an original and its copy do that was fused since they were added.

    Raises:
        ResidentStateError: names the weights.
    """
    shared = [f"{join_name(component, b.name)} and {a.name}" for a, b in conflicts(claims(located))]
    if shared:
        raise ResidentStateError(
            f"{counted(len(shared), 'pair')} of adapted weights {verb(len(shared), 'shares', 'share')} memory, "
            "expected one name for each; nothing has changed. Clear the mix and activate adapters of one of the two "
            f"alone, or undo what made them share:{listing(shared)}"
        )


def run(plans: Sequence[Plan]) -> None:
    """Carry out the plans of all components, or none: on any exception what was written is taken back.

    Only masked entries change; no tensor is replaced, so addresses stay. The caller holds the models' write locks.

    Raises:
        ResidentStateError: somebody else has written the weights that leave.
        ShiraError: sums that are too large for the weights' dtype.
    """
    with ExitStack() as undo:
        if not _carry_out(plans, undo):
            undo.close()
            for plan in plans:
                plan.current = read_current(plan.component, plan.current, plan.weights)
            if not _carry_out(plans, undo):
                raise ResidentStateError("adapted weights are being written by somebody else while they are switched")
        undo.pop_all()
    for plan in plans:
        plan.state.mix, plan.state.disabled = plan.mix, plan.disabled
        plan.state.set_overwritten(plan.fresh)
        note_offload(plan.module)
        if plan.weights.located:
            _reset_step_cache(plan.module)


def _carry_out(plans: Sequence[Plan], undo: ExitStack) -> bool:
    """Restore what leaves, save what is overwritten next, overwrite it.

    Returns:
        Whether all that left was what had been written; if not, ``undo`` is due.

    Raises:
        ShiraError: sums that are too large for the weights' dtype; ``undo`` is due.
    """
    for plan in plans:
        plan.fresh = []
    finite = True
    for steps in zip_longest(*(_steps(plan) for plan in plans)):
        taken = [step for own in steps if own for step in own]
        for sweep in sweeps_of([step for step, _, _, _ in taken]):
            undo.callback(sweep.undo)
            if not sweep.run():
                return False
            finite &= sweep.finite
        for _, weights, old, new in taken:
            undo.callback(_undo_copies, weights, old, new)
            _write_copies(weights, old, new)
    if not finite:
        _require_in_range(plans)
    return True


def _require_in_range(plans: Sequence[Plan]) -> None:
    """Require that no finite value of the base has become infinite or NaN.

    Raises:
        ShiraError: names the weights, with counts.
    """
    wide = [
        f"{join_name(plan.component, name)}: {counted(count, 'entry', of=entry.base.numel())} in {_name_of(entry)}"
        for plan in plans
        for group in plan.fresh
        for name, entry in group.entries()
        if (count := int((_finite(entry.base) & ~_finite(entry.written)).sum()))
    ]
    if wide:
        mix = ", ".join(f"{name}={scale}" for name, scale in sorted(_all_scales(plans).items()))
        raise ShiraError(
            f"{counted(len(wide), 'weight')} would become infinite or NaN with {mix}, expected sums in the range of "
            "their dtype; nothing has changed. Use smaller scales, or load the model in a wider dtype:"
            f"{listing(wide)}"
        )


def _all_scales(plans: Iterable[Plan]) -> dict[str, Scale]:
    return {name: scale for plan in plans for name, scale in plan.mix.scales.items()}


def _name_of(entry: Entry) -> str:
    return str(entry.base.dtype).removeprefix("torch.")


def _finite(values: Tensor) -> Tensor:
    return torch.isfinite(values.float() if values.dtype != torch.float64 else values)


_Taken = tuple[Step, Weights, Overwritten | None, Overwritten | None]


def _steps(plan: Plan) -> Iterator[list[_Taken]]:
    """The steps of one component: those of a list touch different weights, each list comes after the one before.

    Nearly always one step in all: weights of one dtype on one device, one mix that leaves and one that arrives.
    """
    kind_of = plan.weights.kind
    arriving = {kind_of(layout.names[0]): layout for layout in plan.layouts}
    leaving: dict[Kind, list[Overwritten]] = {}
    for group in plan.current:
        leaving.setdefault(kind_of(group.layout.names[0]), []).append(group)
    pairs = [(leaving[kind][-1] if kind in leaving else None, arriving.get(kind)) for kind in {**leaving, **arriving}]
    for k in range(max((len(groups) for groups in leaving.values()), default=1) - 1):
        yield [_step(plan, groups[k], None) for groups in leaving.values() if k < len(groups) - 1]
    yield [_step(plan, old, layout) for old, layout in pairs]


def _step(plan: Plan, old: Overwritten | None, layout: Layout | None) -> _Taken:
    step, new = plan.weights.step(old, None if layout is None else _change(plan, layout))
    if new is not None:
        plan.fresh.append(new)
    return step, plan.weights, old, new


@torch.inference_mode(False)
@torch.no_grad()
def _change(plan: Plan, layout: Layout) -> Change:
    """``sum of scale * delta``, where there is one adapter without the multiplication, which the step does."""
    names = sorted(plan.mix.scales)
    if plan.merge is sum_deltas and len(names) == 1:
        scale = plan.mix.scales[names[0]]
        if isinstance(scale, int | float):
            return Change(layout, layout.values[0], float(scale))
        return Change(layout, layout.values[0], {n: scale_of(scale, plan.component, n) for n in layout.names})
    values, scales, places = [], [], []
    for k, name in enumerate(names):
        if layout.members[k]:
            values.append(layout.values[k])
            scales.append(_scales(plan, layout, k, plan.mix.scales[name]))
            places.append(layout.places[k])
    return Change(layout, plan.merge(Union(layout.indices, tuple(places)), values, scales), 1.0)


def _scales(plan: Plan, layout: Layout, adapter: int, scale: Scale) -> float | Tensor:
    """One number where all weights have the same scale, else float32 ``[nnz]``."""
    if isinstance(scale, int | float):
        return float(scale)
    by_weight = [scale_of(scale, plan.component, weight) for weight in layout.members[adapter]]
    sizes = torch.tensor([layout.adapters[adapter].deltas[name].nnz for name in layout.members[adapter]], device="cpu")
    return torch.tensor(by_weight, dtype=torch.float32, device="cpu").repeat_interleave(sizes).to(layout.indices.device)


def _write_copies(weights: Weights, old: Overwritten | None, new: Overwritten | None) -> None:
    if old is not None:
        weights.write_copies(old.layout, old.base)
    if new is not None:
        weights.write_copies(new.layout, new.written)


def _undo_copies(weights: Weights, old: Overwritten | None, new: Overwritten | None) -> None:
    if new is not None:
        weights.write_copies(new.layout, new.base)
    if old is not None:
        weights.write_copies(old.layout, old.written)


def read_current(component: str, groups: Iterable[Overwritten], weights: Weights) -> list[Overwritten]:
    """The overwritten entries with the bits that are there now: what was written, or the base again.

    The base is there where somebody has put back what ``state_dict`` gave, as accelerate does when it offloads.

    Raises:
        ResidentStateError: names the weights that somebody else has written.
    """
    current: list[Overwritten] = []
    foreign: list[str] = []
    for group in groups:
        current.append(replace(group, written=weights.now(group.layout)))
        foreign += written_since(group.entries(), weights.located)
    _require_ours(component, foreign)
    return current


def require_written(component: str, groups: Iterable[Overwritten], weights: Weights) -> None:
    """Require that overwritten entries hold what was written.

    Raises:
        ResidentStateError: names the weights that somebody else has written.
    """
    entries = (entry for group in groups for entry in group.entries())
    _require_ours(component, written_since(entries, weights.located, base_too=False))


def _require_ours(component: str, foreign: Sequence[str]) -> None:
    if foreign:
        names = [join_name(component, name) for name in foreign]
        raise written_by_others(names, "restoring would mix two bases")


def _reset_step_cache(module: nn.Module) -> None:
    """Step caches (first-block cache and the like) hold activations of the weights before."""
    reset = getattr(module, "_reset_stateful_cache", None)
    if callable(reset):
        reset()
