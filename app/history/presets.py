"""Mixes that visitors saved under a name."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.settings.checks import SettingsError
from shira_diffusers import ShiraError
from shira_diffusers.atomic_write import write_atomically

MAX_PRESETS = 500
MAX_NAME = 60
MAX_FILE = 10_000_000  # bytes: beyond what 500 presets take, so not one of ours


class Presets:
    """Settings by name, in a JSON file that is replaced whole with each change. Safe to use from several threads.

    Args:
        path: of the file; made with the first preset.

    Raises:
        ShiraError: the file is there, but holds no presets.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changing = threading.Lock()
        self._presets: Mapping[str, Mapping[str, Any]] = _read(path) if path.is_file() else {}

    @property
    def names(self) -> tuple[str, ...]:
        """In alphabetical order."""
        return tuple(sorted(self._presets, key=str.casefold))

    def get(self, name: object) -> dict[str, Any]:
        """The settings of a preset. Raises SettingsError: there is none of that name."""
        found = self._presets.get(name) if isinstance(name, str) else None
        if found is None:
            raise SettingsError(f"no preset named {str(name)[:80]!r}; there are {', '.join(self.names) or 'none'}")
        return dict(found)

    def save(self, name: object, settings: Mapping[str, Any]) -> str:
        """Keep settings under a name, in place of those that had it; returns the name without space around it.

        Raises:
            SettingsError: no name, a name too long, or too many presets; nothing has changed.
            OSError: the file cannot be written; nothing has changed.
        """
        kept = tidy(name)
        if not kept or len(kept) > MAX_NAME or not kept.isprintable():
            raise SettingsError(f"a preset needs a name of 1 to {MAX_NAME} characters, got {str(name)[:80]!r}")
        with self._changing:
            if kept not in self._presets and len(self._presets) >= MAX_PRESETS:
                raise SettingsError(f"there are {MAX_PRESETS} presets, which is the most; delete one first")
            self._write({**self._presets, kept: dict(settings)})
        return kept

    def delete(self, name: object) -> None:
        """Forget a preset.

        Raises:
            SettingsError: there is none of that name.
            OSError: the file cannot be written; nothing has changed.
        """
        with self._changing:
            self.get(name)
            self._write({known: settings for known, settings in self._presets.items() if known != name})

    def _write(self, presets: Mapping[str, Mapping[str, Any]]) -> None:
        write_atomically(self._path, json.dumps(presets, indent=1).encode())
        self._presets = presets


def tidy(name: object) -> str:
    """A preset's name without needless space; empty where it is no text."""
    return " ".join(name.split()) if isinstance(name, str) else ""


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        presets = json.loads(path.read_text()) if path.stat().st_size < MAX_FILE else None
    except ValueError:
        presets = None
    if not isinstance(presets, dict) or not all(isinstance(settings, dict) for settings in presets.values()):
        raise ShiraError(f"{path} holds no presets; move it away to start with none")
    return presets
