"""Resident: adapters on weights that stay where they are, switched by overwriting a few of their entries."""

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.base_match import BaseMatch, other_base, trained_on
from shira_diffusers.adapters.merge import fuse_scaled, merge_method
from shira_diffusers.adapters.scales import Blocks, Scale, blocks_of, check_scale, mix_from, name_list, scale_of
from shira_diffusers.engine.bookkeeping import Entered
from shira_diffusers.engine.callers import stacklevel
from shira_diffusers.engine.fit import compare_base, fit
from shira_diffusers.engine.locks import Held, Hold, awaiting, hold, leave
from shira_diffusers.engine.offloading import new_offloads, note_offloads
from shira_diffusers.engine.plan import Mix
from shira_diffusers.engine.side_branch import ResidentBranch, hooks_of
from shira_diffusers.engine.state import ShiraState, ensure_state, state_of
from shira_diffusers.engine.switch import plan_switch, require_in_range, require_written, run
from shira_diffusers.errors import ResidentStateError, ShiraError, counted, listing, verb
from shira_diffusers.weights.finder import WeightMap, unwrap, weights_of
from shira_diffusers.weights.sweep_triton import engine_for
from shira_diffusers.weights.targets import parts_of

logger = logging.getLogger(__name__)


class Resident:
    """Adapters on the resident weights of a module, or of several named ones.

    The state lives in the modules: two ``Resident`` of one module see the same adapters. All methods are safe to
    call from several threads; switching waits until nobody reads (see ``reading``).

    Args:
        components: a module, whose adapters have plain parameter names, or ``{component: module}``, whose adapters'
            names begin with the component, or a pipeline. Compiled modules are looked through.

    Raises:
        ShiraError: something else than modules, or components with a dot in their names.

    Source: arXiv 2407.16712 (rapid switching by overwriting).
    """

    def __init__(self, components: nn.Module | Mapping[str, nn.Module]) -> None:
        found = parts_of(components)
        parts = {"": found} if isinstance(found, nn.Module) else found
        wrong = [
            f"{name!r}: {type(model).__name__}" for name, model in parts.items() if not isinstance(model, nn.Module)
        ]
        if wrong:
            raise ShiraError(f"expected {{component: module}}; leave out what is no module:{listing(wrong)}")
        lists = [
            f"{name!r}: {type(model).__name__}" for name, model in parts.items() if isinstance(model, nn.ModuleList)
        ]
        if lists:  # the state that a module carries would be one of its members
            raise ShiraError(f"expected models, which can be called; pass the model that holds this:{listing(lists)}")
        # a module under two names is one component, by its first name
        first = {id(unwrap(model)): name for name, model in reversed(list(parts.items()))}
        self._models = {name: model for name, model in parts.items() if first[id(unwrap(model))] == name}

    # ---------------------------------------------------------------- what is there

    def __repr__(self) -> str:
        parts = (f"{name}: {type(unwrap(model)).__name__}".removeprefix(": ") for name, model in self._models.items())
        active = ", ".join(f"{name}={scale}" for name, scale in self.active.items()) or "none"
        return f"<Resident of {', '.join(parts) or 'nothing'}; {counted(len(self.names), 'adapter')}, active: {active}>"

    @property
    def models(self) -> dict[str, nn.Module]:
        """The components, as they were given."""
        return dict(self._models)

    @property
    def names(self) -> list[str]:
        """The adapters that were added, in the order in which they were."""
        return list(self.components)

    @property
    def components(self) -> dict[str, list[str]]:
        """The adapters that were added, and the components that each changes."""
        found: dict[str, list[str]] = {}
        for part, state in self._states().items():
            for name in list(state.adapters):  # at once: others may add and remove meanwhile
                found.setdefault(name, []).append(part)
        return found

    @property
    def active(self) -> dict[str, Scale]:
        """The active adapters with their scales as given; empty while disabled.

        Of an adapter that a component lacks, since another model has taken its place, those of the others by component.
        """
        active = self._joined({part: state.mix for part, state in self._states().items()})
        components = self.components
        for _, name in self._lost(active):
            scale = active[name]
            active[name] = scale if isinstance(scale, Mapping) else dict.fromkeys(components[name], scale)
        return copy.deepcopy(active)  # what the caller does to it changes no mix

    def _joined(self, mixes: Mapping[str, Mix], before: Mapping[str, list[str]] | None = None) -> dict[str, Scale]:
        """The scales of a mix as they were given; where components differ, of each by its name here.

        Args:
            mixes: by component.
            before: the adapters' components when these were made; None is those of now.
        """
        names = {name: None for mix in mixes.values() for name in mix.scales}
        joined: dict[str, Scale] = {}
        components = self.components
        for name in names:
            given = {part: (mix.scales[name], mix.component) for part, mix in mixes.items() if name in mix.scales}
            first = joined[name] = next(iter(given.values()))[0]
            # a ``Resident`` of some of the components leaves it out of the mix of these alone
            out = [part for part in (before or components).get(name, ()) if part in mixes and part not in given]
            if out or isinstance(first, Mapping) or any(scale != first for scale, _ in given.values()):
                own = dict.fromkeys(out, 0.0) | {
                    part: scale if not isinstance(scale, Mapping) else scale.get(named)
                    for part, (scale, named) in given.items()
                }
                has = components.get(name, ())
                joined[name] = {part: scale for part, scale in own.items() if part in has and scale is not None}
        return joined

    @property
    def method(self) -> str:
        """How the active adapters are merged, a name in ``shira_diffusers.MERGE_METHODS``."""
        return _method_of({part: state.mix for part, state in self._states().items()})

    def components_of(self, name: str) -> list[str]:
        """The components that an adapter changes.

        Raises:
            ShiraError: no adapter of that name.
        """
        found = self.components.get(name)
        if found is None:
            raise self._unknown([name])
        return found

    def adapter(self, name: str) -> ShiraAdapter:
        """The adapter of a name, with component names put back.

        Raises:
            ShiraError: no adapter of that name.
        """
        found = {part: state.adapters.get(name) for part, state in self._states().items()}
        parts = [(part, adapter) for part, adapter in found.items() if adapter is not None]
        if not parts:
            raise self._unknown([name])
        named = [adapter.prefixed(part) if part else adapter for part, adapter in parts]
        return ShiraAdapter(
            {n: delta for adapter in named for n, delta in adapter.deltas.items()},
            named[0].metadata,
            {n: probe for adapter in named for n, probe in adapter.base_probes.items()},
        )

    def fused(self, scales: Mapping[str, Scale | None] | None = None, method: str = "sum") -> ShiraAdapter:
        """A mix as one adapter, which gives the same weights at scale 1.

        Args:
            scales: as for ``set``; None is the active mix, with its method.
            method: as for ``set``.

        Raises:
            ShiraError: nothing is active; or as ``set``.
        """
        with self.reading():
            mix, method = (self.active, self.method) if scales is None else (self._checked(scales), method)
            if not mix:
                raise ShiraError("no adapter is active: there is no mix to fuse; activate some or name an adapter")

            scaled = [(self.adapter(name), self._scale_by_weight(mix[name])) for name in sorted(mix)]
            mixed = fuse_scaled(scaled, method)
            return mixed.with_metadata(mix=json.dumps(mix), method=method)

    def _scale_by_weight(self, scale: Scale) -> Callable[[str], float]:
        def of(full_name: str) -> float:
            component, _, name = ("", "", full_name) if "" in self._models else full_name.partition(".")
            return scale_of(scale, component, name)

        return of

    def changed(self) -> tuple[int, int]:
        """Entries overwritten now, and entries of all parameters of the components."""
        entries = sum(group.base.numel() for state in self._states().values() for group in state.overwritten)
        total = sum(p.numel() for module in self._modules() for p in module.parameters())
        return entries, total

    @property
    def engines(self) -> dict[str, str]:
        """By what the weights overwritten now were: component -> ``triton`` (one launch) or ``torch``, or both."""
        found = {}
        for part, state in self._states().items():
            kinds = {(group.base.device, group.base.dtype) for group in state.overwritten}
            if kinds:
                found[part] = ", ".join(sorted({engine_for(*kind) for kind in kinds}))
        return found

    def reading(self) -> Held[None]:
        """Keep all others from switching while the weights are read, for instance during a generation.

        For ``with`` and ``async with``. "Others" are those outside the block, whatever thread they are in: what the
        block calls, and the tasks and threads it starts with its context (``asyncio.to_thread``), belong to it.
        """
        return hold(self._modules(), write=False)

    def writing(self) -> Held[None]:
        """Keep all others from reading and switching, for several calls that belong together; see ``reading``."""
        return hold(self._modules(), write=True)

    # ---------------------------------------------------------------- adapters come and go

    def add(self, adapter: ShiraAdapter, name: str) -> None:
        """Register an adapter, without activating it.

        Args:
            adapter: its tensors are kept as they are, on their device.
            name: not in use.

        Raises:
            ShiraError: the name is in use or empty, or no adapter.
            AdapterMismatchError: the adapter does not fit, wholly or in part; all offenders are named.
            ResidentStateError: a weight that cannot be overwritten (merged, on disk, ...).

        Quantized weights of Linear and Conv2d layers stay as they are: the active mix runs beside them, which costs
        time in every step, as a warning says. Another base than the adapter's gives a warning, too. On error nothing
        has changed.
        """
        if not name or not isinstance(name, str):
            raise ShiraError(f"an adapter's name must be a string that is not empty, got {name!r}")
        with self.writing():
            if name in self.names:
                raise ShiraError(
                    f"adapter name {name!r} is in use, expected a new one; delete that adapter first or choose another"
                )
            parts = fit(adapter, self._models)
            self._report_base(adapter, name, compare_base(parts, self._models))
            self._note_quantized(parts, name)
            for part, its_own in parts.items():
                ensure_state(unwrap(self._models[part])).adapters[name] = its_own
            self._note_loaded(name, parts)

    def _note_loaded(self, name: str, parts: Iterable[str]) -> None:
        states, loaded_for = self._states(), tuple(parts)
        for part in loaded_for:
            states[part].loaded_for[name] = loaded_for

    def replace(self, adapter: ShiraAdapter, name: str) -> None:
        """Put another adapter in place of one that was added: active if that was, with its scale.

        Strengths for components that the new one does not change are dropped.

        Raises:
            ShiraError: no adapter of that name.
            AdapterMismatchError, ResidentStateError: as ``add`` and ``set``.

        On error nothing has changed.
        """
        with self.writing():
            self.require_known([name])
            parts = fit(adapter, self._models, replacing=name)
            self._report_base(adapter, name, compare_base(parts, self._models))
            self._note_quantized(parts, name)
            states, components = self._states(), self.components
            mixes = {part: state.mix for part, state in states.items()}
            aside = {part: state.disabled for part, state in states.items() if state.disabled is not None}
            before = {part: (dict(state.adapters), dict(state.loaded_for)) for part, state in states.items()}
            try:
                for part, state in states.items():
                    _exchange(state, name, parts.get(part))
                active, disabled = (self._split(self._joined(m, components), _method_of(m)) for m in (mixes, aside))
                run([plan_switch(p, self._models[p], active[p], disabled[p] if aside else None) for p in states])
            except BaseException:
                for part, state in states.items():
                    state.adapters, state.loaded_for = before[part]
                raise
            self._note_loaded(name, parts)

    def _note_quantized(self, parts: Mapping[str, ShiraAdapter], name: str) -> None:
        """Note which weights of an adapter get branches, and warn of the first what that costs."""
        for part, adapter in parts.items():
            state = ensure_state(unwrap(self._models[part]))
            quantized = weights_of(self._models[part]).quantized(adapter.deltas)
            if quantized and not state.quantized:
                warnings.warn(
                    f"adapter {name!r}: {counted(len(quantized), 'weight', of=len(adapter.deltas))} of "
                    f"{part or 'the model'} {verb(len(quantized), 'is', 'are')} quantized and cannot be overwritten; "
                    "the active mix is computed beside them, which costs a sparse product per layer in every step "
                    "(nothing on a base that is not quantized)",
                    stacklevel=4,  # who called ``load_shira``
                )
            state.quantized |= quantized

    def check(self, adapter: ShiraAdapter) -> BaseMatch | None:
        """Whether an adapter fits, without adding it.

        Returns:
            Whether this is the base it was trained on (``same``), a fine-tune of it (``sibling``) or another model
            (``other``); None where the adapter has no base probes.

        Raises:
            AdapterMismatchError, ResidentStateError: as ``add``.
        """
        with self.reading():
            return compare_base(fit(adapter, self._models), self._models)

    def _report_base(self, adapter: ShiraAdapter, name: str, match: BaseMatch | None) -> None:
        if match == "sibling":
            logger.info("adapter %r was trained on a sibling of this model%s", name, trained_on(adapter.metadata))
        elif match == "other":
            warnings.warn(other_base(name, adapter.metadata), stacklevel=stacklevel())

    def remove(self, *names: str | Iterable[str]) -> None:
        """Forget adapters, in one switch; those of the mix that are left stay active.

        Args:
            names: each one or several; of a mapping the names count.

        Raises:
            ShiraError: no adapter of such a name.
            ResidentStateError: see ``set``.

        On error nothing has changed.
        """
        with self.writing():
            gone = list(chain(*map(name_list, names)))
            self.require_known(gone)
            states = self._states()
            active = [part for part, state in states.items() if not state.mix.scales.keys().isdisjoint(gone)]
            left = set(self.names).difference(gone)
            run([plan_switch(p, self._models[p], states[p].mix.among(left), states[p].disabled) for p in active])
            for state in states.values():
                state.disabled = state.disabled and state.disabled.among(left)
                state.forget(gone)

    # ---------------------------------------------------------------- switching

    def set(self, scales: Mapping[str, Scale | None], method: str = "sum") -> None:
        """Make exactly these adapters active: restore what leaves, overwrite what arrives.

        In float32: ``acc = 0; acc += scale * delta`` in the order of names; ``W = round(base + acc)``, rounded once.
        Only masked entries change, addresses never do.

        Args:
            scales: name -> a number, ``{component: number}`` or ``{component: {"down" | "mid" | "up": ...}}``, see
                ``scales.Scale``; None is 1.0.
            method: how several adapters are merged, a name in ``shira_diffusers.MERGE_METHODS``.

        Raises:
            ShiraError: unknown adapters, a scale that is not finite or for a component that the adapter does not
                change, sums out of the range of the weights' dtype, or an unknown method.
            ResidentStateError: adapted weights were modified outside shira_diffusers, or cannot be overwritten now; or
                a component lacks an adapter that was added for it and others, as one that has replaced another does.

        On error, at whatever point, the mix and all bits are what they were.
        """
        with self.writing():
            scales = self._checked(scales)
            merge_method(method)
            mixes = self._split(scales, method)
            run([plan_switch(part, self._models[part], mix) for part, mix in mixes.items()])

    def _split(self, scales: dict[str, Scale], method: str) -> dict[str, Mix]:
        """A mix by component, each with the adapters that it has."""
        states = self._states().items()
        return {p: Mix({n: s for n, s in scales.items() if n in state.adapters}, method, p) for p, state in states}

    def _checked(self, scales: Mapping[str, Scale | None]) -> dict[str, Scale]:
        mix = mix_from(scales)
        self.require_known(mix)
        self._require_whole(mix)
        components = self.components
        return {name: check_scale(name, scale, self._blocks(scale, components[name])) for name, scale in mix.items()}

    def _blocks(self, scale: Scale, components: Iterable[str]) -> dict[str, Blocks]:
        """The blocks of components, as far as a scale may name some."""
        named = isinstance(scale, Mapping)
        return {part: blocks_of(unwrap(self._models[part])) if named else {} for part in components}

    def clear(self) -> None:
        """Make no adapter active: every parameter is bit-equal to what it was before the first.

        Raises:
            ResidentStateError: see ``set``; nothing has changed.
        """
        self.set({})

    def disable(self) -> None:
        """Restore the base and remember the mix for ``enable``. Idempotent."""
        with self.writing():
            states = self._states().items()
            run([plan_switch(p, self._models[p], Mix(), state.disabled or state.mix) for p, state in states])

    def enable(self) -> None:
        """Bring back the mix that ``disable`` put aside. Idempotent.

        Raises:
            ResidentStateError: see ``set``; nothing has changed.
        """
        with self.writing():
            states = self._states().items()
            self._require_whole({name for _, state in states if state.disabled for name in state.disabled.scales})
            run([plan_switch(p, self._models[p], state.disabled or state.mix) for p, state in states])

    def using(self, scales: Mapping[str, Scale], method: str = "sum") -> Held["Resident"]:
        """Make these adapters active for a while, alone with the model; the mix before returns after.

        Args:
            scales: as for ``set``.
            method: as for ``set``.

        For ``with`` and ``async with``. Others that read or switch wait until the block is left; what the block
        calls, and the tasks and threads that it starts with its context (``asyncio.to_thread``), see this mix.

        Raises:
            ShiraError: as ``set``.
            ResidentStateError: as ``set``, or a deadlock: a plain ``with`` while another task of the same event loop
                holds the model, or holders that wait for each other.
        """

        def inside(hold: Hold, _: None) -> Entered["Resident"]:
            return Entered(partial(self._use, hold, scales, method))

        return Held(self._modules(), write=True, inside=inside)

    def _use(self, hold: Hold, scales: Mapping[str, Scale], method: str, ends: ExitStack) -> "Resident":
        undo = self.restorer()
        self.set(scales, method)
        hold.undo = undo
        ends.callback(leave, hold)
        return self

    def restorer(self) -> "Restorer":
        """Return what brings the mix of now back, as far as its adapters are there then."""
        return Restorer(self._models, {state: (state.mix, state.disabled) for state in self._states().values()})

    def refresh(self) -> None:
        """Write the active mix again where a component was offloaded by accelerate, or loaded, since the last switch.

        What it has now may be the base, as ``state_dict()`` gives it; a pipeline calls this before each generation.

        Raises:
            ResidentStateError: the weights were modified outside shira_diffusers, or are on disk now; as for ``set``
                nothing has changed.
        """
        if self._renewed():
            with self.writing():
                states, renewed = self._states(), self._renewed()
                run([plan_switch(p, self._models[p], states[p].mix, states[p].disabled) for p in renewed])
                note_offloads(chain(*renewed.values()))

    def _renewed(self) -> dict[str, list[Any]]:
        """The components with active adapters that have other weights than the last switch wrote, perhaps."""
        states = {part: state for part, state in self._states().items() if state.overwritten}
        hooks = {part: new_offloads(unwrap(self._models[part])) for part in states}
        return {part: found for part, found in hooks.items() if found or states[part].reloaded}

    def bake(self) -> None:
        """Make the weights as they are now the base for good, and deactivate all adapters (they stay loaded).

        Nothing is written. Also keeps weights that were modified outside shira_diffusers, where those are wanted.

        Raises:
            ShiraError: sums became infinite when the model was cast to a narrower dtype; nothing has changed.
            ResidentStateError: some of the adapters run beside quantized weights; nothing has changed.
        """
        with self.writing():
            beside = [p for p in self._states() if hooks_of(unwrap(self._models[p]), ResidentBranch)]
            if beside:
                raise ResidentStateError(
                    f"the active mix runs beside quantized weights of {', '.join(beside)}, which cannot hold it; bake "
                    "it into the model that is not quantized, and quantize that"
                )
            require_in_range({part: state.overwritten for part, state in self._states().items()}, self.active)
            for state in self._states().values():
                state.mix, state.disabled = Mix(), None
                state.set_overwritten((), {})

    def verify(self) -> None:
        """Require that every overwritten entry still holds what was written.

        Raises:
            ResidentStateError: names the weights that were modified outside shira_diffusers.
        """
        with self.reading():
            for part, state in self._states().items():
                names = [name for saved in state.overwritten for name in saved.plan.names]
                require_written(part, state.overwritten, WeightMap(self._models[part]).live(names))

    def _modules(self) -> list[nn.Module]:
        return [unwrap(model) for model in self._models.values()]

    def _states(self) -> dict[str, ShiraState]:
        found = {part: state_of(unwrap(model)) for part, model in self._models.items()}
        return {part: state for part, state in found.items() if state is not None}

    def require_known(self, names: Iterable[str]) -> None:
        """Require that all these adapters were added.

        Raises:
            ShiraError: names those that were not.
        """
        known = self.components
        unknown = [name for name in names if name not in known]
        if unknown:
            raise self._unknown(unknown)

    def _require_whole(self, names: Iterable[str]) -> None:
        """Require adapters on all components that they were added for: a model may have taken another's place since.

        Raises:
            ResidentStateError: names the components, and the adapters that these lack.
        """
        states = self._states()
        held = {part: ", ".join(map(repr, state.adapters)) for part, state in states.items()}
        lost = [f"{part}: expected {name!r}, got {held.get(part) or 'none'}" for part, name in self._lost(names)]
        if lost:
            raise ResidentStateError(
                "a model lacks an adapter that was loaded for it and others, as one that has replaced another model "
                "does; nothing has changed. Load that adapter again with load_shira(..., hotswap=True) "
                f"(Resident.replace), or delete it:{listing(lost)}"
            )

    def _lost(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """The components that lack an adapter which was added for them, each with its name."""
        states = self._states()
        parts = {n: {part for state in states.values() for part in state.loaded_for.get(n, ())} for n in names}
        return [
            (part, name)
            for part in self._models
            for name in parts
            if part in parts[name] and not (part in states and name in states[part].adapters)
        ]

    def _unknown(self, names: Iterable[str]) -> ShiraError:
        return ShiraError(
            f"no adapter named {', '.join(map(repr, names))}, loaded are {', '.join(map(repr, self.names)) or 'none'}"
        )


class Restorer:
    """Brings back mixes, as far as their adapters are there then.

    Args:
        models: by component.
        before: the mix of each state, and what was put aside there.
    """

    def __init__(self, models: Mapping[str, nn.Module], before: Mapping[ShiraState, tuple[Mix, Mix | None]]) -> None:
        self._models, self._before = models, before

    def __call__(self) -> None:
        plans = []
        for part, model in self._models.items():
            if (state := state_of(unwrap(model))) is not None:
                mix, aside = self._before.get(state, (Mix(), None))
                aside = aside and aside.among(state.adapters)
                plans.append(plan_switch(part, model, mix.among(state.adapters), aside))
        run(plans)

    def names(self, state: ShiraState) -> set[str]:
        """The adapters that it brings back in a state."""
        return {name for mix in self._before.get(state, ()) if mix is not None for name in mix.scales}


def names_in_use(state: ShiraState) -> set[str]:
    """The adapters that are active, put aside by ``disable``, or part of a mix that returns when a block is left."""
    names = {name for mix in (state.mix, state.disabled) if mix is not None for name in mix.scales}
    return names.union(*[undo.names(state) for undo in awaiting() if isinstance(undo, Restorer)])


def _exchange(state: ShiraState, name: str, adapter: ShiraAdapter | None) -> None:
    """Give a name to another adapter, or to none."""
    order = [*state.adapters, name]
    state.forget([name])
    if adapter is not None:
        held = {**state.adapters, name: adapter}
        state.adapters = {name: held[name] for name in dict.fromkeys(order)}


def _method_of(mixes: Mapping[str, Mix]) -> str:
    return next((mix.method for mix in mixes.values() if mix.scales), "sum")
