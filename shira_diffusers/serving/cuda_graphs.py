"""CapturedForward: the forward of a denoiser as CUDA graphs, which a GPU runs without waiting for Python.

Switching overwrites entries and moves no weight, so that a graph computes with whatever mix is active.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # torch.cuda.make_graphed_callables flattens arguments by it, too

from shira_diffusers.engine.bookkeeping import Guard
from shira_diffusers.errors import ShiraError
from shira_diffusers.integrations.denoiser import denoiser_of
from shira_diffusers.weights.finder import WeightMap

logger = logging.getLogger(__name__)

_KINDS = 16  # of calls that are remembered: sizes times batches
_VALUES = (bool, int, float, str, torch.dtype, type(None))
Kind = tuple[Any, ...]
_capturing = Guard()  # an end that comes amid a capture would become a part of the graph, and write no weights


class CapturedForward:
    """A denoiser's forward, which is captured once for each kind of call and replayed from then on: the same kernels.

    Calls are of one kind if their tensors have the same shapes, strides, dtypes and devices, and all else is equal. The
    first of a kind runs as ever, so that one that comes once costs nothing; the second is captured. On a CPU, where
    gradients are computed, and with arguments that are neither tensors nor plain values, all run as ever; so do those
    of new kinds once a capture has failed, which a log tells.

    All calls are one thread's. Weights may be overwritten at any time, and move between two ``applied``; a graph does
    not see what replaces the code of layers after its capture: hooks, attention processors, LoRAs.

    Args:
        pipe: a pipeline with a ``unet`` or a ``transformer``.

    Raises:
        ShiraError: it has neither, or one that is compiled, offloaded or quantized.
    """

    def __init__(self, pipe: Any) -> None:
        found = denoiser_of(pipe)
        if found is None:
            raise ShiraError(f"CUDA graphs: expected a pipeline with a unet or transformer, got {type(pipe).__name__}")
        self._pipe, (self._name, model) = pipe, found
        self._forward: Callable[..., Any] = model.forward
        self._seen: list[tuple[Kind, _Graph | None]] = []  # None before the second call; those of latest use last
        self._pool: Any = None  # of all graphs, as one runs at a time and what it returns is copied
        self._placed: list[int] = []
        self._fails = False
        _require_resident(self._name, model)

    @property
    def graphs(self) -> int:
        """How many kinds of calls are captured."""
        return sum(graph is not None for _, graph in self._seen)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Be the denoiser's forward.

        Raises:
            ShiraError: it is not as it has to be any more.
        """
        model = getattr(self._pipe, self._name)
        _require_resident(self._name, model)
        placed = [weight.data_ptr() for weight in chain(model.parameters(), model.buffers())]
        if placed != self._placed:
            self._seen, self._placed = [], placed
        self._forward = model.forward
        model.forward = self
        try:
            yield
        finally:
            del model.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        if torch.is_grad_enabled() or not all(map(_can_be_replayed, leaves)):
            return self._forward(*args, **kwargs)
        kind = (structure, *map(_kind_of, leaves))
        known = next((entry for entry in self._seen if entry[0] == kind), None)
        graph = None if known is None else known[1] or self._captured(leaves, structure)
        self._seen = [*(entry for entry in self._seen if entry is not known), (kind, graph)][-_KINDS:]
        return graph.replay(leaves) if graph else self._forward(*args, **kwargs)

    def _captured(self, leaves: list[Any], structure: Any) -> "_Graph | None":
        if self._fails:
            return None
        if not self.graphs:  # those that used the one before have given it up
            self._pool = torch.cuda.graph_pool_handle()
        try:
            return _Graph(self._forward, leaves, structure, self._pool)
        except RuntimeError as error:  # it waits for the GPU, or memory is short
            self._fails = True
            logger.warning(
                "%s cannot be captured as a CUDA graph, and is called as ever; start again without CUDA graphs, since "
                "torch may keep memory after that: %s", self._name, error
            )  # fmt: skip
            return None


class _Graph:
    """One call, captured. Its arguments are copied in, its outputs out.

    Raises:
        RuntimeError: it cannot be captured.
    """

    def __init__(self, forward: Any, leaves: list[Any], structure: Any, pool: Any) -> None:
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(own, structure)
        self._given = [leaf for leaf in own if isinstance(leaf, Tensor)]
        self._graph = torch.cuda.CUDAGraph()
        device = self._given[0].device
        here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        with _capturing, torch.cuda.stream(here):  # a capture that fails does not return to it
            side.wait_stream(here)
            with torch.cuda.stream(side):
                forward(*args, **kwargs)  # libraries allocate what they need for a stream at its first call
            # other threads may allocate meanwhile: they read adapters
            with torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self._outputs = forward(*args, **kwargs)

    def replay(self, leaves: list[Any]) -> Any:
        tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
        for own, given in zip(self._given, tensors, strict=True):
            own.copy_(given)
        self._graph.replay()
        return pytree.tree_map_only(Tensor, Tensor.clone, self._outputs)


def _can_be_replayed(leaf: Any) -> bool:
    """Whether an argument is a tensor of a GPU, or a value that is the same whenever it is equal."""
    return leaf.is_cuda if isinstance(leaf, Tensor) else isinstance(leaf, _VALUES)


def _kind_of(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _require_resident(name: str, model: nn.Module) -> None:
    """Require plain weights that stay where they are, and a forward of the model's own."""
    if WeightMap(model).is_compiled:
        raise ShiraError(f"CUDA graphs: {name} is compiled, which can have graphs of its own; leave one of the two out")
    if "forward" in vars(model) or any(_has_hooks(vars(layer)) for layer in model.modules()):
        raise ShiraError(
            f"CUDA graphs: {name} is offloaded, or has other hooks that replace its forward; expected weights that "
            "stay on the GPU"
        )
    if any(type(weight) is not nn.Parameter or not weight.is_floating_point() for weight in model.parameters()):
        raise ShiraError(f"CUDA graphs: {name} is quantized; expected weights that adapters can overwrite")


def _has_hooks(layer: dict[str, Any]) -> bool:
    """Whether a layer has accelerate's or diffusers' hooks: of offloading, layerwise casting, caches."""
    return "_hf_hook" in layer or bool(getattr(layer.get("_diffusers_hook"), "hooks", None))
