"""Draw guidance's negative half under a part of the mix: ``cross_attention_kwargs={"shira_negative": 0.5}``.

Classifier-free guidance multiplies the difference between the half with the prompt and the negative half. Under the
same mix in both, a style cancels where the concept does not; under half of the mix in the negative half, guidance
drives the style too. In the study of mixes (docs/study.md) pairs then keep more, and single styles nearly all. It is
akin to guidance by a weaker version of the model (arXiv 2406.02507), and costs two switches per step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.scales import Scale, plain_scale
from shira_diffusers.engine.resident import Resident
from shira_diffusers.errors import ResidentStateError, ShiraError
from shira_diffusers.integrations.denoiser import denoiser_of
from shira_diffusers.integrations.per_picture import pictures_of
from shira_diffusers.weights.finder import WeightMap, unwrap

KEY = "shira_negative"


@contextmanager
def weaker_negative(pipe: Any, resident: Resident, given: Mapping[str, Any], keyword: str) -> Iterator[dict[str, Any]]:
    """Hold a pipeline's models alone; while it runs, its denoiser computes the two halves of guidance one by one.

    Args:
        pipe: the pipeline.
        resident: of its models.
        given: the arguments of the call by name.
        keyword: the argument that holds ``shira_negative``.

    Returns:
        The arguments to run the pipeline with.

    Raises:
        ShiraError: no number, strengths per block, or a pipeline without two halves of guidance in one batch.
        ResidentStateError: a compiled denoiser.

    On error nothing has been drawn, and nothing has changed.
    """
    options = dict(given[keyword])
    share = plain_scale(options.pop(KEY))
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ShiraError(f"{KEY} is the part of the mix in the negative half: expected 0 to 1, got {share!r}")
    name, model = _denoiser(pipe)
    own = Resident({name: model})
    with resident.writing():
        weaker: dict[str, Scale] = {adapter: _part(scale, share, name) for adapter, scale in own.active.items()}
        halves = _Halves(pipe, own, weaker, unwrap(model), pictures_of(given))
        try:
            unwrap(model).forward = halves
            kept = {key: value for key, value in given.items() if key != keyword}
            yield kept | ({keyword: options} if options else {})
        finally:
            halves.remove()


class _Halves:
    """In the place of a denoiser's ``forward``: the negative half under the weaker mix, then the other half.

    Args:
        pipe: says whether a step is guided.
        own: the engine of the denoiser alone.
        weaker: the mix of the negative half.
        model: the denoiser.
        pictures: how many rows a half has.
    """

    def __init__(self, pipe: Any, own: Resident, weaker: dict[str, Scale], model: nn.Module, pictures: int) -> None:
        self._pipe, self._own, self._weaker, self._model, self._pictures = pipe, own, weaker, model, pictures
        self._shadowed = vars(model).get("forward")  # accelerate's, where it offloads the model
        self._forward = model.forward

    def remove(self) -> None:
        if self._shadowed is None:
            del self._model.forward
        else:
            self._model.forward = self._shadowed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).shape[0]
        if not self._pipe.do_classifier_free_guidance:
            return self._forward(*args, **kwargs)
        if rows != 2 * self._pictures:
            raise ShiraError(
                f"{type(self._model).__name__} is given a batch of {rows}, expected {2 * self._pictures}, a negative "
                f"and a prompted row per picture: leave {KEY} out, this pipeline's guidance has other parts"
            )
        negative, prompted = (_half((args, kwargs), rows, part) for part in (0, 1))
        with self._own.using(self._weaker, self._own.method):
            first = self._forward(*negative[0], **negative[1])
        return _joined(first, self._forward(*prompted[0], **prompted[1]))


def _denoiser(pipe: Any) -> tuple[str, nn.Module]:
    found = denoiser_of(pipe)
    if found is None or not hasattr(type(pipe), "do_classifier_free_guidance"):
        raise ShiraError(
            f"{KEY}: {type(pipe).__name__} has no negative half of guidance in the batch of a denoiser; leave it out"
        )
    name, model = found
    if WeightMap(model).is_compiled:
        raise ResidentStateError(f"{KEY}: {name} is compiled, and its halves cannot be told apart; leave it out")
    return found


def _part(scale: Scale, share: float, component: str) -> float:
    own = scale.get(component, 1.0) if isinstance(scale, Mapping) else scale
    if isinstance(own, Mapping):
        raise ShiraError(f"{KEY} is a part of one strength per adapter, got strengths per block: {scale!r}")
    return share * own


def _half(value: Any, rows: int, part: int) -> Any:
    """The first or second half of all tensors of this many rows in nested arguments."""
    if isinstance(value, Tensor):
        return value.chunk(2)[part] if value.ndim and value.shape[0] == rows else value
    if isinstance(value, Mapping):
        return {key: _half(item, rows, part) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_half(item, rows, part) for item in value)
    return value


def _joined(first: Any, second: Any) -> Any:
    """The outputs of both halves as one: a tuple of tensors, or one of diffusers' outputs."""
    if isinstance(first, Mapping):
        return type(first)(**{key: torch.cat([first[key], second[key]]) for key in first})
    return tuple(torch.cat(pair) for pair in zip(first, second, strict=True))
