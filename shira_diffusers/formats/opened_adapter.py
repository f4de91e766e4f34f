"""``open_adapter``: the one door for adapter files, ours of both versions and PEFT's.

In: a path. Out: the file's header, which is cheap, and the adapter itself, decoded where its weights are.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from shira_diffusers.adapters.adapter import ShiraAdapter
from shira_diffusers.adapters.delta import SparseDelta, index_dtype
from shira_diffusers.errors import AdapterFormatError
from shira_diffusers.formats.adapter_file import AdapterFile
from shira_diffusers.formats.gpu_decoder import DeviceDecoder, record_stream
from shira_diffusers.formats.header import read_header, without_shapes
from shira_diffusers.formats.peft import decode_peft_for, peft_tensors
from shira_diffusers.formats.safetensors_bytes import Bytes, mapped
from shira_diffusers.formats.shira_file import adapter_of, to_adapter

Held = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class OpenedAdapter(AdapterFile):
    """An ``AdapterFile`` that can be decoded; everything in the header is known at once."""

    @property
    def is_peft(self) -> bool:
        """Whether it is PEFT's, which has no shapes and is decoded for a model."""
        return self.reader is None

    @property
    def components(self) -> list[str]:
        """The first parts of the names, sorted: the components, for an adapter of a pipeline; of PEFT's none."""
        return [] if self.is_peft else sorted({weight.name.partition(".")[0] for weight in self.parameters})

    @property
    def decoded_nbytes(self) -> int:
        """Bytes of indices and values once decoded."""
        dtypes = {"F32": 4, "F16": 2, "BF16": 2}
        return sum(w.nnz * (index_dtype(w.numel).itemsize + dtypes[w.dtype]) for w in self.parameters)

    def decode(
        self,
        device: torch.device | None = None,
        *,
        models: Mapping[str, nn.Module] | None = None,
        component: str | None = None,
    ) -> ShiraAdapter:
        """The adapter; every byte is checked, and nothing of the file is kept.

        Args:
            device: where its deltas are, decoded there if it is no CPU; None is the CPU.
            models: by component, for PEFT's.
            component: the one of them that PEFT's adapter is for; None looks for it.

        Raises:
            AdapterFormatError: damaged, or PEFT's while no models are given.
            ShiraError: see ``peft.decode_peft_for``.
        """
        if self.is_peft:
            return self._of_peft(models, component)
        if device is None or device.type == "cpu":
            return to_adapter(self)
        adapter, held = self.decode_on(_decoder(device))
        record_stream(held)
        return adapter

    def _of_peft(self, models: Mapping[str, nn.Module] | None, component: str | None) -> ShiraAdapter:
        if models is None:
            raise AdapterFormatError(without_shapes(self.path))
        tensors, source = peft_tensors(self), str(self.path)
        return decode_peft_for(models, tensors, source, self.metadata, component=component)

    def decode_on(self, decoder: DeviceDecoder, *, compare: bool = True) -> tuple[ShiraAdapter, Held]:
        """The adapter, and the tensors that its deltas are views of; for one of ours.

        Args:
            decoder: of the device.
            compare: with the file's checksum; False where that was done before.

        Raises:
            AdapterFormatError: damaged.
        """
        assert self.reader is not None
        with self.compared(compare):
            found = decoder.decode(self.reader.blocks())
            if found is None:  # on the CPU, which also says what is wrong with bytes that a device refused
                adapter = to_adapter(self, compare=False)
                found = {name: _moved(delta, decoder.device) for name, delta in adapter.deltas.items()}, ()
        return adapter_of(self, found[0]), found[1]


def open_adapter(source: str | os.PathLike[str], read: Callable[[Path], Bytes] = mapped) -> OpenedAdapter:
    """Open a file, or a folder that holds one; nothing is decoded, and only the header is read.

    Args:
        source: a file of ours, of either version, or PEFT's; a folder of either.
        read: how the bytes are read, see ``read_header``.

    Raises:
        FileNotFoundError: there is none.
        AdapterFormatError: no adapter, another version, or a header that contradicts itself.
    """
    return opened(read_header(Path(source), read))


def opened(file: AdapterFile) -> OpenedAdapter:
    """A file, as one that can be decoded."""
    return OpenedAdapter(*(getattr(file, field.name) for field in fields(file)))


@cache
def _decoder(device: torch.device) -> DeviceDecoder:
    return DeviceDecoder(device)


def _moved(delta: SparseDelta, device: torch.device) -> SparseDelta:
    return SparseDelta.unchecked(delta.indices.to(device), delta.values.to(device), delta.shape)
