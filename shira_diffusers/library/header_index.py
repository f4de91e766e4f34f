"""Keep what the headers of adapter files say in an SQLite file, so that each version of a file is read once."""

import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from shira_diffusers.errors import AdapterFormatError
from shira_diffusers.formats.opened_adapter import open_adapter
from shira_diffusers.library.folder import Version

_SCHEMA = 1  # another number, or a damaged file, and the index is built anew
_WAIT = 30.0  # seconds for other processes that write


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    """What an adapter's header says; nothing of it is checked against the tensors.

    Args:
        metadata: the adapter's strings.
        nnz: entries held.
        decoded_nbytes: bytes of a budget ``device_bytes`` that it takes; 0 for PEFT's, which depends on the model.
        sha256: the checksum of its tensors; None of old files and PEFT's.
    """

    metadata: Mapping[str, str]
    nnz: int
    decoded_nbytes: int
    sha256: str | None


def headers_of(versions: Iterable[Version], index: Path) -> dict[str, AdapterHeader]:
    """The headers by name, but for files that cannot be read. Safe under several threads and processes.

    An index that cannot be written, such as in a folder of another user, is done without.
    """
    now = {str(version.path.absolute()): version for version in versions}
    known = _indexed(index)
    found = {path: known[path] for path, version in now.items() if known.get(path, ("",))[0] == _stamp(version)}
    new = {path: row for path, version in now.items() if path not in found and (row := _row(version)) is not None}
    gone = [path for path, version in now.items() if path in known and path not in found and path not in new]
    if new or gone:
        _keep(index, new, gone)
    return {now[path].name: AdapterHeader(**json.loads(row[1])) for path, row in (found | new).items()}


def _stamp(version: Version) -> str:
    return f"{version.size} {version.modified_ns} {version.inode}"


def _row(version: Version) -> tuple[str, str] | None:
    try:
        opened = open_adapter(version.path)
    except (AdapterFormatError, OSError):
        return None  # told at use
    nbytes = 0 if opened.is_peft else opened.decoded_nbytes
    header = AdapterHeader(dict(opened.metadata), opened.nnz, nbytes, opened.sha256)
    return (_stamp(version), json.dumps(asdict(header))) if version.is_on_disk() else None


def _indexed(index: Path) -> dict[str, tuple[str, str]]:
    """All rows by path; none where the index is missing, damaged, or of another version."""
    if not index.is_file():
        return {}
    try:
        with closing(sqlite3.connect(index, timeout=_WAIT)) as database:
            if database.execute("PRAGMA user_version").fetchone()[0] != _SCHEMA:
                return {}
            return {path: (stamp, header) for path, stamp, header in database.execute("SELECT * FROM headers")}
    except sqlite3.Error:
        return {}


def _keep(index: Path, rows: Mapping[str, tuple[str, str]], gone: list[str]) -> None:
    try:
        _write(index, rows, gone)
    except sqlite3.OperationalError:
        return  # read-only, a full disk, or held too long by others: the next start reads the headers again
    except sqlite3.DatabaseError:  # no database, or a damaged one
        index.unlink(missing_ok=True)
        _write(index, rows, [])


def _write(index: Path, rows: Mapping[str, tuple[str, str]], gone: list[str]) -> None:
    with closing(sqlite3.connect(index, timeout=_WAIT, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        if database.execute("PRAGMA user_version").fetchone()[0] != _SCHEMA:
            database.execute("DROP TABLE IF EXISTS headers")
            database.execute("CREATE TABLE headers (path TEXT PRIMARY KEY, stamp TEXT, header TEXT)")
            database.execute(f"PRAGMA user_version = {_SCHEMA}")
        database.executemany("DELETE FROM headers WHERE path = ?", [(path,) for path in gone])
        entries = [(path, *row) for path, row in rows.items()]
        database.executemany("INSERT OR REPLACE INTO headers VALUES (?, ?, ?)", entries)
        database.execute("COMMIT")
