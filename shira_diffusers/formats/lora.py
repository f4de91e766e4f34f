"""Read LoRA files of diffusers, kohya and PEFT as dense updates of a model's weights, and convert them.

In: a file, and the model that it is for. Out: each weight's update as diffusers or PEFT itself would fuse it, one at a
time. Their own loaders map the keys: they load into a hollow copy of the model, its layers without their memory.
"""

import copy
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.base_probes import probe_base, probed_names
from shira_diffusers.engine.resident import Resident
from shira_diffusers.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    ResidentStateError,
    ShiraError,
    counted,
    listing,
    verb,
)
from shira_diffusers.formats.find import PEFT_CONFIG, PEFT_WEIGHTS, find_lora
from shira_diffusers.formats.header import FORMAT, PREFIX, VALUES, is_lora_key
from shira_diffusers.formats.safetensors_bytes import open_safetensors
from shira_diffusers.formats.shira_file import read_safetensors
from shira_diffusers.masks.activations import ActivationChooser
from shira_diffusers.masks.sparsify import Chooser, Ranking, SparseUpdate, require_density, sparsify
from shira_diffusers.weights.finder import WeightMap, unwrap
from shira_diffusers.weights.targets import canonical_name, parts_of

Progress = Callable[[int, int], object]
"""Called with how many of how many steps are done."""
Convert = Callable[[Any], list[Any]]
"""A file, or its tensors, to the tensors by diffusers' keys, and what else its loader wants to know."""

