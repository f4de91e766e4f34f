"""Draw each picture of a batch with an adapter of its own: ``cross_attention_kwargs={"shira_adapters": [...]}``.

Nothing is written: while the pipeline runs, each adapted layer adds to the rows of each picture the sparse product of
the deltas that are meant for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from shira_diffusers.adapters.scales import Scale, mix_of
from shira_diffusers.engine.resident import Resident
from shira_diffusers.engine.side_branch import SideBranch, branches_of, input_of
from shira_diffusers.errors import AdapterMismatchError, ResidentStateError, ShiraError, counted
from shira_diffusers.integrations.lora_scale import KEYWORDS
from shira_diffusers.weights.finder import WeightMap, unwrap

KEY = "shira_adapters"
_COMPONENTS = ("unet", "transformer", "controlnet", "text_encoder")  # whose batches are laid out by prompts
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")


def keyword_of(given: Mapping[str, object], key: str = KEY) -> str | None:
    """The argument of a call that holds an option of ours, if any.

    Args:
        given: the arguments of the call by name.
        key: the option: an adapter per picture, unless another is named.
    """
    options = ((name, given.get(name)) for name in KEYWORDS)
    return next((name for name, option in options if isinstance(option, Mapping) and key in option), None)


def pictures_of(given: Mapping[str, Any]) -> int:
    """How many pictures a call draws.

    Raises:
        ShiraError: there are no prompts.
    """
    return _prompts(given) * next((given[name] for name in _PER_PROMPT if given.get(name)), 1)


@contextmanager
def adapters_per_picture(resident: Resident, given: Mapping[str, Any], keyword: str) -> Iterator[dict[str, Any]]:
    """Hold a pipeline's models alone, with the adapters of each picture of a batch beside their weights.

    The active mix is put aside meanwhile and returns after, as with ``Resident.using``.

    Args:
        resident: of the pipeline's models.
        given: the arguments of the call by name.
        keyword: what ``keyword_of`` found.

    Returns:
        The arguments to run the pipeline with.

    Raises:
        ShiraError: no list of one entry per prompt, unknown adapters, or strengths as for ``Resident.set``.
        AdapterMismatchError: parameters that cannot have an adapter per picture; all are named.
        ResidentStateError: a compiled model.

    On error nothing has been drawn, and nothing has changed.
    """
    options = dict(given[keyword])
    entries, prompts = options.pop(KEY), _prompts(given)
    pictures = pictures_of(given)
    with resident.writing():
        planned = _plan(resident, _mixes(resident, entries, prompts), pictures)
        with resident.using({}), ExitStack() as undo:
            for model, batch, layers in planned:
                undo.callback(model.register_forward_pre_hook(batch.note, with_kwargs=True).remove)
                for layer, own in layers.items():
                    undo.callback(layer.register_forward_hook(_Branches(batch, own), with_kwargs=True).remove)
            kept = {name: value for name, value in given.items() if name != keyword}
            yield kept | ({keyword: options} if options else {})


class _Batch:
    """How the rows of the batch that a model computes now belong to prompts.

    A batch is one or several copies (those of guidance) of all pictures, and the pictures of a prompt are neighbours.
    Layers see all of it, with each row in one piece or as several neighbours, such as the frames of a video, or some
    of the copies, as the processors of perturbed guidance do.

    Args:
        prompts: how many there are.
        pictures: of all prompts; text encoders compute one row per prompt.
    """

    def __init__(self, prompts: int, pictures: int) -> None:
        self._prompts, self._pictures = prompts, pictures
        self._rows = self._per_copy = 0

    def note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: note how many rows it is given."""
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self._rows = first.shape[0]
        is_text = not first.is_floating_point()  # token ids: a row per prompt, not yet repeated for its pictures
        self._per_copy = self._prompts if is_text else self._pictures
        self._require(self._rows == self._prompts if is_text else self._rows % self._pictures == 0, model, first)

    def by_prompt(self, layer: nn.Module, x: Tensor) -> Tensor:
        """A view of ``(rows, ...)`` as ``(copies, prompts, rows of each, ...)``."""
        is_whole = self._rows > 0 and x.shape[0] % self._rows == 0
        self._require(is_whole or (self._rows > 0 and x.shape[0] % self._per_copy == 0), layer, x)
        return x.unflatten(0, ((self._rows if is_whole else x.shape[0]) // self._per_copy, self._prompts, -1))

    def _require(self, fits: bool, module: nn.Module, x: Tensor) -> None:
        if not fits:
            raise ShiraError(
                f"{type(module).__name__} is given a batch of {x.shape[0]}, expected "
                f"{counted(self._prompts, 'prompt')} or a multiple of {counted(self._pictures, 'picture')}: which rows "
                "belong to which adapter is not known; use pipe.set_shira and one call per adapter"
            )


class _Branches:
    """A forward hook that adds the branches of a layer to the rows of their prompts.

    Args:
        batch: whose rows are whose.
        branches: the numbers of prompts, and their branch.
    """

    def __init__(self, batch: _Batch, branches: Sequence[tuple[list[int], SideBranch]]) -> None:
        self._batch, self._branches = batch, branches

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x, added = self._batch.by_prompt(layer, input_of(args, kwargs)), self._batch.by_prompt(layer, output)
        for prompts, branch in self._branches:
            for number in prompts:
                branch.add_to(layer, x[:, number], added[:, number])
        return output


def _prompts(given: Mapping[str, Any]) -> int:
    """How many prompts a call has."""
    prompt = given.get("prompt")
    if prompt is None:
        prompt = given.get("prompt_embeds")
    if prompt is None:
        raise ShiraError("adapters per picture and shira_negative need prompts: give prompt or prompt_embeds")
    return 1 if isinstance(prompt, str) else len(prompt)


def _mixes(resident: Resident, entries: object, prompts: int) -> list[dict[str, Scale]]:
    """The mix of each prompt."""
    if not isinstance(entries, list | tuple) or len(entries) != prompts:
        got = f"{counted(len(entries), 'entry')}" if isinstance(entries, list | tuple) else repr(entries)
        raise ShiraError(
            f"{KEY}: expected a list with one entry (a name, {{name: strength}}, a list of names or None) for each of "
            f"{counted(prompts, 'prompt')}, got {got}; for several adapters on one prompt repeat it: "
            "prompt=[prompt] * 4"
        )
    mixes = [mix_of(() if entry is None else entry) for entry in entries]
    resident.require_known(dict.fromkeys(name for mix in mixes for name in mix))
    return mixes


_Planned = tuple[nn.Module, _Batch, dict[nn.Module, list[tuple[list[int], SideBranch]]]]


def _plan(resident: Resident, mixes: Sequence[dict[str, Scale]], pictures: int) -> list[_Planned]:
    """The branches of the layers of each model."""
    found: dict[str, _Planned] = {}
    for k, mix in enumerate(mixes):
        if not mix or mix in mixes[:k]:
            continue
        prompts = [number for number, other in enumerate(mixes) if other == mix]
        fused = resident.fused(mix)
        for component in fused.component_names():
            model = _require_usable(resident, component, mix)
            _, _, layers = found.setdefault(component, (model, _Batch(len(mixes), pictures), {}))
            for layer, branch in branches_of(WeightMap(model), fused.part(component)):
                layers.setdefault(layer, []).append((prompts, branch))
    return list(found.values())


def _require_usable(resident: Resident, component: str, mix: Mapping[str, Scale]) -> nn.Module:
    model = resident.models[component]
    if not component.startswith(_COMPONENTS):
        raise AdapterMismatchError(
            f"{', '.join(map(repr, mix))} changes {component}, which has no adapter per picture, expected adapters of "
            f"{', '.join(_COMPONENTS)} only; activate it for all pictures by set_shira"
        )
    if WeightMap(model).is_compiled:
        raise ResidentStateError(
            f"{component} is compiled, which computes no adapter per picture: hooks that are added later are not seen; "
            "use a model that is not compiled, or one call per adapter"
        )
    return unwrap(model)
