"""SparseDelta: what one adapter changes in one weight."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shira_diffusers.errors import AdapterFormatError, counted, verb
from shira_diffusers.weights.finite import all_finite

VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INT32_MAX = 2**31 - 1


def index_dtype(numel: int) -> torch.dtype:
    """Return the smallest index dtype that can address ``numel`` entries: int32 where possible, else int64."""
    return torch.int32 if numel <= _INT32_MAX else torch.int64


def check_indices(indices: Tensor, numel: int) -> str | None:
    """Say what is wrong with flat indices ``(nnz,)`` of a weight of ``numel`` entries; None if nothing is.

    Right means integer, one-dimensional, in ``[0, numel)``, strictly increasing (so sorted, no duplicates).
    """
    if indices.dtype not in (torch.int32, torch.int64):
        return f"indices are {indices.dtype}, expected int32 or int64"
    if indices.ndim != 1:
        return f"indices have shape {tuple(indices.shape)}, expected (nnz,)"
    if indices.numel() == 0:
        return None
    steps = indices[1:] > indices[:-1]
    if bool(steps.all()) and int(indices[0]) >= 0 and int(indices[-1]) < numel:
        return None
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= numel:
        return f"indices are out of range: {low} to {high}, expected 0 to {numel - 1}"
    at = int((~steps).nonzero()[0])
    kind = "duplicate" if int(indices[at]) == int(indices[at + 1]) else "unsorted"
    return f"indices are {kind} at position {at + 1}: {int(indices[at])} then {int(indices[at + 1])}"


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of a part of a larger one, all of which a pickle would hold."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _problem(indices: Tensor, values: Tensor, shape: tuple[int, ...]) -> str | None:
    if any(not isinstance(size, int) or size < 0 for size in shape):
        return f"shape {shape} is not a tuple of sizes"
    for what, tensor in (("indices", indices), ("values", values)):
        if not isinstance(tensor, Tensor):
            return f"{what} are {type(tensor).__name__}, expected a tensor"
        if tensor.is_meta or tensor.layout != torch.strided:
            return f"{what} are {tensor.layout} on {tensor.device}, expected dense tensors that hold values"
    wrong = check_indices(indices, math.prod(shape))
    if wrong:
        return wrong
    if values.dtype not in VALUE_DTYPES:
        return f"values are {values.dtype}, expected float32, float16 or bfloat16"
    if values.shape != indices.shape:
        return f"{tuple(values.shape)} values for {tuple(indices.shape)} indices, expected one value per index"
    if not bool(all_finite(values)):
        count = int((~torch.isfinite(values)).sum())
        found = counted(count, "value", of=values.numel())
        return f"{found} {verb(count, 'is', 'are')} NaN or infinite, expected finite values"
    return None


@dataclass(frozen=True, slots=True, eq=False)
class SparseDelta:
    """The sparse difference ``S`` of one weight, ``W_new = W + scale * S`` (arXiv 2406.13175, section 3).

    Args:
        indices: int32 or int64 ``(nnz,)``, flat row-major positions in the weight, strictly increasing. Kept as
            int32 where the weight has fewer than 2^31 entries.
        values: float32, float16 or bfloat16 ``(nnz,)``, finite, in the order of the indices.
        shape: shape of the dense weight, ``(out, in)`` or ``(out, in, kh, kw)``.

    Raises:
        AdapterFormatError: no tensors; indices unsorted, duplicate or out of range; values not finite, of another
            count or dtype.
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        wrong = _problem(self.indices, self.values, self.shape)
        if wrong:
            raise AdapterFormatError(f"not a sparse delta of a {self.shape} weight: {wrong}")
        object.__setattr__(self, "indices", self.indices.detach().to(index_dtype(self.numel)))
        object.__setattr__(self, "values", self.values.detach())

    def __repr__(self) -> str:
        return f"<SparseDelta: {counted(self.nnz, 'entry')} of a {self.shape} weight, {self.values.dtype}>"

    @classmethod
    def unchecked(cls, indices: Tensor, values: Tensor, shape: tuple[int, ...]) -> "SparseDelta":
        """Make a delta without checks, of ``indices`` of ``index_dtype`` and ``values``, both ``(nnz,)``."""
        delta = object.__new__(cls)
        for name, value in (("indices", indices), ("values", values), ("shape", shape)):
            object.__setattr__(delta, name, value)
        return delta

    def __reduce__(self) -> tuple[type["SparseDelta"], tuple[Tensor, Tensor, tuple[int, ...]]]:
        return SparseDelta, (_alone(self.indices), _alone(self.values), self.shape)

    @property
    def numel(self) -> int:
        """Entries of the dense weight."""
        return math.prod(self.shape)

    @property
    def nnz(self) -> int:
        """Entries this delta holds."""
        return self.indices.numel()

    @property
    def density(self) -> float:
        """Fraction of the weight's entries that are held, 0 to 1."""
        return self.nnz / self.numel if self.numel else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the two tensors in memory."""
        return self.indices.nbytes + self.values.nbytes

    def to_dense(self) -> Tensor:
        """Make the dense delta, float32, of ``shape``, on the device of the values."""
        dense = torch.zeros(self.numel, dtype=torch.float32, device=self.values.device)
        dense[self.indices.long()] = self.values.float()
        return dense.view(self.shape)

    def astype(self, dtype: torch.dtype) -> "SparseDelta":
        """Round the values to ``dtype``, in a new delta."""
        return SparseDelta(self.indices, self.values.to(dtype), self.shape)

    def __eq__(self, other: object) -> bool:
        """Equal when shape, indices and values are equal, and the values' dtype too."""
        if not isinstance(other, SparseDelta):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.values.dtype == other.values.dtype
            and torch.equal(self.indices, other.indices)
            and torch.equal(self.values, other.values)
        )

    __hash__ = None  # type: ignore[assignment]