_NAME = "shira_convert"  # of the adapter in the hollow copy
_SCALE, _DOWN, _MID = ".dora_scale", ".lora_down.weight", ".lora_mid.weight"  # of kohya's trainers and LyCORIS
_ALPHA = ".alpha"
_CONFIG = "lora_adapter_metadata"  # PEFT's configurations in a header, by component, as diffusers writes them
# A layer's path, its down matrix and the rest, as each tool writes them.
_PAIR = re.compile(r"(.*?)[._](lora_A|lora_down|lora\.down|lora_linear_layer\.down|down)(\.(?:\w+\.)?weight)")
_FACTOR = re.compile(r"lora[._](A|B|down|up|mid|linear_layer)\b.*\.weight$")
_FLUX = re.compile(r"(?:diffusion_model\.|base_model\.model\.)?(?:double|single)_blocks\.")  # its own names of blocks
_MATRIX = re.compile(r"lora_A|lora_down|lora\.down|lora_linear_layer\.down|lokr_w1(_a)?$")  # one key per layer
_PLAIN = re.compile(
    r"lora\d?[._](A|B|down|up|mid|embedding_[AB]|magnitude_vector|linear_layer)\b|\.lokr_|alpha$|\.dora_scale$"
)  # keys of tensors that make an update of weights together with the base, and with nothing else
_LAYER = re.compile(r"(.*?)(\.(?:lora|lokr|hada|oft|vera)_.*)")  # a layer's path in PEFT's keys, and the rest
# What offloading and hooks attach to modules; it holds weights or refers to other modules, and hollow ones never run.
_ATTACHED = ("_hf_hook", "_diffusers_hook", "_old_forward", "forward")
# What diffusers, PEFT and torch raise for keys that they do not know and shapes that do not fit.
_LOADING = (
    ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, NotImplementedError, AssertionError,
    ImportError,
)  # fmt: skip
_REMEDY = (
    "use it with the architecture it was trained for; if this is it, diffusers does not know its keys: merge it into "
    "the base with the program that made it, and use shira extract"
)
_KINDS = ("LORA", "LOHA", "LOKR", "OFT")  # of PEFT's methods
# Of PEFT's MonteCLoRA, a LoRA whose A has noise while it is trained, and none when it draws or is merged. PEFT would
# draw the noise when it loads: buffer_size * num_samples times the numbers of A for each layer, by default 1,200 times.
_NOISE = ".lora_monteclora_sampler."
# Starts of PEFT's that take something away from the base, and do so again when the LoRA is loaded.
_RESIDUAL_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@torch.no_grad()
def convert_lora(
    source: str | os.PathLike[str],
    target: Any,
    density: float = 0.02,
    *,
    ranking: Ranking = "global",
    calibration: Callable[[], object] | None = None,
    dtype: torch.dtype = torch.float32,
    component: str | None = None,
    progress: Progress | None = None,
) -> SparseUpdate:
    """Convert a LoRA to a SHiRA adapter: the top entries of each dense update ``scale * B A``.

    Args:
        source: a ``.safetensors`` file of diffusers or kohya, or the folder that PEFT or diffusers wrote. Convolutions
            (LoCon), ``alpha``, text encoders and DoRA are read as diffusers and PEFT fuse them; LyCORIS' ``dora_scale``
            per output, which diffusers leaves out, is read too.
        target: the pipeline that it is for, ``{component: module}``, or a module. Its mix is put aside meanwhile, and
            others that read or switch wait.
        density: the fraction of entries to keep, in (0, 1].
        ranking: ``global`` keeps this fraction of all weights together, ``layer`` of each weight.
        calibration: runs ``target`` on a few inputs. Entries are then chosen by ``abs(dW_ij) * sqrt(E[x_j^2])``, and
            their values corrected to reproduce the whole update's effect on these inputs (``masks.activations``).
        dtype: of the values.
        component: the model to convert for; what the file has for others is left out. Needed where the file does not
            say which one it is for, and fits several.
        progress: called after each weight, per pass over them.

    Returns:
        The adapter, on the CPU, and the report: how much of the update's energy (squared norm) survives. At density 1
        and in float32, the adapter gives the weights that ``fuse_lora`` gives, to rounding.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFormatError: a damaged file, no LoRA, or one that changes the model in other ways too, such as
            LyCORIS' LoHa, or biases.
        AdapterMismatchError: layers that the model does not have, or of other shapes.
        ResidentStateError: weights that cannot be read or overwritten, such as quantized ones.
        ShiraError: density or ranking; no such component, or several that fit; PEFT is not installed.

    On error, and after, the target is as before.
    """
    require_density(density)
    file = find_lora(Path(source))
    models = parts_of(target)
    with Resident(models).using({}):
        with torch.device("cpu"):  # diffusers and PEFT make layers on the default device
            updates = LoraUpdates(file, target, component)
        chooser = ActivationChooser(updates.layers(), calibration) if calibration else Chooser()
        deltas, report = sparsify(
            partial(watched, updates, progress),
            density,
            ranking=ranking,
            chooser=chooser,
            dtype=dtype,
            by_component=not isinstance(models, nn.Module),
        )
        probes = probe_base(deltas, {name: updates.weight(name) for name in probed_names(deltas)})
    metadata = {"source": "lora", "lora": file.name, "mask": f"top-{ranking}"}
    metadata |= {"energy_kept": f"{report.total.kept:.4f}"}
    if isinstance(chooser, ActivationChooser):
        metadata |= {"calibrated": "1", "effect_kept": f"{chooser.effect_kept:.4f}"}
    base = getattr(target, "name_or_path", None)  # of pipelines and of transformers' models
    return SparseUpdate(ShiraAdapter(deltas, metadata | ({"base_model": base} if base else {}), probes), report)


