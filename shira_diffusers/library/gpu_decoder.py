"""Decode packed adapters on an accelerator: groups of parameters are copied to it while others are decoded there."""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shira_diffusers.adapters.delta import SparseDelta, index_dtype
from shira_diffusers.formats.decoding import group_names
from shira_diffusers.formats.safetensors_bytes import Bytes
from shira_diffusers.library.gaps_device import decode_many_on_device
from shira_diffusers.weights.finite import all_finite

_GROUP = 2**23  # coded elements; temporary memory is about 30 bytes for each


@dataclass(frozen=True, slots=True)
class Place:
    """One parameter in the bytes of a file: where gaps and values begin and end, their dtypes, the weight's shape."""

    gap_bytes: tuple[int, int]
    gap_dtype: torch.dtype
    value_bytes: tuple[int, int]
    value_dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        """Coded elements."""
        return (self.gap_bytes[1] - self.gap_bytes[0]) // self.gap_dtype.itemsize

    @property
    def count(self) -> int:
        """Values."""
        return (self.value_bytes[1] - self.value_bytes[0]) // self.value_dtype.itemsize


Decoded = tuple[dict[str, SparseDelta], tuple[Tensor, ...]]


class DeviceDecoder:
    """Decodes on one device, one adapter at a time, on streams of its own, so beside what runs there already.

    Args:
        device: where to; of a CPU, it does the same without streams.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._one_at_a_time = threading.Lock()
        on_cuda = device.type == "cuda"
        self._copying = torch.cuda.Stream(device) if on_cuda else None
        self._working = torch.cuda.Stream(device) if on_cuda else None

    def decode(self, content: Bytes, places: Mapping[str, Place]) -> Decoded | None:
        """Decode all parameters. The device is waited for once, at the end.

        Args:
            content: the bytes of a file, best in pinned memory.
            places: by parameter.

        Returns:
            The deltas and the tensors that they are views of; None if anything is not intact, or of a kind that is
            decoded on the CPU only (no entries, or 2^31 and more in the dense weight).
        """
        if not all(_is_plain(place) for place in places.values()):
            return None
        source, groups = torch.from_numpy(content), list(_groups(places))
        with self._one_at_a_time, self._until_done():
            indices, values = self._room(groups)
            # all is sent before anything is decoded: memory that decoding frees is never what a copy goes to
            sent = [self._send(source, list(g.values()), held) for g, held in zip(groups, values, strict=True)]
            good = [self._decode_group(one, at) for one, at in zip(sent, indices, strict=True)]
            with _on(self._working):
                intact = bool(torch.stack(good).all())
        if not intact:
            return None
        deltas: dict[str, SparseDelta] = {}
        for group, one, at in zip(groups, sent, indices, strict=True):
            parts = zip(group.items(), at.split(one.counts), one.values.split(one.counts), strict=True)
            deltas |= {name: SparseDelta.unchecked(own, held, place.shape) for (name, place), own, held in parts}
        lend([*indices, *values], default=True)
        return deltas, (*indices, *values)

    def _room(self, groups: Sequence[Mapping[str, Place]]) -> tuple[list[Tensor], list[Tensor]]:
        """Memory for the indices and the values of each group: all indices end to end, and all values of one dtype."""
        counts = [sum(place.count for place in group.values()) for group in groups]
        dtypes = [next(iter(group.values())).value_dtype for group in groups]
        with _on(self._working):  # all memory is of this stream, which is idle when a decoding begins
            indices = torch.empty(sum(counts), dtype=torch.int32, device=self.device).split(counts)
            values: dict[torch.dtype, Iterator[Tensor]] = {}
            for dtype in set(dtypes):
                own = [count for count, other in zip(counts, dtypes, strict=True) if other == dtype]
                values[dtype] = iter(torch.empty(sum(own), dtype=dtype, device=self.device).split(own))
        return list(indices), [next(values[dtype]) for dtype in dtypes]

    def _send(self, source: Tensor, places: Sequence[Place], values: Tensor) -> "_Sent":
        """Launch the copies of some parameters of one dtype of gaps and of values."""
        lengths, counts = [place.length for place in places], [place.count for place in places]
        gap_dtype = places[0].gap_dtype
        as_bits = torch.int16 if gap_dtype == torch.uint16 else gap_dtype  # which every device can read
        with _on(self._working):
            raw = torch.empty(sum(lengths), dtype=as_bits, device=self.device)
            sizes = torch.tensor([lengths, counts, [math.prod(place.shape) for place in places]], device=self.device)
        with _on(self._copying):
            _copy(source, [place.gap_bytes for place in places], raw)
            _copy(source, [place.value_bytes for place in places], values)
        arrived = self._copying.record_event() if self._copying is not None else None
        return _Sent(raw, values, sizes, gap_dtype, lengths, counts, arrived)

    def _decode_group(self, sent: "_Sent", indices: Tensor) -> Tensor:
        """Launch the decoding of what was sent, once it has arrived: whether it is intact, a bool on the device."""
        if self._working is not None and sent.arrived is not None:
            self._working.wait_event(sent.arrived)
        with _on(self._working):
            found = decode_many_on_device(sent.raw, sent.gap_dtype, sent.lengths, sent.counts, sent.sizes)
            indices.copy_(found.indices)
            return found.good & all_finite(sent.values)

    @contextmanager
    def _until_done(self) -> Iterator[None]:
        """Before anything is given back, let the device finish with it: the packed bytes, and memory on errors too."""
        try:
            yield
        finally:
            for stream in (self._copying, self._working):
                if stream is not None:
                    stream.synchronize()


class _Sent(NamedTuple):
    """A group on its way to the device; see ``decode_many_on_device``."""

    raw: Tensor
    values: Tensor
    sizes: Tensor
    gap_dtype: torch.dtype
    lengths: list[int]
    counts: list[int]
    arrived: "torch.cuda.Event | None"


def lend(held: Sequence[Tensor], *, default: bool = False) -> None:
    """Tell the allocator that the current (or the default) stream uses tensors, before which it reuses no memory."""
    for tensor in held:
        if tensor.is_cuda:
            of = torch.cuda.default_stream if default else torch.cuda.current_stream
            tensor.record_stream(of(tensor.device))


def _groups(places: Mapping[str, Place]) -> Iterator[dict[str, Place]]:
    for names in group_names({name: (p.gap_dtype, p.value_dtype, p.length) for name, p in places.items()}, _GROUP):
        yield {name: places[name] for name in names}


def _is_plain(place: Place) -> bool:
    return place.count > 0 and place.length > 0 and index_dtype(math.prod(place.shape)) == torch.int32


def _copy(source: Tensor, ranges: Sequence[tuple[int, int]], target: Tensor) -> None:
    """Copy ranges of bytes, end to end; those that adjoin in the source, as they do in our files, at once."""
    target, at = target.view(torch.uint8), 0
    first, end = ranges[0]
    for start, stop in [*ranges[1:], (-1, -1)]:
        if start == end:
            end = stop
            continue
        target[at : at + end - first].copy_(source[first:end], non_blocking=True)
        at, first, end = at + end - first, start, stop


def _on(stream: "torch.cuda.Stream | None") -> AbstractContextManager[object]:
    return torch.cuda.stream(stream) if stream is not None else nullcontext()
