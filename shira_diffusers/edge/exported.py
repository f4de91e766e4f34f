"""Map the weights of one exported model from their file into the memory that a session reads and we overwrite."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shira_diffusers.errors import ShiraError
from shira_diffusers.formats.gap_codec import Indices
from shira_diffusers.formats.safetensors_bytes import body_of, open_safetensors
from shira_diffusers.weights.text_model import other_name

MODEL, WEIGHTS, ABOUT = "model.onnx", "model.safetensors", "model.json"
FORMAT, FORMAT_VERSION = "shira-onnx", "1"
_DTYPES = {"F32": np.float32, "F16": np.float16}


class ExportedWeights:
    """The weights of a model that ``shira export-onnx`` wrote.

    The file is mapped privately: memory is taken only for pages that are overwritten, and the file never changes.

    Args:
        folder: of one component, with ``model.onnx``, ``model.safetensors`` and ``model.json``.

    Attributes:
        tensors: by the names that the model's own parameters have; parts of ``memory``.
        memory: all weights end to end, float32 or float16 ``(n,)``.
        transposed: the names of the weights ``(out, in)`` that are stored as ``(in, out)``.
        blocks: the layers of a UNet's blocks, see ``adapters.scales.Blocks``.
        inputs: shapes of the smallest inputs that the model takes.

    Raises:
        ShiraError: no such folder, or of another version.
        AdapterFormatError: a damaged file of weights.
    """

    def __init__(self, folder: Path) -> None:
        about = _read_about(folder)
        opened = open_safetensors(folder / WEIGHTS)
        kinds = {raw.dtype for raw in opened.tensors.values()}
        if len(kinds) != 1 or not kinds <= _DTYPES.keys():
            raise ShiraError(
                f"{folder / WEIGHTS} holds {', '.join(sorted(kinds)) or 'nothing'}, expected F32 or F16 alone; export "
                "the model again"
            )
        self.folder = folder
        self.tensors: dict[str, NDArray[Any]] = {name: raw.array for name, raw in opened.tensors.items()}
        self.memory: NDArray[Any] = body_of(opened.content).view(_DTYPES[kinds.pop()])
        try:
            self.transposed = frozenset(about["transposed"])
            self.blocks: Mapping[str, tuple[int, ...]] = {name: tuple(own) for name, own in about["blocks"].items()}
            self.inputs: Mapping[str, list[int]] = dict(about["inputs"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShiraError(
                f"{folder / ABOUT} is damaged ({type(error).__name__}: {error}); export the model again"
            ) from error
        first, size = self.memory.ctypes.data, self.memory.itemsize
        self._starts = {name: (array.ctypes.data - first) // size for name, array in self.tensors.items()}
        self._order = sorted(self._starts, key=lambda name: self._starts[name])
        self._edges = np.array([self._starts[name] for name in self._order])

    def own_name(self, name: str) -> str | None:
        """The name that the model has for a parameter; None if it has none.

        Text encoders of some versions of transformers begin it with ``text_model.``, others do not.
        """
        return next((each for each in (name, other_name(name)) if each in self.tensors), None)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter in diffusers."""
        shape = self.tensors[name].shape
        return shape[::-1] if name in self.transposed else shape

    def positions(self, name: str, indices: Indices) -> Indices:
        """Where entries lie in ``memory``: int32 where that is possible, else int64 ``(nnz,)``.

        Args:
            name: of a parameter.
            indices: int32 or int64 ``(nnz,)``, flat row-major in the shape that it has in diffusers.
        """
        at = indices.astype(np.int64)
        if name in self.transposed:
            rows, columns = self.shape(name)
            at = at % columns * rows + at // columns
        at += self._starts[name]
        return at.astype(np.int32) if self.memory.size < 2**31 else at

    def names_at(self, positions: Indices) -> list[str]:
        """The parameters that hold entries of ``memory``, sorted by place; ``positions`` are ``(n,)``."""
        return [self._order[k] for k in np.unique(np.searchsorted(self._edges, positions, side="right") - 1)]


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        found = about["format"], about["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShiraError(
            f"{folder} is not an exported model ({type(error).__name__}: {error}): expected {MODEL}, {WEIGHTS} and "
            f"{ABOUT}; write it with shira export-onnx"
        ) from error
    if found != (FORMAT, FORMAT_VERSION):
        raise ShiraError(
            f"{folder / ABOUT} is of format {found}, expected {(FORMAT, FORMAT_VERSION)}; export the model again"
        )
    return about
