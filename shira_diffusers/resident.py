"""Resident: adapters on weights that stay where they are. The only module that writes weights at inference.

Everything is planned and checked first; then the entries are overwritten. Nothing is ever subtracted: the bits that
were overwritten are saved and written back.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shira_diffusers.adapter import ShiraAdapter
from shira_diffusers.delta import SparseDelta
from shira_diffusers.errors import AdapterMismatchError, ResidentStateError, ShiraError, listing
from shira_diffusers.fuse import MergeMethod, fuse_scaled, merge_method, plan_union
from shira_diffusers.locate import Located, Locator, unwrap
from shira_diffusers.locks import hold
from shira_diffusers.probes import match_base
from shira_diffusers.scales import Scale, check_scale, scale_of
from shira_diffusers.scatter import gather, is_byte_dtype, overwrite
from shira_diffusers.state import ATTRIBUTE, Entry, Mix, ShiraState, state_of

logger = logging.getLogger(__name__)


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
class _Plan:
    """One module's part of a switch."""

    component: str
    module: nn.Module
    state: ShiraState
    mix: Mix
    disabled: Mix | None
    steps: list[_Step]
    merge: MergeMethod


class Resident:
    """Adapters on the resident weights of a module, or of several named ones.

    The state lives in the modules: two ``Resident`` of one module see the same adapters. All methods are safe to
    call from several threads; switching waits until nobody reads (see ``reading``).

    Args:
        components: a module, whose adapters have plain parameter names, or ``{component: module}``, whose adapters'
            names begin with the component. Compiled modules are looked through.

    Source: arXiv 2407.16712 (rapid switching by overwriting).
    """

    def __init__(self, components: nn.Module | Mapping[str, nn.Module]) -> None:
        parts = {"": components} if isinstance(components, nn.Module) else dict(components)
        self._parts = {name: unwrap(module) for name, module in parts.items()}
        self._wrapped = parts

    # ---------------------------------------------------------------- what is there

    @property
    def names(self) -> list[str]:
        """The adapters that were added, in the order in which they were."""
        return list(dict.fromkeys(name for state in self._states().values() for name in state.adapters))

    @property
    def active(self) -> dict[str, Scale]:
        """The active adapters with their scales as given; empty while disabled."""
        return {name: scale for state in self._states().values() for name, scale in state.mix.scales.items()}

    @property
    def method(self) -> str:
        """How the active adapters are merged, a name in ``fuse.METHODS``."""
        return next((state.mix.method for state in self._states().values() if state.mix.scales), "sum")

    def components_of(self, name: str) -> list[str]:
        """The components that an adapter changes.

        Raises:
            ShiraError: no adapter of that name.
        """
        self.require_known([name])
        return [part for part, state in self._states().items() if name in state.adapters]

    def adapter(self, name: str) -> ShiraAdapter:
        """The adapter of a name, with component names put back.

        Raises:
            ShiraError: no adapter of that name.
        """
        parts = [(part, self._states()[part].adapters[name]) for part in self.components_of(name)]
        named = [adapter.prefixed(part) if part else adapter for part, adapter in parts]
        return ShiraAdapter(
            {n: delta for adapter in named for n, delta in adapter.deltas.items()},
            named[0].metadata,
            {n: probe for adapter in named for n, probe in adapter.base_probes.items()},
        )

    def fused(self) -> ShiraAdapter:
        """The active mix as one adapter, which gives the same weights at scale 1.

        Raises:
            ShiraError: nothing is active.
        """
        with self.reading():
            active = self.active
            if not active:
                raise ShiraError("no adapter is active: there is no mix to fuse; activate some or name an adapter")

            def scales(name: str) -> Callable[[str], float]:
                return lambda weight: scale_of(active[name], *(_cut(weight) if "" not in self._parts else ("", weight)))

            mixed = fuse_scaled([(self.adapter(name), scales(name)) for name in sorted(active)], self.method)
            return mixed.with_metadata(mix=json.dumps(active, default=dict), method=self.method)

    def changed(self) -> tuple[int, int]:
        """Entries overwritten now, and entries of all parameters of the components."""
        entries = sum(e.indices.numel() for state in self._states().values() for e in state.entries.values())
        total = sum(p.numel() for module in self._parts.values() for p in module.parameters())
        return entries, total

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep all others from switching while the weights are read, for instance during a generation."""
        with hold(self._parts.values(), write=False):
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep all others from reading and switching, for several calls that belong together."""
        with hold(self._parts.values(), write=True):
            yield

    # ---------------------------------------------------------------- adapters come and go

    def add(self, adapter: ShiraAdapter, name: str) -> None:
        """Register an adapter, without activating it.

        Args:
            adapter: its tensors are kept as they are, on their device.
            name: not in use.

        Raises:
            ShiraError: the name is in use or empty.
            AdapterMismatchError: the adapter does not fit, wholly or in part; all offenders are named.
            ResidentStateError: a weight that cannot be overwritten (quantized, merged, on disk, ...).

        On error nothing has changed. Another base than the adapter's gives a warning.
        """
        if not name or not isinstance(name, str):
            raise ShiraError(f"an adapter's name must be a string that is not empty, got {name!r}")
        with self.writing():
            if name in self.names:
                raise ShiraError(
                    f"adapter name {name!r} is in use, expected a new one; delete that adapter first or choose another"
                )
            parts = self._fitted(adapter)
            self._compare_base(parts, name)
            for part, its_own in parts.items():
                self._ensure_state(part).adapters[name] = its_own

    def remove(self, name: str) -> None:
        """Forget an adapter; if it is active, the others stay active without it.

        Raises:
            ShiraError: no adapter of that name.
            ResidentStateError: see ``set``.

        On error nothing has changed.
        """
        with self.writing():
            self.require_known([name])
            plans = []
            for part in self.components_of(name):
                state = self._ensure_state(part)
                disabled = state.disabled.without(name) if state.disabled else None
                plans.append(self._plan(part, state.mix.without(name), disabled))
            self._run(plans)
            for part in self.components_of(name):
                del self._ensure_state(part).adapters[name]

    # ---------------------------------------------------------------- switching

    def set(self, scales: Mapping[str, Scale], method: str = "sum") -> None:
        """Make exactly these adapters active: restore what leaves, overwrite what arrives.

        In float32: ``acc = 0; acc += scale * delta`` in the order of names; ``W = round(base + acc)``, rounded once.
        Only masked entries change, addresses never do.

        Args:
            scales: name -> a number, ``{component: number}`` or ``{component: {"down" | "mid" | "up": number}}``.
            method: how several adapters are merged, a name in ``fuse.METHODS``.

        Raises:
            ShiraError: unknown adapters, a scale that is not finite, or an unknown method.
            ResidentStateError: adapted weights were written by somebody else, or cannot be overwritten now.

        On error, at whatever point, the mix and all bits are what they were.
        """
        with self.writing():
            self.require_known(scales)
            for name, scale in scales.items():
                check_scale(name, scale, [part for part in self._parts if part])
            merge_method(method)
            plans = []
            for part, state in self._states().items():
                own = {name: scale for name, scale in scales.items() if name in state.adapters}
                plans.append(self._plan(part, Mix(own, method), None))
            self._run(plans)

    def clear(self) -> None:
        """Make no adapter active: every parameter is bit-equal to what it was before the first.

        Raises:
            ResidentStateError: see ``set``; nothing has changed.
        """
        self.set({})

    def disable(self) -> None:
        """Restore the base and remember the mix for ``enable``. Calling it again changes nothing."""
        with self.writing():
            states = self._states()
            self._run([self._plan(p, Mix(), s.disabled or s.mix) for p, s in states.items()])

    def enable(self) -> None:
        """Bring back the mix that ``disable`` put aside. Calling it again changes nothing."""
        with self.writing():
            self._run([self._plan(p, s.disabled or s.mix, None) for p, s in self._states().items()])

    @contextmanager
    def using(self, scales: Mapping[str, Scale], method: str = "sum") -> Iterator["Resident"]:
        """Make these adapters active for a while, alone with the model; the mix before returns after.

        Args and Raises: as ``set``. Other threads that read or switch wait until the block is left.
        """
        with self.writing():
            before = {part: (state.mix, state.disabled) for part, state in self._states().items()}
            self.set(scales, method)
            try:
                yield self
            finally:
                plans = []
                for part, state in self._states().items():
                    mix, disabled = before.get(part, (Mix(), None))
                    plans.append(self._plan(part, _known_to(state, mix), disabled and _known_to(state, disabled)))
                self._run(plans)

    def bake(self) -> None:
        """Make the weights as they are now the base for good, and deactivate all adapters (they stay loaded).

        Nothing is written. Also the way out when somebody else has written adapted weights and the new ones are wanted.
        """
        with self.writing():
            for state in self._states().values():
                state.entries, state.mix, state.disabled = {}, Mix(), None

    def verify(self) -> None:
        """Require that every overwritten entry still holds what was written.

        Raises:
            ResidentStateError: names the weights that somebody else has written.
        """
        with self.reading():
            for part, state in self._states().items():
                locator = Locator(self._wrapped[part])
                _require_written([(part, n, locator.locate(n), entry) for n, entry in state.entries.items()])

    # ---------------------------------------------------------------- planning

    def _states(self) -> dict[str, ShiraState]:
        found = {part: state_of(module) for part, module in self._parts.items()}
        return {part: state for part, state in found.items() if state is not None}

    def _ensure_state(self, part: str) -> ShiraState:
        module = self._parts[part]
        state = state_of(module)
        if state is None:
            state = ShiraState()
            module.add_module(ATTRIBUTE, state)
            module.register_state_dict_post_hook(_save_the_base)
        return state

    def require_known(self, names: Iterable[str]) -> None:
        """Require that all these adapters were added.

        Raises:
            ShiraError: names those that were not.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ShiraError(
                f"no adapter named {', '.join(map(repr, unknown))}, "
                f"loaded are {', '.join(map(repr, self.names)) or 'none'}"
            )

    def _split(self, adapter: ShiraAdapter) -> dict[str, ShiraAdapter]:
        """The adapter's part for each component.

        Raises:
            AdapterMismatchError: an adapter without deltas, or with names under no component.
        """
        if not adapter.deltas:
            raise AdapterMismatchError("the adapter holds no deltas: there is nothing to apply")
        if "" in self._parts:
            return {"": adapter}
        lost = [name for name in adapter.deltas if name.partition(".")[0] not in self._parts]
        if lost:
            raise AdapterMismatchError(
                f"adapter does not fit: {len(lost)} of {len(adapter.deltas)} parameters belong to no component of this "
                f"model, which has {', '.join(self._parts)}{_trained_on(adapter)}:{listing(lost)}"
            )
        return {part: adapter.part(part) for part in adapter.component_names()}

    def _fitted(self, adapter: ShiraAdapter) -> dict[str, ShiraAdapter]:
        """The adapter's part for each component, by the names that the component's own parameters have.

        Raises:
            AdapterMismatchError, ResidentStateError: as ``add``.
        """
        fitted: dict[str, ShiraAdapter] = {}
        wrong: list[str] = []
        unusable: list[str] = []
        for part, its_own in self._split(adapter).items():
            locator = Locator(self._wrapped[part])
            renamed: dict[str, str] = {}
            for name, delta in its_own.deltas.items():
                try:
                    located = locator.locate(name)
                except AdapterMismatchError as error:
                    wrong.append(_join(part, str(error)))
                except ResidentStateError as error:
                    unusable.append(_join(part, str(error)))
                else:
                    shape = tuple(located.weight.shape)
                    if shape != delta.shape:
                        wrong.append(f"{_join(part, name)}: expected {shape}, got {delta.shape}")
                    if located.name in renamed.values():
                        wrong.append(f"{_join(part, name)}: means the same parameter as another name in the adapter")
                    renamed[name] = located.name
            fitted[part] = its_own.renamed(renamed)
        if wrong:
            raise AdapterMismatchError(
                f"adapter does not fit: {len(wrong)} of {len(adapter.deltas)} parameters differ"
                f"{_trained_on(adapter)}; use it with the model it was trained for:{listing(wrong)}"
            )
        if unusable:
            raise ResidentStateError(
                f"{len(unusable)} of {len(adapter.deltas)} weights cannot be overwritten:{listing(unusable)}"
            )
        return fitted

    def _compare_base(self, parts: Mapping[str, ShiraAdapter], name: str) -> None:
        pairs = []
        for part, its_own in parts.items():
            locator, state = Locator(self._wrapped[part]), self._states().get(part)
            for weight_name, probe in its_own.base_probes.items():
                indices = its_own.deltas[weight_name].indices[: probe.numel()]
                entry = state.entries.get(weight_name) if state else None
                pairs.append((probe, _base_at(locator.locate(weight_name).weight, indices, entry)))
        match, origin = match_base(pairs), _trained_on(next(iter(parts.values())))
        if match == "sibling":
            logger.info("adapter %r was trained on a sibling of this model%s", name, origin)
        elif match == "other":
            warnings.warn(
                f"adapter {name!r} fits by shape but was trained on another model than this one{origin}; "
                "expect poor pictures",
                stacklevel=4,
            )

    def _plan(self, part: str, mix: Mix, disabled: Mix | None) -> _Plan:
        """Find everything that a switch of one component needs, and check it. Nothing is written.

        Raises:
            ResidentStateError: weights that cannot be overwritten now or that somebody else has written.
        """
        state, module = self._states()[part], self._parts[part]
        locator = Locator(self._wrapped[part])
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
                step.scales += (scale_of(mix.scales[adapter_name], part, name),)
        _require_written([(part, s.name, s.located, s.old) for s in steps.values() if s.old is not None])
        return _Plan(part, module, state, mix, disabled, list(steps.values()), merge_method(mix.method))

    # ---------------------------------------------------------------- writing

    def _run(self, plans: list[_Plan]) -> None:
        """Carry out the plans of all components, or none: on any exception what was written is taken back."""
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


def _base_at(weight: Tensor, indices: Tensor, entry: Entry | None) -> Tensor:
    """The unadapted values at sorted ``indices``, whatever is active."""
    values = gather(weight, indices)
    if entry is None or not entry.indices.numel():
        return values
    wanted = indices.to(entry.indices.device, entry.indices.dtype)
    place = torch.searchsorted(entry.indices, wanted).clamp_(max=entry.indices.numel() - 1)
    saved = _cast(entry.base[place], weight)
    is_saved = (entry.indices[place] == wanted).to(weight.device)
    if is_byte_dtype(weight.dtype):
        return torch.where(is_saved, saved.float(), values.float())
    return torch.where(is_saved, saved, values)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.view(kind), b.view(kind))


def _require_written(active: list[tuple[str, str, Located, Entry]]) -> None:
    foreign = [
        _join(part, name)
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


def _known_to(state: ShiraState, mix: Mix) -> Mix:
    return Mix({name: scale for name, scale in mix.scales.items() if name in state.adapters}, mix.method)


def _reset_step_cache(module: nn.Module) -> None:
    """Step caches (first-block cache and the like) hold activations of the weights before."""
    reset = getattr(module, "_reset_stateful_cache", None)
    if callable(reset):
        reset()


def _cut(name: str) -> tuple[str, str]:
    component, _, rest = name.partition(".")
    return component, rest


def _join(part: str, name: str) -> str:
    return f"{part}.{name}" if part else name


def _trained_on(adapter: ShiraAdapter) -> str:
    base = adapter.metadata.get("base_model")
    return f"; it was trained on {base!r}" if base else ""


def _save_the_base(
    module: nn.Module, state_dict: dict[str, object], prefix: str, local_metadata: dict[str, object]
) -> None:
    """State-dict hook: what is saved while adapters are active is the base, without them."""
    state = state_of(module)
    if state is None or not state.entries:
        return
    keys: dict[int, list[str]] = {}
    for key, value in state_dict.items():
        if key.startswith(prefix) and isinstance(value, Tensor) and not value.is_meta:
            keys.setdefault(value.data_ptr(), []).append(key)
    restored: dict[int, Tensor] = {}
    locator = Locator(module)
    for name, entry in state.entries.items():
        for holder in locator.locate(name).holders:
            address = holder.tensor.data_ptr()
            if address in keys and address not in restored:
                restored[address] = holder.tensor.detach().clone(memory_format=torch.preserve_format)
            if address in restored:
                copy = restored[address]
                overwrite(copy, entry.indices, _cast(entry.base, copy), holder.offset)
    for address, copy in restored.items():
        for key in keys[address]:
            state_dict[key] = copy
