"""ShiraAdapter: named sparse deltas and what is known about them, as frozen data."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.base_probes import probe_base
from shira_diffusers.adapters.delta import SparseDelta
from shira_diffusers.adapters.notebook import table
from shira_diffusers.errors import AdapterFormatError, AdapterMismatchError, counted, listing
from shira_diffusers.weights.targets import named_weights, parts_of


@dataclass(frozen=True, eq=False)
class ShiraAdapter:
    """A SHiRA adapter: for each adapted parameter its sparse difference from the base.

    Args:
        deltas: ``name -> SparseDelta``; the name is ``component.dotted.parameter.name``, or the dotted name alone
            for an adapter of a bare module.
        metadata: strings, as in a file's header: ``base_model``, ``mask``, ``density``, ``instance_prompt``, ...
        base_probes: ``name -> float16 (k,)``: the base's first ``k`` values at the masked entries of a few
            parameters, by which loading recognizes another base.

    Raises:
        AdapterFormatError: deltas that are none, or a probe of no delta, or longer than its delta.
    """

    deltas: Mapping[str, SparseDelta]
    metadata: Mapping[str, str] = field(default_factory=dict)
    base_probes: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_deltas(self.deltas)
        wrong = [
            f"{name}: {counted(probe.numel(), 'base value')}"
            for name, probe in self.base_probes.items()
            if name not in self.deltas or probe.ndim != 1 or probe.numel() > self.deltas[name].nnz
        ]
        if wrong:
            raise AdapterFormatError(
                f"base values must belong to an adapted parameter, at most one per entry:{listing(wrong)}"
            )
        object.__setattr__(self, "deltas", MappingProxyType(dict(sorted(self.deltas.items()))))
        metadata = {str(key): str(value) for key, value in self.metadata.items()}
        object.__setattr__(self, "metadata", MappingProxyType(metadata))
        object.__setattr__(self, "base_probes", MappingProxyType(dict(self.base_probes)))

    def __repr__(self) -> str:
        known = "".join(f", {key}={value!r}" for key, value in self.metadata.items())
        return f"<ShiraAdapter: {counted(self.nnz, 'entry')} in {counted(len(self.deltas), 'parameter')}{known}>"

    def _repr_html_(self) -> str:
        rows = {
            "entries": f"{self.nnz:,} of {self.numel:,} ({self.density:.2%})",
            "parameters": f"{len(self.deltas):,}",
        }
        return table(["ShiraAdapter", ""], [*rows.items(), *self.metadata.items()])

    def __deepcopy__(self, memo: dict[int, object]) -> "ShiraAdapter":
        return self  # frozen data: copies of a model share it

    def __reduce__(
        self,
    ) -> tuple[type["ShiraAdapter"], tuple[dict[str, SparseDelta], dict[str, str], dict[str, Tensor]]]:
        return ShiraAdapter, (dict(self.deltas), dict(self.metadata), dict(self.base_probes))

    @property
    def nnz(self) -> int:
        """Entries held, over all parameters."""
        return sum(delta.nnz for delta in self.deltas.values())

    @property
    def numel(self) -> int:
        """Entries of all adapted parameters, held or not."""
        return sum(delta.numel for delta in self.deltas.values())

    @property
    def density(self) -> float:
        """Fraction of the adapted parameters' entries that are held, 0 to 1."""
        return self.nnz / self.numel if self.numel else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in memory."""
        return sum(delta.nbytes for delta in self.deltas.values())

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The parameters that it changes, sorted."""
        return tuple(self.deltas)

    def component_names(self) -> list[str]:
        """List the first parts of the names, sorted: the components, for an adapter of a pipeline."""
        return sorted({name.partition(".")[0] for name in self.deltas})

    def part(self, component: str) -> "ShiraAdapter":
        """Select the deltas of one component, named without it. Empty if there are none.

        One named like the component alone, which no model has, gets an empty name: it is an offender, not left out.
        """
        parts = {name: name.partition(".") for name in self.deltas}
        return self._taken({name: rest for name, (first, _, rest) in parts.items() if first == component})

    def keeping(self, names: Collection[str]) -> "ShiraAdapter":
        """Select the deltas of some parameters. Empty if there are none."""
        return self._taken({name: name for name in self.deltas if name in names})

    def prefixed(self, component: str) -> "ShiraAdapter":
        """Put every name under ``component``, in a new adapter."""
        return self._taken({name: f"{component}.{name}" for name in self.deltas})

    def renamed(self, names: Mapping[str, str]) -> "ShiraAdapter":
        """Rename parameters to ``names[name]``, in a new adapter; those not in ``names`` keep theirs."""
        return self._taken({name: names.get(name, name) for name in self.deltas})

    def _taken(self, names: Mapping[str, str]) -> "ShiraAdapter":
        """The parameters in ``names``, by their new names."""
        deltas = {new: self.deltas[name] for name, new in names.items()}
        probes = {new: self.base_probes[name] for name, new in names.items() if name in self.base_probes}
        return ShiraAdapter(deltas, self.metadata, probes)

    def astype(self, dtype: torch.dtype) -> "ShiraAdapter":
        """Round the values to ``dtype``, in a new adapter (float16 halves the file of a float32 one).

        Raises:
            AdapterFormatError: values too large for the dtype; lists all parameters with such values.
        """
        wide = [
            f"{name}: {counted(count, 'value', of=delta.nnz)}, up to {float(delta.values.abs().max()):.4g}"
            for name, delta in self.deltas.items()
            if (count := int((~torch.isfinite(delta.values.to(dtype))).sum()))
        ]
        if wide:
            raise AdapterFormatError(
                f"values of {counted(len(wide), 'parameter')} are too large for {dtype}; "
                f"choose float32 (shira fuse --dtype float32):{listing(wide)}"
            )
        deltas = {name: delta.astype(dtype) for name, delta in self.deltas.items()}
        return ShiraAdapter(deltas, self.metadata, self.base_probes)

    def with_metadata(self, **metadata: str) -> "ShiraAdapter":
        """Add or replace metadata, in a new adapter."""
        return ShiraAdapter(self.deltas, {**self.metadata, **metadata}, self.base_probes)

    @classmethod
    def from_difference(
        cls,
        before: nn.Module | Mapping[str, Tensor | nn.Module],
        after: nn.Module | Mapping[str, Tensor | nn.Module],
        *,
        dtype: torch.dtype = torch.float32,
        metadata: Mapping[str, str] | None = None,
    ) -> "ShiraAdapter":
        """Extract what training changed: the entries in which ``after`` differs from ``before``.

        Args:
            before: a module, ``{component: module}``, a pipeline, or a state dict of float tensors ``(out, ...)``.
            after: the same, with the same names and shapes ``(out, ...)``.
            dtype: of the values; the difference is taken in float32 and rounded once.
            metadata: strings to keep with the adapter.

        Returns:
            An adapter with one delta for each changed parameter. In float32, applied to ``before`` it gives
            ``after`` up to one rounding of the sum.

        Raises:
            AdapterMismatchError: the two sides hold other names or shapes, or nothing differs.
            AdapterFormatError: a difference that is not finite, or values that are neither tensors nor modules.
            ShiraError: no module, mapping or pipeline.
        """
        old, new = _tensors(before), _tensors(after)
        require_same_weights(old, new)
        changed = {n: (old[n] != new[n]).flatten().nonzero().flatten() for n in old}
        deltas = {
            name: _difference(name, old[name], new[name], indices, dtype)
            for name, indices in changed.items()
            if indices.numel()
        }
        if not deltas:
            raise AdapterMismatchError("no weight differs between the two: nothing to extract; train first")
        return cls(deltas, metadata or {}, probe_base(deltas, old))


