"""Write a plain checkpoint with a mix in its weights: a diffusers folder, or a single file with its own keys.

In: a checkpoint on disk, adapters and their strengths. Out: a copy of it, in which the adapted tensors have the bits of
a resident pipeline with that mix. One tensor at a time is in memory; the engine itself computes its bits.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.base_probes import match_base
from shira_diffusers.adapters.scales import check_scale
from shira_diffusers.atomic_write import made_whole
from shira_diffusers.engine.resident import Resident
from shira_diffusers.errors import AdapterMismatchError, ShiraError, counted, listing, verb
from shira_diffusers.formats.checkpoint import require_shards
from shira_diffusers.formats.find import safetensors_in
from shira_diffusers.formats.paths import OTHER_WEIGHTS, SUFFIX, did_you_mean, is_hub_id, shown_in
from shira_diffusers.formats.safetensors_bytes import Span, spans_of
from shira_diffusers.integrations.single_file import rows_by_name
from shira_diffusers.weights.scatter import gather
from shira_diffusers.weights.text_model import other_name

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

Mix = Mapping[str, tuple[ShiraAdapter, float]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a weight is: in which tensor of which file, and which rows of that it is."""

    file: Path
    span: Span
    first: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.span.shape[1:]) if self.span.shape else ()


@dataclass(frozen=True, slots=True)
class Baked:
    """What was written.

    Args:
        output: the folder or file.
        weights: how many weights were changed.
        files: those of them that were changed, relative to a folder.
        left_out: files of weights that were not copied, since they are without the mix.
        strangers: the adapters that were trained on another base, by the base values that they keep.
    """

    output: Path
    weights: int
    files: list[str]
    left_out: list[str]
    strangers: list[str]


def bake_checkpoint(
    base: str | os.PathLike[str],
    mix: Mix,
    output: str | os.PathLike[str],
    progress: Progress = lambda done, total: None,
) -> Baked:
    """Copy a checkpoint with a mix of adapters in its weights.

    Args:
        base: a diffusers folder, the folder of a single model, or a ``.safetensors`` file of either or of Stable
            Diffusion's original layout, whose keys and metadata stay.
        mix: by name; adapters are added in the order of names, as in a resident pipeline.
        output: a name not in use.
        progress: called with the bytes done and those to do.

    Returns:
        What was written: each weight has the bits that it has in a pipeline which was loaded in the file's dtype and in
        which this mix is active.

    Raises:
        ShiraError: there is no such base, links in it that lead nowhere or back, the output exists, a strength that is
            no finite number, or sums out of the range of the weights' dtype.
        AdapterMismatchError: an adapter does not fit, wholly or in part; all offenders are named.
        AdapterFormatError: a damaged file of weights, or none where an index names one.
        OSError: a file cannot be read or written.

    On error nothing has been written.
    """
    base, output = Path(base), Path(output)
    _require_new(base, output)
    for title, (_, strength) in mix.items():
        check_scale(title, strength, {})
    held = list(_files(base)) if base.is_dir() else [base]
    places = _find(base, sorted({name for adapter, _ in mix.values() for name in adapter.deltas}))
    _require_fit(base, places, mix)
    touched = {place.file.parent for found in places.values() for place in found}
    copied, left_out = _sorted_out(base, held, touched)
    tensors = _by_tensor(places)
    total = sum(map(os.path.getsize, copied)) + sum(span.end - span.start for own in tensors.values() for span in own)
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    bases: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with made_whole(output) as temporary:
        for file in copied:
            _copy(file, temporary / file.relative_to(base))
            count(os.path.getsize(file))
        for file, own in tensors.items():
            _rewrite(temporary / file.relative_to(base), own, mix, bases, count)
    strangers = [name for name, pairs in bases.items() if pairs and match_base(pairs) == "other"]
    files = [file.relative_to(base).as_posix() for file in tensors] if base.is_dir() else [output.name]
    return Baked(output, len(places), files, left_out, strangers)


