"""Add ``load_shira`` and its family to every ``DiffusionPipeline`` and ``ModularPipeline``.

The only module that knows pipelines.

State lives with the models, not the pipeline: two pipelines that share a UNet see one state.
"""

import functools
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, count
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers import DiffusionPipeline, ModularPipeline, ModularPipelineBlocks
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.interference import cosine, interference, opposing
from shira_diffusers.adapters.notebook import MixTable, ReportTable
from shira_diffusers.adapters.scales import Scale, Weights, mix_of, name_list
from shira_diffusers.engine.locks import Held
from shira_diffusers.engine.resident import Resident
from shira_diffusers.errors import AdapterFormatError, AdapterMismatchError, ShiraError
from shira_diffusers.formats.hub import HubOptions, find_adapter
from shira_diffusers.formats.opened_adapter import open_adapter
from shira_diffusers.formats.peft import decode_peft_for, is_peft_state_dict
from shira_diffusers.formats.shira_file import decode, require_tensors, save_adapter
from shira_diffusers.integrations.drawn_effects import drawn_effects
from shira_diffusers.integrations.lora_scale import warn_of_ignored_scale
from shira_diffusers.integrations.negative_half import KEY as NEGATIVE
from shira_diffusers.integrations.negative_half import weaker_negative
from shira_diffusers.integrations.per_picture import adapters_per_picture, keyword_of
from shira_diffusers.weights.finder import unwrap, weights_beside
from shira_diffusers.weights.targets import models_of

logger = logging.getLogger(__name__)

Source = str | os.PathLike[str] | Mapping[str, Tensor] | ShiraAdapter
Names = str | Sequence[str] | Mapping[str, Scale | None]
"""Adapters by name: one, several, or ``{name: strength}``."""

# Public methods of pipelines that run or save models which adapters change: no switch comes between.
_RUNNING = ("__call__", "encode_prompt", "generate_mask", "invert", "save_pretrained")


def resident_of(pipe: DiffusionPipeline | ModularPipeline) -> Resident:
    """The engine over all models of a pipeline, by component name."""
    return Resident(models_of(pipe))


def unguarded(pipe: DiffusionPipeline) -> Callable[..., Any]:
    """The pipeline's ``__call__`` that holds no models, to be given the pipeline: for callers that hold them."""
    call = type(pipe).__call__
    return getattr(call, "__wrapped__", call) if hasattr(call, "_shira_guarded") else call


