"""Gradients over a calibration set, for the grad, grad_mean and snip masks (arXiv 2406.13175, section 3.1)."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from shira_diffusers.errors import AdapterMismatchError, listing
from shira_diffusers.weights.targets import by_prefix, canonical_name

Calibration = Mapping[str, Tensor] | Iterable[Tensor | Callable[[], Tensor]]


def gradient_magnitudes(
    model: nn.Module | Mapping[str, nn.Module],
    weights: Mapping[str, Tensor],
    calibration: Calibration,
    *,
    signed: bool = False,
) -> dict[str, Tensor]:
    """Sum ``abs(gradient)`` of each weight over the calibration set, or take ``abs`` of its sum.

    Args:
        model: the module, or ``{component: module}``, that the losses come from.
        weights: the target weights ``(out, ...)`` by name, as ``targets.select`` gives them.
        calibration: scalar losses, or functions that return one (each is back-propagated in turn, with one dense
            gradient alive at a time beside the sums), or a mapping of names to gradients.
        signed: sum gradients with their signs and take the magnitude at the end, so that batches that disagree cancel.

    Returns:
        ``{name: float32, weight's shape}``. ``requires_grad`` and ``.grad`` of all parameters are as before.

    Raises:
        AdapterMismatchError: weights that no loss reached, or gradients of other names or shapes.
    """
    if isinstance(calibration, Mapping):
        sums = {name: gradient.detach().float().abs() for name, gradient in calibration.items()}
    else:
        parameters = _parameters(model)
        targets = {name: parameters[name] for name in weights}
        sums = _accumulate(targets, parameters.values(), calibration, signed=signed)
    wrong = [f"{name}: no gradient" for name in weights if name not in sums]
    wrong += [
        f"{name}: gradient of shape {tuple(sums[name].shape)}, expected {tuple(weight.shape)}"
        for name, weight in weights.items()
        if name in sums and sums[name].shape != weight.shape
    ]
    wrong += [f"{name}: gradient is not finite" for name, total in sums.items() if not torch.isfinite(total).all()]
    if wrong:
        raise AdapterMismatchError(f"calibration must reach every target with a finite gradient:{listing(wrong)}")
    return sums


def _parameters(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    parts = by_prefix(model).items()
    return {prefix + canonical_name(name): p for prefix, part in parts for name, p in part.named_parameters()}


def _accumulate(
    targets: Mapping[str, nn.Parameter],
    everything: Iterable[nn.Parameter],
    losses: Iterable[Tensor | Callable[[], Tensor]],
    *,
    signed: bool,
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in everything]
    hooks = []

    def collect(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None  # the hook runs right after it was accumulated
            own = gradient.detach().float()  # no copy if it is float32: nothing else holds it
            own = own if signed else own.abs_()
            sums[name] = sums[name].add_(own) if name in sums else own

        return hook

    try:
        for parameter, _, _ in kept:
            parameter.grad = None
            parameter.requires_grad_(False)
        for name, parameter in targets.items():
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(collect(name)))
        for loss in losses:
            (loss() if callable(loss) and not isinstance(loss, Tensor) else loss).backward()
    finally:
        for handle in hooks:
            handle.remove()
        for parameter, required, gradient in kept:
            parameter.requires_grad_(required)
            parameter.grad = gradient
    return {name: total.abs_() for name, total in sums.items()} if signed else sums
