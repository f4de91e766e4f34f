"""PackedAdapter: an adapter as compact as its file, in memory that a GPU can read, decoded when it is needed."""

import logging
import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.errors import counted
from shira_diffusers.formats.gpu_decoder import DeviceDecoder
from shira_diffusers.formats.header import header_of
from shira_diffusers.formats.opened_adapter import Held, OpenedAdapter, opened
from shira_diffusers.formats.safetensors_bytes import Bytes, cut
from shira_diffusers.formats.shira_file import serialize, to_adapter

logger = logging.getLogger(__name__)

_PORTABLE = 1  # pinned for all devices
_PIECE = 2**26  # bytes read in one call, so that a signal gets through


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter file of ours, opened.

    Args:
        opened: the file.
        memory: what holds its bytes; None where that is not of this object: a mapped file.
        compare: compare the bytes with the file's checksum; False where the same file was compared before.
    """

    opened: OpenedAdapter
    memory: "HostMemory | None" = None
    compare: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the host's memory that it keeps."""
        return len(self.memory.content) if self.memory else 0

    def unpack(self, decoder: DeviceDecoder | None = None) -> tuple[ShiraAdapter, Held]:
        """Decode it; every byte is checked, and nothing of the packed bytes is kept.

        Args:
            decoder: of the device to decode on; None is the CPU.

        Returns:
            The adapter, and on a device the tensors that its deltas are views of.

        Raises:
            AdapterFormatError: as ``load_adapter``.
        """
        if decoder is not None:
            return self.opened.decode_on(decoder, compare=self.compare)
        return to_adapter(self.opened, compare=self.compare), ()


def pack(adapter: ShiraAdapter, source: Path) -> PackedAdapter:
    """Pack an adapter that has no file of ours; ``source`` is what to call it."""
    content = serialize(adapter)
    memory = HostMemory(len(content))
    memory.content[:] = np.frombuffer(content, np.uint8)
    return PackedAdapter(opened(header_of(cut(memory.content), source)), memory)


class HostMemory:
    """Anonymous memory of the process, outside of its heap, so that what is given back leaves no holes there.

    Args:
        nbytes: how much; at least one.
        pin_for: the CUDA device that it is pinned for, see ``pin``.
    """

    def __init__(self, nbytes: int, pin_for: torch.device | None = None) -> None:
        self.content: Bytes = np.frombuffer(_anonymous(nbytes), np.uint8)
        self.pinned = False
        if pin_for is not None:
            self.pin(pin_for)

    def pin(self, device: torch.device) -> None:
        """Lock the pages, so that a CUDA device reads them by itself; where the system refuses, that is logged.

        (torch's own pinned memory would take up to twice as much: its sizes are powers of two.)
        """
        self.pinned = _pin(self.content, device)
        if self.pinned:
            weakref.finalize(self, _unpin, self.content.ctypes.data).atexit = False

    def fill(self, file: Path) -> Bytes:
        """Read a file of exactly this size, and return the memory.

        Raises:
            ValueError: the size of the file has changed.
        """
        with open(file, "rb", buffering=0) as raw:
            if (size := os.fstat(raw.fileno()).st_size) != len(self.content):
                raise ValueError(f"{size} bytes, expected {len(self.content)}: it is being written")
            at = 0
            while at < size:
                got = raw.readinto(self.content[at : at + _PIECE].data)
                if not got:
                    raise ValueError(f"it ends after {at} of {size} bytes: it is being written")
                at += got
        return self.content


def _anonymous(nbytes: int) -> mmap.mmap:
    """Memory that is no file's and not shared with children, in huge pages where there are: a fifth of the time."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _pin(content: Bytes, device: torch.device) -> bool:
    with torch.cuda.device(device):
        error = int(torch.cuda.cudart().cudaHostRegister(content.ctypes.data, content.nbytes, _PORTABLE))
    if error:
        size = counted(content.nbytes, "byte")
        logger.warning("could not pin %s (CUDA error %d): copies to the GPU are slower", size, error)
    return not error


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
