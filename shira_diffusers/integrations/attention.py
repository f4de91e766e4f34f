"""Run adapters beside weights that cannot be overwritten, above all quantized ones.

Nothing is written: each adapted layer's output gets the sparse product of its delta added as it is computed.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.base_match import trained_on
from shira_diffusers.adapters.delta import SparseDelta
from shira_diffusers.adapters.merge import fuse_scaled
from shira_diffusers.adapters.scales import Scale, Weights, blocks_of, check_scale, each_scale, scale_of
from shira_diffusers.engine.locks import hold
from shira_diffusers.engine.side_branch import SideBranch, branch_of, replace_hooks
from shira_diffusers.errors import AdapterMismatchError, ShiraError, counted, listing, verb
from shira_diffusers.weights.finder import WeightMap, unwrap
from shira_diffusers.weights.targets import FUSED_COPIES, require_modules, weight_shape

_PROJECTIONS = frozenset((*chain(*FUSED_COPIES.values()), "to_out", "to_out.0", "to_add_out"))


class ShiraAttnProcessor(nn.Module):
    """An attention processor that runs another one and adds the sparse products of deltas to the projections.

    The other processor is shown the attention layer with projections that add ``scale * x S^T`` to what they give;
    the layer itself is never touched, so errors leave nothing behind and threads do not meet. Works with any
    processor that calls projections (one that reads their ``.weight`` misses the deltas), with fused projections, and
    in float32, float16 and bfloat16. At scale 0 the result is the base's to the bit. A wrapped processor with weights
    of its own, such as an IP-Adapter's, is a submodule, so these move and cast with the model; set an IP-Adapter's
    scale before it is wrapped.

    Args:
        processor: any diffusers attention processor.
        deltas: ``projection -> delta`` of its weight, ``(out, in)``: ``to_q, to_k, to_v, to_out.0, add_q_proj,
            add_k_proj, add_v_proj, to_add_out``, as the attention layer has them.
        scale: may be changed at any time; 0 is the base.

    Raises:
        AdapterMismatchError: deltas of other names.
    """

    def __init__(self, processor: Any, deltas: Mapping[str, SparseDelta], scale: float = 1.0) -> None:
        super().__init__()
        unknown = sorted(deltas.keys() - _PROJECTIONS)
        if unknown:
            raise AdapterMismatchError(
                f"no attention projections: {', '.join(unknown)}; expected some of {', '.join(sorted(_PROJECTIONS))}"
            )
        self.processor = processor
        self.scale = scale
        self._branches = {name: SideBranch(delta) for name, delta in deltas.items()}
        # diffusers reads from here which keyword arguments a processor takes; calls go to the class's __call__
        self.__dict__["__call__"] = _SignatureOf(processor)

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped processor returns for the attention layer with its branches."""
        return self.processor(_Shown(attn, self._branches, self.scale), *args, **kwargs)

    def extra_repr(self) -> str:
        """Which projections have a branch, for ``print(model)``."""
        return f"scale={self.scale}, {', '.join(self._branches)}"


class _SignatureOf:
    """Stands for a function with the parameters of a processor's call."""

    def __init__(self, processor: Any) -> None:
        self.__signature__ = inspect.signature(processor.__call__)

    def __call__(self) -> None:
        raise TypeError("call the processor itself")


class _Shown:
    """An attention layer as its processor sees it: itself, but for projections that add their branches."""

    def __init__(self, attn: nn.Module, branches: Mapping[str, SideBranch], scale: float) -> None:
        self.__dict__.update(_attn=attn, _branches=branches, _scale=scale)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._attn, name)
        if isinstance(found, nn.ModuleList):
            return [self._with_branch(f"{name}.{i}", layer) for i, layer in enumerate(found)]
        return self._with_branch(name, found)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._attn, name, value)

    def _with_branch(self, name: str, layer: Any) -> Any:
        if name in self._branches:
            return _Projection(layer, partial(self._branches[name].add, layer, scale=self._scale))
        if any(part in self._branches for part in FUSED_COPIES.get(name, ())):
            return _Projection(layer, partial(self._add_to_fused, FUSED_COPIES[name]))
        return layer

    def _add_to_fused(self, names: Sequence[str], x: Tensor, output: Tensor) -> Tensor:
        layers = [getattr(self._attn, name) for name in names]
        outputs = output.split([layer.out_features for layer in layers], dim=-1)
        branches = [self._branches.get(name) for name in names]
        added = [
            branch.add(layer, x, part, self._scale) if branch else part
            for branch, layer, part in zip(branches, layers, outputs, strict=True)
        ]
        return torch.cat(added, dim=-1)


