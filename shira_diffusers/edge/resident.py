"""OnnxResident: what ``Resident`` is for modules of torch, for ONNX Runtime sessions."""

import copy
import logging
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from shira_diffusers.adapters.base_match import other_base, trained_on
from shira_diffusers.adapters.scales import Scale, check_scale, mix_from
from shira_diffusers.edge.adapter import read_adapter
from shira_diffusers.edge.exported import ABOUT, ExportedWeights
from shira_diffusers.edge.fit import compare_base, fit
from shira_diffusers.edge.session import Options, open_live
from shira_diffusers.edge.switch import SwitchedWeights
from shira_diffusers.errors import ShiraError, counted

logger = logging.getLogger(__name__)


class OnnxResident:
    """Adapters on the weights of ONNX Runtime sessions, switched by overwriting a few entries.

    No session is built anew. Adapters, names, mixes and strengths are those of ``Resident``, and so are the bits of the
    weights. At construction a test proves that each session reads what is overwritten. All methods are safe to call
    from several threads.

    Args:
        folder: what ``shira export-onnx`` wrote: a folder per component.
        components: those to open; None is all.
        session_options: makes ``onnxruntime.SessionOptions``, called per session; for the number of threads and such.
        providers: ONNX Runtime's execution providers. Those that copy weights, as GPUs do, are refused.

    Raises:
        ShiraError: no exported models, or ONNX Runtime cannot load them.
        ResidentStateError: a session that does not read its weights where they are overwritten.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        components: Sequence[str] | None = None,
        *,
        session_options: Options = ort.SessionOptions,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        found = sorted(path.parent.name for path in Path(folder).glob(f"*/{ABOUT}"))
        if not found:
            raise ShiraError(f"no exported models in {folder}: expected a folder that shira export-onnx wrote")
        wanted = found if components is None else list(components)
        if not wanted or isinstance(components, str):
            raise ShiraError(f"expected a list of some of {', '.join(found)} as components, got {components!r}")
        if not callable(session_options):
            raise ShiraError(
                f"expected a function that makes session_options anew for each session, got {session_options!r}"
            )
        self._models = {name: SwitchedWeights(name, ExportedWeights(Path(folder, name))) for name in wanted}
        self._sessions = {
            name: open_live(model.weights, session_options, providers) for name, model in self._models.items()
        }
        self._lock = threading.RLock()
        self._mix: dict[str, Scale] = {}
        self._disabled: dict[str, Scale] | None = None

    def __repr__(self) -> str:
        active = ", ".join(f"{name}={scale}" for name, scale in self._mix.items()) or "none"
        count = counted(len(self.names), "adapter")
        return f"<OnnxResident of {', '.join(self._models)}; {count}, active: {active}>"

    @property
    def sessions(self) -> dict[str, ort.InferenceSession]:
        """The sessions by component; each stays the same object."""
        return {name: session.onnx for name, session in self._sessions.items()}

    @property
    def components(self) -> dict[str, list[str]]:
        """The adapters that were added, and the components that each changes."""
        found: dict[str, list[str]] = {}
        for part, model in self._models.items():
            for name in list(model.adapters):
                found.setdefault(name, []).append(part)
        return found

    @property
    def names(self) -> list[str]:
        """The adapters that were added."""
        return list(self.components)

    @property
    def active(self) -> dict[str, Scale]:
        """The active adapters with their scales as given; empty while disabled."""
        return copy.deepcopy(self._mix)

    def run(self, component: str, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run a model with the active mix; others switch before or after.

        Args:
            component: such as ``unet``.
            feeds: its inputs by name.

        Returns:
            Its outputs.

        Raises:
            ShiraError: no model of that name is open.
        """
        session = self._sessions.get(component)
        if session is None:
            known = ", ".join(map(repr, self._sessions))
            raise ShiraError(f"no component named {component!r}, expected one of {known}")
        with self._lock:
            return session.run(dict(feeds))

    def add(self, path: str | os.PathLike[str], name: str) -> None:
        """Read an adapter file and register it, without activating it.

        Args:
            path: a file of ours, of either version, or a folder that holds one.
            name: not in use.

        Raises:
            ShiraError: the name is in use or empty.
            FileNotFoundError, AdapterFormatError: no intact adapter.
            AdapterMismatchError: the adapter does not fit, wholly or in part; all offenders are named.

        On error nothing has changed. Another base than the adapter's gives a warning.
        """
        if not name or not isinstance(name, str):
            raise ShiraError(f"an adapter's name must be a string that is not empty, got {name!r}")
        adapter = read_adapter(path)
        with self._lock:
            if name in self.names:
                raise ShiraError(
                    f"adapter name {name!r} is in use, expected a new one; remove that adapter first or choose another"
                )
            parts, match = fit(adapter, self._models), compare_base(adapter, self._models)
            for part, entries in parts.items():
                self._models[part].adapters[name] = entries
        if match == "sibling":
            logger.info("adapter %r was trained on a sibling of this model%s", name, trained_on(adapter.metadata))
        elif match == "other":
            warnings.warn(other_base(name, adapter.metadata), stacklevel=2)

    def set(self, scales: Mapping[str, Scale | None]) -> None:
        """Make exactly these adapters active: restore what leaves, overwrite what arrives.

        Args:
            scales: name -> a number, ``{component: number}`` or ``{component: {"down" | "mid" | "up": ...}}``, see
                ``adapters.scales.Scale``; None is 1.0.

        Raises:
            ShiraError: unknown adapters, a scale that is not finite or for a component that the adapter does not
                change, or sums out of the range of the weights' dtype.
            ResidentStateError: weights were modified outside shira_diffusers while an adapter was active.

        On error, at whatever point, the mix and all bits are what they were.
        """
        with self._lock:
            self._switch(self._checked(scales), None)

    def clear(self) -> None:
        """Make no adapter active: every weight is bit-equal to the exported one. Raises: as ``set``."""
        self.set({})

    def disable(self) -> None:
        """Restore the base and remember the mix for ``enable``. Idempotent."""
        with self._lock:
            self._switch({}, self._mix if self._disabled is None else self._disabled)

    def enable(self) -> None:
        """Bring back the mix that ``disable`` put aside. Idempotent."""
        with self._lock:
            self._switch(self._mix if self._disabled is None else self._disabled, None)

    def remove(self, *names: str) -> None:
        """Forget adapters, in one switch; those of the mix that are left stay active. Raises: as ``set``."""
        with self._lock:
            self._require_known(names)
            aside = None if self._disabled is None else _without(self._disabled, names)
            self._switch(_without(self._mix, names), aside)
            for model in self._models.values():
                for name in names:
                    model.forget(name)

    @contextmanager
    def using(self, scales: Mapping[str, Scale | None]) -> Iterator["OnnxResident"]:
        """Make these adapters active for a while, alone with the models; the mix before returns after.

        Adapters that are removed meanwhile are no longer in it.

        Raises: as ``set``.
        """
        with self._lock:
            mix, aside = self._mix, self._disabled
            self.set(scales)
            try:
                yield self
            finally:
                self._switch(self._known(mix), None if aside is None else self._known(aside))

    def _switch(self, mix: Mapping[str, Scale], disabled: dict[str, Scale] | None) -> None:
        with ExitStack() as undo:
            for model in self._models.values():
                model.switch({name: scale for name, scale in mix.items() if name in model.adapters}, undo)
            undo.pop_all()
        self._mix, self._disabled = dict(mix), disabled

    def _checked(self, scales: Mapping[str, Scale | None]) -> dict[str, Scale]:
        mix = mix_from(scales)
        self._require_known(mix)
        parts = self.components
        blocks = {name: {part: self._models[part].weights.blocks for part in parts[name]} for name in mix}
        return {name: check_scale(name, scale, blocks[name]) for name, scale in mix.items()}

    def _known(self, mix: Mapping[str, Scale]) -> dict[str, Scale]:
        names = self.names
        return {name: scale for name, scale in mix.items() if name in names}

    def _require_known(self, names: Iterable[str]) -> None:
        known = self.names
        unknown = [repr(name) for name in names if name not in known]
        if unknown:
            loaded = ", ".join(map(repr, known)) or "none"
            raise ShiraError(f"no adapter named {', '.join(unknown)}, loaded are {loaded}")


def _without(mix: Mapping[str, Scale], names: Iterable[str]) -> dict[str, Scale]:
    left = set(names)
    return {name: scale for name, scale in mix.items() if name not in left}
