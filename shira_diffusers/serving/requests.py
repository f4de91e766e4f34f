"""ImageRequest: what a client wants drawn, checked, as frozen data; and why a request ends without pictures."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shira_diffusers.errors import ShiraError, listing

MAX_STEPS = 1000
_LARGEST = sys.float_info.max  # integers can be larger
SIDE = 8  # pixels that a latent is wide, at the least


class RequestError(ShiraError):
    """A request with a setting that no pipeline can draw."""


class QueueFullError(ShiraError):
    """More requests wait than may."""


class DeadlineError(ShiraError):
    """A request that was not finished by its deadline."""


class ClosedError(ShiraError):
    """The scheduler was closed before the request was finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """What a client wants drawn.

    Args:
        prompt: the text.
        mix: strength by adapter; empty is the base.
        seed: of the first picture; the next ones have the next seeds.
        steps: of denoising.
        guidance: the pipeline's ``guidance_scale``; None is its default.
        width, height: in pixels, multiples of 8; None is the pipeline's default.
        n: pictures.
        negative_prompt: None where there is none, which some models tell from an empty one.
        client: who asks: clients take equal shares. None is a client of its own.
        deadline: seconds from the time that it is submitted within which it must be finished; None is no limit.

    Raises:
        RequestError: names all settings that are out of range.
    """

    prompt: str
    mix: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    steps: int = 20
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    n: int = 1
    negative_prompt: str | None = None
    client: str | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise RequestError(f"the request cannot be drawn, expected other settings:{listing(faults)}")
        object.__setattr__(self, "mix", {name: float(self.mix[name]) for name in sorted(self.mix)})

    def _faults(self) -> Iterator[str]:
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt or "")):
            if not isinstance(text, str):
                yield f"{name}: expected text, got {type(text).__name__}"
        if not isinstance(self.mix, Mapping):
            yield f"mix: expected {{name: strength}}, got {type(self.mix).__name__}"
        else:
            for name, strength in self.mix.items():
                if not isinstance(name, str) or not _is_number(strength):
                    yield f"mix: expected {{name: strength}} with finite strengths, got {name!r}: {strength!r}"
        yield from _integer("seed", self.seed, 0, 2**62)
        yield from _integer("steps", self.steps, 1, MAX_STEPS)
        yield from _integer("n", self.n, 1, 2**16)
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None:
                yield from _integer(name, side, SIDE, 2**16, SIDE)
        if self.guidance is not None and not _is_number(self.guidance):
            yield f"guidance: expected a finite number, got {self.guidance!r}"
        if self.deadline is not None and not (_is_number(self.deadline) and self.deadline > 0):
            yield f"deadline: expected seconds above 0, got {self.deadline!r}"

    @property
    def cost(self) -> int:
        """The work of one step, by which clients' shares are measured: pixels of all its pictures."""
        return self.n * (self.width or 512) * (self.height or 512)

    @property
    def kind(self) -> tuple[object, ...]:
        """What requests have in common that may share a batch."""
        size = self.width, self.height, self.steps, self.guidance
        return (*self.mix.items(), *size, self.negative_prompt is None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _integer(name: str, value: object, low: int, high: int, multiple: int = 1) -> Iterator[str]:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high or value % multiple:
        kind = "a whole number" if multiple == 1 else f"a multiple of {multiple}"
        yield f"{name}: expected {kind} from {low} to {high}, got {value!r}"