def watched(updates: Any, progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
    """The updates of one pass, reported one by one: names, and float32 ``(out, ...)``."""
    for number, update in enumerate(updates(), 1):
        yield update
        if progress:
            progress(number, len(updates))


class LoraUpdates:
    """The dense updates of a LoRA file, by name: ``Updates`` for ``sparsify``.

    Args:
        file: as ``find_lora`` gives it.
        target: a pipeline, ``{component: module}``, or a module; its weights are read for DoRA, never written.
        component: as for ``convert_lora``.

    Raises:
        AdapterFormatError, AdapterMismatchError, ShiraError: as ``convert_lora``.
    """

    def __init__(self, file: Path, target: Any, component: str | None = None) -> None:
        parts = parts_of(target)
        models = {"": parts} if isinstance(parts, nn.Module) else dict(parts)
        self._maps = {part: WeightMap(model) for part, model in models.items()}
        self._magnitudes: dict[str, Tensor] = {}
        _require_component(component, models)
        if file.is_dir():
            part, state = _peft_state(file, self._maps, component)
            hollow = {part: _hollow(models[part])}
            _inject_folder(file, hollow[part], state)
            self._layers = _adapted(hollow)
            _require_weights_only(file, self._layers)
            return
        tensors = _lora_tensors(file)
        load = partial(_load, file, target, models, component)
        scales = {key: tensor for key, tensor in tensors.items() if key.endswith(_SCALE)}
        plain = _with_alphas(_in_two_factors({key: tensor for key, tensor in tensors.items() if key not in scales}))
        self._layers = load(file if all(plain.get(key) is own for key, own in tensors.items()) else plain)
        if any(key.endswith(_ALPHA) for key in tensors):
            for layer in self._layers.values():
                layer.scaling[_NAME] = 1.0  # the matrices have the alphas now; diffusers 0.36 mistakes the rest
        if scales:
            self._magnitudes = _by_weight(plain | scales, load)

    def __len__(self) -> int:
        return len(self._layers)

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight's name and dense update, float32 ``(out, ...)``, on the weight's device."""
        for name, layer in self._layers.items():
            weight = self.weight(name)
            yield name, _dense(name, layer, weight, self._magnitudes.get(name)).to(weight.device)

    def weight(self, name: str) -> Tensor:
        """The model's own weight ``(out, ...)``."""
        part, own = self._split(name)
        return self._maps[part][own]

    def layers(self) -> dict[str, nn.Module]:
        """The model's own layers, by the names of their weights."""
        return {name: self._maps[part].layer(own) for name in self._layers for part, own in [self._split(name)]}

    def _split(self, name: str) -> tuple[str, str]:
        part, _, own = name.partition(".")
        return ("", name) if "" in self._maps else (part, own)


def _require_component(component: str | None, models: Mapping[str, nn.Module]) -> None:
    if component is not None and "" in models:
        raise ShiraError(f"component {component!r} of a single model, expected none; leave it out, or give a pipeline")
    if component is not None and component not in models:
        raise ShiraError(f"no component {component!r}, expected one of {', '.join(models)}")


def _hollow(model: nn.Module) -> nn.Module:
    """A copy of a model with parameters of the same shapes, float32 on the CPU, that take no memory.

    Raises:
        ResidentStateError: a LoRA is fused into the weights.
    """
    root = unwrap(model)
    if any(getattr(module, "merged", False) for module in root.modules()):
        raise ResidentStateError(f"{type(root).__name__} has a LoRA fused into its weights; call unfuse_lora() first")
    memo: dict[int, Any] = {
        id(own): nn.Parameter(torch.zeros(()).expand(own.shape), requires_grad=False) for own in root.parameters()
    }
    attached = [vars(module)[name] for module in root.modules() for name in _ATTACHED if name in vars(module)]
    found = copy.deepcopy(root, memo | {id(each): object() for each in attached})
    for module in found.modules():
        for name in _ATTACHED:
            vars(module).pop(name, None)
    if hasattr(found, "load_adapter"):  # of transformers, which refuses versions of PEFT that serve here
        vars(found)["load_adapter"] = partial(_inject, found)
    return found


def _inject(
    model: nn.Module, peft_config: Any, adapter_state_dict: Mapping[str, Tensor], adapter_name: str, **_: Any
) -> None:
    """Put the layers of a LoRA into a model, as ``load_adapter`` of transformers' models does.

    Args:
        adapter_state_dict: PEFT's keys without a prefix; any shapes, which PEFT checks.
    """
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    if not hasattr(model, "text_model"):
        _leave_out_text_model(peft_config)
    inject_adapter_in_model(peft_config, model, adapter_name, state_dict=dict(adapter_state_dict))
    found: Any = set_peft_model_state_dict(model, dict(adapter_state_dict), adapter_name)
    if found.unexpected_keys:
        raise ValueError(f"no layer for {', '.join(found.unexpected_keys[:3])}")
    if missing := [key for key in found.missing_keys if f".{adapter_name}" in key]:
        raise ValueError(f"incomplete, without {', '.join(missing[:3]).replace(f'.{adapter_name}', '')}")


def _leave_out_text_model(config: Any) -> None:
    """Name layers in patterns as transformers does from 5.6 on, which dropped ``text_model.`` from CLIPTextModel."""
    for each in ("rank_pattern", "alpha_pattern"):
        if pattern := getattr(config, each, None):
            setattr(config, each, {re.sub(r"\btext_model\\?\.", "", key): own for key, own in pattern.items()})


def _adapted(models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Full name of a weight -> PEFT's layer over it, of those that were just loaded."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        f"{part}.{canonical_name(path)}.weight".removeprefix("."): layer
        for part, model in models.items()
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
        and any(_NAME in getattr(layer, each, ()) for each in layer.adapter_layer_names)
    }


# -------------------------------------------------------------------- files of diffusers and kohya


def _lora_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that holds a LoRA. Raises AdapterFormatError: another file."""
    tensors, metadata = read_safetensors(file)
    if metadata.get("format") == FORMAT:
        raise AdapterFormatError(f"{file} is a SHiRA adapter already, expected a LoRA; load it with load_shira")
    if not any(map(is_lora_key, tensors)):
        first = next(iter(tensors), "none")
        raise AdapterFormatError(
            f"{file} is no LoRA: expected keys with lora_A, lora_down or lora.down, got {first!r} first; check the path"
        )
    if others := [key for key, tensor in tensors.items() if not _PLAIN.search(key) and bool(tensor.any())]:
        raise AdapterFormatError(
            f"{file} is more than a LoRA or a LoCon: {counted(len(others), 'tensor', of=len(tensors))} "
            f"{verb(len(others), 'is', 'are')} of another kind; merge it into the base with the program that made it, "
            f"and use shira extract:{listing(others)}"
        )
    if any(key.startswith(PREFIX) for key in tensors) and not any(map(_FLUX.match, tensors)):
        raise AdapterFormatError(
            f"{file} is PEFT's and needs the {PEFT_CONFIG} that was saved beside it, which has lora_alpha; "
            "put both into one folder"
        )
    if flat := [f"{key}: {tuple(own.shape)}" for key, own in tensors.items() if _FACTOR.search(key) and own.ndim < 2]:
        raise AdapterFormatError(
            f"{file} is damaged: expected factors of two dimensions or more, get an intact copy:{listing(flat)}"
        )
    if config := metadata.get(_CONFIG):
        _require_plain_header(file, config, tensors)
    return tensors


def _require_plain_header(file: Path, text: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterFormatError where the configuration in a header is damaged, or not all that tells scales."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise AdapterFormatError(
            f"{file} cannot be read, its header is damaged: expected a JSON object as {_CONFIG}, got {text!r:.60}; get "
            "an intact copy"
        )
    if told := next((key for key in tensors if key.endswith((_ALPHA, _SCALE, _MID))), None):
        raise AdapterFormatError(
            f"{file} says scales twice: in its header ({_CONFIG}), and in {told}; expected one of them, as diffusers "
            "does: save it without the other"
        )
    _require_ranks(file, config, tensors)


def _require_ranks(file: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterFormatError where a configuration has ranks that no tensor has: PEFT would allocate them first.

    Args:
        config: PEFT's; where it is for several components, their names are before its own.
        tensors: ``(r, in)``, ``(out, r)`` and so on.
    """
    if any(".lokr_" in key for key in tensors):
        return  # whose r may be any number: from some size on, a factor is whole
    found = [config[key] for key in config if key.rpartition(".")[2] in ("r", "rank_pattern")]
    ranks = [rank for each in found for rank in (each.values() if isinstance(each, dict) else [each])]
    widest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    if wrong := [rank for rank in ranks if isinstance(rank, int | float) and rank > widest]:
        raise AdapterFormatError(
            f"{file} claims a rank of {wrong[0]:,}, expected one of {widest} or less, as its tensors have; get an "
            "intact copy"
        )


def _in_two_factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LyCORIS' three factors of a convolution, ``up @ mid @ down``, as two; ``mid @ down`` is ``(r, in, ...)``."""
    found = dict(tensors)
    for key, mid in tensors.items():
        down = key.removesuffix(_MID) + _DOWN
        if key.endswith(_MID) and down in found and mid.shape[1:2] == found[down].shape[:1]:
            found[down] = torch.einsum("rs...,si->ri...", found.pop(key).float(), found[down].float().flatten(1))
    return found


def _pairs(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str]]:
    """Of each layer with both its matrices, in order: its path, and the keys of down ``(r, in, ...)`` and of up."""
    for key in tensors:
        if match := _PAIR.fullmatch(key):
            up = match[2].replace("A", "B").replace("down", "up")
            if (other := f"{key[: match.start(2)]}{up}{match[3]}") in tensors:
                yield match[1], key, other


