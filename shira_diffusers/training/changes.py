"""How trained values change weights: as they are (SHiRA), or as directions and magnitudes (``dora``)."""

from typing import Protocol

from torch import Tensor


class Change(Protocol):
    """Makes deltas, float32 ``[nnz]`` for the masked entries of all weights, of trained values, float32 ``[n]``."""

    @property
    def count(self) -> int:
        """How many values are trained beside one an entry: ``n - nnz``."""

    def deltas(self, trained: Tensor) -> Tensor:
        """What is added to the base's entries: all zero, exactly, where everything trained is zero."""

    def gradient(self, trained: Tensor, of_entries: Tensor) -> Tensor:
        """The gradient of ``trained``, given that of the weights' entries, float32 ``[nnz]``."""


class Plain:
    """SHiRA itself: the trained values are the deltas."""

    count = 0

    def deltas(self, trained: Tensor) -> Tensor:
        """As ``Change.deltas``."""
        return trained

    def gradient(self, trained: Tensor, of_entries: Tensor) -> Tensor:
        """As ``Change.gradient``."""
        return of_entries
