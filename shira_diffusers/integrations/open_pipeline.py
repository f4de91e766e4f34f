"""Open a base pipeline, quietly, with one clear error for whatever is wrong with it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import torch
import transformers
from diffusers import DiffusionPipeline

from shira_diffusers.errors import ShiraError
from shira_diffusers.formats.contents import guess
from shira_diffusers.formats.find import safetensors_in
from shira_diffusers.formats.paths import did_you_mean, is_hub_id, shown_in

# What from_pretrained raises for a folder that is missing, damaged, incomplete or of a class unknown here.
_LOADING = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)
_DAMAGED = (safetensors.SafetensorError,)


def open_pipeline(base: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a pipeline, without progress bars.

    Args:
        base: a diffusers folder, or a Hub id ``owner/name``.
        dtype: of the weights.

    Raises:
        ShiraError: there is none, or it cannot be loaded.
    """
    path = Path(base)
    if not path.exists() and not is_hub_id(base):
        raise ShiraError(
            f"no base pipeline at {base}: expected a diffusers folder or a Hub id owner/name; name one with --base"
            f"{did_you_mean(path)}"
        )
    try:
        with _quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer diffusers call it dtype, older ones do not know that
            pipe = DiffusionPipeline.from_pretrained(base, torch_dtype=dtype)
    except (*_LOADING, *_DAMAGED) as error:
        raise ShiraError(
            f"cannot load a pipeline from {base!r}, expected a diffusers folder or a Hub id owner/name "
            f"({type(error).__name__}: {error}){_remedy(path)}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _remedy(path: Path) -> str:
    """What is wrong with a base that could not be loaded, if its name or the first bytes of its weights say so.

    They are looked for in the folder itself, and in those inside of it where it is a pipeline's, which has its index.
    """
    if not path.exists():
        return did_you_mean(path)
    inside = shown_in(path) if (path / "model_index.json").is_file() else []
    for file in [file for folder in (path, *inside) for file in safetensors_in(folder)]:
        found = guess(file)
        if found is not None:
            return f"; {file} looks like {found.kind}; {found.remedy}"
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without loading bars and remarks of the two libraries, whose settings return after."""
    libraries: tuple[Any, ...] = (diffusers.utils.logging, transformers.logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