def _with_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put each layer's ``alpha / r`` into its up matrix ``(out, r, ...)``: diffusers mistakes or ignores some.

    An alpha is r then, which kohya's keys need to have, or gone.
    """
    found = dict(tensors)
    for path, down, up in _pairs(tensors):
        alpha, rank = found.get(path + _ALPHA), len(tensors[down])
        if alpha is None or alpha.numel() != 1 or not rank:
            continue
        found[up] = tensors[up].float() * (float(alpha) / rank)
        if path.startswith("lora_"):
            found[path + _ALPHA] = torch.tensor(float(rank))
        else:
            del found[path + _ALPHA]
    return found


def _numbered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same keys and shapes, with the number of its layer in each down matrix: 1 for the first of ``_pairs``."""
    found = dict(tensors)
    for number, (_, down, up) in enumerate(_pairs(tensors), 1):
        found[down] = torch.full(tensors[down].shape, float(number))
        found[up] = torch.ones(tensors[up].shape)
    return found


def _require_all_taken(file: Path, tensors: Mapping[str, Tensor], convert: Convert, component: str | None) -> None:
    """Raise AdapterFormatError where diffusers leaves out layers of a file when it converts the keys.

    Args:
        tensors: of the file.
        convert: tensors by the file's keys to tensors by diffusers'.
        component: a denoiser's name if the text encoders' layers are not wanted.
    """
    state, pairs = convert(_numbered(tensors))[0], list(_pairs(tensors))
    taken = {float(number) for key, own in state.items() if _MATRIX.search(key) for number in own.unique()}
    others = ("lora_te", "text_encoder") if component and not component.startswith("text_encoder") else ()
    if left := [
        path
        for number, (path, down, up) in enumerate(pairs, 1)
        if number not in taken and not path.startswith(others) and bool(tensors[down].any() and tensors[up].any())
    ]:
        part = counted(len(left), "layer", of=len(pairs))
        raise AdapterFormatError(
            f"{file} has {part} that diffusers cannot load; merge it into the base with the program that made it, and "
            f"use shira extract, or convert one component of it:{listing(left)}"
        )


