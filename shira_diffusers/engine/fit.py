"""Check that an adapter fits a model: names, shapes, and the base it was trained on. Nothing is written here."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.base_match import BaseMatch, trained_on
from shira_diffusers.adapters.base_probes import match_base
from shira_diffusers.engine.sharing import Claim, claims, conflicts
from shira_diffusers.engine.state import Part, ShiraState, owners, state_of
from shira_diffusers.errors import AdapterMismatchError, ResidentStateError, ShiraError, counted, listing, verb
from shira_diffusers.weights.finder import WeightMap, identity, unwrap, weights_beside, weights_of
from shira_diffusers.weights.scatter import gather, is_byte_dtype
from shira_diffusers.weights.targets import weight_shape


def join_name(component: str, name: str) -> str:
    """A parameter's full name; the component is empty for a bare module."""
    return f"{component}.{name}" if component else name


def _split(adapter: ShiraAdapter, models: Mapping[str, nn.Module]) -> dict[str, ShiraAdapter]:
    """The adapter's part for each component.

    Raises:
        ShiraError: no adapter.
        AdapterMismatchError: an adapter without deltas, or with names under no component.
    """
    if not isinstance(adapter, ShiraAdapter):
        raise ShiraError(
            f"expected a ShiraAdapter, got {type(adapter).__name__} {adapter!r:.80}; read files with load_adapter"
        )
    if not adapter.deltas:
        raise AdapterMismatchError("the adapter holds no deltas: there is nothing to apply")
    if "" in models:
        return {"": adapter}
    lost = [name for name in adapter.deltas if name.partition(".")[0] not in models]
    if lost:
        raise AdapterMismatchError(
            f"adapter does not fit: {counted(len(lost), 'parameter', of=len(adapter.deltas))} "
            f"{verb(len(lost), 'belongs', 'belong')} to no component of this model, "
            f"which has {', '.join(models) or 'none'}{trained_on(adapter.metadata)}"
            f"{_bare(lost[0], models)}:{listing(lost)}"
        )
    return {part: adapter.part(part) for part in adapter.component_names()}


def _bare(name: str, models: Mapping[str, nn.Module]) -> str:
    """A clause with the way out for an adapter of a bare module, whose names are those of one component."""
    of = [part for part, model in models.items() if name in dict(unwrap(model).named_parameters())]
    return f"; an adapter of a bare module is named by adapter.prefixed({of[0]!r})" if of else ""


def fit(
    adapter: ShiraAdapter, models: Mapping[str, nn.Module], *, replacing: str | None = None
) -> dict[str, ShiraAdapter]:
    """The adapter's part for each component, by the names that the component's own parameters have.

    Args:
        adapter: named by component and parameter.
        models: by component, compiled ones too; under the empty name one bare module, for plain parameter names.
        replacing: the name of an adapter of theirs that leaves for this one.

    Raises:
        ShiraError: no adapter.
        AdapterMismatchError: it fits nothing or fits in part; all offenders are named.
        ResidentStateError: weights that cannot be overwritten, or that other adapters change under another name or
            in another model; all offenders are named. Quantized weights of Linear and Conv2d layers are no offenders.
    """
    fitted: dict[str, ShiraAdapter] = {}
    wrong: list[str] = []
    unusable: list[str] = []
    own: list[Claim] = []
    maps: dict[str, WeightMap] = {}
    for part, its_own in _split(adapter, models).items():
        weights, owner = weights_of(models[part]), _owner(models[part])
        maps[part], known = weights, weights.known(its_own.names)
        renamed: dict[str, str] = {}
        own_names: set[str] = set()
        tied: dict[Any, str] = {}
        for name, delta in its_own.deltas.items():
            try:
                holders = _holders_of(weights, name, known)
            except AdapterMismatchError as error:
                wrong.append(join_name(part, str(error)))
            except ResidentStateError as error:
                unusable.append(join_name(part, str(error)))
            else:
                shape = tuple(holders[0][0].shape) if holders else weight_shape(weights.layer(name))
                twin = tied.setdefault(identity(holders[0][0]), name) if holders else name
                own_name = name if name in known else weights.own_name(name)
                if shape != delta.shape:
                    wrong.append(f"{join_name(part, name)}: expected {shape}, got {delta.shape}")
                if own_name in own_names:
                    wrong.append(f"{join_name(part, name)}: means the same parameter as another name in the adapter")
                elif twin != name and its_own.deltas[twin] != delta:
                    wrong.append(
                        f"{join_name(part, name)}: has different deltas from {twin}, the same tied weight here"
                    )
                own += claims({join_name(part, own_name): holders} if holders else {}, owner)
                renamed[name] = own_name
                own_names.add(own_name)
        fitted[part] = its_own.renamed(renamed)
    wrong += [f"{b.name}: {_relation(a, b)} with {a.name}, which has deltas for it too" for a, b in conflicts(own)]
    if wrong:
        raise AdapterMismatchError(
            f"adapter does not fit: {counted(len(wrong), 'parameter', of=len(adapter.deltas))} "
            f"{verb(len(wrong), 'differs', 'differ')}"
            f"{trained_on(adapter.metadata)}; use it with the model it was trained for:{listing(wrong)}"
        )
    if unusable:
        raise ResidentStateError(
            f"{counted(len(unusable), 'weight', of=len(adapter.deltas))} cannot be overwritten:{listing(unusable)}"
        )
    _require_unshared(own, models, replacing)
    for part, its_own in fitted.items():
        weights = maps[part]
        if not weights.known(its_own.names):
            weights.track(its_own.names)
        weights.apart = weights.version, frozenset(its_own.names)
    return fitted


