"""Switch all CUDA weights in one launch, over a table of the addresses of all tensors of all components.

In: steps. Out: weights overwritten in place, or as they were. Triton comes with the CUDA builds of torch; ``available``
says whether it is there, and ``sweeps_of`` chooses. Training reads and writes its entries here too (``access``).
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shira_diffusers.weights import sweep_cpu
from shira_diffusers.weights.finder import WeightMap
from shira_diffusers.weights.scatter import bits_dtype, bits_of, overwrite, storage_indices
from shira_diffusers.weights.steps import EntryPlan, SavedEntries, SwitchStep
from shira_diffusers.weights.sweep_cpu import Access, TorchSweep
from shira_diffusers.weights.tiles import BLOCK_SIZE

logger = logging.getLogger(__name__)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_SCATTERED = {"BLOCK": 256, "num_warps": 8}  # measured on an H200: entries on their own, and in runs
_IN_RUNS = {"BLOCK": 512, "num_warps": 4}
_ENTRIES = 160  # entries per tile: what one program of the kernel moves (measured on an H200)
_SHIFT = BLOCK_SIZE.bit_length() - 1
_MOVED = 1024  # entries that one program of the kernel ``move`` copies


@cache
def available() -> bool:
    """Whether Triton can be imported and there is a CUDA device for it."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``TritonSweep`` can write weights of a dtype on a device; logs a warning once if Triton fails there."""
    return device.type == "cuda" and dtype in FLOATS and available() and _works(device, dtype)


def engine_for(device: torch.device, dtype: torch.dtype) -> str:
    """Which engine switches weights: ``triton`` (one launch) or ``torch`` (by tiles on a CPU, else by weight)."""
    return "triton" if usable(device, dtype) else "torch"


def sweeps_of(steps: Sequence[SwitchStep]) -> "list[TorchSweep | TritonSweep]":
    """What carries out steps over different weights: one launch for those that ``TritonSweep`` can write."""
    launched = [step for step in steps if _usable_for(step)]
    others = [step for step in steps if not _usable_for(step)] if len(launched) < len(steps) else []
    sweeps: list[TorchSweep | TritonSweep] = [TorchSweep(others)] if others else []
    return [*sweeps, TritonSweep(launched)] if launched else sweeps


def _usable_for(step: SwitchStep) -> bool:
    first = step.first
    return usable(first.device, first.dtype) and all([plan.indices.dtype == torch.int32 for plan in step.plans])


class TritonSweep:
    """Carries out steps in one launch per device, dtype of weights and dtype of deltas; nearly always one in all.

    Attributes:
        finite: as of ``TorchSweep``.
    """

    def __init__(self, steps: Sequence[SwitchStep]) -> None:
        self._groups: dict[tuple[Any, ...], list[SwitchStep]] = {}
        deltas = {_kind(step): step.delta.dtype for step in steps if step.delta is not None}
        for step in steps:
            any_delta = deltas.get(_kind(step), torch.float32)  # where nothing arrives
            delta = any_delta if step.delta is None else step.delta.dtype
            self._groups.setdefault((*_kind(step), delta), []).append(step)
        outgoing = [(id(step), step.outgoing) for step in steps if step.outgoing is not None]
        self._seen = {key: torch.empty_like(saved.written) for key, saved in outgoing}
        self._begun: list[SwitchStep] = []
        self.finite = True

    def run(self, confirm: Callable[[], bool] = lambda: True) -> bool:
        """As ``TorchSweep.run``. Waits for the device, to read whether what left was unmodified and all is finite."""
        found = [self._launch(steps, *key) for key, steps in self._groups.items()]
        if not confirm():
            return False
        flags = [one.tolist() for one in found]
        self.finite = not any(infinite for _, infinite in flags)
        return not any(differs for differs, _ in flags)

    def _launch(
        self, steps: Sequence[SwitchStep], device: torch.device, dtype: torch.dtype, delta: torch.dtype
    ) -> Tensor:
        import triton.language as tl  # there only where CUDA is

        from shira_diffusers.weights.triton_kernels import sweep as kernel

        rows, parts, counts = _table(steps, [self._seen.get(id(step)) for step in steps])
        tables = torch.from_numpy(np.concatenate([rows.ravel(), parts.ravel(), np.zeros(2, np.int64)]))
        tables = tables.to(device, non_blocking=True)  # CUDA has copied what is not pinned once the call returns
        weights, sides, found = tables.split([rows.size, parts.size, 2])
        owners = _owners(counts, device)
        how = _IN_RUNS if all([_in_runs(plan, step) for step in steps for plan in step.plans]) else _SCATTERED
        self._begun += steps
        with torch.cuda.device(device):
            kernel[(len(owners),)](
                owners,
                weights,
                sides,
                found,
                BITS=_triton(tl, bits_dtype(dtype)),
                FLOAT=_triton(tl, dtype),
                DELTA=_triton(tl, delta),
                enable_fp_fusion=False,  # the same bits as on a CPU
                **how,
            )
        return found

    @torch.inference_mode()
    def undo(self) -> None:
        """As ``TorchSweep.undo``; weight by weight, since it is hardly ever due."""
        while self._begun:
            step = self._begun.pop()
            if step.incoming is not None and not step.stays:
                _put_back(step, step.incoming.plan, step.incoming.base)
            if step.outgoing is not None:
                _put_back(step, step.outgoing.plan, self._seen[id(step)])


