"""Turn any trainer into a SHiRA trainer: mask gradients where they arrive (arXiv 2406.13175, section 3.3)."""

import weakref
from collections.abc import Iterable, Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from shira_diffusers.adapters.delta import check_indices
from shira_diffusers.engine.state import state_of
from shira_diffusers.errors import AdapterMismatchError, ResidentStateError, ShiraError, counted, listing, verb
from shira_diffusers.weights.finder import WeightMap, unwrap
from shira_diffusers.weights.scatter import gather, overwrite
from shira_diffusers.weights.targets import by_prefix, canonical_name

TRAINABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def masked_parameters(
    model: nn.Module | Mapping[str, nn.Module], masks: Mapping[str, Tensor]
) -> dict[str, nn.Parameter]:
    """Find the parameter of each mask, in the order of the masks, and check that it can be trained. Changes nothing.

    Args:
        model: a module, or ``{component: module}``.
        masks: ``{name: sorted flat indices}``, int32 or int64 ``(nnz,)`` each, as ``build_masks`` gives them.

    Raises:
        AdapterMismatchError: no masks, or masks that fit no parameter of the model.
        ResidentStateError: parameters that cannot be trained: quantized, on the meta device, held twice (fused
            projections, offloading), named by two masks, or with an adapter active in them.
    """
    if not masks:
        raise AdapterMismatchError("no masks: there is nothing to train; build some with build_masks")
    parts = by_prefix(model)
    _require_no_adapter(parts)
    finders = {prefix: _Finder(prefix, module) for prefix, module in parts.items()}
    found: dict[str, nn.Parameter] = {}
    misfits: list[str] = []
    unusable: list[str] = []
    for name, mask in masks.items():
        finder = next((finders[prefix] for prefix in finders if name.startswith(prefix)), None)
        if finder is None:
            misfits.append(f"{name}: belongs to no component of {', '.join(p.rstrip('.') for p in parts)}")
            continue
        try:
            found[name] = finder.find(name, mask)
        except AdapterMismatchError as error:
            misfits.append(str(error))
        except ResidentStateError as error:
            unusable.append(str(error))
    if misfits:
        raise AdapterMismatchError(
            f"{counted(len(misfits), 'mask', of=len(masks))} {verb(len(misfits), 'fits', 'fit')} no parameter:"
            f"{listing(misfits)}"
        )
    unusable += _tied_twice(found)
    if unusable:
        raise ResidentStateError(
            f"{counted(len(unusable), 'parameter', of=len(masks))} cannot be trained:{listing(unusable)}"
        )
    return found


class _Finder:
    """Finds the parameters of one component by full name."""

    def __init__(self, prefix: str, module: nn.Module) -> None:
        self._prefix = prefix
        self._weights = WeightMap(module)
        named = unwrap(module).named_parameters(remove_duplicate=False)
        self._parameters = {canonical_name(name): parameter for name, parameter in named}

    def find(self, name: str, mask: Tensor) -> nn.Parameter:
        own = name.removeprefix(self._prefix)
        holders = self._weights.holders(own)
        parameter = self._parameters[self._weights.own_name(own)]
        _require_trainable(name, parameter, len(holders))
        wrong = check_indices(mask, parameter.numel())
        if wrong:
            raise AdapterMismatchError(f"{name} of shape {tuple(parameter.shape)}: {wrong}")
        return parameter


def _require_no_adapter(parts: Mapping[str, nn.Module]) -> None:
    for prefix, module in parts.items():
        state = state_of(unwrap(module))
        if state is not None and state.overwritten:
            raise ResidentStateError(
                f"adapters are active in {prefix.rstrip('.') or type(module).__name__} "
                f"({', '.join(state.mix.scales)}), expected the base: call disable_shira() to train on the base, "
                "or bake_shira() to train on top of them"
            )


def _require_trainable(name: str, parameter: nn.Parameter, holders: int) -> None:
    if parameter.is_meta:
        raise ResidentStateError(f"{name} is offloaded, expected it on its device: train without offloading")
    if parameter.dtype not in TRAINABLE_DTYPES:
        raise ResidentStateError(f"{name} is {parameter.dtype}, expected float32, float16 or bfloat16; cast the model")
    if holders > 1:
        raise ResidentStateError(
            f"{name} is held in {holders} places, so its gradient may arrive elsewhere: "
            "call unfuse_qkv_projections(), or train without group offloading"
        )


def _tied_twice(found: Mapping[str, nn.Parameter]) -> list[str]:
    first: dict[int, str] = {}
    twice = [(name, first.setdefault(id(p), name)) for name, p in found.items()]
    return [f"{name} is tied to {other}: give one of the two a mask" for name, other in twice if name != other]