def _load(
    file: Path,
    target: Any,
    models: Mapping[str, nn.Module],
    component: str | None,
    source: Path | Mapping[str, Tensor],
) -> dict[str, Any]:
    """Let diffusers load a LoRA into hollow models, and return its layers as ``_adapted``.

    Args:
        file: what to call it.
        component: the only one whose layers to return; None is all.
        source: the file, whose header has its configuration, or tensors by key, of any shapes.
    """
    _require_peft()
    hollow = {part: _hollow(model) for part, model in models.items()}
    given = os.fspath(source) if isinstance(source, Path) else dict(source)
    with _quiet(), _loading(file, "diffusers", _REMEDY):
        keys = (
            _load_module(file, hollow[""], given)
            if "" in hollow
            else _load_pipeline(file, target, hollow, given, component)
        )
    for model in hollow.values():
        _require_plain_start(file, getattr(model, "peft_config", {}).get(_NAME))
    layers, expected = _adapted(hollow), sum(bool(_MATRIX.search(key)) for key in keys)
    if len(layers) < expected or not layers:
        raise AdapterMismatchError(
            f"{file} does not fit: {len(layers)} of its {expected} layers are in this model; {_REMEDY}"
        )
    if partly := [name for name, layer in layers.items() if any(each.is_meta for each in layer.parameters())]:
        raise AdapterFormatError(f"{file} is incomplete, get an intact copy; tensors are missing for:{listing(partly)}")
    _require_weights_only(file, layers)
    return layers if component is None else _only(component, layers, file)