def load_shira(
    self: DiffusionPipeline,
    source: Source,
    adapter_name: str | None = None,
    *,
    scale: Scale = 1.0,
    activate: bool = True,
    component: str | None = None,
    hotswap: bool = False,
    **hub_kwargs: Unpack[HubOptions],
) -> None:
    """Load a SHiRA adapter and make it the active one.

    Args:
        source: a ``.safetensors`` file, a folder, a Hub id, an adapter in memory, or a state dict, whose keys are those
            of format version 1: the tensors of version 2 lack the weights' names, which stand in the file's header.
            What PEFT's SHiRA tuner wrote (folder, file or state dict) goes to the one model that has all its layers.
        adapter_name: not in use; None takes ``default_0``, ``default_1``, ...
        scale: strength when active; 0 is the base, above 1 exaggerates. Also per component, see ``set_shira``.
        activate: make it active, alone; False only loads it, and ``scale`` then has no effect, which a warning says.
        component: the model that an adapter is for which does not say so: one of PEFT's where several models fit, such
            as ``"transformer_2"``, or one with plain parameter names.
        hotswap: put it in place of the loaded adapter ``adapter_name``. The mix stays as it was, its strengths too:
            ``scale`` and ``activate`` do not count. Nothing is compiled anew.
        hub_kwargs: ``weight_name, subfolder, revision, token, cache_dir, local_files_only, force_download, proxies``,
            as for ``load_lora_weights``. (Proxies come from the environment; others are refused.) ``low_cpu_mem_usage``
            and ``use_safetensors`` change nothing.

    Raises:
        ValueError: the name is in use, or a ``ShiraError``: a damaged file (AdapterFormatError), an adapter that does
            not fit this pipeline (AdapterMismatchError), weights that cannot be overwritten (ResidentStateError),
            several models that one of PEFT's adapters fits, arguments that contradict each other.
        OSError: there is no such file, or the Hub cannot be reached.

    On error nothing has changed: not the weights, not the mix, not the list of adapters.
    """
    _check_options(hub_kwargs)
    resident = resident_of(self)
    if hotswap:
        _require_swap(resident, adapter_name, scale, activate)
    elif adapter_name is not None and adapter_name in resident.names:
        raise ShiraError(
            f"adapter name {adapter_name!r} is in use, expected a new one; call delete_shira({adapter_name!r}) first, "
            "or replace it with hotswap=True"
        )
    if component is not None:
        _require_loaded(self, [component])
    adapter = _read(self, source, component, hub_kwargs)
    _require_loaded(self, adapter.component_names())
    with resident.writing():
        if hotswap:
            return resident.replace(adapter, str(adapter_name))
        name = adapter_name if adapter_name is not None else _auto_name(resident.names)
        resident.add(adapter, name)
        if activate:
            try:
                resident.set({name: scale})
            except BaseException:
                resident.remove(name)
                raise
        elif scale != 1.0:
            warnings.warn(
                f"scale={scale!r} has no effect with activate=False; give it to set_shira({name!r}, ...)", stacklevel=2
            )


def set_shira(
    self: DiffusionPipeline,
    adapter_names: Names,
    adapter_weights: Weights = None,
    *,
    method: str = "sum",
) -> None:
    """Replace the active mix.

    Args:
        adapter_names: one or several loaded adapters, or ``{name: weight}``; an empty list activates none.
        adapter_weights: for all, or one each: a float, ``{component: float}``,
            ``{component: {"down" | "mid" | "up": float}}``, or None for 1.0; what a mapping leaves out is 1.0. For
            down, mid and up also finer, in the forms of diffusers' ``set_adapters``: ``{"up": {"block_0": 0.5}}``, and
            a list with one float per layer in place of a float: ``{"up": {"block_0": [0.5, 0.2, 1.0]}}``.
        method: how several are merged, a name in ``shira_diffusers.MERGE_METHODS``.

    Raises:
        ShiraError: unknown or repeated names, another number of weights, a weight that is no finite number, too large
            for the model's dtype, or for a component or block that is not there; weights beside a mapping of names.
        ResidentStateError: see ``Resident.set``.

    On error the mix and all bits are what they were.
    """
    resident_of(self).set(mix_of(adapter_names, adapter_weights), method)


def get_active_shira(self: DiffusionPipeline) -> dict[str, Scale]:
    """The active adapters and their weights as given; empty while disabled.

    Where a model of the pipeline was replaced since, by component: the new model is not among them.
    """
    return MixTable(resident_of(self).active)


def list_shira(self: DiffusionPipeline) -> dict[str, list[str]]:
    """All loaded adapters and the components that each changes."""
    return resident_of(self).components


def disable_shira(self: DiffusionPipeline) -> None:
    """Restore the base, bit for bit, and remember the mix."""
    resident_of(self).disable()


def enable_shira(self: DiffusionPipeline) -> None:
    """Bring back the mix that ``disable_shira`` put aside."""
    resident_of(self).enable()


def delete_shira(self: DiffusionPipeline, adapter_names: Names) -> None:
    """Forget adapters; the rest of the mix stays active without them.

    Args:
        adapter_names: one or several; of a mapping, such as ``get_active_shira()`` returns, the names count.

    Raises:
        ShiraError: unknown names.
        ResidentStateError: see ``Resident.set``.

    On error nothing has changed.
    """
    resident_of(self).remove(*name_list(adapter_names))


