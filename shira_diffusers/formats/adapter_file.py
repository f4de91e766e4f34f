"""AdapterFile: an adapter file before anything is decoded, and what decodes and checks it.

NumPy only, so that a file can be looked into without loading torch.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import shira_diffusers.formats.format_1 as format_1
import shira_diffusers.formats.format_2 as format_2
from shira_diffusers.errors import AdapterFormatError
from shira_diffusers.formats.block import Block, Weight, require_intact
from shira_diffusers.formats.safetensors_bytes import Bytes, Identity, Raw, body_of, dtype_name, identity_of

_THREADED = 2**18  # bytes from which on a thread is worth starting: below, hashing takes less than 0.2 ms

Reader = format_1.Reader | format_2.Reader
T = TypeVar("T")

_REMEMBERED = 1024  # files
_verified: dict[Identity, str] = {}  # the checksums that this process has computed


def digest(*parts: Bytes) -> str:
    """The SHA-256 over contiguous parts, uint8 ``(n,)`` each, in this order: 64 lower-case hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.data)
    return found.hexdigest()


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter on disk, or in a file's bytes, not decoded.

    Args:
        path: the file that was read.
        kind: ``OURS`` or ``PEFTS``.
        format_version: of our own format; None for PEFT's.
        metadata: all strings that are the adapter's, or those from PEFT's config.
        parameters: the adapted weights, sorted by name; PEFT's have no shapes.
        size: bytes of the file.
        sha256: the checksum in the header, unproved; None if there is none.
        tensors: by key.
        content: all bytes of the file.
        reader: of our own format.
        identity: of the file that the bytes were read from; None where another file may have the same.
    """

    path: Path
    kind: str
    format_version: str | None
    metadata: Mapping[str, str]
    parameters: tuple[Weight, ...]
    size: int
    sha256: str | None
    tensors: Mapping[str, Raw]
    content: Bytes
    reader: Reader | None
    identity: Identity | None = None

    @property
    def tells_base(self) -> bool:
        """Whether it holds base values, by which another base is recognised."""
        return self.reader is not None and bool(self.reader.probes)

    @property
    def nnz(self) -> int:
        """Entries held, over all parameters."""
        return sum(parameter.nnz for parameter in self.parameters)

    @property
    def numel(self) -> int | None:
        """Entries of all adapted parameters, held or not; None where a shape is not known."""
        shapes = [parameter.shape for parameter in self.parameters]
        return sum(math.prod(shape) for shape in shapes if shape is not None) if None not in shapes else None

    @property
    def density(self) -> float | None:
        """Fraction of the adapted parameters' entries that are held; None where it is not known."""
        return self.nnz / self.numel if self.numel else None

    @property
    def bytes_per_entry(self) -> float | None:
        """Bytes of the file for each entry held; None of an adapter without entries."""
        return self.size / self.nnz if self.nnz else None

    @property
    def dtypes(self) -> list[str]:
        """The dtypes of the values, sorted."""
        return sorted({dtype_name(parameter.dtype) for parameter in self.parameters})

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data for JSON; what is not known is None."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "format_version": self.format_version,
            "base_model": self.metadata.get("base_model"),
            "mask": self.metadata.get("mask"),
            "density": self.density,
            "nnz": self.nnz,
            "numel": self.numel,
            "dtypes": self.dtypes,
            "bytes": self.size,
            "bytes_per_entry": self.bytes_per_entry,
            "tells_base": self.tells_base,
            "sha256": self.sha256,
            "metadata": dict(self.metadata),
            "parameters": [
                {
                    "name": p.name,
                    "shape": None if p.shape is None else list(p.shape),
                    "nnz": p.nnz,
                    "density": p.density,
                    "dtype": dtype_name(p.dtype),
                }
                for p in self.parameters
            ],
        }

    def check(self) -> None:
        """Require that all of it is intact, as far as can be checked without a model.

        Raises:
            AdapterFormatError: see ``decode_blocks``, and ``compared``.
        """
        if self.reader is not None:
            with self.compared():
                self.decode_blocks(Block.decode)

    def arrays(self) -> dict[str, format_1.Sparse]:
        """The adapted weights of one of ours, sorted by name, in NumPy; nothing of the file is kept.

        Raises:
            AdapterFormatError: see ``check``.
        """
        found: dict[str, format_1.Sparse] = {}
        with self.compared():
            for block, indices in self.decode_blocks(Block.decode):
                values = block.split(block.values.array.copy())
                for weight, at, own in zip(block.weights, indices, values, strict=True):
                    found[weight.name] = format_1.Sparse(at, Raw(weight.dtype, own), weight.shape or ())
        return dict(sorted(found.items()))

    def decode_blocks(self, how: Callable[[Block], T | None]) -> list[tuple[Block, T]]:
        """The blocks, and what a decoder makes of each: None for one that is damaged.

        Raises:
            AdapterFormatError: anything is; all weights are named.
        """
        assert self.reader is not None
        found = [(block, how(block)) for block in self.reader.blocks()]
        refused = [block.problems() or ["its weights cannot be decoded"] for block, own in found if own is None]
        require_intact([problem for problems in refused for problem in problems], str(self.path))
        return [(block, own) for block, own in found if own is not None]

    @contextmanager
    def compared(self, compare: bool = True) -> Iterator[None]:
        """Compare the tensors with the checksum while the block runs, in a thread; it ends before the block does.

        A file that was compared before and has not been written since is not hashed again. (SHA-256 takes 0.75 ms per
        MB on a CPU with SHA instructions, which a thread hides where a core is free.)

        Args:
            compare: False where that was done before.

        Raises:
            AdapterFormatError: the bytes are not those that were written; at the end of the block.
        """
        if self.sha256 is None or not compare:
            yield
            return
        running = None if self._is_verified() else _started(self._checked_bytes())
        try:
            yield
        finally:
            if running:
                wait([running])  # it reads the mapped file, which may change once this has returned, error or not
        if running is None and self._is_verified():
            return  # nor was it written while it was decoded
        found = running.result() if running else digest(*self._checked_bytes())
        if found != self.sha256:
            raise AdapterFormatError(
                f"{self.path} is damaged: the SHA-256 of its tensors is {found}, expected {self.sha256} as "
                "its header says; get an intact copy"
            )
        self._remember()

    def _is_verified(self) -> bool:
        return _verified.get(self.identity or ()) == self.sha256 and self._is_unchanged()

    def _is_unchanged(self) -> bool:
        try:
            return identity_of(self.path) == self.identity
        except OSError:
            return False  # gone

    def _remember(self) -> None:
        if self.identity and self.sha256 and self._is_unchanged():
            if len(_verified) >= _REMEMBERED:
                _verified.clear()
            _verified[self.identity] = self.sha256

    def _checked_bytes(self) -> Sequence[Bytes]:
        if self.format_version == format_2.VERSION:
            return format_2.checked_bytes(self.tensors)
        return [body_of(self.content)]


def _started(parts: Sequence[Bytes]) -> "Future[str]":
    if sum(part.nbytes for part in parts) < _THREADED:
        found: Future[str] = Future()
        found.set_result(digest(*parts))
        return found
    pool = ThreadPoolExecutor(1, "shira-checksum")
    running = pool.submit(digest, *parts)
    pool.shutdown(wait=False)  # the thread ends with its work
    return running
