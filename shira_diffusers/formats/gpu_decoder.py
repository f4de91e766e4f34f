"""Decode coded weights on an accelerator: values and gaps go there in one copy each, and one running sum is taken.

In: blocks, best in pinned memory. Out: deltas on the device, the bits that a CPU decodes; or None for what is damaged,
about which the CPU then says what is wrong. All of it runs on a CPU device too, without streams.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from shira_diffusers.adapters.delta import SparseDelta
from shira_diffusers.engine.bookkeeping import Guard
from shira_diffusers.formats.block import Block
from shira_diffusers.formats.gap_codec import ESCAPES
from shira_diffusers.formats.safetensors_bytes import Raw
from shira_diffusers.formats.shira_file import tensor_of
from shira_diffusers.weights.finite import all_finite

_PIECE = 2**23  # coded elements that are decoded together; temporary memory is about 20 bytes for each

Decoded = tuple[dict[str, SparseDelta], tuple[Tensor, ...]]


class DeviceDecoder:
    """Decodes on one device, one adapter at a time, on streams of its own, so beside what runs there already.

    Args:
        device: where to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._one_at_a_time = Guard()  # an end that comes amid it would write weights on its streams
        on_cuda = device.type == "cuda"
        self._copying = torch.cuda.Stream(device) if on_cuda else None
        self._working = torch.cuda.Stream(device) if on_cuda else None

    def decode(self, blocks: Sequence[Block]) -> Decoded | None:
        """Decode all weights. The device is waited for once, at the end.

        Returns:
            The deltas and the tensors that they are views of; None if anything is not intact, or of a kind that is
            decoded on the CPU only (2^31 entries and more in the dense weight).
        """
        if not all(block.narrow for block in blocks):
            return None
        with self._one_at_a_time, self._until_done():
            # all is sent before anything is decoded: memory that decoding frees is never what a copy goes to
            sent = [(self._send(raw_gaps(block)), self._send(block.values)) for block in blocks]
            found: list[tuple[Tensor, Tensor]] = []
            for block, ((gaps, gaps_here), (values, values_here)) in zip(blocks, sent, strict=True):
                self._wait(gaps_here)
                with _on(self._working):
                    indices, good = decode_gaps_on(gaps, block)
                self._wait(values_here)
                with _on(self._working):
                    found.append((indices, good & all_finite(values)))
            with _on(self._working):
                intact = bool(torch.stack([good for _, good in found]).all())
        if not intact:
            return None
        deltas: dict[str, SparseDelta] = {}
        for block, (_, (values, _)), (indices, _) in zip(blocks, sent, found, strict=True):
            counts = [weight.nnz for weight in block.weights]
            parts = zip(block.weights, indices.split(counts), values.split(counts), strict=True)
            deltas |= {w.name: SparseDelta.unchecked(at, own, w.shape or ()) for w, at, own in parts}
        held = (*(indices for indices, _ in found), *(values for _, (values, _) in sent))
        record_stream(held, default=True)
        return deltas, held

    def _send(self, raw: Raw) -> "tuple[Tensor, torch.cuda.Event | None]":
        """Launch the copy of a tensor; on CUDA also what happens when it has arrived."""
        source = tensor_of(raw)
        with _on(self._working):  # all memory is of this stream, which is idle when a decoding begins
            target = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        with _on(self._copying):
            target.copy_(source, non_blocking=True)
        return target, self._copying.record_event() if self._copying is not None else None

    def _wait(self, arrived: "torch.cuda.Event | None") -> None:
        if self._working is not None and arrived is not None:
            self._working.wait_event(arrived)

    @contextmanager
    def _until_done(self) -> Iterator[None]:
        """Before anything is given back, let the device finish with it: the packed bytes, and memory on errors too."""
        try:
            yield
        finally:
            for stream in (self._copying, self._working):
                if stream is not None:
                    stream.synchronize()


def raw_gaps(block: Block) -> Raw:
    """The coded elements; of uint16 ones the bits as int16, which every device can read."""
    return Raw("", block.gaps.view("int16") if block.gaps.dtype == "uint16" else block.gaps)


def decode_gaps_on(coded: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Decode the gaps of a block on the device that they are on, without waiting for it.

    Args:
        coded: ``raw_gaps`` of the block, ``(m,)``.
        block: whose weights have fewer than 2^31 entries each.

    Returns:
        Indices, int32 ``(nnz,)`` of all weights, and whether they are as ``gap_codec.decode_gaps`` would give them: a
        0-dimensional bool on the device. No element makes any kernel fail.
    """
    device, top, total = coded.device, ESCAPES.get(block.gaps.dtype.name), sum(block.counts)
    # sums over all weights may go beyond int32 and wrap; differences inside a weight do not, if it is intact
    sums = torch.zeros(total + 1, dtype=torch.int32, device=device)
    good = torch.ones((), dtype=torch.bool, device=device)
    reach = count = whole = torch.zeros((), dtype=torch.int64, device=device)
    for part in coded.split(_PIECE) if len(coded) else ():
        wide = part.to(torch.int32, copy=True)
        if coded.dtype == torch.int16:
            wide &= 0xFFFF
        good = good & (wide.min() >= 0)
        ended = wide != top if top is not None else torch.ones_like(wide, dtype=torch.bool)
        whole = whole + wide.sum(dtype=torch.int64)
        wide += ended
        place = ended.cumsum(0) + count  # int64, as indexing wants it
        count = place[-1]
        wide = wide.cumsum(0, dtype=torch.int32) + reach.to(torch.int32)
        reach = wide[-1]
        sums[torch.where(ended, place - 1, total).clamp_(max=total)] = wide  # what is no index goes behind all indices
    if top is not None and len(coded):
        good = good & ended[-1]
    good = good & (count == total)
    held = [(n, limit) for n, limit in zip(block.counts, block.limits, strict=True) if n]
    counts, limits = torch.tensor(held, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
    last = sums[counts.cumsum(0) - 1]
    starts = torch.cat([last.new_zeros(1), last])[:-1]
    lengths = (last - starts).long()  # one more than each weight's last index, all of which add up unless one wrapped
    good = good & (lengths >= 0).all() & (lengths <= limits).all() & (lengths.sum() == whole + count)
    positions = sums[:total] - (starts + 1).repeat_interleave(counts, output_size=total)
    if block.run > 1:
        within = torch.arange(block.run, dtype=torch.int32, device=device)
        positions = (positions[:, None] * block.run + within).reshape(-1)
    return positions, good


def record_stream(held: Sequence[Tensor], *, default: bool = False) -> None:
    """Keep the memory of CUDA tensors (any shape) from reuse until the current (or the default) stream has used it."""
    for tensor in held:
        if tensor.is_cuda:
            of = torch.cuda.default_stream if default else torch.cuda.current_stream
            tensor.record_stream(of(tensor.device))


def _on(stream: "torch.cuda.Stream | None") -> AbstractContextManager[object]:
    return torch.cuda.stream(stream) if stream is not None else nullcontext()
