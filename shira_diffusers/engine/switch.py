"""Carry out a switch of all components, or roll it back.

In: mixes of the components of a model. Out: their weights overwritten in place, and the bits that were there.
Everything is planned and checked first; nothing is ever subtracted: what was overwritten is saved and written back.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, zip_longest

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.merge import Union, fuse_scaled, merge_method, sum_deltas
from shira_diffusers.adapters.scales import Scale, scale_of
from shira_diffusers.engine.fit import join_name
from shira_diffusers.engine.plan import Mix, as_now, fits_now, is_one_name_each, plan_entries, plans_of
from shira_diffusers.engine.sharing import claims, conflicts
from shira_diffusers.engine.side_branch import ResidentBranch, SideBranch, branches_of, hooks_of, replace_hooks
from shira_diffusers.engine.state import ShiraState, as_rounded, ensure_state, written_by_others, written_since
from shira_diffusers.errors import AdapterMismatchError, ResidentStateError, ShiraError, counted, listing, verb
from shira_diffusers.weights.finder import WeightMap, live_weights, unwrap, weights_of
from shira_diffusers.weights.scatter import cast, overwrite
from shira_diffusers.weights.steps import EntryPlan, Kind, SavedEntries, SwitchStep
from shira_diffusers.weights.sweep_cpu import TorchSweep
from shira_diffusers.weights.sweep_triton import TritonSweep, sweeps_of


@dataclass(slots=True)
class Transaction:
    """One component's part of a switch; ``run`` carries out those of all components, or none.

    Args:
        component: its name, empty for a bare module.
        module: it, unwrapped.
        state: its own.
        mix, disabled: what the state has after it.
        weights, live: where the weights are, and they themselves.
        outgoing: what is restored, as the weights are now.
        plans: of what is overwritten next.
        twins: other names of the weights of these, which are tied.
        branches: what runs beside quantized weights next; None where there are none.
        again: plans it anew.
        incoming: what is overwritten after it, filled on the way.
    """

    component: str
    module: nn.Module
    state: ShiraState
    mix: Mix
    disabled: Mix | None
    weights: WeightMap
    live: dict[str, Tensor]
    outgoing: list[SavedEntries]
    plans: tuple[EntryPlan, ...]
    twins: dict[str, str]
    branches: list[tuple[nn.Module, SideBranch]] | None
    again: Callable[[], "Transaction"]
    incoming: list[SavedEntries] = field(default_factory=list)

    def commit(self) -> None:
        """Note that it has been carried out."""
        self.state.mix, self.state.disabled = self.mix, self.disabled
        self.state.set_overwritten(self.incoming, self.twins)
        if self.branches is not None:
            replace_hooks(self.module, ResidentBranch, self.branches)

    def restorer(self) -> Callable[[], None]:
        """What makes mix, saved bits and branches those of now again."""
        restore = self.state.restorer()
        before = None if self.branches is None else hooks_of(self.module, ResidentBranch)

        def undo() -> None:
            restore()
            if before is not None:
                replace_hooks(self.module, ResidentBranch, before)

        return undo

    def notify(self) -> None:
        """Let others know, once all components are committed: what they raise comes too late to undo anything."""
        if self.live:
            _reset_step_cache(self.module)


def plan_switch(component: str, model: nn.Module, mix: Mix, disabled: Mix | None = None) -> Transaction:
    """Find everything that a switch of one component needs, and check it. Nothing is written.

    Args:
        component: its name, empty for a bare module.
        model: the component, compiled or not.
        mix: what shall be active.
        disabled: the mix to remember as put aside.

    Raises:
        AdapterMismatchError: an adapter with different deltas for one tied weight, or for weights of another shape.
        ResidentStateError: weights that cannot be overwritten now, or that share memory now.
    """
    module = unwrap(model)
    state = ensure_state(module)
    adapters = [state.adapters[name] for name in sorted(mix.scales)]
    if state.twins or state.quantized:  # what is not overwritten itself no glance looks at
        state.note_untied(weights_of(model))
    outgoing_names = tuple([saved.plan.names for saved in state.overwritten])
    weights, live = live_weights(model, _joined([*outgoing_names, *[a.names for a in adapters]], state.quantized))
    if live:
        weights.require_not_frozen()
    version = weights.version
    _require_ours(component, [n for saved in state.overwritten for n in _resized(saved.plan, live, version)])
    outgoing = [part for saved in state.overwritten for part in as_now(saved, live, version)]
    known = plans_of(adapters, [tuple([saved.plan for saved in outgoing]), *state.remembered])
    usable = ("usable", outgoing_names, state.quantized)  # once per version: all weights are looked at

    def is_usable(plans: tuple[EntryPlan, ...]) -> bool:
        if not (weights.confirm() and fits_now(plans, live, version)):
            return False
        _check_weights(component, adapters, weights, live)
        return is_one_name_each(plans, outgoing_names, live)

    plans = next((plans for plans in known if plans[0].once(usable, partial(is_usable, plans), version)), ())
    if adapters and not plans:
        if not weights.confirm():
            return plan_switch(component, model, mix, disabled)
        _check_weights(component, adapters, weights, live)
        plans = plan_entries(adapters, live, outgoing_names)
        if plans:
            plans[0].once(usable, lambda: True, version)
    state.remember(plans)
    twins: dict[str, str] = {}
    for plan in plans:
        twins |= plan.once("twins", partial(weights.twins, plan.names), version)
    branches = _plan_branches(component, state, mix, weights) if state.quantized else None
    again = partial(plan_switch, component, model, mix, disabled)
    return Transaction(component, module, state, mix, disabled, weights, live, outgoing, plans, twins, branches, again)


def _joined(groups: Sequence[tuple[str, ...]], without: Collection[str]) -> tuple[str, ...]:
    """All names of some groups, as a rule those of one: adapters change the same weights."""
    apart = list(dict.fromkeys(groups))
    if len(apart) == 1 and not without:
        return apart[0]
    return tuple([name for name in dict.fromkeys(chain(*apart)) if name not in without])


def _plan_branches(
    component: str, state: ShiraState, mix: Mix, weights: WeightMap
) -> list[tuple[nn.Module, SideBranch]]:
    """The branches beside quantized weights.

    Raises:
        ResidentStateError: a compiled model.
    """
    held = [
        (state.adapters[name].keeping(state.quantized), partial(scale_of, scale, component))
        for name, scale in sorted(mix.scales.items())
    ]
    fused = fuse_scaled(held, mix.method) if held else ShiraAdapter({})
    if fused.deltas and weights.is_compiled:
        raise ResidentStateError(
            f"{component or 'the model'} is quantized and compiled: adapters run beside quantized weights as hooks, "
            "which a compiled model does not see; expected a model that is not compiled"
        )
    return branches_of(weights, fused, ResidentBranch)


def _resized(plan: EntryPlan, live: Mapping[str, Tensor], version: int) -> list[str]:
    """Weights (any shape) whose number of entries has changed since they were overwritten."""
    numels = zip(plan.names, plan.numels, strict=True)
    return plan.once("resized", lambda: [name for name, numel in numels if live[name].numel() != numel], version)


def _check_weights(
    component: str, adapters: Sequence[ShiraAdapter], weights: WeightMap, live: Mapping[str, Tensor]
) -> None:
    """Require of the weights, which may have been replaced since the adapters were added, what ``add`` required.

    Raises:
        AdapterMismatchError: names the weights of another shape.
        ResidentStateError: names the weights that share memory.
    """
    wrong = [
        f"{join_name(component, name)}: expected {delta.shape}, got {tuple(live[name].shape)}"
        for adapter in adapters
        for name, delta in adapter.deltas.items()
        if name in live and delta.shape != live[name].shape
    ]
    if wrong:
        raise AdapterMismatchError(
            f"{counted(len(wrong), 'weight')} {verb(len(wrong), 'has', 'have')} another shape than when the adapter "
            f"was added, nothing has changed; put the layers back, or remove the adapter:{listing(wrong)}"
        )
    _require_apart(component, weights, live)


def _require_apart(component: str, weights: WeightMap, names: Iterable[str]) -> None:
    """Require that no two weights share memory, as an original and its copy do that was fused since they were added.

    Raises:
        ResidentStateError: names the weights.
    """
    version, apart = weights.apart
    if version == weights.version and apart.issuperset(names):
        return
    held = {name: weights.holders(name) for name in names}
    shared = [f"{join_name(component, b.name)} and {a.name}" for a, b in conflicts(claims(held))]
    if shared:
        raise ResidentStateError(
            f"{counted(len(shared), 'pair')} of adapted weights {verb(len(shared), 'shares', 'share')} memory, "
            "expected one name for each; nothing has changed. Clear the mix and activate adapters of one of the two "
            f"alone, or undo what made them share:{listing(shared)}"
        )


def run(transactions: Sequence[Transaction]) -> None:
    """Carry out a switch of all components, or none: on any exception what was written is taken back.

    Only masked entries change; no tensor is replaced, so addresses stay. The caller holds the models' write locks.

    Raises:
        ResidentStateError: the weights that leave were modified outside shira_diffusers.
        ShiraError: sums that are too large for the weights' dtype.
    """
    with ExitStack() as undo:
        if not _carry_out(transactions, undo):
            undo.close()
            transactions = [one.again() for one in transactions]
            for one in transactions:
                one.outgoing = read_current(one.component, one.outgoing, one.live)
            if not _carry_out(transactions, undo):
                raise ResidentStateError(
                    "adapted weights are being modified outside shira_diffusers while they are switched, expected no "
                    "other writer; stop what writes them (training, load_state_dict) and switch again"
                )
        for one in transactions:
            undo.callback(one.restorer())
            one.commit()
        undo.pop_all()
    _note_written(transactions)
    for one in transactions:
        one.notify()


def _note_written(transactions: Sequence[Transaction]) -> None:
    """Let autograd know that weights were written: what it kept of the old ones is of no use any more."""
    torch.clear_autocast_cache()  # an enclosing autocast region holds casts of them
    for one in transactions:
        torch.autograd.graph.increment_version(list(one.live.values()))  # a backward that needs them must fail


def _carry_out(transactions: Sequence[Transaction], undo: ExitStack) -> bool:
    """Restore what leaves, save what is overwritten next, overwrite it.

    Returns:
        Whether all that left was what had been written, in the weights that the models have; if not, ``undo`` is due.

    Raises:
        ShiraError: sums that are too large for the weights' dtype; ``undo`` is due.
    """
    finite = True

    def confirm() -> bool:
        return all([one.weights.confirm() for one in transactions])

    for steps, sweeps in _prepare(transactions):
        for sweep in sweeps:
            undo.callback(sweep.undo)
            if not sweep.run(confirm):
                return False
            finite &= sweep.finite
        for step in steps:
            undo.callback(_undo_copies, step)
            _write_copies(step)
    if not finite:
        scales = {name: scale for one in transactions for name, scale in one.mix.scales.items()}
        require_in_range({one.component: one.incoming for one in transactions}, scales)
    return True


def require_in_range(groups: Mapping[str, Iterable[SavedEntries]], scales: Mapping[str, Scale]) -> None:
    """Require that no finite value of the base has become infinite or NaN.

    Args:
        groups: what is overwritten in each component.
        scales: by which adapters, for the message.

    Raises:
        ShiraError: names the weights, with counts.
    """
    wide = [
        f"{join_name(component, name)}: {counted(count, 'entry', of=base.numel())} in {_name_of(base)}"
        for component, group in groups.items()
        for saved in group
        for name, _, base, written in saved.parts()
        if (count := int((_finite(base) & ~_finite(written)).sum()))
    ]
    if wide:
        mix = ", ".join(f"{name}={scale}" for name, scale in sorted(scales.items()))
        raise ShiraError(
            f"{counted(len(wide), 'weight')} would become infinite or NaN with {mix}, expected sums in the range of "
            "their dtype; nothing has changed. Use smaller scales, or load the model in a wider dtype:"
            f"{listing(wide)}"
        )


def _name_of(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _finite(values: Tensor) -> Tensor:
    return torch.isfinite(values.float() if values.dtype != torch.float64 else values)


@torch.inference_mode(False)  # what is saved is read and written in any mode
@torch.no_grad()
def _prepare(transactions: Sequence[Transaction]) -> list[tuple[list[SwitchStep], list[TorchSweep | TritonSweep]]]:
    """The steps of all components and what carries them out, in turns: a turn's steps touch different weights."""
    turns = zip_longest(*[_steps(one) for one in transactions], fillvalue=[])
    return [(steps, sweeps_of(steps)) for steps in [list(chain(*own)) for own in turns]]