def _require_new(base: Path, output: Path) -> None:
    if not base.exists():
        first = f"; download it first: hf download {base} --local-dir FOLDER" if is_hub_id(str(base)) else ""
        expected = f"expected a diffusers folder or a {SUFFIX} file"
        raise ShiraError(f"no checkpoint at {base}: {expected}{did_you_mean(base) or first}")
    if output.exists():
        raise ShiraError(
            f"{output} exists, expected a new {'folder' if base.is_dir() else 'file'}; choose another name"
        )
    if base.is_file() and output.suffix.lower() != SUFFIX:
        raise ShiraError(f"{base} is a single file: expected an output that ends in {SUFFIX}, got {output}")
    if not output.absolute().parent.is_dir():
        raise ShiraError(f"cannot write {output}: expected a name in a folder that exists; make the folder first")


def _find(base: Path, names: Iterable[str]) -> dict[str, list[_Place]]:
    """The places of weights; several where a folder has variants of a model's weights, none where there is none."""
    if base.is_file():
        return _find_in_file(base, list(names))
    is_pipeline = (base / "model_index.json").is_file()
    found: dict[str, list[_Place]] = {}
    spans: dict[Path, dict[str, Span]] = {}
    lacking: dict[Path, list[str]] = {}
    for name in names:
        part, _, rest = name.partition(".") if is_pipeline else ("", "", name)
        files = safetensors_in(base / part)
        spans |= {file: spans_of(file) for file in files if file not in spans}
        found[name] = [_whole(file, spans[file][key]) for file in files for key in _aliases(rest) if key in spans[file]]
        if not found[name]:
            lacking.setdefault(base / part, []).extend(_aliases(rest))
    for folder, keys in lacking.items():
        require_shards(folder, keys)
    return found


def _find_in_file(file: Path, names: list[str]) -> dict[str, list[_Place]]:
    """As ``_find``: by the original layout's names, by the adapter's, or without the component, if there is but one."""
    spans = spans_of(file)
    rows = rows_by_name({key: span.shape for key, span in spans.items()})
    places = {key: _whole(file, span) for key, span in spans.items()}
    places |= {name: _Place(file, spans[key], first, count) for name, (key, first, count) in rows.items()}
    of_one = len({name.partition(".")[0] for name in names}) == 1
    found: dict[str, list[_Place]] = {}
    for name in names:
        part, _, rest = name.partition(".")
        wanted = [name, *(f"{part}.{own}" for own in _aliases(rest)), *(_aliases(rest) if of_one else ())]
        found[name] = [places[key] for key in wanted if key in places][:1]
    return found


def _whole(file: Path, span: Span) -> _Place:
    return _Place(file, span, 0, span.shape[0] if span.shape else 1)


def _aliases(name: str) -> tuple[str, str]:
    return name, other_name(name)


def _require_fit(base: Path, places: Mapping[str, list[_Place]], mix: Mix) -> None:
    wrong = [f"{name}: no such tensor" for name, found in places.items() if not found]
    for adapter, _ in mix.values():
        wrong += [
            f"{name}: expected {place.shape}, got {delta.shape}"
            for name, delta in adapter.deltas.items()
            for place in places[name]
            if place.shape != delta.shape
        ]
    wrong += [
        f"{name}: values of dtype {place.span.dtype}, expected one of {', '.join(_DTYPES)}"
        for name, found in places.items()
        for place in found
        if place.span.dtype not in _DTYPES
    ]
    if not places:
        raise AdapterMismatchError("the mix holds no deltas: there is nothing to bake")
    if wrong:
        raise AdapterMismatchError(
            f"the mix does not fit {base}: {counted(len(wrong), 'weight', of=len(places))} "
            f"{verb(len(wrong), 'differs', 'differ')}; use it with the model it was trained for:{listing(wrong)}"
        )