def _put_back(step: SwitchStep, plan: EntryPlan, values: Tensor) -> None:
    parts = zip(plan.names, plan.indices.split(plan.sizes), values.split(plan.sizes), strict=True)
    for name, indices, own in parts:
        overwrite(step.live[name], indices, own)


def _kind(step: SwitchStep) -> tuple[torch.device, torch.dtype]:
    first = step.first
    return first.device, first.dtype


def _in_runs(plan: EntryPlan, step: SwitchStep) -> bool:
    return plan.at(step.live, step.weights.version)[1] == BLOCK_SIZE


def _triton(tl: Any, dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _table(
    steps: Sequence[SwitchStep], seen: Sequence[Tensor | None]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], tuple[int, ...]]:
    """The tables ``weights`` and ``steps`` of the kernel, and how many tiles each weight has."""
    rows: list[np.ndarray[Any, Any]] = []
    parts: list[list[int]] = []
    counts: list[int] = []
    first = 0
    for number, (step, own_seen) in enumerate(zip(steps, seen, strict=True)):
        grid, tile = step.grid(_ENTRIES)
        rows.append(_rows(step, number, grid))
        tiles = sum(grid.values())
        none = _none(tiles, step.first.device).data_ptr()
        left = _addresses(step, step.outgoing, none, own_seen, grid, tile)
        came = _addresses(step, step.incoming, none, step.delta, grid, tile)
        parts.append([first, *left, *came, int(step.stays)])
        first += tiles
        counts += grid.values()
    return np.concatenate(rows), np.asarray(parts, np.int64), tuple(counts)


def _rows(step: SwitchStep, number: int, grid: Mapping[str, int]) -> np.ndarray[Any, Any]:
    """The table ``weights`` of one step, int64 ``(weights, 3)``."""

    def make() -> np.ndarray[Any, Any]:
        rows = np.empty((len(grid), 3), np.int64)
        rows[:, 0], rows[:, 1] = [step.live[name].data_ptr() for name in grid], number
        rows[:, 2] = np.asarray(step.scale(grid), np.float32).view(np.int32)
        return rows

    if not isinstance(step.scales, float):
        return make()
    version = (step.weights.version, number, step.scales, step.plans[0].names)
    return step.plans[-1].once("rows", make, version)


def _addresses(
    step: SwitchStep, saved: SavedEntries | None, none: int, last: Tensor | None, grid: Mapping[str, int], tile: int
) -> list[int]:
    if saved is None or last is None:
        return [none, 0, 0, 0, 0, 0]
    at, unit = saved.plan.at(step.live, step.weights.version)
    tensors = (saved.plan.starts(grid, tile), at, saved.base, saved.written, last)
    return [*[tensor.data_ptr() for tensor in tensors], 0 if unit == 1 else _SHIFT]


