"""Carry out a switch: the only module that writes the weights of a model at inference.

Everything is planned and checked first; then the entries are overwritten. Nothing is ever subtracted: the bits that
were overwritten are saved and written back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shira_diffusers.delta import SparseDelta
from shira_diffusers.errors import AdapterMismatchError, ResidentStateError, listing
from shira_diffusers.fitting import join_name
from shira_diffusers.fuse import MergeMethod, merge_method, plan_union
from shira_diffusers.locate import Located, Locator, unwrap
from shira_diffusers.scales import scale_of
from shira_diffusers.scatter import gather, overwrite
from shira_diffusers.state import Entry, Mix, ShiraState, ensure_state


@dataclass(slots=True)
class _Step:
    """What one weight goes through in a switch; ``fresh`` is filled in when its base bits are known."""

    name: str
    located: Located
    old: Entry | None
    deltas: tuple[SparseDelta, ...]
    scales: tuple[float, ...]
    fresh: Entry | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One module's part of a switch."""

    module: nn.Module
    state: ShiraState
    mix: Mix
    disabled: Mix | None
    steps: list[_Step]
    merge: MergeMethod


def plan_switch(component: str, model: nn.Module, mix: Mix, disabled: Mix | None = None) -> Plan:
    """Find everything that a switch of one component needs, and check it. Nothing is written.

    Args:
        component: its name, empty for a bare module.
        model: the component, compiled or not, which has a state.
        mix: what shall be active.
        disabled: the mix to remember as put aside.

    Raises:
        ResidentStateError: weights that cannot be overwritten now or that somebody else has written.
    """
    module = unwrap(model)
    state = ensure_state(module)
    locator = Locator(model)
    if mix.scales or state.entries:
        locator.require_not_frozen()
    located: dict[str, Located] = {}
    steps: dict[tuple[object, ...], _Step] = {}

    def step_of(name: str) -> _Step:
        if name not in located:
            located[name] = locator.locate(name)
        found = located[name]
        return steps.setdefault(found.key, _Step(name, found, None, (), ()))

    for name, entry in state.entries.items():
        step_of(name).old = entry
    for adapter_name in sorted(mix.scales):
        claimed: dict[int, tuple[str, SparseDelta]] = {}
        for name, delta in state.adapters[adapter_name].deltas.items():
            step = step_of(name)
            if id(step) in claimed:
                _require_same_delta(adapter_name, name, delta, *claimed[id(step)])
                continue  # another name of a tied weight
            claimed[id(step)] = (name, delta)
            step.deltas += (delta,)
            step.scales += (scale_of(mix.scales[adapter_name], component, name),)
    require_written([(component, s.name, s.located, s.old) for s in steps.values() if s.old is not None])
    return Plan(module, state, mix, disabled, list(steps.values()), merge_method(mix.method))


def run(plans: Sequence[Plan]) -> None:
    """Carry out the plans of all components, or none: on any exception what was written is taken back.

    Only masked entries change; no tensor is replaced, so addresses stay. The caller holds the models' write locks.
    """
    begun: list[_Step] = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            for plan in plans:
                for step in plan.steps:
                    begun.append(step)
                    _carry_out(step, plan.merge)
    except BaseException:
        for step in reversed(begun):
            _take_back(step)
        raise
    for plan in plans:
        plan.state.mix, plan.state.disabled = plan.mix, plan.disabled
        plan.state.entries = {step.name: step.fresh for step in plan.steps if step.fresh is not None}
        if plan.steps:
            _reset_step_cache(plan.module)


def _carry_out(step: _Step, merge: MergeMethod) -> None:
    """Overwrite the entries of one weight, in the weight and in all that holds it."""
    weight, old = step.located.weight, step.old
    same_place = (
        old is not None
        and len(old.sources) == len(step.deltas)
        and all(a is b for a, b in zip(old.sources, step.deltas, strict=True))
    )
    if old is not None and not same_place:
        _write(step.located, old.indices, old.base)
    if not step.deltas:
        return
    union = plan_union([delta.indices.to(weight.device) for delta in step.deltas])
    base = _cast(old.base, weight) if old is not None and same_place else gather(weight, union.indices)
    total = merge(union, [delta.values.to(weight.device) for delta in step.deltas], step.scales)
    wide = base if base.dtype == torch.float64 else base.float()
    written = (wide + total).to(weight.dtype)
    step.fresh = Entry(union.indices, base, written, step.deltas)
    _write(step.located, union.indices, written)


def _take_back(step: _Step) -> None:
    if step.fresh is not None:
        _write(step.located, step.fresh.indices, step.fresh.base)
    if step.old is not None:
        _write(step.located, step.old.indices, step.old.base)
        _write(step.located, step.old.indices, step.old.written)


def _write(located: Located, indices: Tensor, values: Tensor) -> None:
    for holder in located.holders:
        overwrite(holder.tensor, indices, _cast(values, holder.tensor), holder.offset)


def _cast(values: Tensor, weight: Tensor) -> Tensor:
    """Saved bits as the weight has them now: it may have been cast or moved since."""
    return values.to(weight.device, weight.dtype)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.view(kind), b.view(kind))


def require_written(active: Sequence[tuple[str, str, Located, Entry]]) -> None:
    """Require that overwritten entries hold what was written: ``(component, name, located, entry)`` each.

    Raises:
        ResidentStateError: names the weights that somebody else has written.
    """
    foreign = [
        join_name(part, name)
        for part, name, located, entry in active
        if not _same_bits(gather(located.weight, entry.indices), _cast(entry.written, located.weight))
    ]
    if foreign:
        raise ResidentStateError(
            f"{len(foreign)} of {len(active)} adapted weights were written by somebody else while adapters were active "
            "(load_state_dict, fuse_lora, training), so restoring would mix two bases; expected what the last switch "
            "wrote. Undo that write, or keep the new weights as the base with bake_shira() (Resident.bake()):"
            f"{listing(foreign)}"
        )


def _require_same_delta(adapter: str, name: str, delta: SparseDelta, other: str, first: SparseDelta) -> None:
    if delta != first:
        raise AdapterMismatchError(
            f"adapter {adapter!r} has different deltas for {other} and {name}, which are one tied weight here; "
            "use it with a model whose weights are not tied"
        )


def _reset_step_cache(module: nn.Module) -> None:
    """Step caches (first-block cache and the like) hold activations of the weights before."""
    reset = getattr(module, "_reset_stateful_cache", None)
    if callable(reset):
        reset()
