"""Build sessions that read weights where we overwrite them, and prove by a test that they do."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from shira_diffusers.edge.exported import MODEL, ExportedWeights
from shira_diffusers.errors import ResidentStateError, ShiraError, counted, listing

_ALTERED = 64  # entries of each weight that the test overwrites: enough to be seen, and one page of memory

Options = Callable[[], Any]
"""Makes ``onnxruntime.SessionOptions``, anew for each session."""


class LiveSession:
    """An ONNX Runtime session whose initializers are the memory of exported weights.

    Args:
        weights: of the model; they must not be overwritten while the session runs.
        options: see ``Options``.
        providers: ONNX Runtime's execution providers.

    Raises:
        ShiraError: ONNX Runtime cannot load the model.
    """

    def __init__(self, weights: ExportedWeights, options: Options, providers: Sequence[str]) -> None:
        own = options()
        own.log_severity_level = 3  # or it warns of each weight that it is no constant
        # ONNX Runtime reads this memory as long as the session lives, and keeps no reference to it
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights.tensors.items()}
        for name, value in self._values.items():
            own.add_initializer(name, value)
        self.onnx = _opened(weights.folder / MODEL, own, providers)

    def run(self, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """All outputs of the model."""
        return self.onnx.run(None, feeds)


def _opened(model: Path, options: Any, providers: Sequence[str]) -> Any:
    try:
        return ort.InferenceSession(str(model), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's errors have no base class of their own
        raise ShiraError(
            f"ONNX Runtime {ort.__version__} cannot load {model}, expected a model that shira export-onnx wrote; "
            f"export it again ({type(error).__name__}: {str(error)[:300]})"
        ) from error


def open_live(weights: ExportedWeights, options: Options, providers: Sequence[str]) -> LiveSession:
    """Build a session, overwrite a few entries of every weight, and compare with what it computes when given those.

    The weights are put back. It takes four runs of the smallest inputs.

    Raises:
        ResidentStateError: what is overwritten does not reach the session, wholly or in part; names the weights.
        ShiraError: ONNX Runtime cannot load the model.
    """
    session = LiveSession(weights, options, providers)
    constant = weights.tensors.keys() - {each.name for each in session.onnx.get_overridable_initializers()}
    if constant:
        raise _stale(weights, sorted(constant), "are constants, which are prepacked or folded into copies")
    parts = [array.reshape(-1)[:_ALTERED] for array in weights.tensors.values()]
    before = [part.copy() for part in parts]
    feeds, base = _first_run(session, weights)
    try:
        for part in parts:
            part[:] = part[::-1] + part.dtype.type(1 / 64)
        altered = session.run(feeds)
        if _same(altered, base) or not _same(altered, session.run({**feeds, **weights.tensors})):
            each = weights.tensors.items()
            names = [name for name, array in each if not _same(altered, session.run({**feeds, name: array}))]
            raise _stale(weights, names or list(weights.tensors), "are copied, as to another device")
    finally:
        for part, bits in zip(parts, before, strict=True):
            part[:] = bits
    return session


def _first_run(session: LiveSession, weights: ExportedWeights) -> tuple[dict[str, NDArray[Any]], list[NDArray[Any]]]:
    """The smallest inputs, and what the model gives for them.

    Raises:
        ShiraError: its files are not of one export.
    """
    others = {each.name for each in session.onnx.get_overridable_initializers()} - weights.tensors.keys()
    wrong = f"the files in {weights.folder} do not belong together"
    if others:
        raise ShiraError(f"{wrong} (the weights lack {', '.join(sorted(others)[:3])}); export the model again")
    try:
        feeds = _feeds(session, weights.inputs)
        return feeds, session.run(feeds)
    except Exception as error:  # ONNX Runtime's errors have no base class of their own
        why = f"{type(error).__name__}: {str(error)[:300]}"
        raise ShiraError(f"{wrong} ({why}); export the model again") from error


def _stale(weights: ExportedWeights, names: Sequence[str], why: str) -> ResidentStateError:
    return ResidentStateError(
        f"{counted(len(names), 'weight', of=len(weights.tensors))} of {weights.folder / MODEL} {why}: expected "
        "sessions that read their weights where they are overwritten; use the CPUExecutionProvider, and a model as "
        f"shira export-onnx writes it:{listing(names)}"
    )


def _feeds(session: LiveSession, shapes: Mapping[str, list[int]]) -> dict[str, NDArray[Any]]:
    """Inputs of these shapes; integers are 0, floats some wave."""
    kinds = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
    inputs = {each.name: kinds[each.type] for each in session.onnx.get_inputs()}
    waves = {name: np.cos(np.arange(np.prod(shapes[name]))).reshape(shapes[name]) for name in inputs}
    return {name: wave.astype(inputs[name]) * (inputs[name] != np.int64) for name, wave in waves.items()}


def _same(one: Sequence[NDArray[Any]], other: Sequence[NDArray[Any]]) -> bool:
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=True))