@lru_cache(maxsize=8)
def _owners(tiles: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 ``(sum of tiles,)``: the weight of each tile."""
    counts = torch.tensor(tiles, device="cpu")
    return torch.arange(len(tiles), dtype=torch.int32, device="cpu").repeat_interleave(counts).to(device)


@lru_cache(maxsize=8)
def _none(tiles: int, device: torch.device) -> Tensor:
    """The starts of a side that is not there."""
    return torch.zeros(tiles + 1, dtype=torch.int32, device=device)


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Try a small switch once: Triton compiles at run time, and needs a C compiler for it."""
    results = []
    for sweep in (TorchSweep, TritonSweep):
        weight = torch.arange(64, device=device).to(dtype)
        indices = torch.tensor([1, 40], dtype=torch.int32, device=device)
        plan = EntryPlan(("weight",), (64,), (0, 2), indices)
        saved = SavedEntries(plan, *torch.zeros(2, 2, dtype=dtype, device=device))
        delta = torch.ones(2, dtype=torch.float16, device=device)
        try:
            sweep([SwitchStep(WeightMap(nn.Module()), {"weight": weight}, None, saved, delta, 0.5)]).run()
        except torch.OutOfMemoryError:
            raise  # says nothing about Triton
        except Exception as error:  # noqa: BLE001  whatever Triton, its compiler or the driver says
            logger.warning("switching on %s goes weight by weight, many times slower: Triton fails (%s)", device, error)
            return False
        results.append(weight)
    if not torch.equal(*results):
        logger.warning("switching on %s goes weight by weight, many times slower: Triton gives other values", device)
        return False
    logger.info("%s weights on %s are switched by one Triton launch", dtype, device)
    return True


# ---------------------------------------------------------------- for training


def access(weights: Sequence[Tensor], sizes: Sequence[int], indices: Tensor) -> Access:
    """As ``sweep_cpu.access``, with one launch per read or write for weights of one dtype on one CUDA device.

    Args:
        weights: of any shape; kept alive.
        sizes: how many entries each has.
        indices: int32 or int64 ``(n,)`` on the weights' device, row-major in each weight.
    """
    first = weights[0]
    alike = all(w.device == first.device and w.dtype == first.dtype for w in weights)
    if not (first.is_cuda and alike and available()):
        return sweep_cpu.access(weights, sizes, indices)
    at = indices.to(first.device)
    if not all(weight.is_contiguous() for weight in weights):
        parts = zip(weights, at.split(list(sizes)), strict=True)
        at = torch.cat([storage_indices(own, weight).to(at.dtype) for weight, own in parts])
    blocks = _blocks(sizes).to(first.device)
    addresses = torch.tensor([weight.data_ptr() for weight in weights], dtype=torch.int64, device="cpu")
    addresses = addresses.to(first.device)

    def move(values: Tensor, *, write: bool) -> None:
        if not len(blocks):
            return
        from shira_diffusers.weights.triton_kernels import move as kernel  # Triton is there only where CUDA is

        with torch.cuda.device(values.device):
            kernel[(len(blocks),)](addresses, blocks, at, bits_of(values), WRITE=write, BLOCK=_MOVED, num_warps=4)

    def read() -> Tensor:
        values = torch.empty(at.numel(), dtype=weights[0].dtype, device=weights[0].device)
        move(values, write=False)
        return values

    return read, lambda values: move(values.contiguous(), write=True)


def _blocks(sizes: Sequence[int]) -> Tensor:
    """int32 ``(k, 3)``: of each program of ``move`` the weight, its first entry and the end of its entries."""
    counts = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    ends = counts.cumsum(0)
    programs = (counts + _MOVED - 1) // _MOVED
    owner = torch.arange(len(sizes), device="cpu").repeat_interleave(programs)
    number = torch.arange(len(owner), device="cpu") - (programs.cumsum(0) - programs)[owner]  # in its weight
    first = (ends - counts)[owner] + number * _MOVED
    return torch.stack([owner, first, torch.minimum(first + _MOVED, ends[owner])], dim=1).to(torch.int32).contiguous()
