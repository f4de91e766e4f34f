"""What a module remembers about its adapters: carried by the module, so by copies of it too."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.scales import Scale
from shira_diffusers.engine.offloading import offload_under_way
from shira_diffusers.errors import ResidentStateError, counted, listing, verb
from shira_diffusers.weights.finder import Located, Locator
from shira_diffusers.weights.scatter import bits_of, cast, gather, overwrite
from shira_diffusers.weights.spares import Spares
from shira_diffusers.weights.targets import canonical_name

ATTRIBUTE = "_shira"
_REMEMBERED_BYTES = 2**26  # of layouts beyond the last two


class Entry(NamedTuple):
    """The overwritten entries of one weight.

    Args:
        indices: int32 or int64 ``[n]``, sorted flat positions.
        base: the bits that were there, ``[n]``, of the weight's dtype.
        written: the bits that are there now, ``[n]``; another value in the weight means somebody else wrote it.
    """

    indices: Tensor
    base: Tensor
    written: Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the deltas of some adapters lie: their unions, weight by weight, end to end.

    Args:
        names: the weights.
        bounds: ``names[k]`` has the entries ``bounds[k]`` to ``bounds[k + 1]``.
        indices: int32 or int64 ``[n]``, sorted flat positions in each weight.
        adapters: those whose deltas these are, in the order in which they are added.
        members: for each adapter the weights it has, in the order of its values.
        values: of each adapter ``[its nnz]``, in its own dtype.
        places: for each adapter int64 ``[its nnz]``, where its values go in ``[n]``; None when they are all of it.
        runs: whether all entries come in aligned runs of ``tiles.RUN``.
        found: what was computed from the indices once and is used again; see ``weights``.
    """

    names: tuple[str, ...]
    bounds: tuple[int, ...]
    indices: Tensor
    adapters: tuple[ShiraAdapter, ...]
    members: tuple[tuple[str, ...], ...]
    values: tuple[Tensor, ...]
    places: tuple[Tensor | None, ...]
    runs: bool = False
    found: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def sizes(self) -> list[int]:
        """How many entries each weight has."""
        return [end - start for start, end in pairwise(self.bounds)]

    def moved(self, indices: Tensor) -> "Layout":
        """The same with ``indices`` on another device, and all that belongs to them."""
        device = indices.device
        values = tuple(value.to(device) for value in self.values)
        places = tuple(None if place is None else place.to(device) for place in self.places)
        return replace(self, indices=indices, values=values, places=places, found={})

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        places = (place for place in self.places if place is not None)
        held = {id(tensor): tensor for tensor in (self.indices, *self.values, *places, *self.found.values())}
        return sum(tensor.nbytes for tensor in held.values())


@dataclass(frozen=True, slots=True)
class Overwritten:
    """The entries overwritten in the weights of one layout: saved bits and written bits, both ``[n]``."""

    layout: Layout
    base: Tensor
    written: Tensor

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """The entries of each weight, as views."""
        sizes = self.layout.sizes
        parts = zip(*(t.split(sizes) for t in (self.layout.indices, self.base, self.written)), strict=True)
        for name, part in zip(self.layout.names, parts, strict=True):
            yield name, Entry(*part)


@dataclass(frozen=True, slots=True)
class Mix:
    """Which adapters are active, how strongly, and how they are merged."""

    scales: dict[str, Scale] = field(default_factory=dict)
    method: str = "sum"

    def without(self, names: Collection[str]) -> "Mix":
        """The same mix less some adapters."""
        return replace(self, scales={n: s for n, s in self.scales.items() if n not in names})


