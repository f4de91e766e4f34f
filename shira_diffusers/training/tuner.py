"""SparseTuner: train sparse deltas, so that only masked entries cost gradients and optimizer state.

Source: arXiv 2406.13175, section 3.3 and appendix D.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.base_probes import probe_base
from shira_diffusers.adapters.delta import SparseDelta, index_dtype
from shira_diffusers.errors import AdapterFormatError, AdapterMismatchError, ResidentStateError, counted, listing, verb
from shira_diffusers.training.dora import Dora, Identity
from shira_diffusers.training.gradient_buffer import GradientBuffer
from shira_diffusers.training.gradient_taps import Columns, Tap, find_columns, narrows, tappable
from shira_diffusers.training.masked_entries import MaskedEntries
from shira_diffusers.training.masking import let_gradients_in, masked_parameters
from shira_diffusers.training.recompute import ActivationRecompute
from shira_diffusers.weights.targets import by_prefix


class _Adapted(NamedTuple):
    """One adapted weight: its entries are ``start`` to ``end`` of the flat tensors; ``indices`` are those, a view."""

    parameter: nn.Parameter
    indices: Tensor
    start: int
    end: int


class SparseTuner:
    """Trainable sparse deltas on the resident weights of a model.

    One flat float32 parameter, ``deltas``, holds all deltas, zero at the start. Give it, alone, to any optimizer;
    call ``apply`` after each of its steps. The weights hold ``round(base + delta)`` in their own dtype. Backward
    computes the dense gradient of one weight at a time, which is gathered at the mask and freed; for whole columns and
    a diagonal (``struct``) of a Linear there is none at all. Weight decay pulls deltas to zero, so weights to the base.

    Gradient accumulation, clipping, GradScaler, autocast and both kinds of gradient checkpointing work; all
    parameters without a mask are frozen. Leaving the ``with`` block (or ``restore``) gives every weight its bits
    back and every parameter its ``requires_grad``.

    Args:
        modules: a module, or ``{component: module}``; then names begin with the component.
        masks: ``{name: sorted flat indices}``, int32 or int64 ``(nnz,)`` each, as ``build_masks`` gives them.
        recompute: keep no inputs of adapted Linears that can be recomputed, bit for bit, from what autograd keeps
            anyway (layer norms, gated activations): less activation memory without gradient checkpointing, a little
            more time. Always done for ``struct`` masks and for Linears with four inputs per output.
        dora: train a direction per masked entry and a magnitude per row, see ``training.dora.Dora``; ``deltas`` is
            longer then. The result is an ordinary adapter.

    Raises:
        AdapterMismatchError: masks that fit no parameter; all are named.
        ResidentStateError: weights that cannot be trained (quantized, on the meta device, offloaded, fused, of
            another dtype than float32, float16 or bfloat16, on several devices, with an adapter active, or without
            rows for ``dora``).

    On error nothing has changed.
    """

    def __init__(
        self,
        modules: nn.Module | Mapping[str, nn.Module],
        masks: Mapping[str, Tensor],
        *,
        recompute: bool = False,
        dora: bool = False,
    ) -> None:
        parameters = masked_parameters(modules, masks)
        if dora:
            _require_rows(parameters)
        device = _only_device(parameters)
        parts = by_prefix(modules).values()
        sizes = [masks[name].numel() for name in parameters]
        self._indices = torch.cat([masks[name].to(device, index_dtype(p.numel())) for name, p in parameters.items()])
        bounds = pairwise(accumulate(sizes, initial=0))
        self._adapted = {
            name: _Adapted(p, self._indices[start:end], start, end)
            for (name, p), (start, end) in zip(parameters.items(), bounds, strict=True)
        }
        self._entries = MaskedEntries(list(parameters.values()), sizes, self._indices)
        self._base = self._entries.read()  # float32: a later cast of the model rounds it as the weights themselves
        self._probes = probe_base(self._sparse(torch.zeros_like(self._base), torch.float32), parameters)
        self._flags = [(p, p.requires_grad) for part in parts for p in part.parameters()]
        self._change = self._dora() if dora else Identity()
        self.deltas = nn.Parameter(torch.zeros(self._base.numel() + self._change.count, device=device))
        self._hooks: list[Any] = []
        try:
            self._train(parts, recompute)
        except BaseException:
            self._let_go()
            raise

    @property
    def masks(self) -> dict[str, Tensor]:
        """The trained entries by name: int32 (int64 for weights of 2^31 entries or more), on the weights' device."""
        return {name: adapted.indices for name, adapted in self._adapted.items()}

    @property
    def trained(self) -> dict[str, Tensor]:
        """The trained values of each weight, float32 views of ``deltas``, in order; with DoRA, magnitudes come last."""
        values = self.deltas.detach()
        parts = {name: values[a.start : a.end] for name, a in self._adapted.items()}
        if self._change.count:
            rows = [a.parameter.shape[0] for a in self._adapted.values()]
            magnitudes = values[self._base.numel() :].split(rows)
            parts |= {f"{name}.magnitude": part for name, part in zip(self._adapted, magnitudes, strict=True)}
        return parts

    @torch.no_grad()
    def apply(self) -> None:
        """Write ``round(base + delta)`` into the weights, in place, at the masked entries only.

        Raises:
            ResidentStateError: after ``restore``.
        """
        self._require_training()
        self._entries.write(self._base + self._change.deltas(self.deltas))

    def _require_training(self) -> None:
        if not self._hooks:
            raise ResidentStateError("this tuner was restored: its model holds the base again; make a new tuner")

    def restore(self) -> None:
        """Give the weights the base's bits and all parameters their ``requires_grad``. Idempotent."""
        if self._hooks:
            self._entries.write(self._base)
            self._let_go()

    def _let_go(self) -> None:
        """Remove all hooks and give all parameters their ``requires_grad``."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def __enter__(self) -> "SparseTuner":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def adapter(
        self,
        metadata: Mapping[str, str] | None = None,
        dtype: torch.dtype = torch.float16,
        *,
        deltas: Tensor | None = None,
    ) -> ShiraAdapter:
        """Make an adapter of the deltas as they are now, on the CPU, rounded to ``dtype``; also after ``restore``.

        Args:
            deltas: in place of ``self.deltas``, float32 of their shape ``(nnz,)``: their mean over steps, say.

        Raises:
            AdapterFormatError: a delta that is not finite in ``dtype``.
        """
        return ShiraAdapter(
            self._sparse(self._change.deltas(self.deltas.detach() if deltas is None else deltas), dtype),
            metadata or {},
            self._probes,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: ``deltas``, float32, and the ``masks``, on the CPU."""
        masks = {name: indices.cpu() for name, indices in self.masks.items()}
        return {"deltas": self.deltas.detach().cpu().clone(), "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the deltas of a checkpoint and write them into the weights.

        Raises:
            AdapterMismatchError: the checkpoint has other masks, or in another order, or another ``dora``.
            ResidentStateError: after ``restore``.

        On error nothing has changed.
        """
        self._require_training()
        wrong = _differences(self.masks, state["masks"])
        if wrong:
            raise AdapterMismatchError(
                "the checkpoint was made with other masks than this tuner's; make the tuner with the checkpoint's "
                f"masks (state['masks']):{listing(wrong)}"
            )
        if state["deltas"].shape != self.deltas.shape:
            raise AdapterMismatchError(
                f"the checkpoint holds {counted(state['deltas'].numel(), 'trained value')}, expected "
                f"{self.deltas.numel():,}: one of the two has DoRA's magnitudes, the other has not; train with dora as "
                "the checkpoint was"
            )
        with torch.no_grad():
            self.deltas.copy_(state["deltas"])
        self.apply()

    def _train(self, parts: Iterable[nn.Module], recompute: bool) -> None:
        """Freeze all parameters, and direct gradients into the flat one."""
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        layers = tappable(parts)
        adapted = [(layers.get(id(a.parameter)), a) for a in self._adapted.values()]
        columns = [find_columns(a.indices, a.parameter.shape) if layer else None for layer, a in adapted]
        buffer = self._make_buffer(columns)
        inputs = ActivationRecompute()
        for number, ((layer, (parameter, indices, _, _)), own) in enumerate(zip(adapted, columns, strict=True)):
            if layer and (own or recompute or narrows(layer)):
                tap = Tap(buffer, inputs, number, indices, own)
                self._hooks.append(layer.register_forward_hook(tap.hook, with_kwargs=True))
            else:
                parameter.requires_grad_(True)
                collect = partial(_collect, buffer, number, indices)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(collect))
        for part in parts:
            if recompute or any(columns):
                self._hooks += inputs.watch(part)
            self._hooks += let_gradients_in(part)

    def _make_buffer(self, columns: Iterable[Columns | None]) -> GradientBuffer:
        """Make slots for all weights: of the masked entries, or of columns' and diagonals' products."""
        pairs = list(zip(self._adapted.values(), columns, strict=True))
        sizes = [own.size if own else a.indices.numel() for a, own in pairs]
        order = None
        if any(own for _, own in pairs):
            device, dtype = self._indices.device, index_dtype(sum(sizes))
            places = [own.order if own else torch.arange(a.indices.numel(), device=device) for a, own in pairs]
            starts = accumulate(sizes, initial=0)
            order = torch.cat([(own + start).to(dtype) for own, start in zip(places, starts, strict=False)])
        return GradientBuffer(sizes, order, self._indices.device, _Receiver(self))

    def _dora(self) -> Dora:
        adapted = self._adapted.values()
        return Dora(self._base, [a.parameter for a in adapted], [a.indices for a in adapted])

    def _receive(self, gradient: Tensor) -> None:
        """Accumulate the entries' gradient of one backward, float32 ``(nnz,)``."""
        gradient = self._change.gradient(self.deltas.detach(), gradient)
        if self.deltas.grad is None:
            self.deltas.grad = gradient
        else:
            self.deltas.grad += gradient

    def _sparse(self, values: Tensor, dtype: torch.dtype) -> dict[str, SparseDelta]:
        host = values.to(dtype).cpu()
        if not bool(torch.isfinite(host).all()):
            count = int((~torch.isfinite(host)).sum())
            raise AdapterFormatError(
                f"{counted(count, 'delta', of=host.numel())} {verb(count, 'is', 'are')} NaN or infinite in {dtype}: "
                "training diverged; lower the learning rate"
            )
        return {
            name: SparseDelta(a.indices.cpu(), host[a.start : a.end].clone(), tuple(a.parameter.shape))
            for name, a in self._adapted.items()
        }


class _Receiver:
    """Gives the entries' gradient, float32 ``(nnz,)``, to a tuner, unless that was dropped.

    Parameters hold it through hooks, in cycles that the garbage collector would not see: so it holds the tuner weakly.
    """

    def __init__(self, tuner: SparseTuner) -> None:
        self._tuner = weakref.ref(tuner)

    def __call__(self, gradient: Tensor) -> None:
        tuner = self._tuner()
        if tuner is not None:
            tuner._receive(gradient)

    def __deepcopy__(self, memo: object) -> Callable[[Tensor], None]:
        return _drop  # a copy of the model trains nothing


def _drop(gradient: Tensor) -> None:
    """Take what belongs to no tuner."""


def _collect(buffer: GradientBuffer, number: int, indices: Tensor, weight: Tensor) -> None:
    """Take the dense gradient of a weight at once, so that it is freed before the next one is computed."""
    dense, weight.grad = weight.grad, None
    if dense is not None:
        buffer.take(number, dense, indices)


def _differences(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> list[str]:
    """What a checkpoint's masks differ in; their order counts, as deltas and an optimizer's state follow it."""
    wrong = [f"{name}: only in the {'tuner' if name in own else 'checkpoint'}" for name in own.keys() ^ saved.keys()]
    wrong += [n for n in own.keys() & saved.keys() if not torch.equal(own[n].cpu().long(), saved[n].cpu().long())]
    return sorted(wrong) or [
        f"{theirs}: number {number} in the checkpoint, expected {name}: the order differs"
        for number, (name, theirs) in enumerate(zip(own, saved, strict=True), 1)
        if name != theirs
    ]


def _require_rows(parameters: Mapping[str, nn.Parameter]) -> None:
    wrong = [
        f"{name} of shape {tuple(p.shape)}: expected rows, which have a magnitude each"
        for name, p in parameters.items()
        if not any(p.shape[:1])
    ]
    if wrong:
        raise ResidentStateError(
            f"{counted(len(wrong), 'parameter', of=len(parameters))} cannot be trained with dora; leave out their "
            f"masks, or train without dora:{listing(wrong)}"
        )


def _only_device(parameters: Mapping[str, nn.Parameter]) -> torch.device:
    devices = {parameter.device for parameter in parameters.values()}
    if len(devices) > 1:
        raise ResidentStateError(
            f"adapted weights are on {len(devices)} devices ({', '.join(sorted(map(str, devices)))}), expected one; "
            "move the model to one device before the tuner is made"
        )
    return devices.pop()
