"""Keep a module's adapters, mix and saved bits inside the module, so that copies of it have them too."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.engine.bookkeeping import Guard
from shira_diffusers.engine.offloading import offload_under_way
from shira_diffusers.engine.plan import Mix
from shira_diffusers.errors import ResidentStateError, ShiraError, counted, listing, verb
from shira_diffusers.weights.finder import WeightMap, identity
from shira_diffusers.weights.scatter import bits_of, cast, gather, overwrite
from shira_diffusers.weights.steps import EntryPlan, SavedEntries
from shira_diffusers.weights.sweep_cpu import BufferPool
from shira_diffusers.weights.targets import canonical_name

ATTRIBUTE = "_shira"
_REMEMBERED, _REMEMBERED_BYTES = 64, 2**26  # mixes, and bytes of the plans of those beyond the last two
# In this order: the narrowest dtype that has all values of a weight is the one that it was cast to.
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16)


Part = tuple[str, Tensor, Tensor, Tensor]
"""Overwritten entries of one weight, as ``SavedEntries.parts`` gives them: name, indices, base and written bits."""


class ShiraState(nn.Module):
    """Adapters, active mix and saved bits of one module.

    A submodule without parameters and buffers: casts and moves of the module (``.to``, ``.half``) reach the
    saved bits through ``_apply``, so that restoring equals casting an unadapted model; ``deepcopy`` carries it;
    ``state_dict`` does not see it, ``load_state_dict`` is noted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, ShiraAdapter] = {}
        self.loaded_for: dict[str, tuple[str, ...]] = {}  # adapter -> the components that it changes, this one too
        self.quantized: frozenset[str] = frozenset()  # of the adapters' weights; they get branches
        self.mix = Mix()
        self.disabled: Mix | None = None
        self.overwritten: tuple[SavedEntries, ...] = ()
        self.twins: dict[str, str] = {}  # other names of overwritten weights that are tied -> those of the plan
        self.reloaded = False  # since the last switch, by ``load_state_dict``
        self.remembered: list[tuple[EntryPlan, ...]] = []
        self.pool = BufferPool()

    def note_untied(self, weights: WeightMap) -> None:
        """Count as overwritten the weights that were untied from one that is, if they hold a copy of its mix."""
        entries = self.entries if self.twins else {}
        for name, twin in list(self.twins.items()):
            _, indices, base, written = entries[twin]
            with suppress(ShiraError):  # no such weight any more, or none that we could write
                weight, other = weights[name], weights[twin]
                if identity(weight) == identity(other) or weight.numel() != other.numel():
                    continue
                if _holds_any(weight, indices, (written,)):
                    plan = EntryPlan((name,), (weight.numel(),), (0, indices.numel()), indices)
                    self.overwritten += (SavedEntries(plan, base.clone(), written.clone()),)
                    del self.twins[name]

    def set_overwritten(self, fresh: Sequence[SavedEntries], twins: dict[str, str]) -> None:
        """Note what is overwritten now, under which other names, and keep the memory of what was."""
        left = [tensor for saved in self.overwritten for tensor in (saved.base, saved.written)]
        self.overwritten, self.twins, self.reloaded = tuple(fresh), twins, False
        self.pool.keep(left, [tensor for saved in fresh for tensor in (saved.base, saved.written)])

    def restorer(self) -> Callable[[], None]:
        """What makes mix and saved bits those of now again."""
        mix, disabled, overwritten, twins = self.mix, self.disabled, self.overwritten, self.twins

        def restore() -> None:
            self.mix, self.disabled, self.overwritten, self.twins = mix, disabled, overwritten, twins
            self.pool.clear()  # it may hold what is saved there

        return restore

    def remember(self, plans: tuple[EntryPlan, ...]) -> None:
        """Keep the plans of the last two mixes, whatever their size, and of older ones what has room.

        So going back and forth between two plans nothing, with adapters of any size.
        """
        if not plans:
            return
        others = [old for old in self.remembered if old[0] is not plans[0]]
        if len(others) < len(self.remembered):
            self.remembered = [plans, *others]
            return
        last, older = others[:1], others[1 : _REMEMBERED - 1]
        used = accumulate([sum([plan.nbytes for plan in mix]) for mix in older])
        roomy = [mix for mix, total in zip(older, used, strict=True) if total <= _REMEMBERED_BYTES]
        self.remembered = [plans, *last, *roomy]

    def forget(self, names: Collection[str]) -> None:
        """Drop adapters, and what is remembered of mixes with them."""
        gone = [self.adapters.pop(name) for name in names if name in self.adapters]
        for name in names:
            self.loaded_for.pop(name, None)
        self.remembered = [m for m in self.remembered if not any(a is g for a in m[0].sources for g in gone)]
        if not self.adapters:
            self.pool.clear()

    @property
    def entries(self) -> dict[str, Part]:
        """The overwritten entries by weight."""
        return {part[0]: part for saved in self.overwritten for part in saved.parts()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ShiraState":
        self.remembered = []
        self.pool.clear()
        self.overwritten = tuple(_applied(saved, fn) for saved in self.overwritten)
        return self

    def _load_from_state_dict(self, *_: Any) -> None:
        self.reloaded = True

    def forward(self, value: Any) -> Any:
        """Return the input: a ``Sequential`` runs this as one of its layers."""
        return value

    def extra_repr(self) -> str:
        """The names of the adapters, for ``print(model)``."""
        return ", ".join(self.adapters)


def _applied(saved: SavedEntries, fn: Callable[[Tensor], Tensor]) -> SavedEntries:
    """A cast or a move of the module; of the plan the move alone."""
    base, written = fn(saved.base), fn(saved.written)
    return SavedEntries(saved.plan.moved(base.device), base, written)


_owners: WeakSet[nn.Module] = WeakSet()
_owners_guard = Guard()
if hasattr(os, "register_at_fork"):  # held during a fork, so that no other thread is inside, which does not survive it
    os.register_at_fork(
        before=_owners_guard.__enter__, after_in_parent=_owners_guard.__exit__, after_in_child=_owners_guard.__exit__
    )


def state_of(module: nn.Module) -> ShiraState | None:
    """The state that an unwrapped module carries, if any."""
    found: Any = module._modules.get(ATTRIBUTE)
    if not isinstance(found, ShiraState):
        return None
    if module not in _owners:  # a copy, not registered yet
        _register(module)
    return found


def _register(module: nn.Module) -> None:
    with _owners_guard:
        _owners.add(module)


def owners() -> list[tuple[nn.Module, ShiraState]]:
    """The modules alive whose state was looked at, and their states; of two that share a state the first."""
    with _owners_guard:
        modules = list(_owners)
    states = {id(state): (module, state) for module in modules if (state := state_of(module)) is not None}
    return list(states.values())


def ensure_state(module: nn.Module) -> ShiraState:
    """The state that an unwrapped module carries, attached now if it had none."""
    state = state_of(module)
    if state is None:
        state = ShiraState()
        module.add_module(ATTRIBUTE, state)
        module.register_state_dict_post_hook(_save_the_base)
        _register(module)
    return state


def _save_the_base(
    module: nn.Module, state_dict: dict[str, object], prefix: str, local_metadata: dict[str, object]
) -> None:
    """State-dict hook: what is saved while adapters are active is the base, without them.

    accelerate's offloads get the weights as they are, since the model goes on with what they are given. So do callers
    that pass ``keep_vars=True``, who want the parameters themselves (``torch.jit``, the ONNX export).

    Raises:
        ResidentStateError: names the weights that were modified outside shira_diffusers, whose base is unknown.
            Or accelerate is about to offload the module to disk, from where no weight could be restored.
    """
    state = state_of(module)
    if state is None or not state.overwritten:
        return
    offload = offload_under_way()
    if offload == "disk":
        raise _no_way_to_disk(module, state)
    weights = WeightMap(module)
    state.note_untied(weights)
    entries = state.entries
    if offload == "memory" or _holds_parameters(state_dict, prefix, entries):
        return
    restored: dict[int, Tensor] = {}
    live = weights.live(entries)
    entries = {part[0]: part for saved in state.overwritten for part in as_rounded(saved, live).parts()}
    keys = _keys_by_address(state_dict, prefix, live)
    if foreign := written_since(entries.values(), live):
        raise written_by_others(foreign, f"what to save as the base of {type(module).__name__} is not known")
    for name, indices, base, _ in entries.values():
        for tensor, offset in weights.holders(name):
            address = tensor.data_ptr()
            if address in keys and address not in restored:
                restored[address] = tensor.detach().clone(memory_format=torch.preserve_format)
            if address in restored:
                copy = restored[address]
                overwrite(copy, indices, base.to(copy.device, copy.dtype), offset)
    for address, copy in restored.items():
        for key in keys[address]:
            state_dict[key] = copy


def _holds_parameters(state_dict: Mapping[str, object], prefix: str, names: Collection[str]) -> bool:
    """Whether a state dict was asked for with ``keep_vars=True``."""
    return any(
        isinstance(value, nn.Parameter) and canonical_name(key.removeprefix(prefix)) in names
        for key, value in state_dict.items()
    )


def _keys_by_address(state_dict: Mapping[str, object], prefix: str, live: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """The keys of a module in a state dict by the memory that they name; offloaded ones by where that is kept."""
    keys: dict[int, list[str]] = {}
    for key, value in state_dict.items():
        if key.startswith(prefix) and isinstance(value, Tensor):
            stored = live.get(canonical_name(key.removeprefix(prefix))) if value.is_meta else None
            keys.setdefault(value.data_ptr() if stored is None else stored.data_ptr(), []).append(key)
    return keys


def _no_way_to_disk(module: nn.Module, state: ShiraState) -> ResidentStateError:
    active = ", ".join(state.mix.scales)
    return ResidentStateError(
        f"{type(module).__name__} cannot be offloaded to disk while adapters are active ({active}): its "
        "weights could not be restored there. Offload to the CPU instead, or before you offload to disk call "
        "disable_shira() (Resident.disable()) for the base, or bake_shira() (Resident.bake()) to keep the mix for good"
    )


def written_since(parts: Iterable[Part], live: Mapping[str, Tensor], *, base_too: bool = True) -> list[str]:
    """Names of the weights modified outside shira_diffusers.

    Args:
        parts: the overwritten entries of each weight.
        live: the weights, of any shape.
        base_too: whether entries that hold the base's bits again count as unmodified.
    """
    return [
        name
        for name, indices, base, written in parts
        if not _holds_any(live[name], indices, (written, base) if base_too else (written,))
    ]


def _holds_any(weight: Tensor, indices: Tensor, values: Iterable[Tensor]) -> bool:
    """Whether a weight's values at indices are one of these, after the same cast if it was cast since."""
    now = gather(weight, indices)
    return any(torch.equal(bits_of(now), bits_of(cast(one, now))) for one in values)


def as_rounded(saved: SavedEntries, live: Mapping[str, Tensor]) -> SavedEntries:
    """The same entries, rounded as weights (any shape) that were cast to a narrower dtype and back, layer by layer.

    Such casts do not reach the state, or only when all layers are in the wide dtype again.
    """
    parts = [_rounded(live[name], indices, base, written) for name, indices, base, written in saved.parts()]
    base, written = (torch.cat(bits) for bits in zip(*parts, strict=True))
    return SavedEntries(saved.plan, base, written)


def _rounded(weight: Tensor, indices: Tensor, base: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    if base.dtype == weight.dtype and not _holds_any(weight, indices, (written, base)):
        for dtype in _NARROW:
            whole, was, now = (one.to(dtype).to(one.dtype) for one in (weight, base, written))
            if torch.equal(whole, weight) and _holds_any(weight, indices, (now,)):
                return was, now
    return base, written


def written_by_others(names: Sequence[str], consequence: str) -> ResidentStateError:
    """The error for weights that hold neither what the last switch wrote nor the base."""
    return ResidentStateError(
        f"{counted(len(names), 'adapted weight')} {verb(len(names), 'was', 'were')} modified outside shira_diffusers "
        f"while adapters were active (load_state_dict, fuse_lora, training), so {consequence}; expected the values "
        "that the last switch wrote. Undo that change, or load the base's weights again with load_state_dict "
        "(unfuse_lora subtracts, and leaves other bits), or keep the new weights as the base with bake_shira() "
        f"(Resident.bake()):{listing(names)}"
    )