class ShiraState(nn.Module):
    """Adapters, active mix and saved bits of one module.

    A submodule without parameters and buffers: casts and moves of the module (``.to``, ``.half``) reach the
    saved bits through ``_apply``, so that restoring equals casting an unadapted model; ``deepcopy`` carries it;
    ``state_dict`` does not see it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, ShiraAdapter] = {}
        self.mix = Mix()
        self.disabled: Mix | None = None
        self.overwritten: tuple[Overwritten, ...] = ()
        self.remembered: list[tuple[Layout, ...]] = []
        self.spares = Spares()

    def set_overwritten(self, fresh: Sequence[Overwritten]) -> None:
        """Note what is overwritten now, and keep the memory of what was."""
        left = [tensor for group in self.overwritten for tensor in (group.base, group.written)]
        self.overwritten = tuple(fresh)
        self.spares.keep(left, [tensor for group in fresh for tensor in (group.base, group.written)])

    def remember(self, layouts: tuple[Layout, ...]) -> None:
        """Keep the layouts of the last two mixes, whatever their size, and of older ones what has room.

        So going back and forth between two plans nothing, with adapters of any size.
        """
        kept = [layouts, *(old for old in self.remembered if old[0] is not layouts[0])] if layouts else self.remembered
        used = accumulate(sum(layout.nbytes for layout in mix) for mix in kept[2:])
        older = [mix for mix, total in zip(kept[2:], used, strict=True) if total <= _REMEMBERED_BYTES]
        self.remembered = kept[:2] + older

    def forget(self, names: Collection[str]) -> None:
        """Drop adapters, and what is remembered of mixes with them."""
        gone = [self.adapters.pop(name) for name in names if name in self.adapters]
        self.remembered = [m for m in self.remembered if not any(a is g for a in m[0].adapters for g in gone)]
        if not self.adapters:
            self.spares.clear()

    @property
    def entries(self) -> dict[str, Entry]:
        """The overwritten entries by weight."""
        return {name: entry for group in self.overwritten for name, entry in group.entries()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ShiraState":
        self.remembered = []
        self.spares.clear()
        self.overwritten = tuple(_applied(group, fn) for group in self.overwritten)
        return self

    def forward(self, value: Any) -> Any:
        """What came, for a ``Sequential``, which takes this for one of its layers."""
        return value

    def extra_repr(self) -> str:
        """The names of the adapters, for ``print(model)``."""
        return ", ".join(self.adapters)


def _applied(group: Overwritten, fn: Callable[[Tensor], Tensor]) -> Overwritten:
    """A cast or a move of the module; of the indices the move alone."""
    base, written = fn(group.base), fn(group.written)
    return Overwritten(group.layout.moved(group.layout.indices.to(base.device)), base, written)


_owners: WeakSet[nn.Module] = WeakSet()
_owners_guard = Lock()


def state_of(module: nn.Module) -> ShiraState | None:
    """The state that an unwrapped module carries, if any."""
    found: Any = module._modules.get(ATTRIBUTE)
    if not isinstance(found, ShiraState):
        return None
    if module not in _owners:  # a copy, which nobody has told of
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
        ResidentStateError: names the weights that somebody else has written: base and adapters cannot be told apart.
            Or accelerate is about to offload the module to disk, from where no weight could be restored.
    """
    state = state_of(module)
    if state is None or not state.overwritten:
        return
    offload = offload_under_way()
    if offload == "disk":
        raise _no_way_to_disk(module, state)
    entries = state.entries
    if offload == "memory" or _holds_parameters(state_dict, prefix, entries):
        return
    restored: dict[int, Tensor] = {}
    locator = Locator(module)
    located = {name: locator.locate(name) for name in entries}
    keys = _keys_by_address(state_dict, prefix, located)
    if foreign := written_since(entries.items(), located):
        raise written_by_others(foreign, f"what to save as the base of {type(module).__name__} is not known")
    for name, entry in entries.items():
        for holder in located[name].holders:
            address = holder.tensor.data_ptr()
            if address in keys and address not in restored:
                restored[address] = holder.tensor.detach().clone(memory_format=torch.preserve_format)
            if address in restored:
                copy = restored[address]
                overwrite(copy, entry.indices, entry.base.to(copy.device, copy.dtype), holder.offset)
    for address, copy in restored.items():
        for key in keys[address]:
            state_dict[key] = copy


def _holds_parameters(state_dict: Mapping[str, object], prefix: str, names: Collection[str]) -> bool:
    """Whether a state dict was asked for with ``keep_vars=True``."""
    return any(
        isinstance(value, nn.Parameter) and canonical_name(key.removeprefix(prefix)) in names
        for key, value in state_dict.items()
    )


def _keys_by_address(
    state_dict: Mapping[str, object], prefix: str, located: Mapping[str, Located]
) -> dict[int, list[str]]:
    """The keys of a module in a state dict by the memory that they name; offloaded ones by where that is kept."""
    keys: dict[int, list[str]] = {}
    for key, value in state_dict.items():
        if key.startswith(prefix) and isinstance(value, Tensor):
            stored = located.get(canonical_name(key.removeprefix(prefix))) if value.is_meta else None
            keys.setdefault(value.data_ptr() if stored is None else stored.weight.data_ptr(), []).append(key)
    return keys


def _no_way_to_disk(module: nn.Module, state: ShiraState) -> ResidentStateError:
    active = ", ".join(state.mix.scales)
    return ResidentStateError(
        f"{type(module).__name__} cannot be offloaded to disk while adapters are active ({active}): its "
        "weights could not be restored there. Offload to the CPU instead, or before you offload to disk call "
        "disable_shira() (Resident.disable()) for the base, or bake_shira() (Resident.bake()) to keep the mix for good"
    )


def written_since(
    entries: Iterable[tuple[str, Entry]], located: Mapping[str, Located], *, base_too: bool = True
) -> list[str]:
    """The weights that somebody else has written: they hold neither what was written nor, if that counts, the base."""
    return [
        name
        for name, entry in entries
        if not _holds_any(
            located[name].weight, entry.indices, (entry.written, entry.base) if base_too else (entry.written,)
        )
    ]


def _holds_any(weight: Tensor, indices: Tensor, values: Iterable[Tensor]) -> bool:
    """Whether a weight's values at indices are one of these, after the same cast if it was cast since."""
    now = gather(weight, indices)
    return any(torch.equal(bits_of(now), bits_of(cast(one, now))) for one in values)


def written_by_others(names: Sequence[str], consequence: str) -> ResidentStateError:
    """The error for weights that hold neither what the last switch wrote nor the base."""
    return ResidentStateError(
        f"{counted(len(names), 'adapted weight')} {verb(len(names), 'was', 'were')} written by somebody else while "
        "adapters were active "
        f"(load_state_dict, fuse_lora, training), so {consequence}; expected what the last switch "
        "wrote. Undo that write, or keep the new weights as the base with bake_shira() (Resident.bake()):"
        f"{listing(names)}"
    )
