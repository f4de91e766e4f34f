"""What a client asks for: the body of ``POST /v1/images``, checked against the service's limits."""

import math
import re
import secrets
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from shira_diffusers.serving.errors import ServiceError, invalid, one_line
from shira_diffusers.serving.requests import SIDE, ImageRequest, RequestError
from shira_diffusers.serving.settings import Settings, problems

Format = Literal["png", "json", "stream"]
_TYPES: dict[str, Format] = {"image/png": "png", "application/json": "json", "text/event-stream": "stream"}
_SIZE = "^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$"
_SHOWN = 8  # unknown fields; a body has room for some 40,000, and each is compared with all that there are


class ImageBody(BaseModel):
    """The body of ``POST /v1/images``."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=2000)
    mix: dict[str, float] = Field({}, description="strengths by adapter; empty is the base model")
    seed: int | None = Field(None, ge=0, lt=2**32, description="of the first picture, the next has the next; or random")
    steps: int = Field(20, ge=1)
    guidance: float = Field(3.0, ge=0, le=30)
    size: str | None = Field(None, pattern=_SIZE, description="WIDTHxHEIGHT, or the model's")
    n: int = Field(1, ge=1, description="pictures")
    timeout: float | None = Field(None, gt=0, description="seconds after which the pictures are of no use")
    response_format: Format | None = Field(None, description="or by the header Accept")

    @field_validator("size", mode="before")
    @classmethod
    def _says_size(cls, given: Any) -> Any:
        """A size as it came, refused in words: the pattern, which programs read in the schema, would tell itself."""
        if given is not None and not (isinstance(given, str) and re.fullmatch(_SIZE, given)):
            raise PydanticCustomError("size", "expected WIDTHxHEIGHT, as 512x512")
        return given

    @property
    def sides(self) -> list[int]:
        """Width and height; empty is the model's own size."""
        return [int(side) for side in self.size.split("x")] if self.size else []

    def request(self, client: str) -> ImageRequest:
        """What to draw; without a seed of its own it gets a random one, so that drawing it again gives the same.

        Raises:
            ServiceError: 422, a size that no model draws.
        """
        width, height = self.sides or (None, None)
        try:
            return ImageRequest(
                prompt=self.prompt,
                mix=self.mix,
                seed=secrets.randbelow(2**32) if self.seed is None else self.seed,
                steps=self.steps,
                guidance=self.guidance,
                width=width,
                height=height,
                n=self.n,
                client=client,
                deadline=self.timeout,
            )
        except RequestError as error:
            raise invalid(one_line(error)) from error

    def format(self, accept: str) -> Format:
        """How to answer: as the body says, else the first type of ``Accept`` that there is, else PNG for one picture.

        Raises:
            ServiceError: 406, none of the types; 422, several pictures as one PNG.
        """
        kinds = [part.split(";")[0].strip().lower() for part in accept.split(",")]
        found = self.response_format or next((_TYPES[kind] for kind in kinds if kind in _TYPES), None)
        if found is None and accept and not {"*/*", "image/*", "application/*"} & set(kinds):
            raise ServiceError("not_acceptable", f"expected Accept to be one of {', '.join(_TYPES)}", 406)
        found = found or ("png" if self.n == 1 else "json")
        if found == "png" and self.n > 1:
            raise invalid(f"a PNG is one picture, got n={self.n}: ask for response_format 'json' or 'stream'")
        return found


def parse(raw: bytes, limits: Settings) -> ImageBody:
    """The body from JSON.

    Raises:
        ServiceError: 422, it is malformed, or more than the limits allow; lists all that is wrong.
    """
    try:
        body = ImageBody.model_validate_json(raw)
    except ValidationError as error:
        raise invalid("; ".join(_malformed(error))) from None
    if wrong := list(_over(body, limits)):
        raise invalid("; ".join(wrong))
    return body


def _malformed(error: ValidationError) -> list[str]:
    """What is wrong with each field, and which fields there are where some are unknown."""
    found = list(zip(error.errors(), problems(error), strict=True))
    wrong = [told for each, told in found if each["type"] != "extra_forbidden"]
    unknown = [str(each["loc"][0]) for each, _ in found if each["type"] == "extra_forbidden"]
    return [*wrong, _no_fields(unknown)] if unknown else wrong


def _no_fields(names: Sequence[str]) -> str:
    shown = [f"{name[:40]!r}{_did_you_mean(name[:40])}" for name in names[:_SHOWN]]
    shown += [f"{len(names) - _SHOWN:,} more"] if len(names) > _SHOWN else []
    return f"expected the fields {', '.join(ImageBody.model_fields)}, got {', '.join(shown)}"


def _did_you_mean(name: str) -> str:
    close = get_close_matches(name.casefold(), ImageBody.model_fields, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _over(body: ImageBody, limits: Settings) -> list[str]:
    counts = {
        "steps": (body.steps, limits.max_steps),
        "n": (body.n, limits.max_pictures),
        "adapters in mix": (len(body.mix), limits.max_adapters),
        "pixels of size": (math.prod(body.sides or [0]), limits.max_pixels),
    }
    wrong = [f"{name}: expected at most {most:,}, got {got:,}" for name, (got, most) in counts.items() if got > most]
    if any(side % SIDE for side in body.sides):
        wrong.append(f"size: expected multiples of {SIDE}, got {body.size!r}")
    strong = [name for name, strength in body.mix.items() if abs(strength) > 10]
    return wrong + [f"mix: expected strengths from -10 to 10, got {body.mix[name]:g} for {name!r}" for name in strong]
