"""Check that an adapter fits exported models: names, shapes, and the base it was trained on. Nothing is written."""

from collections.abc import Mapping

import numpy as np

from shira_diffusers.adapters.base_match import ROUNDING, UNDERFLOW, BaseMatch, match, trained_on
from shira_diffusers.edge.adapter import ArrayAdapter
from shira_diffusers.edge.exported import ExportedWeights
from shira_diffusers.edge.switch import Entries, SwitchedWeights
from shira_diffusers.errors import AdapterMismatchError, counted, listing, verb
from shira_diffusers.formats.format_1 import Sparse
from shira_diffusers.formats.safetensors_bytes import Raw


def fit(adapter: ArrayAdapter, models: Mapping[str, SwitchedWeights]) -> dict[str, Entries]:
    """The adapter's entries by component.

    Raises:
        AdapterMismatchError: it fits nothing or fits in part; all offenders are named.
    """
    deltas: dict[str, dict[str, Sparse]] = {}
    wrong: list[str] = []
    for full_name, delta in adapter.deltas.items():
        component, _, name = full_name.partition(".")
        own = models[component].weights.own_name(name) if component in models else None
        if own is None:
            wrong.append(f"{full_name}: no such parameter in the exported models, which are {', '.join(models)}")
        elif models[component].weights.shape(own) != delta.shape:
            wrong.append(f"{full_name}: expected {models[component].weights.shape(own)}, got {delta.shape}")
        elif own in deltas.setdefault(component, {}):
            wrong.append(f"{full_name}: means the same parameter as another name in the adapter")
        else:
            deltas[component][own] = delta
    if wrong:
        raise AdapterMismatchError(
            f"adapter does not fit: {counted(len(wrong), 'parameter', of=len(adapter.deltas))} "
            f"{verb(len(wrong), 'differs', 'differ')}{trained_on(adapter.metadata)}; use it with an export of the "
            f"model it was trained for:{listing(wrong)}"
        )
    return {component: _entries(models[component].weights, own) for component, own in deltas.items()}


def _entries(weights: ExportedWeights, deltas: Mapping[str, Sparse]) -> Entries:
    """Deltas end to end in the order of memory, so that a switch walks through it once."""
    parts = {name: weights.positions(name, delta.indices) for name, delta in deltas.items()}
    names = sorted((name for name in parts if len(parts[name])), key=lambda name: parts[name].min())
    empty = np.empty(0, np.int32)
    positions = np.concatenate([empty, *(parts[name] for name in names)])
    values = [deltas[name].values for name in names]
    dtype = values[0].dtype if len({raw.dtype for raw in values}) == 1 else "F32"  # which holds all of them exactly
    held = [raw.array if raw.dtype == dtype else raw.to_float32() for raw in values]
    order = np.argsort(positions, kind="stable")
    counts = tuple(len(parts[name]) for name in names)
    joined = np.concatenate(held)[order] if held else np.empty(0, np.float32)
    return Entries(positions[order], Raw(dtype, joined), tuple(names), counts)


def compare_base(adapter: ArrayAdapter, models: Mapping[str, SwitchedWeights]) -> BaseMatch | None:
    """Whether the models are the base that an adapter was trained on, whatever is active; None without probes."""
    if not adapter.base_probes:
        return None
    expected, got, allowed = [], [], []
    for full_name, probe in adapter.base_probes.items():
        component, _, name = full_name.partition(".")
        model, values = models[component], probe.to_float32().astype(np.float64)
        own = model.weights.own_name(name) or name
        now = model.base_at(model.weights.positions(own, adapter.deltas[full_name].indices[: len(values)]))
        expected.append(values)
        got.append(now.astype(np.float64))
        allowed.append((ROUNDING + float(np.finfo(now.dtype).eps)) * np.abs(values) + UNDERFLOW)
    return match(np.concatenate(expected), np.concatenate(got), np.concatenate(allowed))