def unload_shira(self: DiffusionPipeline) -> None:
    """Restore the base, bit for bit, and forget all adapters."""
    resident = resident_of(self)
    with resident.writing():
        resident.clear()
        resident.remove(*resident.names)


def save_shira(self: DiffusionPipeline, directory: str | os.PathLike[str], adapter_name: Names | None = None) -> Path:
    """Write a loaded adapter, or a mix fused into one, to a folder (or a ``.safetensors`` file).

    Args:
        directory: the folder, made if needed, or the file.
        adapter_name: which; several names, or ``{name: weight}``, are a mix; None is the active one.

    Returns:
        The file written.

    Raises:
        ShiraError: an unknown name, or None while nothing is active; a mix as for ``set_shira``.
    """
    resident = resident_of(self)
    if isinstance(adapter_name, str):
        return save_adapter(resident.adapter(adapter_name), directory)
    return save_adapter(resident.fused(None if adapter_name is None else mix_of(adapter_name)), directory)


def fuse_report(
    self: DiffusionPipeline, adapter_names: Sequence[str] | Mapping[str, Scale | None] | None = None, **call: Any
) -> dict[tuple[str, str], dict[str, float]]:
    """How much adapters interfere, for each pair: overlap, sign_conflict, awom, awor, l2, and in pictures.

    With a call's arguments, ``fuse_report(names, prompt=..., num_inference_steps=8)``, the base and each adapter alone
    draw the same picture, and the report has two figures more, of what two adapters change in its latents: "opposing",
    how far they push the same place in opposite directions, and "cosine". In docs/study.md "opposing", measured on
    the denoiser's predictions, foretells what a mix keeps (rank correlation -0.79); the figures of weights hardly do
    (at most 0.37).

    Args:
        adapter_names: at least two; None is all that are loaded. Of ``{name: weight}`` the adapters are compared as
            they are at these weights, which are those of ``set_shira``.
        call: arguments of the pipeline's call; several prompts are averaged. Without ``generator`` the seed is 0.

    Raises:
        ShiraError: unknown names or fewer than two; ``output_type`` and its kind in the call.

    See ``interference.Interference`` for the figures (arXiv 2406.13175, section 4.2).
    """
    resident = resident_of(self)
    mix = mix_of(resident.names if adapter_names is None else adapter_names)
    if isinstance(adapter_names, str) or len(mix) < 2:
        raise ShiraError(f"expected a list of at least two adapters to compare, got {adapter_names!r}")
    adapters = {name: _at(resident, name, scale) for name, scale in mix.items()}
    report = {(a, b): interference(adapters[a], adapters[b]).as_dict() for a, b in combinations(mix, 2)}
    if call:
        effects = drawn_effects(self, resident, mix, call)
        for (a, b), figures in report.items():
            figures |= {"opposing": opposing(effects[a], effects[b]), "cosine": cosine(effects[a], effects[b])}
    return ReportTable(report)


def _at(resident: Resident, name: str, scale: Scale) -> ShiraAdapter:
    is_plain = isinstance(scale, int | float) and scale == 1
    return resident.adapter(name) if is_plain else resident.fused({name: scale})


def shira(
    self: DiffusionPipeline,
    adapter_names: Names,
    adapter_weights: Weights = None,
    *,
    method: str = "sum",
) -> Held[DiffusionPipeline]:
    """``with pipe.shira("bluefire", 0.8): ...``: a mix for a while; the mix before returns after, also on errors.

    Holds the pipeline's models: generations and switches outside the block wait. In coroutines use
    ``async with pipe.shira("bluefire"): image = await asyncio.to_thread(pipe, prompt)``.

    Args and Raises: as ``set_shira``; also ResidentStateError for a deadlock, see ``Resident.using``.
    """
    return resident_of(self).using(mix_of(adapter_names, adapter_weights), method).giving(self)