def _sorted_out(base: Path, files: Iterable[Path], touched: set[Path]) -> tuple[list[Path], list[str]]:
    """The files to copy, and by relative name those to leave out: weights that would be there once more, unchanged."""
    copied, left_out = [], []
    for file in files:
        is_root = file.parent == base and base not in touched
        suffix = file.suffix.lower()
        if (suffix in OTHER_WEIGHTS and file.parent in touched) or (is_root and suffix in (SUFFIX, *OTHER_WEIGHTS)):
            left_out.append(file.relative_to(base).as_posix())
        else:
            copied.append(file)
    return copied, left_out


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files that are not hidden. Raises ShiraError: a link to nothing, or to a folder that it is in."""
    above = (*above, folder.resolve())
    for path in shown_in(folder):
        if path.is_file():
            yield path
        elif not path.is_dir() or path.resolve() in above:
            what = "links to a folder that it is in" if path.is_dir() else "links to nothing, or is no file"
            raise ShiraError(f"{path} {what}: expected files and folders that can be copied; mend or remove it")
        else:
            yield from _files(path, above)


def _by_tensor(places: Mapping[str, list[_Place]]) -> dict[Path, dict[Span, dict[str, _Place]]]:
    """The weights in each tensor of each file."""
    found: dict[Path, dict[Span, dict[str, _Place]]] = {}
    for name, own in places.items():
        for place in own:
            found.setdefault(place.file, {}).setdefault(place.span, {})[name] = place
    return dict(sorted(found.items()))


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)


def _rewrite(
    file: Path,
    tensors: Mapping[Span, Mapping[str, _Place]],
    mix: Mix,
    bases: dict[str, list[tuple[Tensor, Tensor]]],
    count: Callable[[int], None],
) -> None:
    """Write the mix into some tensors of a file, one after the other.

    Args:
        bases: takes, by adapter, its probes and what the base held there.
        count: called with the bytes of each tensor when it is written.
    """
    with open(file, "r+b") as raw:
        for span, places in tensors.items():
            _rewrite_tensor(raw, span, places, mix, bases)
            count(span.end - span.start)
        raw.flush()
        os.fsync(raw.fileno())


def _rewrite_tensor(
    raw: BufferedRandom,
    span: Span,
    places: Mapping[str, _Place],
    mix: Mix,
    bases: dict[str, list[tuple[Tensor, Tensor]]],
) -> None:
    content = bytearray(span.end - span.start)
    raw.seek(span.start)
    raw.readinto(content)
    tensor = torch.frombuffer(content, dtype=_DTYPES[span.dtype]).view(span.shape)
    weights = {
        name: tensor[place.first : place.first + place.count] if span.shape else tensor
        for name, place in places.items()
    }
    for title, (adapter, _) in mix.items():
        bases.setdefault(title, []).extend(_probed(adapter, weights))
    _overwrite(weights, mix)
    raw.seek(span.start)
    raw.write(content)


def _probed(adapter: ShiraAdapter, weights: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The probes of an adapter, float ``(k,)``, and what weights of any shape hold there."""
    for name in sorted(adapter.base_probes.keys() & weights.keys()):
        probe = adapter.base_probes[name]
        yield probe, gather(weights[name], adapter.deltas[name].indices[: probe.numel()])


def _overwrite(weights: Mapping[str, Tensor], mix: Mix) -> None:
    """Put a mix into weights, each of any shape, as a resident model does."""
    resident = Resident(_module_of(weights))
    for title, (adapter, _) in mix.items():
        deltas = {name: delta for name, delta in adapter.deltas.items() if name in weights}
        if deltas:
            resident.add(ShiraAdapter(deltas), title)
    resident.set({title: mix[title][1] for title in resident.names})


def _module_of(weights: Mapping[str, Tensor]) -> nn.Module:
    """A module with these parameters, each of any shape, by their dotted names."""
    root = nn.Module()
    for name, weight in weights.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        module.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
    return root