def let_gradients_in(module: nn.Module) -> list[Any]:
    """Make a module's floating-point inputs require gradients while it is checkpointed; return the hooks' handles.

    Reentrant checkpointing computes no gradient for a segment whose inputs need none, as behind frozen early layers.
    In text models the embeddings require gradients instead, since token ids cannot.
    """
    switches: list[Any] = [part for part in module.modules() if hasattr(part, "gradient_checkpointing")]

    def needed() -> bool:
        return torch.is_grad_enabled() and any(part.gradient_checkpointing for part in switches)

    def of_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not needed():
            return None
        return tuple(map(_requiring, args)), {name: _requiring(value) for name, value in kwargs.items()}

    def of_output(_: nn.Module, args: object, output: Tensor) -> Tensor | None:
        return _requiring(output) if needed() else None

    embeddings = _input_embeddings(module)
    hooks: list[Any] = [module.register_forward_pre_hook(of_inputs, with_kwargs=True)]
    return hooks if embeddings is None else [*hooks, embeddings.register_forward_hook(of_output)]


def _input_embeddings(module: Any) -> nn.Module | None:
    """The embeddings of a text model; None for others, some of which have the method but raise."""
    try:
        found = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def _requiring(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_(True)
    return value


class MaskedGradients:
    """The handle of ``mask_gradients``: undo it with ``remove()``, or use it as a context manager."""

    def __init__(self, model: nn.Module | Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> None:
        parameters = masked_parameters(model, masks)
        parts = by_prefix(model).values()
        # weak: parameters hold this through hooks, in cycles that the garbage collector would not see
        self._masks = WeakTensorKeyDictionary({p: masks[name].to(p.device) for name, p in parameters.items()})
        self._base = WeakTensorKeyDictionary({p: p.detach().clone() for p in parameters.values()})
        self._flags = [(weakref.ref(p), p.requires_grad) for part in parts for p in part.parameters()]
        self._hooks: list[Any] = []
        try:
            self._train(parameters.values(), parts)
        except BaseException:
            self.remove()
            raise

    def _train(self, parameters: Iterable[nn.Parameter], parts: Iterable[nn.Module]) -> None:
        for part in parts:
            for parameter in part.parameters():
                parameter.requires_grad_(parameter in self._masks)
        for parameter in parameters:
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._mask_gradient))
        for part in parts:
            self._hooks += let_gradients_in(part)
        _STEPS.watch(self)

    def remove(self) -> None:
        """Stop masking and restore ``requires_grad``; the weights keep what they learned. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for held, flag in self._flags:
            parameter = held()
            if parameter is not None:
                parameter.requires_grad_(flag)
        self._flags.clear()
        self._base.clear()
        _STEPS.forget(self)

    def __enter__(self) -> "MaskedGradients":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _mask_gradient(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            raise ShiraError("a gradient was taken away by another hook before it was masked; register that one later")
        kept = gather(gradient, self._masks[parameter])
        overwrite(gradient.zero_(), self._masks[parameter], kept)

    def keep_the_rest(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore the entries outside the masks, which weight decay and momentum change without a gradient."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                base = self._base.get(parameter)
                if base is not None:
                    mask = self._masks[parameter]
                    kept = gather(parameter, mask)
                    overwrite(parameter.detach().copy_(base), mask, kept)


class _Steps:
    """Lets all handles restore their entries after steps of any optimizer, also one that is made later.

    One hook for all, which holds none of them: a handle that is dropped must not take a hook away, since garbage may be
    collected while torch walks the hooks.
    """

    def __init__(self) -> None:
        self._handles: weakref.WeakSet[MaskedGradients] = weakref.WeakSet()
        self._hook: Any = None
        self._lock = Lock()

    def watch(self, handle: MaskedGradients) -> None:
        with self._lock:
            self._handles.add(handle)
            self._hook = self._hook or register_optimizer_step_post_hook(self._after)

    def forget(self, handle: MaskedGradients) -> None:
        with self._lock:
            self._handles.discard(handle)
            if self._hook and not self._handles:
                self._hook.remove()
                self._hook = None

    def _after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for handle in list(self._handles):
            handle.keep_the_rest(optimizer)


_STEPS = _Steps()


def mask_gradients(model: nn.Module | Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> MaskedGradients:
    """Let any trainer, unchanged, train only the masked entries of a model.

    Gradients are zeroed outside the masks as they arrive, parameters without a mask stop requiring gradients, and
    after each step of any ``torch.optim`` optimizer entries outside the masks get their bits back, whatever weight
    decay or momentum did to them. Extract the result with ``ShiraAdapter.from_difference(before, after)``.

    Args:
        model: a module, or ``{component: module}``.
        masks: ``{name: sorted flat indices}``, int32 or int64 ``(nnz,)`` each, as ``build_masks`` gives them.

    Returns:
        A handle to undo it: ``remove()``, or use it in ``with``.

    Raises:
        AdapterMismatchError, ResidentStateError: as ``masked_parameters``; nothing has changed.

    Costs one copy of the masked weights, beside the trainer's own dense gradients and optimizer state;
    ``training.SparseTuner`` needs none of them. A trainer's weight decay pulls masked entries to zero, not to the
    base: set ``weight_decay=0`` if that matters. Call it before an optimizer is made that should see only what is
    trained. Source: arXiv 2406.13175, section 3.3 and appendix D.
    """
    return MaskedGradients(model, masks)