def _steps(one: Transaction) -> list[list[SwitchStep]]:
    """The steps of one component by turn.

    Nearly always one step in all: weights of one dtype on one device, one mix that leaves and one that arrives.
    """
    one.incoming = []
    version = one.weights.version
    arriving = {plan.kinds(one.live, version)[0]: plan for plan in one.plans}
    leaving: dict[Kind, list[SavedEntries]] = {}
    for saved in one.outgoing:
        leaving.setdefault(saved.plan.kinds(one.live, version)[0], []).append(saved)
    steps = [
        [_step(one, groups[k], None) for groups in leaving.values() if k < len(groups) - 1]
        for k in range(max(map(len, leaving.values()), default=1) - 1)
    ]
    pairs = [(leaving[kind][-1] if kind in leaving else None, arriving.get(kind)) for kind in {**leaving, **arriving}]
    return [*steps, [_step(one, old, plan) for old, plan in pairs]]


def _step(one: Transaction, outgoing: SavedEntries | None, plan: EntryPlan | None) -> SwitchStep:
    if plan is None:
        return SwitchStep(one.weights, one.live, outgoing, None)
    first, pool = one.live[plan.names[0]], one.state.pool
    stays = outgoing is not None and outgoing.plan is plan
    base = outgoing.base if outgoing is not None and stays else pool.take(plan.bounds[-1], first)
    incoming = SavedEntries(plan, base, pool.take(plan.bounds[-1], first))
    one.incoming.append(incoming)
    return SwitchStep(one.weights, one.live, outgoing, incoming, *_mixed(one, plan))