class _Projection:
    """A projection as an attention processor sees it: a call adds the branch, all else is the layer's own."""

    def __init__(self, layer: nn.Module, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._layer, self._add = layer, add

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._add(x, self._layer(x, *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def set_shira_attn_processors(
    model: nn.Module,
    adapter: ShiraAdapter | Sequence[ShiraAdapter],
    scale: Weights = 1.0,
    *,
    component: str | None = None,
) -> None:
    """Run adapters beside a model's layers, without writing a weight: for quantized and other fixed bases.

    Projections of attention layers get theirs through a ``ShiraAttnProcessor``, all other Linear and Conv2d layers
    (feed-forward, for instance) through a forward hook. Up to rounding the outputs are those of the overwritten
    model. Each call replaces what the one before installed; ``remove_shira_attn_processors`` gives back the model as
    it was, bit for bit.

    Args:
        model: a UNet, transformer or text encoder, quantized in whatever way or not at all.
        adapter: one, or several that are added up.
        scale: for all, or one each: a number, ``{component: number}`` or ``{component: {"down" | "mid" | "up":
            ...}}``, as for ``pipe.set_shira``; None is 1.0. At 0 nothing is installed.
        component: the part of the adapter that is meant for this model, such as ``"unet"``; None where adapters have
            one component only, or plain parameter names.

    Raises:
        ShiraError: a pipeline instead of a model, no adapters, another number of scales, or a scale that is not a
            finite number or for a component that the adapter does not change.
        AdapterMismatchError: deltas that fit no layer, by name or shape, or are of norms, biases or embeddings; all are
            named.

    On error nothing has changed. Set processors (IP-Adapter, attention slicing, fused projections) and load LoRAs
    before: diffusers' setters replace processors, ours too. Compile after: hooks of a compiled model are not seen.
    A weight that two layers share gets its branch in the layer that the adapter names only.
    """
    require_modules(model, "a module", "set_shira_attn_processors(pipe.unet, ...), once for each model")
    root = unwrap(model)
    weights = WeightMap(root)
    deltas = _merge(weights, adapter, scale, component)
    with hold([root], write=True):
        remove_shira_attn_processors(root)
        for attention, own in _by_attention(weights, deltas):
            attention.set_processor(ShiraAttnProcessor(attention.processor, own))
        replace_hooks(
            root, SideBranch, [(layer, branch_of(layer, delta)) for layer, delta in _by_layer(weights, deltas)]
        )


def remove_shira_attn_processors(model: nn.Module) -> None:
    """Give a model the processors back that it had, and remove all branches. Idempotent."""
    require_modules(model, "a module", "remove_shira_attn_processors(pipe.unet), once for each model")
    root = unwrap(model)
    with hold([root], write=True):
        modules: list[Any] = list(root.modules())
        for module in modules:
            processor = getattr(module, "processor", None)
            if isinstance(processor, ShiraAttnProcessor) and hasattr(module, "set_processor"):
                module.set_processor(processor.processor)
        replace_hooks(root, SideBranch, ())


# ---------------------------------------------------------------- what goes where


def _merge(
    weights: WeightMap,
    adapter: ShiraAdapter | Sequence[ShiraAdapter],
    scale: Weights,
    component: str | None,
) -> dict[str, SparseDelta]:
    """One float32 delta per weight, strength included; those that are zero are left out."""
    adapters = [adapter] if isinstance(adapter, ShiraAdapter) else list(adapter)
    scales = each_scale(scale, len(adapters))
    if not adapters or len(scales) != len(adapters):
        raise ShiraError(
            f"expected at least one adapter and one scale each, got {counted(len(adapters), 'adapter')} "
            f"and {counted(len(scales), 'scale')}"
        )
    parts = []
    for number, (given, strength) in enumerate(zip(adapters, scales, strict=True)):
        name, part = _part_for(weights, given, component)
        checked = _checked(f"number {number}", strength, given.component_names() if name else [], name, weights)
        _require_fit(weights, part)
        parts.append((part, partial(scale_of, checked, name)))
    fused = fuse_scaled(parts)
    return {name: delta for name, delta in fused.deltas.items() if bool(delta.values.any())}


def _checked(adapter: str, scale: Scale | None, components: Sequence[str], own: str, weights: WeightMap) -> Scale:
    """A scale as ``check_scale`` gives it; the blocks of components other than ``own`` are not known here."""
    if isinstance(scale, Mapping):
        scale = {p: 1.0 if p != own and isinstance(value, Mapping) else value for p, value in scale.items()}
    blocks = blocks_of(weights.module(""))
    return check_scale(adapter, 1.0 if scale is None else scale, dict.fromkeys(components, blocks))


def _part_for(weights: WeightMap, adapter: ShiraAdapter, component: str | None) -> tuple[str, ShiraAdapter]:
    """The component's name, empty for plain parameter names, and the adapter's part for it."""
    has = adapter.component_names()
    if component is None and any(weights.module(first) is not None for first in has):
        return "", adapter
    if component is None and len(has) == 1:
        component = has[0]
    if component is None or component not in has:
        raise AdapterMismatchError(
            f"the adapter has the components {', '.join(has) or 'none'}, expected "
            f"{f'{component!r} among them' if component else 'one'}: name one of them with component="
        )
    return component, adapter.part(component)


def _require_fit(weights: WeightMap, adapter: ShiraAdapter) -> None:
    """Require a layer of the right shape for each delta.

    Raises:
        AdapterMismatchError: deltas that fit no layer; all are named.
    """
    wrong: list[str] = []
    for name, delta in adapter.deltas.items():
        try:
            layer = weights.layer(name)
        except AdapterMismatchError as error:
            wrong.append(str(error))
            continue
        expected = weight_shape(layer)
        if expected is None or not name.endswith(".weight"):
            wrong.append(
                f"{name} of {type(layer).__name__}: only weights of Linear, Conv2d and Conv1D layers have a branch"
            )
        elif expected != delta.shape:
            wrong.append(f"{name}: expected {expected}, got {delta.shape}")
    if wrong:
        raise AdapterMismatchError(
            f"adapter does not fit: {counted(len(wrong), 'parameter', of=len(adapter.deltas))} "
            f"{verb(len(wrong), 'differs', 'differ')}"
            f"{trained_on(adapter.metadata)}; use it with the model it was trained for:{listing(wrong)}"
        )


def _attention_of(weights: WeightMap, name: str) -> tuple[str, Any] | None:
    """The path and the attention layer whose processor calls a weight's layer; None where none does."""
    path = name.removesuffix(".weight")
    for projection in (".".join(path.split(".")[-length:]) for length in (1, 2)):
        if projection in _PROJECTIONS:
            place = path.removesuffix("." + projection)
            attention = weights.module(place)
            if hasattr(attention, "set_processor") and getattr(attention, "processor", None) is not None:
                return place, attention
    return None


def _by_attention(weights: WeightMap, deltas: Mapping[str, SparseDelta]) -> list[tuple[Any, dict[str, SparseDelta]]]:
    """The attention layers with the deltas of their projections."""
    found: dict[str, tuple[Any, dict[str, SparseDelta]]] = {}
    for name, delta in deltas.items():
        if (place := _attention_of(weights, name)) is not None:
            path, attention = place
            projection = name.removeprefix(f"{path}.").removesuffix(".weight")
            found.setdefault(path, (attention, {}))[1][projection] = delta
    return list(found.values())


def _by_layer(weights: WeightMap, deltas: Mapping[str, SparseDelta]) -> Iterator[tuple[nn.Module, SparseDelta]]:
    """All other layers with their deltas."""
    for name, delta in deltas.items():
        if _attention_of(weights, name) is None:
            yield weights.layer(name), delta