def _require_deltas(given: object) -> None:
    """Raises AdapterFormatError: not ``{name: SparseDelta}``; names all offenders."""
    if not isinstance(given, Mapping):
        raise AdapterFormatError(f"expected {{name: SparseDelta}}, got {type(given).__name__}")
    odd = {
        name: value for name, value in given.items() if not (isinstance(name, str) and isinstance(value, SparseDelta))
    }
    _refuse_kinds("expected {name: SparseDelta}; read files with load_adapter; got", odd)


def _refuse_kinds(expected: str, odd: Mapping[Any, object]) -> None:
    if odd:
        kinds = [f"{name!r}: {type(value).__name__}" for name, value in odd.items()]
        raise AdapterFormatError(f"{expected}:{listing(kinds)}")


class HasShape(Protocol):
    """A weight, in memory or not."""

    @property
    def shape(self) -> Sequence[int]: ...


def _tensors(source: Any) -> dict[str, Tensor]:
    """Name -> weight, of a module, of modules by component, or of a state dict."""
    parts: Mapping[str, Tensor | nn.Module] | nn.Module = source if isinstance(source, Mapping) else parts_of(source)
    if isinstance(parts, nn.Module):
        return named_weights(parts, every=True)
    odd = {name: value for name, value in parts.items() if not isinstance(value, Tensor | nn.Module)}
    _refuse_kinds("expected tensors or modules by name, got", odd)
    found: dict[str, Tensor] = {}
    for name, value in parts.items():
        if isinstance(value, nn.Module):
            found.update({f"{name}.{n}": w for n, w in named_weights(value, every=True).items()})
        elif value.is_floating_point():
            found[name] = value.detach()
    return found


def require_same_weights(old: Mapping[str, HasShape], new: Mapping[str, HasShape]) -> None:
    """Raises AdapterMismatchError: the two have weights of other names or shapes; names all."""
    wrong = [f"{name}: only on one side" for name in sorted(old.keys() ^ new.keys())]
    wrong += [
        f"{name}: {tuple(old[name].shape)} before, {tuple(new[name].shape)} after"
        for name in sorted(old.keys() & new.keys())
        if old[name].shape != new[name].shape
    ]
    if wrong:
        raise AdapterMismatchError(
            "cannot take the difference, expected the same parameters on both sides, as of a model and a fine-tune of "
            f"it:{listing(wrong)}"
        )


def _difference(name: str, old: Tensor, new: Tensor, indices: Tensor, dtype: torch.dtype) -> SparseDelta:
    values = new.flatten()[indices].float() - old.flatten()[indices].float()
    try:
        return SparseDelta(indices.cpu(), values.to(dtype).cpu(), tuple(old.shape))
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{name}: {error}") from None