def _mixed(one: Transaction, plan: EntryPlan) -> tuple[Tensor, Mapping[str, float] | float]:
    """``sum of scale * delta``, ``(n,)``, and what is still to be multiplied with: of one adapter its scale."""
    names, merge = sorted(one.mix.scales), merge_method(one.mix.method)
    if merge is sum_deltas and len(names) == 1:
        scale = one.mix.scales[names[0]]
        if isinstance(scale, int | float):
            return plan.values[0], float(scale)
        own = zip(plan.names, plan.members[0], strict=True)  # of a tied weight the adapter may have another name
        return plan.values[0], {name: scale_of(scale, one.mix.component, member) for name, member in own}
    held = [k for k in range(len(names)) if plan.members[k]]
    union = Union(plan.indices, tuple([plan.places[k] for k in held]))
    scales = [_scales(one, plan, k, one.mix.scales[names[k]]) for k in held]
    total = merge(union, [plan.values[k] for k in held], scales)
    if not isinstance(total, Tensor) or total.shape != plan.indices.shape:
        got = tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__
        raise ShiraError(
            f"merge method {one.mix.method!r}: expected a tensor of shape {tuple(plan.indices.shape)}, a sum per "
            f"entry, got {got}; nothing has changed"
        )
    return total, 1.0


