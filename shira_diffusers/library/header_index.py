"""Keep what the headers of adapter files say in an SQLite file, so that each version of a file is read once."""

import json
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from shira_diffusers.errors import AdapterFormatError
from shira_diffusers.formats.opened_adapter import OpenedAdapter, open_adapter
from shira_diffusers.library.folder import Version

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SCHEMA = 1  # an index of another number is built anew
_OURS = b"SHiR"  # SQLite's application_id, at bytes 68 to 71: any other file is left alone
_WAIT = 30.0  # seconds for other processes that write


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    """What an adapter's header says; nothing of it is checked against the tensors.

    Args:
        metadata: the adapter's strings.
        nnz: entries held.
        density: the fraction of the adapted weights' entries that those are; None of PEFT's, which store no shapes.
        components: the models that it changes, such as "unet"; of PEFT's none.
        size: bytes of the file.
        sha256: the checksum of its tensors; None of old files and PEFT's.
    """

    metadata: Mapping[str, str]
    nnz: int
    density: float | None
    components: Sequence[str]
    size: int
    sha256: str | None

    @classmethod
    def of(cls, file: OpenedAdapter) -> "AdapterHeader":
        """That of an open file."""
        return cls(dict(file.metadata), file.nnz, file.density, file.components, file.size, file.sha256)


class _Row(NamedTuple):
    stamp: str  # of the version that was read
    header: AdapterHeader | None  # None of a file that is no intact adapter


class HeaderIndex:
    """Headers of adapter files. Safe to use from several threads, and its file from several processes.

    Args:
        file: made where there is none; a damaged one, or one of another schema, is built anew. None, and a file that
            cannot be written, keeps headers in memory only.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file, self._lock = file, threading.Lock()
        self._rows: dict[str, _Row] | None = None

    def headers(self, versions: Iterable[Version]) -> dict[str, AdapterHeader]:
        """The headers of files as they are on disk now, by name, but for those that cannot be read."""
        now = {os.path.abspath(version.path): version for version in versions}
        with self._lock:
            if self._rows is None:
                self._rows = self._on_file(_load) or {}
            known = self._rows
            stale = [path for path, version in now.items() if path not in known or known[path].stamp != _stamp(version)]
            read = {path: _read(now[path]) for path in stale}
            if stale:
                self._keep(known, read)
            found = known | read
        return {version.name: header for path, version in now.items() if (header := found[path].header)}

    def _keep(self, known: dict[str, _Row], read: Mapping[str, _Row]) -> None:
        """Keep rows that were read, and drop those of files that are gone, or that say something else."""
        new = {path: row for path, row in read.items() if row.stamp}
        gone = [path for path in known if path not in new and (path in read or not os.path.exists(path))]
        for path in gone:
            del known[path]
        known.update(new)
        if new or gone:
            self._on_file(lambda file: _save(file, new, gone))

    def _on_file(self, act: Callable[[Path], T]) -> T | None:
        """What an action on the index returns; None where there is no index that can be used."""
        if self._file is None:
            return None
        try:
            if _is_of_others(self._file):
                raise OSError("it is not an index of adapters' headers; give another file")
            return act(self._file)
        except (OSError, sqlite3.OperationalError) as error:
            logger.warning("headers of adapters are not kept in %s: %s", self._file, error)
            self._file = None
        except (sqlite3.DatabaseError, ValueError, TypeError):  # damaged
            with suppress(OSError):
                self._file.unlink(missing_ok=True)
        return None


def _stamp(version: Version) -> str:
    return f"{version.size} {version.modified_ns} {version.inode}"


def _read(version: Version) -> _Row:
    """What a file says; where it may still change unseen without a stamp, so that it is read again."""
    try:
        header = AdapterHeader.of(open_adapter(version.path))
    except AdapterFormatError:
        header = None
    except OSError:
        return _Row("", None)
    return _Row(_stamp(version) if version.is_settled() and version.is_on_disk() else "", header)


def _is_of_others(file: Path) -> bool:
    if not file.exists():
        return False
    with file.open("rb") as content:
        head = content.read(72)
    return bool(head) and head[68:] != _OURS


def _load(file: Path) -> dict[str, _Row]:
    if not file.exists():
        return {}
    with closing(sqlite3.connect(file, timeout=_WAIT)) as database:
        database.text_factory = bytes
        if database.execute("PRAGMA user_version").fetchone()[0] != _SCHEMA:
            return {}
        rows = database.execute("SELECT path, stamp, header FROM headers").fetchall()
    return {
        os.fsdecode(path): _Row(stamp.decode(), AdapterHeader(**json.loads(header))) for path, stamp, header in rows
    }


def _save(file: Path, rows: Mapping[str, _Row], gone: Iterable[str]) -> None:
    entries = [
        (os.fsencode(path), row.stamp, json.dumps(asdict(row.header))) for path, row in rows.items() if row.header
    ]
    leaving = [*gone, *(path for path, row in rows.items() if not row.header)]
    with closing(sqlite3.connect(file, timeout=_WAIT, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        if database.execute("PRAGMA user_version").fetchone()[0] != _SCHEMA:
            database.execute("DROP TABLE IF EXISTS headers")
            database.execute(f"PRAGMA application_id = {int.from_bytes(_OURS, 'big')}")
            database.execute(f"PRAGMA user_version = {_SCHEMA}")
            database.execute("CREATE TABLE headers (path BLOB PRIMARY KEY, stamp TEXT, header TEXT) WITHOUT ROWID")
        database.executemany("DELETE FROM headers WHERE path = ?", [(os.fsencode(path),) for path in leaving])
        database.executemany("INSERT OR REPLACE INTO headers VALUES (?, ?, ?)", entries)
        database.execute("COMMIT")
