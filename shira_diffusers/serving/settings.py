"""What a service is made of and what its clients may ask for, checked at the start."""

import os
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shira_diffusers.errors import ShiraError, listing
from shira_diffusers.serving.requests import MAX_STEPS

ASSETS = Path(__file__).resolve().parents[2] / "assets"  # of the source code; an installed package has none


class Settings(BaseModel):
    """The settings of a service; in a config file of Ray Serve they are the application's ``args``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(default_factory=lambda: str(ASSETS / "emoji-diffusion"), description="a folder, or a Hub id")
    adapters: str | None = Field(None, description="a folder, s3://bucket/folder, hf://owner/name, or what fsspec has")
    cache: str | None = Field(None, description="a local folder for copies of others' adapters, and for the index")
    device: str = Field("cpu", description="as torch names it")
    dtype: str = Field("float32", pattern="^(float32|float16|bfloat16)$", description="of the weights")
    cuda_graphs: bool = Field(False, description="replay the denoiser's kernels: faster, the same bits, more memory")
    ram_bytes: int = Field(4 * 2**30, ge=0, description="for packed adapters, per replica")
    device_bytes: int = Field(2**30, ge=0, description="for decoded adapters, per replica")

    replicas: int = Field(1, ge=1, description="of the model; at least so many where max_replicas is more")
    max_replicas: int = Field(1, ge=1, description="as many as the load asks for, up to this")
    cpus: float = Field(1, ge=0, description="that a replica reserves")
    gpus: float | None = Field(None, ge=0, description="that a replica reserves: one where device is cuda")
    ingresses: int = Field(1, ge=1, description="processes that answer HTTP")
    revision: str = Field("", description="another value than before restarts all replicas, one after the other")

    keys: str | None = Field(None, description="a file with a line CLIENT:KEY or CLIENT:KEY:admin for each client")
    pictures_per_minute: float = Field(120, gt=0, description="that a client may ask for")
    max_pixels: int = Field(1024 * 1024, ge=64, description="of a picture")
    max_steps: int = Field(100, ge=1, le=MAX_STEPS, description="of a picture")
    max_pictures: int = Field(4, ge=1, description="of a request")
    max_adapters: int = Field(8, ge=1, description="of a mix")
    max_upload_bytes: int = Field(256 * 2**20, ge=1, description="of an adapter")
    max_running: int = Field(32, ge=1, description="requests that a replica works on, taking turns")
    max_queued: int = Field(100, ge=1, description="requests that wait for a replica, per ingress")

    @classmethod
    def checked(cls, given: dict[str, Any]) -> Self:
        """Settings from a command line or config file.

        Raises:
            ShiraError: lists all that are unknown or out of range; or CUDA graphs are asked for without CUDA, or the
                demo's files without a clone.
        """
        try:
            settings = cls.model_validate(given)
        except ValidationError as error:
            raise ShiraError(f"the service's settings are wrong:{listing(problems(error))}") from None
        if settings.cuda_graphs and not settings.device.startswith("cuda"):
            raise ShiraError(f"cuda_graphs: expected device=cuda, got {settings.device!r}; leave one of the two out")
        given_by = {"MODEL": settings.model, "--adapters FOLDER": settings.adapter_source}
        if missing := [
            name for name, path in given_by.items() if Path(path).parent == ASSETS and not Path(path).exists()
        ]:
            raise ShiraError(
                "the demo's model and adapters come with the source code, not with an installed package: name your own "
                f"with {' and '.join(missing)}, or install with pip install -e . in a clone"
            )
        return settings

    @property
    def adapter_source(self) -> str:
        """Where adapters are: those that come with the source code unless told otherwise."""
        return os.path.expanduser(self.adapters or str(ASSETS / "adapters"))


def problems(error: ValidationError) -> list[str]:
    """What is wrong with each field, a line each, without what was sent where that is long."""
    return [_problem(each["loc"], each["msg"], each["type"], each["input"]) for each in error.errors()]


def _problem(place: tuple[int | str, ...], message: str, kind: str, got: Any) -> str:
    sent = repr(got[:60]) if isinstance(got, str) else repr(got)[:60]
    shown = "" if kind in ("missing", "json_invalid") else f", got {sent}"
    name = ".".join(map(str, place))
    return f"{name + ': ' if name else ''}{message}{shown}"
