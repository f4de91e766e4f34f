"""Keep the top entries of dense updates, and say how much of each update's energy (its squared norm) they hold.

In: dense updates, weight by weight, so that one of them is in memory at a time. Out: sparse deltas and an
``EnergyReport``. It does not know where updates come from: a LoRA, or the difference of two checkpoints.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.delta import SparseDelta
from shira_diffusers.errors import AdapterFormatError, AdapterMismatchError, ShiraError, listing
from shira_diffusers.masks.top_entries import BINS, Cutoff, bin_of, bits_of, counts_by_bin, cutoff, top_indices

Ranking = Literal["layer", "global"]
Updates = Callable[[], Iterable[tuple[str, Tensor]]]
"""Each call yields all updates anew: a weight's name and its dense update, float32, of the weight's shape."""

DENSITIES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Those of the report's table."""


class Energy(NamedTuple):
    """What is kept of one component's update, or of the whole.

    Args:
        entries: kept. numel: entries of the weights that the update changes.
        kept: the share of the update's energy that the kept entries hold, 0 to 1.
        at: the share that the entries of the largest magnitude hold, by density.
    """

    entries: int
    numel: int
    kept: float
    at: Mapping[float, float]


@dataclass(frozen=True)
class EnergyReport:
    """How much of an update survives: by component ("" for a bare module), and in total."""

    components: Mapping[str, Energy]
    total: Energy

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        parts = {name: _as_dict(energy) for name, energy in self.components.items()}
        return {"total": _as_dict(self.total), "components": parts}


class SparseUpdate(NamedTuple):
    """A dense update as an adapter, and how much of it that holds."""

    adapter: ShiraAdapter
    report: EnergyReport


class Chooser:
    """How entries are chosen and which values they get: the largest ones, as they are. Subclasses may know better."""

    def score(self, name: str, update: Tensor) -> Tensor:
        """How much each entry matters, float32 of the update's shape ``(out, ...)``, not negative."""
        return update.abs()

    def values(self, name: str, update: Tensor, indices: Tensor) -> Tensor:
        """The kept values, float32 ``(nnz,)``, of an update ``(out, ...)`` at its flat indices, int64 ``(nnz,)``."""
        return update.flatten()[indices]


def require_density(density: float) -> None:
    """Raises ShiraError: not in (0, 1]."""
    if not 0.0 < density <= 1.0:
        raise ShiraError(f"density must be in (0, 1], got {density}; 0.01 to 0.02 is usual")


def sparsify(
    updates: Updates,
    density: float,
    *,
    ranking: Ranking = "layer",
    chooser: Chooser | None = None,
    dtype: torch.dtype = torch.float32,
    by_component: bool = True,
) -> tuple[dict[str, SparseDelta], EnergyReport]:
    """Keep the top entries of dense updates.

    Args:
        updates: asked once for ``layer``, twice for ``global``; float32 ``(out, ...)`` each.
        density: the fraction of entries to keep, in (0, 1]; entries that are zero are never kept.
        ranking: ``layer`` keeps this fraction of each weight, ``global`` of all of them together.
        chooser: how entries are scored and corrected; None keeps the largest ones.
        dtype: of the values, rounded once.
        by_component: names begin with their component, by which the report is divided.

    Returns:
        ``{name: SparseDelta}`` on the CPU, and the report. Equal scores go to the lowest index.

    Raises:
        ShiraError: the density, or an unknown ranking.
        AdapterFormatError: an update that is not finite, or a value too large for ``dtype``; names all.
        AdapterMismatchError: every update is zero.
    """
    require_density(density)
    if ranking not in ("layer", "global"):
        raise ShiraError(f"unknown ranking {ranking!r}, expected 'layer' or 'global'")
    chooser = chooser or Chooser()
    shared = _cutoff(updates, density, chooser) if ranking == "global" else None
    deltas: dict[str, SparseDelta] = {}
    tallies, wrong = dict[str, _Tally](), list[str]()
    for name, update in updates():
        if not bool(torch.isfinite(update).all()):
            wrong.append(f"{name}: the update holds NaN or infinity")
            continue
        indices = _chosen(chooser.score(name, update).flatten(), density, shared)
        part = name.partition(".")[0] if by_component else ""
        tallies.setdefault(part, _Tally()).add(update.flatten(), indices, ranking)
        if not indices.numel():
            continue
        try:
            values = chooser.values(name, update, indices).to(dtype).cpu()
            deltas[name] = SparseDelta(indices.cpu(), values, tuple(update.shape))
        except AdapterFormatError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        raise AdapterFormatError(f"the update cannot be kept; get an intact file, or choose float32:{listing(wrong)}")
    if not deltas:
        changed = any(tally.energy for tally in tallies.values())
        why = f"density {density:g} keeps no entry; raise it" if changed else "no weight is changed; train it first"
        raise AdapterMismatchError(f"there is nothing to keep of this update: {why}")
    whole = sum(tallies.values(), _Tally())
    return deltas, EnergyReport({part: tally.result(whole) for part, tally in tallies.items()}, whole.result(whole))


