"""Find every tensor that holds a named weight now: the parameter, its fused copies, its offloaded original.

In: a module and parameter names. Out: tensors, and a version that changes when they move. Nothing is written here.
What diffusers does to weights is in docs/compatibility.md.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from operator import attrgetter, itemgetter
from types import NoneType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shira_diffusers.errors import AdapterMismatchError, ResidentStateError
from shira_diffusers.weights.scatter import is_byte_dtype, is_dense
from shira_diffusers.weights.targets import FUSED_COPIES, WRAPPERS, canonical_name, weight_shape
from shira_diffusers.weights.text_model import other_name

# Where `fuse_qkv_projections` copies a projection to: the copies, and the projections before it in each.
_FUSED: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    name: [(copy, parts[: parts.index(name)]) for copy, parts in FUSED_COPIES.items() if name in parts]
    for name in {name for parts in FUSED_COPIES.values() for name in parts}
}
_versions = count(1)
_TRACKS = 8  # groups of weights that a map remembers the way to
_LAYERS, _PARAMETERS = itemgetter("_modules"), itemgetter("_parameters")
_SHAPE, _DEVICE = attrgetter("shape"), attrgetter("device")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def unwrap(module: nn.Module) -> nn.Module:
    """The module itself, out of ``torch.compile``, DDP, ``get_peft_model`` and the like."""
    while True:
        parallel = type(module).__name__ in ("DistributedDataParallel", "DataParallel")
        inner = module._modules.get("module" if parallel else "_orig_mod")
        if inner is None and hasattr(type(module), "get_base_model"):  # PeftModel
            inner = module.get_base_model()  # type: ignore[operator]
        if inner is None:
            return module
        module = inner


class WeightMap:
    """Name -> the live tensor of a weight, and every other tensor that holds it, for one module.

    Layers and weights are referenced weakly, so they are freed as soon as their user drops or moves them.

    Args:
        module: the component, compiled or not.

    Raises:
        ResidentStateError: group-offloaded to disk.
    """

    def __init__(self, module: nn.Module) -> None:
        self.version = next(_versions)
        """Another number as soon as a weight that is looked at lies elsewhere than it did, has another dtype or other
        copies. What was computed from the addresses of weights holds as long as the version stays."""
        self._model, self._top = ref(module), ref(unwrap(module))
        self._modules: dict[str, ref[nn.Module]] = {}
        self._seen: list[tuple[ref[nn.Module], int, tuple[int, ...]]] = []
        self._plain: set[str] = set()  # weights that are nothing but a contiguous parameter
        self._tracks: dict[tuple[str, ...], _Track] = {}  # by names that were looked at together
        self._unconfirmed: _Track | None = None
        self._places: dict[str, tuple[Any, ...]] = {}
        self._compiled = [self._model] if _is_compiled(module.__dict__) else []
        self._offloaded: dict[int, Tensor] = {}
        self._hooked = False
        self.apart: tuple[int, frozenset[str]] = 0, frozenset()
        """A version, and weights that were found to share no memory in it."""
        self._walk()

    @property
    def _root(self) -> nn.Module:
        root = self._top()
        assert root is not None  # whoever asks holds it
        return root

    def _walk(self) -> None:
        """Look at each module once: its path (without wrappers), whether it is compiled or offloaded in a group."""
        left = [("", self._root)]
        while left:
            path, module = left.pop()
            own = module.__dict__  # read past nn.Module.__getattr__, which is slow for what is not there
            this = ref(module)
            self._modules.setdefault(path, this)  # a wrapper comes before what it wraps
            self._seen.append((this, len(own), tuple(map(id, own["_modules"].values()))))
            if "_diffusers_hook" in own:
                self._hooked = True
                self._offloaded |= _group_offloaded(module, own["_diffusers_hook"])
            if _is_compiled(own):
                self._compiled.append(this)
            for name, child in own["_modules"].items():
                if child is not None:
                    inside = path if name in WRAPPERS else f"{path}.{name}" if path else name
                    left.append((inside, child))

    def _at(self, path: str) -> nn.Module | None:
        found = self._modules.get(path)
        return None if found is None else found()

    def is_current(self, module: nn.Module) -> bool:
        """Whether a new map of a module would see the same layers: none added or replaced, none hooked since.

        Compiling, hooks and offloading add attributes to a layer; its weights may be others, which ``live`` sees.
        """
        if self._hooked or module is not self._model():
            return False
        for layer, attributes, children in self._seen:  # one plain loop: at each switch over all layers
            found = layer()
            if found is None:
                return False
            own = found.__dict__
            if len(own) != attributes:
                return False
            now = own["_modules"]
            if now:
                if tuple(map(id, now.values())) != children:  # all alive, so ids are unique
                    return False
            elif children:
                return False
        return True

    def require_not_frozen(self) -> None:
        """Refuse a model that inductor has compiled with freezing: its graph holds copies of the weights.

        Raises:
            ResidentStateError: compiled with ``freezing``.
        """
        if not self._compiled:
            return
        from torch._inductor import config  # slow to import, and only needed where something is compiled

        options = [option for module in self._compiled for option in _compile_options(module())]
        if config.freezing or any(option.get("freezing") for option in options):
            raise ResidentStateError(
                f"{type(self._root).__name__} is compiled with inductor's freezing, which copies the weights into the "
                "graph: overwriting them has no effect; compile with torch._inductor.config.freezing = False"
            )

    def live(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Look at weights, in the one pass that a switch makes over them.

        Returns:
            The live tensor of each (the stored one, where accelerate has offloaded it). On a CPU to hold them keeps
            their memory in place; on a GPU what is launched comes before what frees it.

        Raises:
            AdapterMismatchError, ResidentStateError: as ``holders``.
        """
        names = tuple(names)
        self._unconfirmed = None
        if found := self.known(names):
            return found | {name: self[name] for name in names if name not in found}
        live = {name: self[name] for name in names}
        self.track(names)
        return live

    def known(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Those of some weights that are known to be nothing but a parameter; all of them or none, after ``track``."""
        track = self._tracks.get(names)
        if track is None or not track.leads_there(self._root):
            return {}
        track.version = self.version
        return track.look() or {}

    def track(self, names: tuple[str, ...]) -> None:
        """Remember the way to weights, as they were looked at before. Layers tied since then make a new version."""
        self._note("", tuple(map(id, self._parameters())))
        if len(self._tracks) == _TRACKS:
            self._tracks.clear()
        plain = [name for name in names if name in self._plain]
        shapes = {self._places[name][0][3] for name in plain}
        self._tracks[names] = _Track(self._root, plain, shapes, self.version)

    def glance(self, module: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor] | None:
        """As ``live``, if these parameters are what they were when they were looked at in this version, else None.

        Whether the module still has them is left to ``confirm``, so that a GPU can work meanwhile.
        """
        track = self._unconfirmed = self._tracks.get(names)
        if track is None or track.version != self.version or len(track.names) < len(names):
            return None
        return None if self._hooked or module is not self._model() else track.look()

    def confirm(self) -> bool:
        """Whether the module still has what ``glance`` gave, in layers to which nothing was added.

        If not, the next ``live_weights`` looks at everything anew, and what was computed since belongs to no version.
        """
        if self._unconfirmed is None or self._unconfirmed.leads_there(self._root):
            self._unconfirmed = None
            return True
        self._tracks.clear()
        self.version = next(_versions)
        return False

    def __getitem__(self, name: str) -> Tensor:
        """The live tensor of a weight; raises as ``holders``."""
        return self.holders(name)[0][0]

    def copied(self, names: Iterable[str]) -> list[str]:
        """Those of some weights that more than one tensor holds; they were looked at before."""
        return [name for name in names if name not in self._plain and len(self._places[name]) > 1]

    def twins(self, names: Iterable[str]) -> dict[str, str]:
        """Other names of some weights -> these, where the module has one parameter under several names."""
        all_ids = list(map(id, self._parameters()))
        if len(set(all_ids)) == len(all_ids):
            return {}
        parameters = self._root.named_parameters(remove_duplicate=False)
        ids = {canonical_name(name): id(parameter) for name, parameter in parameters}
        first = {ids[name]: name for name in names if name in ids}
        return {name: first[own] for name, own in ids.items() if first.get(own, name) != name}

    def devices(self) -> set[torch.device]:
        """Where the module's parameters are."""
        return set(map(_DEVICE, self._parameters()))

    def _parameters(self) -> list[nn.Parameter]:
        """All parameters, those in several layers as many times."""
        layers = [layer() for layer, _, _ in self._seen]
        held = chain.from_iterable([layer._parameters.values() for layer in layers if layer is not None])
        return [parameter for parameter in held if parameter is not None]

    def own_name(self, name: str) -> str:
        """The name that the module itself has for a weight; raises as ``holders``."""
        path, _, leaf = name.rpartition(".")
        path = self._owner(path, name)[0]
        return f"{path}.{leaf}" if path else leaf

    def holders(self, name: str) -> list[tuple[Tensor, int]]:
        """Every tensor that holds a weight, and the entry at which it begins there; first the live weight itself.

        Raises:
            AdapterMismatchError: no such parameter.
            ResidentStateError: the weight cannot be overwritten: quantized, parametrized, sharded, merged with a
                LoRA, kept on disk, or fused by inductor's freezing.
        """
        path, _, leaf = name.rpartition(".")
        path, parent, owner = self._owner(path, name)
        parameter = owner._parameters.get(leaf)
        if parameter is None:
            raise self._missing_or_unusable(owner, leaf, name)
        if parent is not owner:
            _require_unmerged(parent, path)
        weight = self._stored(owner, leaf, parameter, name)
        _require_plain(parameter, weight, name)
        holders = [(weight, 0)]
        original = self._offloaded.get(id(parameter))
        if original is not None and original.data_ptr() != weight.data_ptr():
            holders.append((original, 0))
        if path.rpartition(".")[2] in _FUSED:
            holders += self._fused_copies(path, leaf, weight)
        is_plain = parent is owner and len(holders) == 1 and not parameter.is_meta and weight.is_contiguous()
        (self._plain.add if is_plain else self._plain.discard)(name)
        self._note(name, tuple((*identity(tensor), offset) for tensor, offset in holders))
        return holders

    def _note(self, name: str, places: Any) -> None:
        """Remember where a weight lies, and count a new version if that was elsewhere."""
        if self._places.setdefault(name, places) != places:
            self._places[name] = places
            self.version = next(_versions)

    def layer(self, name: str) -> nn.Module:
        """The layer of a parameter, however it holds its values; under PEFT the layer that is wrapped.

        Raises:
            AdapterMismatchError: no such layer.
        """
        return self._owner(name.rpartition(".")[0], name)[2]

    def layers(self, names: Iterable[str]) -> dict[str, list[tuple[nn.Module, int]]]:
        """The layers that compute with weights, and the row at which each begins there: tied and fused ones too.

        Raises:
            AdapterMismatchError: no such layer.
        """
        holding: dict[int, list[nn.Module]] = {}
        for module in self._root.modules():
            for parameter in module._parameters.values():
                holding.setdefault(id(parameter), []).append(module)
        found = {}
        for name in names:
            path, _, leaf = name.rpartition(".")
            path, _, owner = self._owner(path, name)
            weight = owner._parameters.get(leaf)
            tied = [owner] if weight is None else holding[id(weight)]
            found[name] = [(layer, 0) for layer in tied] + self._fused_layers(path)
        return found

    def quantized(self, names: Iterable[str]) -> frozenset[str]:
        """Those of some weights that cannot be overwritten because they are quantized, in layers that a branch fits.

        Of those that ``holders`` has looked at before only what could not be overwritten then.
        """
        return frozenset(name for name in names if name not in self._plain and self.is_quantized(name))

    def is_quantized(self, name: str) -> bool:
        """Whether a weight is one of ``quantized``."""
        path, _, leaf = name.rpartition(".")
        try:
            owner = self._owner(path, name)[2]
        except AdapterMismatchError:
            return False
        weight = owner._parameters.get(leaf)
        if leaf != "weight" or weight_shape(owner) is None or parametrize.is_parametrized(owner, leaf):
            return False
        if weight is None:
            return getattr(owner, leaf, None) is not None
        return not weight.is_meta and _quantized_as(weight, weight.data) not in (None, "a DTensor")

    @property
    def is_compiled(self) -> bool:
        """Whether the module or a part of it is compiled: hooks that are added later are not seen there."""
        return bool(self._compiled)

    def module(self, path: str) -> nn.Module | None:
        """The module at a path without wrappers, itself out of its wrappers."""
        found = self._at(path)
        return None if found is None else unwrap(found)

    def _owner(self, path: str, name: str) -> tuple[str, nn.Module, nn.Module]:
        """The layer's path, the layer as found and the one that owns the parameter, which differ under PEFT."""
        found = self._at(path)
        if found is None:
            path = other_name(path)
            found = self._at(path)
        if found is None:
            raise AdapterMismatchError(f"{name}: no such parameter in {type(self._root).__name__}")
        owner = unwrap(found)
        while (base := owner._modules.get("base_layer")) is not None:
            owner = base
        return path, found, owner

    def _missing_or_unusable(self, owner: nn.Module, leaf: str, name: str) -> Exception:
        if parametrize.is_parametrized(owner, leaf):
            return ResidentStateError(
                f"{name} is parametrized (torch.nn.utils.parametrize): its weight is computed, expected a plain "
                "parameter; remove the parametrization first"
            )
        if not isinstance(getattr(owner, leaf, None), NoneType | nn.Module):
            return ResidentStateError(_quantized_message(name, type(owner).__name__, "a computed weight"))
        return AdapterMismatchError(f"{name}: no such parameter in {type(self._root).__name__}")

    def _stored(self, owner: nn.Module, leaf: str, parameter: nn.Parameter, name: str) -> Tensor:
        """The tensor that keeps the weight: the parameter's own, or what accelerate's hook keeps for it."""
        if not parameter.is_meta:
            return parameter.detach() if type(parameter) is nn.Parameter else parameter.data
        for hook in _accelerate_hooks(owner):
            weights: Mapping[str, Tensor] | None = getattr(hook, "weights_map", None)
            if weights is None:
                continue
            first, again = weights[leaf], weights[leaf]
            if first.data_ptr() == again.data_ptr() and not first.is_meta:
                return first
            raise ResidentStateError(
                f"{name} is offloaded to disk: writing to it has no effect; offload to the CPU instead "
                "(enable_model_cpu_offload or enable_sequential_cpu_offload), or bring the weights back with "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )
        raise ResidentStateError(f"{name} is on the meta device: it has no values; load the model's weights first")

    def _fused_copies(self, path: str, leaf: str, weight: Tensor) -> list[tuple[Tensor, int]]:
        holders = []
        for layer, rows in self._fused_layers(path):
            copied = layer._parameters.get(leaf)
            if copied is not None:
                stored = self._stored(layer, leaf, copied, f"{path}.{leaf} (fused)")
                holders.append((stored, rows * weight.shape[1:].numel()))
        return holders

    def _fused_layers(self, path: str) -> list[tuple[nn.Module, int]]:
        """The layers that ``fuse_qkv_projections`` has copied one into, and the row at which its copy begins."""
        attention_path, _, projection = path.rpartition(".")
        attention = self.module(attention_path) if projection in _FUSED else None
        if attention is None:
            return []
        fused = [(attention._modules.get(copy), before) for copy, before in _FUSED[projection]]
        return [
            (layer, sum(_out_features(attention, n) for n in before)) for layer, before in fused if layer is not None
        ]


class _Track:
    """Weights that are nothing but contiguous parameters: what they were, and the way to them from the module.

    Modules and parameters are referenced weakly. A switch looks at hundreds of layers, so it goes level by level with
    functions of C: a loop over the layers takes twice as long. It leads to all parameters of the weights' shapes, since
    any of them may be tied to one of the weights later.

    Args:
        root: the module, unwrapped.
        names: the weights.
        shapes: theirs.
        version: of the map, when they were looked at.
    """

    def __init__(self, root: nn.Module, names: Iterable[str], shapes: Collection[Any], version: int) -> None:
        self.version = version
        ways = [
            (*filter(None, path.split(".")), leaf)
            for path, layer in root.named_modules(remove_duplicate=False)
            for leaf, parameter in layer._parameters.items()
            if parameter is not None and parameter.shape in shapes
        ]
        real = {canonical_name(".".join(way)): way for way in reversed(ways)}  # with ``_orig_mod`` in it
        own = {real[name]: name for name in names if name in real}
        held: dict[tuple[str, ...], list[str]] = {}
        for *path, leaf in ways:
            held.setdefault(tuple(path), []).append(leaf)
        depths: list[dict[tuple[str, ...], int]] = [{} for _ in range(1 + max(map(len, held), default=0))]
        for way in held:
            for depth in range(len(way) + 1):
                depths[depth].setdefault(way[:depth], len(depths[depth]))
        # by level: of each layer its parent's place in the level above and its key there, of each weight its layer's
        # place and its key
        self._levels: list[tuple[list[int], list[str], list[int], list[str]]] = []
        walked: list[str | None] = []
        root_alone: dict[tuple[str, ...], int] = {(): 0}
        for above, level in zip([root_alone, *depths], depths, strict=False):
            leaves = [(way, place, leaf) for way, place in level.items() for leaf in held.get(way, ())]
            parents, keys = [above[way[:-1]] for way in level], [way[-1] if way else "" for way in level]
            self._levels.append((parents, keys, [place for _, place, _ in leaves], [leaf for _, _, leaf in leaves]))
            walked += [own.get((*way, leaf)) for way, _, leaf in leaves]
        found, self._counts = self._walk(root)
        self._ids, self._shapes = list(map(id, found)), list(map(_SHAPE, found))
        weights = {name: parameter for name, parameter in zip(walked, found, strict=True) if name is not None}
        self.names, parameters = list(weights), list(weights.values())
        self._parameters = [ref(parameter) for parameter in parameters]
        self._on_cpu = any(parameter.is_cpu for parameter in parameters)
        self._seen = _looks_of(parameters)

    def look(self) -> dict[str, Tensor] | None:
        """The weights, if each parameter is the memory that it was, else None.

        Shapes are left to ``leads_there``: a GPU's launch waits for this, and they take half as long as all else.
        """
        parameters: list[Any] = [parameter() for parameter in self._parameters]
        if _looks_of(parameters) != self._seen:
            return None
        held = [parameter.detach() for parameter in parameters] if self._on_cpu else parameters
        return dict(zip(self.names, held, strict=True))

    def leads_there(self, root: nn.Module) -> bool:
        """Whether the module has these parameters where it had them, as many attributes and layers in each layer.

        Compiling, hooks and offloading add attributes to a layer. The parameters have the shapes that they had.
        """
        try:
            parameters, counts = self._walk(root)
        except (AttributeError, TypeError):
            return False  # a layer is gone
        same = counts == self._counts and list(map(id, parameters)) == self._ids
        return same and list(map(_SHAPE, parameters)) == self._shapes

    def _walk(self, root: nn.Module) -> tuple[list[Any], list[int]]:
        """The parameters, and how many attributes and layers each layer on the way has."""
        parameters: list[Any] = []
        counts: list[int] = []
        inside: list[dict[str, Any]] = [{"": root}]
        for parents, keys, places, leaves in self._levels:
            level = map(dict.get, map(inside.__getitem__, parents), keys)
            own = [layer.__dict__ for layer in level]  # read past nn.Module.__getattr__
            inside = list(map(_LAYERS, own))
            counts += map(len, own)
            counts += map(len, inside)
            parameters += map(dict.get, map(_PARAMETERS, map(own.__getitem__, places)), leaves)
        return parameters, counts


def _looks_of(parameters: Sequence[Any]) -> list[Any]:
    """Which memory parameters (any shape) are: address, dtype and size of each, and whether it is contiguous."""
    if set(map(type, parameters)) - {nn.Parameter}:
        return [None]  # gone, or of another type
    looks: list[Any] = list(map(Tensor.data_ptr, parameters))
    looks += [parameter.dtype for parameter in parameters]
    looks += map(Tensor.numel, parameters)
    looks += map(Tensor.is_contiguous, parameters)
    return looks


_maps: WeakKeyDictionary[nn.Module, WeightMap] = WeakKeyDictionary()


def weights_of(module: nn.Module) -> WeightMap:
    """The map of a module, compiled or not: the last one, as long as it is true. For one thread at a time.

    Raises:
        ResidentStateError: as ``WeightMap``.
    """
    root = unwrap(module)
    found = _maps.get(root)
    if found is None or not found.is_current(module):
        found = _maps[root] = WeightMap(module)
    return found


def live_weights(module: nn.Module, names: tuple[str, ...]) -> tuple[WeightMap, dict[str, Tensor]]:
    """The map of a module, as ``weights_of``, and what its ``live`` gives; its ``confirm`` is due.

    Raises:
        AdapterMismatchError, ResidentStateError: as ``WeightMap.holders``.
    """
    found = _maps.get(unwrap(module))
    live = None if found is None else found.glance(module, names)
    if found is None or live is None:
        found = weights_of(module)
        live = found.live(names)
    return found, live


def weights_beside(root: nn.Module) -> WeightMap:
    """The map of an unwrapped module of which the caller holds no lock: the last one if it is true, else a new one.

    Raises:
        ResidentStateError: as ``WeightMap``.
    """
    found = _maps.get(root)
    model = None if found is None else found._model()
    return found if found is not None and model is not None and found.is_current(model) else WeightMap(root)


def identity(weight: Tensor) -> tuple[Any, ...]:
    """A key that is equal for two tensors (any shape) which view the same memory alike, as those of tied weights do."""
    return weight.data_ptr(), weight.device, weight.dtype, weight.shape, weight.stride()


def _out_features(attention: nn.Module, projection: str) -> int:
    layer = attention._modules[projection]
    assert layer is not None  # it was fused, so it is there
    while (base := layer._modules.get("base_layer")) is not None:
        layer = base
    shape = weight_shape(layer)
    assert shape is not None
    return shape[0]


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return []
    return list(getattr(hook, "hooks", [hook]))


def _group_offloaded(module: nn.Module, registry: Any) -> dict[int, Tensor]:
    """``id(parameter) -> its CPU copy``, where a module is under diffusers' group offloading with a stream."""
    hook = registry.get_hook("group_offloading")
    if hook is None:
        return {}
    if getattr(hook.group, "offload_to_disk_path", None) is not None:
        raise ResidentStateError(
            f"{type(module).__name__} is group-offloaded to disk: writing to its weights has no effect; "
            "apply group offloading without offload_to_disk_path"
        )
    copies = getattr(hook.group, "cpu_param_dict", None) or {}
    return {id(parameter): copy for parameter, copy in copies.items()}


def _require_unmerged(found: nn.Module, path: str) -> None:
    merged = getattr(found, "merged_adapters", None)
    if getattr(found, "merged", False) or merged:
        raise ResidentStateError(
            f"{path} has a LoRA fused into its weight ({', '.join(merged or [])}): one of the two would be lost; "
            "call unfuse_lora() first, or use the LoRA unfused. If it was fused while adapters were active, then call "
            "unload_lora_weights() and load the base's weights again with load_state_dict"
        )


def _quantized_message(name: str, kind: str, got: str) -> str:
    return (
        f"{name} of {kind} is {got}, expected a plain float32, float16 or bfloat16 parameter; "
        "a quantized base cannot be overwritten: load this component without a quantization_config, "
        "apply the adapter to the unquantized model and bake it (bake_shira) before you quantize, "
        "or run the adapter beside it (shira_diffusers.set_shira_attn_processors)"
    )


def _quantized_as(parameter: nn.Parameter, weight: Tensor) -> str | None:
    """What a weight is stored as, if not as a plain tensor of floats."""
    odd = next((t for t in (weight, parameter) if type(t) not in (Tensor, nn.Parameter)), None)
    if odd is not None:
        return f"a {type(odd).__name__}"
    return None if weight.dtype in _FLOATS or is_byte_dtype(weight.dtype) else str(weight.dtype)


def _require_plain(parameter: nn.Parameter, weight: Tensor, name: str) -> None:
    if stored := _quantized_as(parameter, weight):
        raise ResidentStateError(_quantized_message(name, "this model", stored))
    if weight.layout != torch.strided or not (weight.is_contiguous() or is_dense(weight)):
        raise ResidentStateError(f"{name} is not a dense strided tensor; make it contiguous first")
    if weight.numel() and not weight.untyped_storage().nbytes():
        raise ResidentStateError(f"{name} has no memory: its storage was freed; load the model's weights first")


def _is_compiled(own: Mapping[str, Any]) -> bool:
    """Whether a module, given by its ``__dict__``, or its forward alone, is compiled."""
    in_place = own.get("_compiled_call_impl") is not None or hasattr(own.get("forward"), "get_compiler_config")
    return in_place or "_orig_mod" in own["_modules"]


def _compile_options(module: nn.Module | None) -> Iterator[Mapping[str, Any]]:
    """What a module, its call or its forward is compiled with; a backend other than inductor has none."""
    for compiled in (module, *(getattr(module, name, None) for name in ("_compiled_call_impl", "forward"))):
        options = getattr(compiled, "get_compiler_config", None)
        if options is not None:
            yield options() or {}