def _holders_of(weights: WeightMap, name: str, known: Mapping[str, Tensor]) -> list[tuple[Tensor, int]]:
    """As ``WeightMap.holders``; nothing for a quantized weight, which gets a branch."""
    if name in known:
        return [(known[name], 0)]
    try:
        return weights.holders(name)
    except ResidentStateError:
        if weights.is_quantized(name):
            return []
        raise


def _owner(model: nn.Module) -> object:
    """Whose the weights of a model are: its state's, which shallow copies of a module share."""
    module = unwrap(model)
    return state_of(module) or module


def _relation(one: Claim, other: Claim) -> str:
    return "one tied weight" if one.weight[1:] == other.weight[1:] else "one memory"


def _require_unshared(own: Sequence[Claim], models: Mapping[str, nn.Module], replacing: str | None) -> None:
    """Require that no other adapter changes this memory under another name, or in another model.

    Raises:
        ResidentStateError: names all offenders, with the owners.
    """
    known = {id(_owner(model)): part for part, model in models.items()}
    others = [claim for owner in owners() for claim in _claims_of(*owner, known, replacing)]
    mine = {id(claim) for claim in own}
    pairs = [pair for pair in conflicts([*own, *others]) if (id(pair[0]) in mine) != (id(pair[1]) in mine)]
    shared = [f"{a.name}: {b.name}" if id(a) in mine else f"{b.name}: {a.name}" for a, b in pairs]
    if shared:
        raise ResidentStateError(
            f"{counted(len(shared), 'weight')} of the adapter {verb(len(shared), 'shares', 'share')} memory with "
            "weights that other adapters change, expected one owner of each, or both would save the other's values as "
            f"the base. Remove those adapters first, or add this one to their model, by its names:{listing(shared)}"
        )


def _claims_of(
    module: nn.Module, state: ShiraState, known: Mapping[int, str], replacing: str | None
) -> Iterator[Claim]:
    """The memory of all weights that the adapters of a module change, named with their owners."""
    part = known.get(id(state))
    changed: dict[str, str] = {}
    for adapter, held in list(state.adapters.items()):
        if part is None or adapter != replacing:
            changed |= dict.fromkeys(held.deltas, adapter)
    if changed:
        place = f" of another model, {type(module).__name__}," if part is None else ""
        for name, holders in _holders(module, changed).items():
            full = join_name(part or "", name)
            yield from claims({f"{full}{place} is changed by adapter {changed[name]!r}": holders}, state)


def _holders(module: nn.Module, names: Iterable[str]) -> dict[str, list[tuple[Tensor, int]]]:
    """What holds the weights of a module that can be written now; those that cannot be do not interfere."""
    found: dict[str, list[tuple[Tensor, int]]] = {}
    with suppress(ShiraError):
        weights = weights_beside(module)
        for name in names:
            with suppress(ShiraError):
                found[name] = weights.holders(name)
    return found


def compare_base(parts: Mapping[str, ShiraAdapter], models: Mapping[str, nn.Module]) -> BaseMatch | None:
    """Whether the models are the base that an adapter was trained on, whatever is active; None without probes.

    Args:
        parts: what ``fit`` returned.
        models: as for ``fit``.
    """
    pairs = []
    for part, its_own in parts.items():
        if not its_own.base_probes:
            continue
        weights, state = weights_of(models[part]), state_of(unwrap(models[part]))
        quantized, entries = weights.quantized(its_own.base_probes), state.entries if state else {}
        for name, probe in its_own.base_probes.items():
            if name in quantized:
                continue
            indices = its_own.deltas[name].indices[: probe.numel()]
            saved = entries.get(name) or entries.get(state.twins.get(name, "") if state else "")
            pairs.append((probe, base_values(weights[name], indices, saved)))
    return match_base(pairs) if pairs else None


def base_values(weight: Tensor, indices: Tensor, saved: Part | None) -> Tensor:
    """The unadapted values at sorted ``indices``, whatever is active.

    Args:
        weight: the live weight, of any shape, floating dtype and device.
        indices: int32 or int64 ``(n,)``, flat row-major, on any device.
        saved: what is overwritten in the weight.

    Returns:
        ``(n,)`` on the weight's device, of its dtype; float32 for 8-bit floats.
    """
    values = gather(weight, indices)
    if saved is None or not saved[1].numel():
        return values
    _, held, base, _ = saved
    wanted = indices.to(held.device, held.dtype)
    place = torch.searchsorted(held, wanted).clamp_(max=held.numel() - 1)
    found = base[place].to(weight.device, weight.dtype)
    is_saved = (held[place] == wanted).to(weight.device)
    if is_byte_dtype(weight.dtype):
        return torch.where(is_saved, found.float(), values.float())
    return torch.where(is_saved, found, values)
