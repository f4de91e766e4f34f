"""The whole switch of CUDA weights in one launch, over a table of the addresses of all tensors of all components."""

import logging
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shira_diffusers.weights.launches import available
from shira_diffusers.weights.scatter import bits_dtype
from shira_diffusers.weights.sweep_cpu import Prepared, Side, Step, Sweep, TorchSweep
from shira_diffusers.weights.tiles import RUN

logger = logging.getLogger(__name__)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_SCATTERED = {"BLOCK": 256, "num_warps": 8}  # measured on an H200: entries on their own, and in runs
_IN_RUNS = {"BLOCK": 512, "num_warps": 4}
_SHIFT = RUN.bit_length() - 1


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``TritonSweep`` can write weights of a dtype on a device; if it fails there, that is told once."""
    return device.type == "cuda" and dtype in FLOATS and available() and _works(device, dtype)


def engine_for(device: torch.device, dtype: torch.dtype) -> str:
    """By what weights are switched: ``triton`` (one launch), or ``torch`` (on a CPU by tiles, else by weight)."""
    return "triton" if usable(device, dtype) else "torch"


def sweeps_of(steps: Sequence[Step]) -> list[Sweep]:
    """What carries out steps over different weights: one launch for those that ``TritonSweep`` can write."""
    launched = [step for step in steps if _usable_for(step)]
    others = [step for step in steps if not _usable_for(step)]
    sweeps: list[Sweep] = [TorchSweep(others)] if others else []
    return [*sweeps, TritonSweep(launched)] if launched else sweeps


def _usable_for(step: Step) -> bool:
    sides = (side for side in (step.leaving, step.arriving) if side is not None)
    first = step.weights[0]
    return usable(first.device, first.dtype) and all(side.at.dtype == torch.int32 for side in sides)


class TritonSweep:
    """Steps in one launch for each device, dtype of weights and dtype of deltas; nearly always one in all."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._groups: dict[tuple[Any, ...], list[Step]] = {}
        deltas = {_kind(step): step.delta.dtype for step in steps if step.delta is not None}
        for step in steps:
            any_delta = deltas.get(_kind(step), torch.float32)  # where nothing arrives
            delta = any_delta if step.delta is None else step.delta.dtype
            self._groups.setdefault((*_kind(step), delta), []).append(step)
        self._seen = {id(s): torch.empty_like(s.leaving.written) for s in steps if s.leaving is not None}
        self._begun: list[Step] = []
        self.finite = True

    def run(self) -> bool:
        """As ``Sweep.run``. Waits for the device, to hear whether what left was there, and what arrived is finite."""
        found = [self._launch(steps, *key) for key, steps in self._groups.items()]
        flags = [one.tolist() for one in found]
        self.finite = not any(infinite for _, infinite in flags)
        return not any(differs for differs, _ in flags)

    def _launch(self, steps: Sequence[Step], device: torch.device, dtype: torch.dtype, delta: torch.dtype) -> Tensor:
        import triton.language as tl  # there only where CUDA is

        from shira_diffusers.weights.triton_kernels import sweep as kernel

        rows, parts = _table(steps, [self._seen.get(id(step)) for step in steps])
        table = torch.from_numpy(np.concatenate([rows.ravel(), parts.ravel(), np.zeros(2, np.int64)])).to(device)
        owners = _owners(tuple(count for step in steps for count in step.tiles), device)
        cut = rows.size, rows.size + parts.size
        how = _IN_RUNS if all(_in_runs(step) for step in steps) else _SCATTERED
        self._begun += steps
        with torch.cuda.device(device):
            kernel[(len(owners),)](
                owners,
                table[: cut[0]],
                table[cut[0] : cut[1]],
                table[cut[1] :],
                BITS=_triton(tl, bits_dtype(dtype)),
                FLOAT=_triton(tl, dtype),
                DELTA=_triton(tl, delta),
                enable_fp_fusion=False,  # the same bits as on a CPU
                **how,
            )
        return table[cut[1] :]

    @torch.inference_mode()
    def undo(self) -> None:
        """As ``Sweep.undo``; weight by weight, since it is hardly ever due."""
        while self._begun:
            step = self._begun.pop()
            prepared = Prepared(step)
            if step.arriving is not None and not step.stays:
                prepared.write(step.arriving, step.arriving.base)
            if step.leaving is not None:
                prepared.write(step.leaving, self._seen[id(step)])


def _kind(step: Step) -> tuple[torch.device, torch.dtype]:
    return step.weights[0].device, step.weights[0].dtype


def _in_runs(step: Step) -> bool:
    return all(side.runs for side in (step.leaving, step.arriving) if side is not None)


def _triton(tl: Any, dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _table(steps: Sequence[Step], seen: Sequence[Tensor | None]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The tables ``weights`` and ``steps`` of the kernel."""
    rows, parts = [], []
    first = 0
    for number, (step, own_seen) in enumerate(zip(steps, seen, strict=True)):
        scales = np.asarray(step.scales, np.float32).view(np.int32)
        rows.append(np.stack([[w.data_ptr() for w in step.weights], np.full(len(scales), number), scales], axis=1))
        none = _none(sum(step.tiles), step.weights[0].device).data_ptr()
        left, came = step.leaving, step.arriving
        parts.append(
            [
                first,
                *_addresses(left, none, own_seen),
                *_addresses(came, none, step.delta),
                int(step.stays),
            ]
        )
        first += sum(step.tiles)
    return np.concatenate(rows).astype(np.int64), np.asarray(parts, np.int64)


def _addresses(side: Side | None, none: int, last: Tensor | None) -> list[int]:
    if side is None or last is None:
        return [none, 0, 0, 0, 0, 0]
    tensors = (side.starts, side.at, side.base, side.written, last)
    return [*(tensor.data_ptr() for tensor in tensors), _SHIFT if side.runs else 0]


@lru_cache(maxsize=8)
def _owners(tiles: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 ``[sum of tiles]``: the weight of each tile."""
    counts = torch.tensor(tiles, device="cpu")
    return torch.arange(len(tiles), dtype=torch.int32, device="cpu").repeat_interleave(counts).to(device)


@lru_cache(maxsize=8)
def _none(tiles: int, device: torch.device) -> Tensor:
    """The starts of a side that is not there."""
    return torch.zeros(tiles + 1, dtype=torch.int32, device=device)


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Tried out once: Triton compiles at run time, and needs a C compiler for it."""
    bits = bits_dtype(dtype)
    results = []
    for sweep in (TorchSweep, TritonSweep):
        weight = torch.arange(64, device=device).to(dtype)
        side = Side(
            torch.tensor([1, 40], dtype=torch.int32, device=device),
            False,
            torch.tensor([0, 2], dtype=torch.int32, device=device),
            torch.zeros(2, dtype=bits, device=device),
            torch.zeros(2, dtype=bits, device=device),
        )
        delta = torch.ones(2, dtype=torch.float16, device=device)
        try:
            sweep([Step([weight], [1], None, side, delta, [0.5])]).run()
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