def _scales(one: Transaction, plan: EntryPlan, member: int, scale: Scale) -> float | Tensor:
    """One number where all weights have the same scale, else float32 ``(nnz,)``."""
    if isinstance(scale, int | float):
        return float(scale)
    by_weight = [scale_of(scale, one.mix.component, weight) for weight in plan.members[member]]
    sizes = torch.tensor([plan.sources[member].deltas[name].nnz for name in plan.members[member]], device="cpu")
    return torch.tensor(by_weight, dtype=torch.float32, device="cpu").repeat_interleave(sizes).to(plan.indices.device)


def _write_copies(step: SwitchStep) -> None:
    """Write what a step has written to all else that holds the weights: fused copies, offloaded originals."""
    if step.outgoing is not None:
        _write_all(step, step.outgoing.plan, step.outgoing.base)
    if step.incoming is not None:
        _write_all(step, step.incoming.plan, step.incoming.written)


def _undo_copies(step: SwitchStep) -> None:
    if step.incoming is not None:
        _write_all(step, step.incoming.plan, step.incoming.base)
    if step.outgoing is not None:
        _write_all(step, step.outgoing.plan, step.outgoing.written)


def _write_all(step: SwitchStep, plan: EntryPlan, values: Tensor) -> None:
    version = step.weights.version
    if copied := plan.once("copied", lambda: step.weights.copied(plan.names), version):
        parts = zip(plan.names, plan.indices.split(plan.sizes), values.split(plan.sizes), strict=True)
        for name, indices, bits in parts:
            for tensor, offset in step.weights.holders(name)[1:] if name in copied else ():
                overwrite(tensor, indices, cast(bits, tensor), offset)


def read_current(component: str, groups: Iterable[SavedEntries], live: Mapping[str, Tensor]) -> list[SavedEntries]:
    """The overwritten entries with the bits that are there now: what was written, or the base again.

    Weights hold the base after the output of ``state_dict`` was loaded back, as accelerate does when it offloads.

    Args:
        component: its name, for messages.
        groups: what is overwritten.
        live: the component's weights, of any shape.

    Raises:
        ResidentStateError: names the weights that were modified outside shira_diffusers.
    """
    current: list[SavedEntries] = []
    foreign: list[str] = []
    for saved in [as_rounded(one, live) for one in groups]:
        current.append(replace(saved, written=saved.plan.read(live)))
        foreign += written_since(saved.parts(), live)
    _require_ours(component, foreign)
    return current


def require_written(component: str, groups: Iterable[SavedEntries], live: Mapping[str, Tensor]) -> None:
    """Require that overwritten entries of the ``live`` weights (any shape) hold what was written.

    Raises:
        ResidentStateError: names the weights that were modified outside shira_diffusers.
    """
    _require_ours(
        component, written_since(chain(*[as_rounded(saved, live).parts() for saved in groups]), live, base_too=False)
    )


def _require_ours(component: str, foreign: Sequence[str]) -> None:
    if foreign:
        names = [join_name(component, name) for name in foreign]
        raise written_by_others(names, "restoring would mix two bases")


def _reset_step_cache(module: nn.Module) -> None:
    """Step caches (first-block cache and the like) hold activations of the weights before."""
    reset = getattr(module, "_reset_stateful_cache", None)
    if callable(reset):
        reset()