def bake_shira(self: DiffusionPipeline) -> None:
    """Make the active mix the base for good; the adapters stay loaded, none of them active.

    Also keeps weights that were modified outside shira_diffusers while adapters were active (see ResidentStateError).
    """
    resident_of(self).bake()


METHODS = (
    load_shira,
    set_shira,
    get_active_shira,
    list_shira,
    disable_shira,
    enable_shira,
    delete_shira,
    unload_shira,
    save_shira,
    fuse_report,
    shira,
    bake_shira,
)


def install() -> None:
    """Add the methods to ``DiffusionPipeline`` and ``ModularPipeline``, so to every pipeline. Idempotent.

    From now on the generations of all pipelines (and their inversions, masks and encoded prompts), since any two may
    share a model, hold their models' locks for reading, so that no switch tears a picture, not even the first
    adapter's. So do the blocks of modular pipelines, which may be called one by one.
    """
    for base in (DiffusionPipeline, ModularPipeline):
        for method in METHODS:
            setattr(base, method.__name__, method)
        _guard_family(base, _guard)
    _guard_family(ModularPipelineBlocks, _guard_block)


def _check_options(options: Mapping[str, object]) -> None:
    unknown = sorted(options.keys() - HubOptions.__annotations__.keys())
    if unknown:
        raise TypeError(
            f"load_shira() got unexpected keyword arguments {', '.join(unknown)}; "
            f"expected {', '.join(HubOptions.__annotations__)}"
        )
    if options.get("proxies"):
        raise ShiraError(
            f"proxies={options['proxies']!r}: huggingface_hub takes proxies from HTTP_PROXY and HTTPS_PROXY; set those"
        )
    if options.get("use_safetensors") is False:
        raise ShiraError("use_safetensors=False: adapters are safetensors files, others are not read; leave it out")
    if "low_cpu_mem_usage" in options:
        logger.warning(
            "low_cpu_mem_usage has no effect on a SHiRA adapter: its deltas are read once and no layer is made for them"
        )


def _require_swap(resident: Resident, name: str | None, scale: Scale, activate: bool) -> None:
    if name is None or name not in resident.names:
        raise ShiraError(
            f"hotswap=True replaces a loaded adapter: expected its name as adapter_name, got {name!r}; loaded are "
            f"{', '.join(map(repr, resident.names)) or 'none'}; leave hotswap out to load another"
        )
    if scale != 1.0 or not activate:
        raise ShiraError(
            f"hotswap=True leaves the mix as it is, got scale={scale!r} and activate={activate!r}; leave them out and "
            "call set_shira to change the mix"
        )


def _require_loaded(pipe: Any, components: Sequence[str]) -> None:
    """Require the models that a modular pipeline loads later."""
    missing = [part for part in components if part in getattr(pipe, "null_component_names", ())]
    if missing:
        raise AdapterMismatchError(
            f"the adapter is for {', '.join(missing)}, not loaded yet by this pipeline; call load_components() or "
            "update_components() first"
        )


def _read(pipe: DiffusionPipeline, source: Source, component: str | None, options: HubOptions) -> ShiraAdapter:
    """Read an adapter, with component names."""
    models = models_of(pipe)
    if component is not None and component not in models:
        raise ShiraError(
            f"component={component!r} is no model of this pipeline, which has {', '.join(models) or 'none'}"
        )
    if isinstance(source, ShiraAdapter):
        return _named(source, component, models)
    if isinstance(source, Mapping):
        require_tensors(source, "the state dict")
        if is_peft_state_dict(source):  # ``unet.save_lora_adapter`` writes such, without a config
            return decode_peft_for(models, source, "the state dict", component=component)
        return _named(decode(source, None, "the state dict"), component, models)
    if not isinstance(source, str | os.PathLike):
        raise AdapterFormatError(
            "expected a file, a folder, a Hub id, a state dict of tensors or a ShiraAdapter, "
            f"got {type(source).__name__}"
        )
    opened = open_adapter(find_adapter(source, options))
    adapter = opened.decode(_device_of(models, opened.components), models=models, component=component)
    return adapter if opened.is_peft else _named(adapter, component, models)


