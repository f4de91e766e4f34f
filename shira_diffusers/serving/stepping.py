"""SteppedCall: one call of a pipeline, which goes on from one denoising step to the next when it is told to."""

import contextvars
import copy
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from shira_diffusers.errors import ShiraError
from shira_diffusers.serving.requests import ImageRequest, RequestError

_CALLBACK = "callback_on_step_end"
_SCHEDULERS = ("diffusers", "schedulers")  # the folder of their code


def require_steps(pipe: Any, call: Callable[..., Any]) -> None:
    """Require of a pipeline that its calls can take turns.

    Raises:
        ShiraError: it has no ``callback_on_step_end``, or caches what its models computed in earlier steps.
    """
    if _CALLBACK not in inspect.signature(call).parameters:
        raise ShiraError(
            f"{type(pipe).__name__} has no {_CALLBACK}, by which pictures take turns; expected one that has"
        )
    cached = [name for name, part in pipe.components.items() if getattr(part, "is_cache_enabled", False)]
    if cached:
        raise ShiraError(
            f"{', '.join(cached)} caches what earlier steps computed, which other pictures' steps would overwrite; "
            "call disable_cache() first"
        )


class SteppedCall:
    """A call of a pipeline in a greenlet of the thread that steps it.

    So all calls run in one thread, which matters: each thread has threads of OpenMP, handles of cuBLAS and CUDA graphs
    of its own. The thread must have gradients disabled, as the calls share its mode.

    The pipeline's models are shared; its scheduler, and what a pipeline notes about the call that runs, are copied.

    Args:
        pipe: any pipeline that ``require_steps`` allows.
        call: its ``__call__``, which holds no models.
        requests: of one kind; they are one batch.
        output_type: as the pipeline takes it.
    """

    def __init__(self, pipe: Any, call: Callable[..., Any], requests: list[ImageRequest], output_type: str) -> None:
        own = copy.copy(pipe)
        own.scheduler = copy.deepcopy(pipe.scheduler)
        own.set_progress_bar_config(disable=True)
        self._outside = getcurrent()
        options = {**arguments_of(requests), "output_type": output_type, "return_dict": False, _CALLBACK: self._pause}
        self._inside = greenlet(lambda: call(own, **options)[0])
        self._inside.gr_context = contextvars.copy_context()  # it is inside of what its thread holds
        self._queued: list[torch.cuda.Event] = []

    def run(self) -> int | list[Any]:
        """Go on to the end of the next step, or after the last to the pictures.

        Returns:
            The number of steps done, or the pictures of the batch.

        Raises:
            RequestError: the pipeline's own checks, or its scheduler, refuse the settings; it has ended then.
            Exception: whatever else the pipeline raises; it has ended then.
        """
        try:
            outcome = self._inside.switch()
        except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
            if remedy := _remedy(error):
                raise RequestError(f"the model cannot draw this: {error}; {remedy}") from error
            raise
        return list(outcome) if self._inside.dead else outcome

    def close(self) -> None:
        """End it where it is. Idempotent."""
        if not self._inside.dead:
            self._inside.throw()

    def _pause(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._keep_up(next(iter(tensors.values()), None))
        self._outside.switch(step + 1)
        return {}

    def _keep_up(self, tensor: torch.Tensor | None) -> None:
        """Wait for the GPU, but for the last step: it has work while the next step is queued, and turns stay short."""
        if tensor is not None and tensor.is_cuda:
            self._queued.append(torch.cuda.current_stream(tensor.device).record_event())
            if len(self._queued) > 1:
                self._queued.pop(0).synchronize()


def _remedy(error: BaseException) -> str:
    """What to ask for where a pipeline's check of its arguments raised an error, or a scheduler of diffusers did.

    Any other error is not the client's: empty.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.name == "check_inputs" for frame in frames):
        return "ask for other settings"
    # some schedulers refuse a number of steps; others find no noise level for it, as late as at a step
    return (
        "ask for another number of steps"
        if any(Path(one.filename).parts[-3:-1] == _SCHEDULERS for one in frames)
        else ""
    )


def arguments_of(requests: list[ImageRequest]) -> dict[str, Any]:
    """What a pipeline is called with to draw the pictures of requests of one kind as one batch.

    Picture ``k`` of a request has a generator of its own, seeded with ``seed + k``, on the CPU, so that its noise is
    the same on every machine.
    """
    first = requests[0]
    given: dict[str, Any] = {
        "prompt": [request.prompt for request in requests for _ in range(request.n)],
        "num_inference_steps": first.steps,
        "generator": [_generator(request.seed + k) for request in requests for k in range(request.n)],
    }
    if first.negative_prompt is not None:
        given["negative_prompt"] = [request.negative_prompt for request in requests for _ in range(request.n)]
    options = {"guidance_scale": first.guidance, "width": first.width, "height": first.height}
    return given | {name: value for name, value in options.items() if value is not None}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
