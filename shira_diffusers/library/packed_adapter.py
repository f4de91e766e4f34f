"""PackedAdapter: an adapter kept as compactly as in its file, decoded when it is needed, on a CPU or a GPU."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.delta import VALUE_DTYPES, SparseDelta, index_dtype
from shira_diffusers.errors import AdapterFormatError
from shira_diffusers.formats.checksum import Checksum
from shira_diffusers.formats.decoding import Coded, decode_parts
from shira_diffusers.formats.gap_codec import GAP_DTYPES
from shira_diffusers.formats.safetensors_bytes import Bytes, cut
from shira_diffusers.formats.shira_file import (
    checksum_of,
    decode,
    encode,
    kept_metadata,
    parts_of,
    probes_of,
    require_intact,
)
from shira_diffusers.library.gpu_decoder import DeviceDecoder, Place
from shira_diffusers.library.hostmemory import HostMemory

Held = tuple[Tensor, ...]


@dataclass(frozen=True)
class PackedAdapter:
    """The bytes of one adapter file, and where each parameter lies in them.

    Args:
        source: what to call it in messages.
        content: the file's bytes.
        memory: what holds them; None where it is not of this object: a mapped file.
        places: by parameter.
        metadata, base_probes: as of a ``ShiraAdapter``.
        checksum: the comparison of the bytes with the file's checksum, which may still be running.
    """

    source: str
    content: Bytes
    memory: HostMemory | None
    places: Mapping[str, Place]
    metadata: Mapping[str, str]
    base_probes: Mapping[str, Tensor]
    checksum: Checksum

    @property
    def nbytes(self) -> int:
        """Bytes of the host's memory that it keeps."""
        return len(self.content) if self.memory else 0

    @property
    def unpacked_nbytes(self) -> int:
        """Bytes of its indices and values once decoded."""
        return sum(
            place.count * (index_dtype(math.prod(place.shape)).itemsize + place.value_dtype.itemsize)
            for place in self.places.values()
        )

    def unpack(self, decoder: DeviceDecoder | None = None) -> tuple[ShiraAdapter, Held]:
        """Decode it; every byte is checked, and nothing of the packed bytes is kept.

        Args:
            decoder: of the device to decode on; None is the CPU.

        Returns:
            The adapter, and on a device the tensors that its deltas are views of.

        Raises:
            AdapterFormatError: as ``load_adapter``.
        """
        found = decoder.decode(self.content, self.places) if decoder else None
        if found is None:  # on the CPU, which also says what is wrong with bytes that a device refused
            deltas = self._decode_on_cpu()
            if decoder:
                deltas = {name: _moved(delta, decoder.device) for name, delta in deltas.items()}
            found = deltas, ()
        self.checksum.require()
        return ShiraAdapter(found[0], self.metadata, self.base_probes), found[1]

    def _decode_on_cpu(self) -> dict[str, SparseDelta]:
        decoded = decode_parts({name: self._coded(place) for name, place in self.places.items()}, copy=True)
        require_intact([f"{n}: {d}" for n, d in decoded.items() if isinstance(d, AdapterFormatError)], self.source)
        return {name: delta for name, delta in decoded.items() if isinstance(delta, SparseDelta)}

    def _coded(self, place: Place) -> Coded:
        return Coded(
            torch.from_numpy(self.content[slice(*place.gap_bytes)]).view(place.gap_dtype),
            torch.from_numpy(self.content[slice(*place.value_bytes)]).view(place.value_dtype),
            place.shape,
        )


def _moved(delta: SparseDelta, device: torch.device) -> SparseDelta:
    return SparseDelta.unchecked(delta.indices.to(device), delta.values.to(device), delta.shape)


def packed(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    source: str,
    content: Bytes,
    memory: HostMemory | None,
    *,
    check: bool = True,
) -> PackedAdapter:
    """An adapter of tensors that are parts of ``content``, the bytes of a file.

    Args:
        check: compare the bytes with the file's checksum; False where the same file was compared before.

    Raises:
        AdapterFormatError: not this format, or damaged as far as it is seen without decoding.
    """
    checksum = checksum_of(content, metadata if check else {}, source)  # runs while the rest of this does, and unpack
    parts, problems = parts_of(tensors, metadata, source)
    if problems or not all(_is_regular(part) for part in parts.values()):
        decode(tensors, metadata, source)  # raises, and names what else is wrong
    places = {name: _place(part, content) for name, part in parts.items()}
    if any(stop > len(content) for place in places.values() for _, stop in (place.gap_bytes, place.value_bytes)):
        copied = pack(decode(tensors, metadata, source), source)  # tensors that were not aligned have been copied
        return replace(copied, checksum=checksum)
    return PackedAdapter(source, content, memory, places, kept_metadata(metadata), probes_of(tensors), checksum)


def pack(adapter: ShiraAdapter, source: str) -> PackedAdapter:
    """Pack an adapter that has no file of this format."""
    tensors, metadata = encode(adapter)
    content = safetensors.torch.save(tensors, metadata)
    memory = HostMemory(len(content))
    memory.content[:] = np.frombuffer(content, np.uint8)
    return packed(cut(memory.content), metadata, source, memory.content, memory)


def _is_regular(part: Coded) -> bool:
    dimensions = (part.gaps.ndim, part.values.ndim)
    return dimensions == (1, 1) and part.gaps.dtype in GAP_DTYPES and part.values.dtype in VALUE_DTYPES


def _place(part: Coded, content: Bytes) -> Place:
    gaps, values = _range(part.gaps, content), _range(part.values, content)
    return Place(gaps, part.gaps.dtype, values, part.values.dtype, part.shape)


def _range(tensor: Tensor, content: Bytes) -> tuple[int, int]:
    """Where a tensor lies in the bytes; what lies elsewhere ends behind them."""
    if not tensor.nbytes:
        return 0, 0
    start = (tensor.data_ptr() - content.ctypes.data) % 2**63
    return start, start + tensor.nbytes
