"""Measure how much two adapters interfere (arXiv 2406.13175, section 4.2 and table 13)."""

import warnings
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.delta import SparseDelta
from shira_diffusers.adapters.same_names import named_alike
from shira_diffusers.errors import AdapterMismatchError


@dataclass(frozen=True, slots=True)
class Interference:
    """The interference of two adapters, on one weight or over all.

    Args:
        overlap: entries that both hold, as a fraction of the smaller adapter's entries; 0 to 1.
        sign_conflict: of those, the fraction in which the two pull in opposite directions; 0 if there are none.
        awom: adapter weight orthogonality magnitude, the l2 (Frobenius) norm of ``A1^T A2``; low is good.
        awor: adapter weight orthogonality ratio, ``1 - nnz(A1^T A2) / m^2``; high is good, 1 is orthogonal.
        l2: l2 distance of the two deltas.
    """

    overlap: float
    sign_conflict: float
    awom: float
    awor: float
    l2: float

    def as_dict(self) -> dict[str, float]:
        """Return the five figures by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Counts:
    """What adds up over weights: shared and smaller nnz, conflicts, squared norms, nonzeros and size of the product."""

    common: int
    first: int
    second: int
    conflicts: int
    square: float
    nonzeros: int
    cells: int
    distance: float

    def __add__(self, other: "_Counts") -> "_Counts":
        mine, theirs = asdict(self), asdict(other)
        return _Counts(**{key: mine[key] + theirs[key] for key in mine})

    def result(self) -> Interference:
        smaller = min(self.first, self.second)
        return Interference(
            overlap=self.common / smaller if smaller else 0.0,
            sign_conflict=self.conflicts / self.common if self.common else 0.0,
            awom=self.square**0.5,
            awor=1.0 - self.nonzeros / self.cells if self.cells else 1.0,
            l2=self.distance**0.5,
        )


def _sizes(delta: SparseDelta) -> tuple[int, int]:
    """Rows and columns of the delta as a matrix; a weight without dimensions has one of each."""
    height = delta.shape[0] if delta.shape else 1
    return height, delta.numel // height if height else 0


def _matrix(delta: SparseDelta) -> Tensor:
    """The delta as a float64 sparse matrix, (out, in) or (out, in * kh * kw)."""
    height, width = _sizes(delta)
    flat = delta.indices.long().cpu()
    places = torch.stack([flat // max(width, 1), flat % max(width, 1)])
    return torch.sparse_coo_tensor(
        places,
        delta.values.double().cpu(),
        (height, width),
        is_coalesced=True,
        check_invariants=False,
        device="cpu",
    )


def _compare(first: SparseDelta, second: SparseDelta) -> _Counts:
    mine, theirs = first.indices.cpu(), second.indices.cpu()
    shared = mine[torch.isin(mine, theirs, assume_unique=True)]
    a = first.values.double().cpu()[torch.searchsorted(mine, shared)]
    b = second.values.double().cpu()[torch.searchsorted(theirs, shared)]
    left, right = _matrix(first), _matrix(second)
    with warnings.catch_warnings():  # torch says once that its sparse CSR is in beta
        warnings.simplefilter("ignore", UserWarning)
        product = torch.sparse.mm(left.t(), right).coalesce().values()  # (in, out) @ (out, in) -> nnz of (in, in)
    apart = (left - right).coalesce().values()
    return _Counts(
        common=shared.numel(),
        first=first.nnz,
        second=second.nnz,
        conflicts=int((a * b < 0).sum()),
        square=float(product.square().sum()),
        nonzeros=int((product != 0).sum()),
        cells=left.shape[1] ** 2,
        distance=float(apart.square().sum()),
    )


def _alone(first: SparseDelta | None, second: SparseDelta | None) -> _Counts:
    """A weight that only one of the two adapts: nothing shared, the product is zero."""
    delta = first or second
    assert delta is not None  # one of the two is given
    _, width = _sizes(delta)
    counts = (first.nnz if first else 0, second.nnz if second else 0)
    distance = float(delta.values.double().square().sum())
    return _Counts(0, *counts, conflicts=0, square=0.0, nonzeros=0, cells=width**2, distance=distance)


def interference(first: ShiraAdapter, second: ShiraAdapter) -> Interference:
    """Measure the interference of two adapters over all weights, each adapter taken as one block-diagonal matrix.

    Raises:
        AdapterMismatchError: a weight of different shapes in the two.
    """
    return interference_in_all(first, second)[0]


def interference_in_all(first: ShiraAdapter, second: ShiraAdapter) -> tuple[Interference, dict[str, Interference]]:
    """Measure the interference of two adapters over all weights and on each weight that both adapt, in one pass.

    Raises:
        AdapterMismatchError: a weight of different shapes in the two.
    """
    first, second = named_alike((first, second))
    counts = {name: _counted(name, first, second) for name in sorted(first.deltas.keys() | second.deltas.keys())}
    shared = first.deltas.keys() & second.deltas.keys()
    whole = sum(counts.values(), start=_Counts(0, 0, 0, 0, 0.0, 0, 0, 0.0))
    return whole.result(), {name: each.result() for name, each in counts.items() if name in shared}


def _counted(name: str, first: ShiraAdapter, second: ShiraAdapter) -> _Counts:
    a, b = first.deltas.get(name), second.deltas.get(name)
    if a is None or b is None:
        return _alone(a, b)
    if a.shape != b.shape:
        raise AdapterMismatchError(
            f"adapters of different models cannot be compared: {name} is {a.shape} in one and {b.shape} in the other"
        )
    return _compare(a, b)


def opposing(first: Tensor, second: Tensor) -> float:
    """How far two effects push the same values in opposite directions: the mean of ``max(0, -first * second)``.

    Args:
        first, second: what two adapters change in latents or predictions, of any shape, both of one.
    """
    return float((-first * second).clamp(min=0).mean())


def cosine(first: Tensor, second: Tensor) -> float:
    """The cosine of two effects, -1 to 1; 0 where one is zero.

    Args:
        first, second: as for ``opposing``, of any shape, both of one.
    """
    return float(torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), 0))