def _chosen(score: Tensor, density: float, shared: Cutoff | None) -> Tensor:
    """Sorted flat indices, int64 ``(nnz,)``, of a score ``(numel,)``; a cutoff that all weights share goes first."""
    if shared is None:
        count = min(round(density * score.numel()), int((score > 0).sum()))
        return top_indices(score, count)
    bits = bits_of(score)
    above, equal = (bits > shared.level).nonzero().flatten(), (bits == shared.level).nonzero().flatten()
    return torch.cat([above, equal[: round(shared.kept / shared.equal * equal.numel())]]).sort().values


def _cutoff(updates: Updates, density: float, chooser: Chooser) -> Cutoff:
    """Where the kept entries of all updates end; entries that are zero are never kept."""

    def scores() -> Iterator[Tensor]:
        for name, update in updates():
            yield chooser.score(name, update).flatten().nan_to_num(0.0, 0.0)  # what is not finite is refused later

    counts = counts_by_bin(scores())
    return cutoff(counts, scores(), min(round(density * int(counts.sum())), int(counts[1:].sum())))


@dataclass
class _Tally:
    """Sums over the weights of a component."""

    entries: int = 0
    numel: int = 0
    kept: float = 0.0
    energy: float = 0.0
    at: Tensor | float = 0.0
    """By density in ``DENSITIES``, float64: the energy of the top entries of each weight."""
    histogram: Tensor | float = 0.0
    """Float64 ``(2, bins)``: counts and energies by magnitude, of all weights; for the global ranking. Bins are so
    narrow that an energy interpolated inside one is exact to far less than 1 %."""

    def add(self, update: Tensor, indices: Tensor, ranking: Ranking) -> None:
        """An update, float32 ``(numel,)``, of which these flat indices, ``(nnz,)``, are kept."""
        bins, squares = bin_of(update.abs()), update.double().square()
        histogram = torch.stack([torch.bincount(bins, w, BINS).double() for w in (None, squares)]).cpu()
        self.entries += indices.numel()
        self.numel += update.numel()
        self.kept += float(squares[indices].sum())
        self.energy += float(histogram[1].sum())
        if ranking == "global":
            self.histogram = self.histogram + histogram
        else:
            self.at = self.at + _row(_above(histogram, *_cut(histogram, d)) for d in DENSITIES)

    def __add__(self, other: "_Tally") -> "_Tally":
        return _Tally(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def result(self, whole: "_Tally") -> Energy:
        """Of the component, or of the whole itself."""
        at = self.at
        if isinstance(self.histogram, Tensor) and isinstance(whole.histogram, Tensor):
            at = _row(_above(self.histogram, *_cut(whole.histogram, density)) for density in DENSITIES)
        shares = (torch.as_tensor(at, device="cpu") / (self.energy or 1.0)).clamp(max=1.0).tolist()
        return Energy(
            self.entries, self.numel, self.kept / (self.energy or 1.0), dict(zip(DENSITIES, shares, strict=True))
        )


def _row(figures: Iterable[float]) -> Tensor:
    """Float32 ``(n,)`` on the CPU."""
    return torch.tensor(list(figures), device="cpu")


def _cut(histogram: Tensor, density: float) -> tuple[int, float]:
    """Where the top entries of a histogram ``(2, bins)`` end: in which bin from the top, and how far inside it."""
    from_top = histogram[0].flip(0).cumsum(0)
    wanted = density * float(from_top[-1])
    at = min(int(torch.searchsorted(from_top, wanted)), BINS - 1)
    before = float(from_top[at - 1]) if at else 0.0
    return at, (wanted - before) / max(1.0, float(from_top[at]) - before)


def _above(histogram: Tensor, at: int, share: float) -> float:
    """The energy above a cut."""
    energy = histogram[1].flip(0)
    return float(energy[:at].sum()) + share * float(energy[at])


def _as_dict(energy: Energy) -> dict[str, Any]:
    return {
        "entries": energy.entries,
        "numel": energy.numel,
        "density": energy.entries / energy.numel if energy.numel else 0.0,
        "energy_kept": energy.kept,
        "energy_kept_at": {f"{density:g}": share for density, share in energy.at.items()},
    }