def _device_of(models: Mapping[str, nn.Module], components: Sequence[str]) -> torch.device | None:
    """The CUDA device that all weights of the models are on, to decode there; None is the CPU."""
    devices = {
        device for name in components if name in models for device in weights_beside(unwrap(models[name])).devices()
    }
    return devices.pop() if len(devices) == 1 and all(device.type == "cuda" for device in devices) else None


def _named(adapter: ShiraAdapter, component: str | None, models: Mapping[str, nn.Module]) -> ShiraAdapter:
    """An adapter by component names: as it is, or with one put before plain parameter names."""
    has = adapter.component_names()
    if component is None or has == [component]:
        return adapter
    known = [part for part in has if part in models]
    if known:
        raise ShiraError(
            f"component={component!r}, but the adapter's own names are for {', '.join(known)}; leave component "
            "out, or take one part of the adapter with adapter.part(...).prefixed(...)"
        )
    return adapter.prefixed(component)


def _auto_name(names: Sequence[str]) -> str:
    return next(name for name in (f"default_{i}" for i in count()) if name not in names)


def _guard_family(base: Any, guard: Callable[[type], None]) -> None:
    """Guard all classes that come from a base, those made later too."""
    base.__init_subclass__ = _guard_of_new_classes(base, guard)
    for cls in _family(base):
        guard(cls)


@functools.cache
def _guard_of_new_classes(base: Any, guard: Callable[[type], None]) -> Any:
    def init_subclass(cls: Any, **options: Any) -> None:
        super(base, cls).__init_subclass__(**options)
        guard(cls)

    return classmethod(init_subclass)  # type: ignore[arg-type]


def _family(cls: Any) -> Iterator[type]:
    yield cls
    for child in cls.__subclasses__():
        yield from _family(child)


def _guard(cls: type) -> None:
    for name in _RUNNING:
        _wrap(cls, name, _reading)


def _guard_block(cls: type) -> None:
    _wrap(cls, "__call__", _reading_by_block)


def _wrap(cls: type, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    run = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    if inspect.isfunction(run) and not hasattr(run, "_shira_guarded"):
        guarded = wrapper(run)
        guarded._shira_guarded = True  # type: ignore[attr-defined]
        setattr(cls, name, guarded)


def _generating(resident: Resident) -> Held[None]:
    """What holds the models for reading, with the mix in place wherever accelerate keeps the weights now."""
    resident.refresh()
    return resident.reading()


def _reading(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def guarded(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        resident = resident_of(self)
        given = dict(zip(parameters, args, strict=False)) | kwargs
        warn_of_ignored_scale(self, given, lambda: resident.active, resident.models.values())
        per_picture, negative = keyword_of(given), keyword_of(given, NEGATIVE)
        if per_picture and negative:
            raise ShiraError("shira_adapters and shira_negative are both given: a call takes one of them")
        if per_picture:
            with adapters_per_picture(resident, given, per_picture) as given:
                return run(self, **given)
        if negative:
            with weaker_negative(self, resident, given, negative) as given:
                return run(self, **given)
        with _generating(resident):
            return run(self, *args, **kwargs)

    parameters = list(inspect.signature(run).parameters)[1:]
    return guarded


def _reading_by_block(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def guarded(self: ModularPipelineBlocks, *args: Any, **kwargs: Any) -> Any:
        pipe = next((value for value in (*args, *kwargs.values()) if isinstance(value, ModularPipeline)), None)
        if pipe is None:
            return run(self, *args, **kwargs)
        with _generating(resident_of(pipe)):
            return run(self, *args, **kwargs)

    return guarded


__all__ = ["install", "models_of", "resident_of", "unguarded", *(method.__name__ for method in METHODS)]