def _only(component: str, layers: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The layers of one component. Raises AdapterMismatchError: the file has none for it."""
    found = {name: layer for name, layer in layers.items() if name.startswith(f"{component}.")}
    if not found:
        has = ", ".join(sorted({name.partition(".")[0] for name in layers}))
        raise AdapterMismatchError(f"{file} has nothing for the component {component!r}, expected one of {has}")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of diffusers and PEFT, such as about models that a LoRA does not change."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def _loading(file: Path, program: str, remedy: str) -> Iterator[None]:
    """Raise AdapterMismatchError for what a program raises when it loads a file; AdapterFormatError as it is."""
    try:
        yield
    except AdapterFormatError:
        raise
    except re.error as error:
        raise AdapterFormatError(
            f"{file} cannot be read, its configuration is damaged: {error.pattern!r} is no regular expression "
            f"({error}); get an intact copy"
        ) from error
    except _LOADING as error:
        raise AdapterMismatchError(
            f"{file} cannot be loaded into this model by {program} ({_reason(error)}); {remedy}"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {shorten(str(error), 200, placeholder=' ...')}"


def _load_pipeline(
    file: Path, pipe: Any, hollow: Mapping[str, nn.Module], given: Any, component: str | None
) -> list[str]:
    """Load by the pipeline's own loader; returns diffusers' keys of what it loads."""
    if not hasattr(pipe, "load_lora_weights"):
        raise TypeError(f"{type(pipe).__name__} has no load_lora_weights; give the pipeline itself")
    twin, keys = copy.copy(pipe), list[str]()
    for part, model in hollow.items():
        setattr(twin, part, model)

    def read(source: Any, **options: Any) -> Any:
        def convert(tensors: Any) -> list[Any]:
            found = type(pipe).lora_state_dict(tensors, **options)
            return list(found) if isinstance(found, tuple) else [found]

        tensors = given if isinstance(given, dict) else read_safetensors(file)[0]
        if any(key.startswith(PREFIX) for key in tensors):  # fal's, of which diffusers expects all layers of Flux
            source = tensors = _as_comfyui(tensors)
        state, *rest = convert(source)
        if any(map(_FLUX.match, state or tensors)):  # left as they are
            source = tensors = _as_comfyui(tensors)
            state, *rest = convert(source)
        _require_all_taken(file, tensors, convert, component)
        state = _in_one_notation(_by_component(state, hollow))
        keys.extend(state)
        if rest and rest[0] and all(key.endswith(_ALPHA) for key in rest[0]):
            rest[0] = {}  # _with_alphas has seen to them
        return (state, *rest) if rest else state

    twin.lora_state_dict = read
    second = {"load_into_transformer_2": True} if component == "transformer_2" else {}  # Wan's, named as its first
    twin.load_lora_weights(given, adapter_name=_NAME, use_safetensors=True, **second)
    denoiser = hollow.get(component or "transformer", hollow.get("unet"))
    if denoiser is not None and not _adapted(hollow) and any(".lora_A." in key for key in keys):
        return _load_module(file, denoiser, given)  # what save_lora_adapter wrote, which names no component
    return keys


def _as_comfyui(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flux's own names of layers as ComfyUI and kohya write them; with PEFT's of matrices diffusers knows them not."""
    plain = {key.removeprefix(PREFIX).removeprefix("diffusion_model."): tensor for key, tensor in tensors.items()}
    return {
        f"diffusion_model.{key}".replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
        for key, tensor in plain.items()
    }


def _by_component(state: Mapping[str, Tensor], models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The transformer's layers by ``transformer.``, which diffusers forgets for those outside of Flux's blocks."""
    if not any(key.startswith("transformer.") for key in state):
        return dict(state)
    return {key if key.partition(".")[0] in models else f"transformer.{key}": own for key, own in state.items()}


def _in_one_notation(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' trainers write ``lora.down`` for attention and ``lora_A`` for other layers; its loader expects one."""
    if not any(".lora_A." in key for key in state):
        return dict(state)
    return {key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): own for key, own in state.items()}


def _load_module(file: Path, model: Any, given: Any) -> list[str]:
    """Load into one of diffusers' models, whose keys may begin with its name."""
    keys = list(given) if isinstance(given, dict) else list(open_safetensors(file).tensors)
    first = {key.partition(".")[0] for key in keys}
    prefix = next((each for each in ("unet", "transformer") if first == {each}), None)
    if not hasattr(model, "load_lora_adapter") or any(key.endswith(_DOWN) for key in keys):
        raise TypeError(f"a {type(model).__name__} alone does not know these keys; give the pipeline")
    model.load_lora_adapter(given, prefix=prefix, adapter_name=_NAME, use_safetensors=True)
    return keys


def _by_weight(
    tensors: Mapping[str, Tensor], load: Callable[[Mapping[str, Tensor]], dict[str, Any]]
) -> dict[str, Tensor]:
    """LyCORIS' magnitudes ``(out, 1, ...)`` by the names of the weights, which diffusers does not load.

    Where diffusers puts each layer is seen by loading numbers in place of values.

    Raises:
        AdapterFormatError: magnitudes of another kind, such as per input.
    """
    paths = [path for path, _, _ in _pairs(tensors)]
    numbered = _numbered({key: tensor for key, tensor in tensors.items() if not key.endswith(_SCALE)})
    found, wrong = dict[str, Tensor](), list[str]()
    for name, layer in load(numbered).items():
        key = paths[int(layer.lora_A[_NAME].weight.flatten()[0]) - 1] + _SCALE
        if key not in tensors:
            continue
        rows = layer.get_base_layer().weight.shape[0]
        if tensors[key].shape[:1] != (rows,) or tensors[key].numel() != rows:
            wrong.append(f"{key}: {tuple(tensors[key].shape)}, expected one number for each of {rows} outputs")
        found[name] = tensors[key]
    if wrong:
        raise AdapterFormatError(f"DoRA can be converted with one scale per output only:{listing(wrong)}")
    return found


# -------------------------------------------------------------------- folders of PEFT


def _peft_state(folder: Path, maps: Mapping[str, WeightMap], component: str | None) -> tuple[str, dict[str, Tensor]]:
    """The model that a PEFT folder is for, and its tensors by the model's own names."""
    _require_peft()
    if not (folder / PEFT_WEIGHTS).is_file():
        raise AdapterFormatError(f"{folder} has no {PEFT_WEIGHTS}; save it with safe_serialization=True")
    tensors = {key: own for key, own in read_safetensors(folder / PEFT_WEIGHTS)[0].items() if _NOISE not in key}
    if any(key.endswith(VALUES) for key in tensors):
        raise AdapterFormatError(f"{folder} is a SHiRA adapter already, expected a LoRA; load it with load_shira")
    _peft_config(folder)
    missing: dict[str, list[str]] = {}
    fitting: dict[str, dict[str, Tensor]] = {}
    for part in maps if component is None else [component]:
        fitting[part], missing[part] = _renamed(tensors, maps[part])
    found = [part for part in fitting if not missing[part]]
    if len(found) > 1:
        raise ShiraError(
            f"{folder} is PEFT's, which does not say what it is for, and fits several models: {', '.join(found)}; "
            "name the right one with component="
        )
    if not found:
        nearest = min(missing, key=lambda part: len(missing[part]))
        raise AdapterMismatchError(
            f"{folder} does not fit: {len(missing[nearest])} of its {len(tensors)} tensors belong to no layer of "
            f"{nearest or 'this model'}; use it with the model it was trained for:{listing(missing[nearest])}"
        )
    return found[0], fitting[found[0]]


def _renamed(tensors: Mapping[str, Tensor], weights: WeightMap) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors ``(r, in)``, ``(out, r)`` and so on by a model's own names, and the keys of which it has no layer."""
    found, missing = dict[str, Tensor](), list[str]()
    for key, tensor in tensors.items():
        match = _LAYER.fullmatch(key.removeprefix(PREFIX))
        try:
            own = weights.own_name(f"{match[1]}.weight") if match else None
        except AdapterMismatchError:
            own = None
        if match and own:
            found[own.removesuffix(".weight") + match[2]] = tensor
        else:
            missing.append(key)
    return found, missing


def _inject_folder(folder: Path, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put PEFT's layers into a hollow model, of tensors ``(r, in)``, ``(out, r)`` and so on by its own names."""
    config = _peft_config(folder)
    _require_plain_start(folder, config)
    _require_ranks(folder, vars(config), state)
    with _quiet(), _loading(folder, "PEFT", "use it with the model it was trained for"):
        _inject(model, config, state, _NAME)


def _peft_config(folder: Path) -> Any:
    """What ``adapter_config.json`` says. Raises AdapterFormatError: damaged, or of a method that is none of these."""
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(os.fspath(folder))
    except _LOADING as error:
        raise AdapterFormatError(
            f"{folder / PEFT_CONFIG} is no configuration of PEFT's ({_reason(error)}); get an intact copy"
        ) from error
    if config.peft_type not in _KINDS or getattr(config, "alora_invocation_tokens", None):
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        got = "an aLoRA, which acts on some tokens only" if kind in _KINDS else kind
        raise AdapterFormatError(
            f"{folder} is PEFT's of another method: expected {', '.join(_KINDS)}, got {got}; merge it into the base "
            "with PEFT, where it can be merged, and use shira extract"
        )
    config.inference_mode = True
    if hasattr(config, "monteclora_config"):
        config.monteclora_config = None  # see _NOISE
    return config


def _require_weights_only(file: Path, layers: Mapping[str, Any]) -> None:
    """Raise AdapterFormatError where a LoRA changes biases too (``lora_bias=True``)."""
    biased = [
        name
        for name, layer in layers.items()
        if getattr(layer, "lora_bias", {}).get(_NAME) and bool(layer.lora_B[_NAME].bias.any())
    ]
    if biased:
        raise AdapterFormatError(
            f"{file} changes biases too (lora_bias), expected weights only; merge it into the base with PEFT, and use "
            f"shira extract:{listing(biased)}"
        )


def _require_plain_start(file: Path, config: Any) -> None:
    """Raise AdapterFormatError where ``B A`` is not what the LoRA adds to the base as it was before training."""
    start = getattr(config, "init_lora_weights", True)
    if str(start).lower().startswith(_RESIDUAL_STARTS):
        raise AdapterFormatError(
            f"{file} started from a changed base (init_lora_weights={start!r}): expected an update of the base itself; "
            "save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if getattr(config, "kasa_config", None):
        raise AdapterFormatError(
            f"{file} is a KaSA, which takes singular values away from the base: expected an update of the base itself; "
            "merge it into the base with PEFT, and use shira extract"
        )


def _require_peft() -> None:
    try:
        import peft  # noqa: F401  slow to import, and only needed here
    except ImportError as error:
        raise ShiraError("reading a LoRA needs PEFT, which is not installed; pip install peft") from error


# -------------------------------------------------------------------- dense updates


def _dense(name: str, layer: Any, weight: Tensor, magnitude: Tensor | None) -> Tensor:
    """What fusing a layer's LoRA adds to its weight, float32 ``(out, ...)``.

    Args:
        name: of the weight, for messages.
        layer: PEFT's, over a hollow layer.
        weight: the model's own, ``(out, ...)``, which DoRA scales and OFT rotates.
        magnitude: of DoRA, one number per output, where the layer does not know it itself.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lycoris_utils import LycorisLayer

    additive: tuple[Any, ...] = (LoraLayer, LycorisLayer)
    own_update = _NAME in getattr(layer, "lora_magnitude_vector", ()) or _NAME in getattr(layer, "lora_variant", ())
    if own_update or not isinstance(layer, additive):
        return _merged(layer, weight)
    for each in layer.adapter_layer_names:
        if isinstance(part := getattr(layer, each, None), nn.Module):
            part.to(weight.device)
    update: Tensor = layer.get_delta_weight(_NAME).float()
    if [size for size in update.shape if size > 1] != [size for size in weight.shape if size > 1]:
        raise AdapterMismatchError(
            f"{name}: expected an update of {tuple(weight.shape)}, got {tuple(update.shape)}; use the LoRA with the "
            "architecture it was trained for"
        )
    update = update.view(weight.shape)
    if magnitude is None:
        return update
    base = weight.detach().cpu().double()
    whole = base + update.cpu().double()
    factors = magnitude.cpu().double().flatten() / whole.flatten(1).norm(dim=1)
    return (factors.view(-1, *[1] * (whole.ndim - 1)) * whole - base).float()


def _merged(layer: Any, weight: Tensor) -> Tensor:
    """The difference that PEFT's own merge makes, taken in float64 on the CPU; float32 ``(out, ...)``."""
    alone, base = copy.deepcopy(layer).cpu().double(), weight.detach().cpu().double()
    alone.get_base_layer().weight = nn.Parameter(base.clone(), requires_grad=False)
    alone.merge(safe_merge=True, adapter_names=[_NAME])
    return (alone.get_base_layer().weight - base).float()
