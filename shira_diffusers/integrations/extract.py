"""Extract an adapter from a fine-tuned model on disk: the top entries of its difference from the base."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_model, single_file_utils
from torch import Tensor

from shira_diffusers.adapters.adapter import ShiraAdapter, require_same_weights
from shira_diffusers.adapters.base_probes import probe_base, probed_names
from shira_diffusers.errors import AdapterFormatError, AdapterMismatchError
from shira_diffusers.formats.checkpoint import Checkpoint, StoredWeight, read_checkpoint
from shira_diffusers.formats.lora import Progress, watched
from shira_diffusers.formats.shira_file import read_safetensors
from shira_diffusers.integrations.single_file import rows_by_name
from shira_diffusers.masks.sparsify import Ranking, SparseUpdate, require_density, sparsify
from shira_diffusers.weights.text_model import PREFIX

# What diffusers raises for a checkpoint that is none of the architecture.
_MAPPING = (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError)


def extract_adapter(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    density: float = 0.02,
    *,
    ranking: Ranking = "global",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> SparseUpdate:
    """Keep the top entries of what a fine-tuned model changes. Neither model is loaded: weights are read one by one.

    Args:
        base: the folder of a pipeline or of one model, or a ``.safetensors`` file; sharded or not.
        tuned: the same after training. Beside the folder of a pipeline also a single file of one of its models, or an
            original checkpoint (``model.diffusion_model...``), whose keys diffusers maps; text encoders other than
            Stable Diffusion 1's are left out of those. Of two original checkpoints the autoencoder is left out, and
            what is stored transposed.
        density: the fraction of entries to keep, in (0, 1], of the weights that differ.
        ranking: ``global`` keeps this fraction of all weights together, ``layer`` of each weight.
        dtype: of the values; the difference is taken in float32 and rounded once.
        progress: called after each weight, per pass over them.

    Returns:
        The adapter, and the report: how much of the difference's energy (squared norm) survives. Components that only
        one of the two has are left out. Applied to the base, the adapter at density 1 gives the tuned model, to
        rounding.

    Raises:
        FileNotFoundError: there is no such model.
        AdapterFormatError: a file that is damaged, or differences that are not finite.
        AdapterMismatchError: other names or shapes, or nothing differs.
        ShiraError: density or ranking.
    """
    require_density(density)
    old, new = read_checkpoint(Path(base)), read_checkpoint(Path(tuned))
    if "" in old and "" in new:
        old, new = _by_component(old), _by_component(new)
    before, after = _side_by_side(Path(base), old, Path(tuned), new)
    updates = _Differences(before, after)
    deltas, report = sparsify(
        partial(watched, updates, progress), density, ranking=ranking, dtype=dtype, by_component="" not in old
    )
    probes = dict[str, Tensor]()
    for name in probed_names(deltas):
        probes |= probe_base({name: deltas[name]}, {name: before[name].read()})
    metadata = {"source": "difference", "base_model": str(base), "tuned_model": str(tuned), "mask": f"top-{ranking}"}
    return SparseUpdate(ShiraAdapter(deltas, metadata | {"energy_kept": f"{report.total.kept:.4f}"}, probes), report)


class _Differences:
    """``after - before``, float32, of the weights that differ: ``Updates`` for ``sparsify``."""

    def __init__(self, before: Mapping[str, StoredWeight], after: Mapping[str, StoredWeight]) -> None:
        self._before, self._after = before, after

    def __len__(self) -> int:
        return len(self._before)

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        for name, old in self._before.items():
            difference = self._after[name].read().float() - old.read().float()
            if bool(difference.any()):
                yield name, difference


def _by_component(model: Checkpoint) -> Checkpoint:
    """An original checkpoint's weights by component, as a pipeline names them; another model as it is."""
    found: Checkpoint = {}
    for name, rows in rows_by_name({key: weight.shape for key, weight in model[""].items()}).items():
        part, _, own = name.partition(".")
        whole = model[""][rows.key]
        read = partial(_rows_of, whole, slice(rows.first, rows.first + rows.height))
        own = own.removeprefix(PREFIX)
        found.setdefault(part, {})[own] = StoredWeight((rows.height, *whole.shape[1:]), read)
    return found or model


def _rows_of(whole: StoredWeight, rows: slice) -> Tensor:
    return whole.read()[rows]


def _side_by_side(
    base: Path, old: Checkpoint, tuned: Path, new: Checkpoint
) -> tuple[dict[str, StoredWeight], dict[str, StoredWeight]]:
    """Both models' weights by the same full names."""
    if "" in new and "" not in old:
        new = _placed(base, old, tuned, new[""])
    elif "" in old and "" not in new:
        new = next(({"": part} for part in new.values() if part.keys() == old[""].keys()), new)
    parts = [part for part in old if part in new]
    if not parts:
        raise AdapterMismatchError(
            f"the two models have no component in common: {', '.join(map(repr, old))} and {', '.join(map(repr, new))}; "
            "give two folders, or two files, of the same architecture"
        )
    before, after = (
        {f"{part}.{name}".removeprefix("."): w for part in parts for name, w in model[part].items()}
        for model in (old, new)
    )
    before, after = _once(before, after), _once(after, before)
    require_same_weights(before, after)
    return before, after


def _once(weights: dict[str, StoredWeight], others: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """Without tied weights that are stored a second time, by a name which the other model does not have."""
    shared = [weight for name, weight in weights.items() if name in others]
    return {name: own for name, own in weights.items() if name in others or not _is_stored_in(shared, own)}


def _is_stored_in(weights: Iterable[StoredWeight], one: StoredWeight) -> bool:
    alike = [each for each in weights if each.shape == one.shape]
    if not alike:
        return False
    own = one.read()  # once: it may be large
    return any(torch.equal(each.read(), own) for each in alike)


def _placed(base: Path, old: Checkpoint, tuned: Path, weights: dict[str, StoredWeight]) -> Checkpoint:
    """A model alone beside a pipeline's folder: one of its models, or an original checkpoint of all of them."""
    found = {part: weights for part in old if old[part].keys() == weights.keys()}
    if len(found) == 1 or not tuned.is_file():
        return found or {"": weights}
    tensors, _ = read_safetensors(tuned)  # mapped: what is not looked at is not read
    mapped = {part: _mapped(base / part / "config.json", tensors) for part in old}
    return {part: own for part, own in mapped.items() if own} or {"": weights}


def _mapped(config_file: Path, tensors: Mapping[str, Tensor]) -> dict[str, StoredWeight]:
    """An original checkpoint's weights of one component by diffusers' names; none where it has none.

    Args:
        tensors: of the file, ``(out, ...)`` each, by its own keys.

    Raises:
        AdapterFormatError: a config that is damaged.
    """
    config = _config(config_file)
    known: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES.get(config.get("_class_name", ""))
    try:
        if known is not None:
            found = known["checkpoint_mapping_fn"](config=config, checkpoint=dict(tensors))
        elif config.get("model_type") == "clip_text_model":
            found = single_file_utils.convert_ldm_clip_checkpoint(dict(tensors))
        else:
            return {}
    except _MAPPING:
        return {}
    return {
        name.removeprefix(PREFIX): StoredWeight(tuple(own.shape), own.detach)
        for name, own in found.items()
        if own.is_floating_point()
    }


def _config(file: Path) -> dict[str, Any]:
    """A component's config; empty where it has none."""
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{file} is not JSON ({error}); get an intact copy") from error
    if not isinstance(config, dict):
        raise AdapterFormatError(f"{file} is no model's config: expected a JSON object; get an intact copy")
    return config
