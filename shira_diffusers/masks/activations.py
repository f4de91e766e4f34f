"""Choose and correct the entries of a dense update by what reaches its layer: second moments of the layer's inputs.

In: layers, and a function that runs the model on calibration data. Out: a ``Chooser``. Its choice is that of Wanda
(https://arxiv.org/abs/2306.11695) applied to an update: ``abs(dW_ij) * sqrt(E[x_j^2])``; its values are the least
squares fit of the kept entries to what the whole update does to the layer's output, row by row.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shira_diffusers.errors import AdapterMismatchError, listing
from shira_diffusers.masks.sparsify import Chooser

RIDGE = 0.01
"""In means of the inputs' squares: keeps corrected values near the update where inputs hardly tell them apart."""
_ROOM = 2 * 2**30  # bytes of second moments at a time; the calibration runs again for the layers beyond
_BATCH = 2**26  # numbers in one batch of linear systems


class ActivationChooser(Chooser):
    """Score entries by update and input, and correct the kept values.

    The inputs are those of the model as it is while ``calibration`` runs, which may be offloaded.

    Args:
        layers: of all updates, by the name of the weight; Linear and Conv2d layers. Updates of others, and of grouped
            convolutions, are kept as they are.
        calibration: runs the model, the same way each time; called once per 2 GiB of second moments.
        ridge: of the correction, in means of ``E[x_j^2]``.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], calibration: Callable[[], object], ridge: float = RIDGE
    ) -> None:
        self._layers = {name: layer for name, layer in layers.items() if _inputs_of(layer)}
        self._calibration, self._ridge = calibration, ridge
        self._moments: dict[str, Tensor] = {}
        self._roots: dict[str, Tensor] = {}  # of all layers, once known: passes that only score run nothing again
        self._whole = self._left = 0.0

    @property
    def effect_kept(self) -> float:
        """The share of the update's effect on calibrated outputs (their mean square) that kept values reproduce."""
        return 1.0 - self._left / self._whole if self._whole else 0.0

    def score(self, name: str, update: Tensor) -> Tensor:
        """``abs(dW_ij) * sqrt(E[x_j^2])``, float32, of an update ``(out, ...)``."""
        if name not in self._layers:
            return super().score(name, update)
        if name not in self._roots:
            self._roots[name] = self._moment(name).diagonal().sqrt()
        return (update.abs().flatten(1) * self._roots[name].to(update.device)).view_as(update)

    def values(self, name: str, update: Tensor, indices: Tensor) -> Tensor:
        """The fitted values, float32 ``(nnz,)``, of an update ``(out, ...)`` at its sorted flat indices ``(nnz,)``."""
        if name not in self._layers:
            return super().values(name, update, indices)
        moment, rows = self._moment(name).to(update.device), update.flatten(1)
        kept = fit_rows(rows, moment, indices, self._ridge)
        rest = rows.flatten().index_add(0, indices, -kept).view_as(rows)
        self._whole += float((rows @ moment * rows).sum())
        self._left += float((rest @ moment * rest).sum())
        return kept

    def _moment(self, name: str) -> Tensor:
        """``E[x x^T]`` of a layer's inputs, float32 ``(in, in)``; for the layers that come next, too."""
        if name not in self._moments:
            names = list(self._layers)
            chosen = list(_within(names[names.index(name) :], self._layers))
            self._moments.clear()
            self._moments = input_moments({each: self._layers[each] for each in chosen}, self._calibration)
        return self._moments[name]


def _within(names: list[str], layers: Mapping[str, nn.Module]) -> Iterator[str]:
    room = _ROOM
    for number, name in enumerate(names):
        room -= 4 * _inputs_of(layers[name]) ** 2
        if room < 0 and number:
            return
        yield name


def _inputs_of(layer: nn.Module) -> int:
    """How many inputs each output of a layer has; 0 for a layer of another kind."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return layer.weight[0].numel() if isinstance(layer, nn.Conv2d) and layer.groups == 1 else 0


@torch.no_grad()
def input_moments(layers: Mapping[str, nn.Module], calibration: Callable[[], object]) -> dict[str, Tensor]:
    """Mean outer products of layers' inputs, ``E[x x^T]``; a convolution's inputs are its patches.

    Args:
        layers: Linear, or Conv2d without groups, by name.
        calibration: runs the model.

    Returns:
        Float32 ``(in, in)`` by name, ``(in * kh * kw,) * 2`` for a convolution, on the device of the inputs.

    Raises:
        AdapterMismatchError: layers that the calibration did not reach.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def watch(name: str, layer: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs = _rows(layer, given[0].detach().float())  # (n, in)
            product = inputs.T @ inputs
            sums[name] = sums[name].add_(product) if name in sums else product
            counts[name] += len(inputs)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name, layer)) for name, layer in layers.items()]
    try:
        calibration()
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in layers if name not in sums]:
        raise AdapterMismatchError(
            f"calibration must run every layer of the update; run the whole pipeline, uncompiled:{listing(missing)}"
        )
    return {name: total / counts[name] for name, total in sums.items()}


def _rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What each output sees: ``(..., in) -> (n, in)``, or ``(b, in, h, w) -> (n, in * kh * kw)``."""
    if not isinstance(layer, nn.Conv2d):
        return inputs.reshape(-1, inputs.shape[-1])
    padding = 0 if isinstance(layer.padding, str) else layer.padding
    if isinstance(layer.padding, str):  # "same" or "valid"
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice)
    patches = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)  # (b, in * kh * kw, n)
    return patches.transpose(1, 2).flatten(0, 1)


def fit_rows(update: Tensor, moment: Tensor, indices: Tensor, ridge: float = RIDGE) -> Tensor:
    """The values at some entries of an update that come nearest to what all of it does, row by row.

    Minimizes ``E[(u x - v x)^2] + r * |v - u|^2`` over the kept entries ``v`` of each row, where ``u`` is the row of
    the update and ``r`` is ``ridge`` times the mean of ``E[x_j^2]``.

    Args:
        update: float32 ``(out, in)``.
        moment: ``E[x x^T]``, float32 ``(in, in)``.
        indices: sorted flat indices of the kept entries, int64 ``(nnz,)``.

    Returns:
        Float32 ``(nnz,)``.
    """
    width = update.shape[1]
    rows, columns = indices // width, indices % width
    strength = ridge * float(moment.diagonal().mean()) or 1.0  # inputs that are all zero ask for nothing
    wanted = (update @ moment + strength * update).flatten()[indices]
    values = torch.empty_like(wanted)
    counts = torch.bincount(rows, minlength=len(update))
    for count in counts.unique().tolist():
        if count == 0:
            continue
        places = (counts[rows] == count).nonzero().view(-1, count)  # (rows of that count, count)
        for part in places.split(max(1, _BATCH // count**2)):
            at = columns[part]
            system = moment[at[:, :, None], at[:, None, :]]  # (rows, count, count)
            system.diagonal(dim1=1, dim2=2).add_(strength)
            values[part] = torch.linalg.solve(system, wanted[part])
    return values
