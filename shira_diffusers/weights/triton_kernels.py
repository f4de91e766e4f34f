"""Define the Triton kernels of a switch and of training; only builds of torch with Triton can import this module."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def move(addresses, blocks, at, bits, WRITE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy bits to (or from) entries of many weights; one program per block."""
    program = tl.program_id(0)
    weight = tl.load(blocks + 3 * program)
    first = tl.load(blocks + 3 * program + 1)
    end = tl.load(blocks + 3 * program + 2)
    entry = first + tl.arange(0, BLOCK)
    inside = entry < end
    place = tl.load(at + entry, mask=inside, other=0).to(tl.int64)
    target = tl.load(addresses + weight).to(tl.pointer_type(bits.dtype.element_ty)) + place
    if WRITE:
        tl.store(target, tl.load(bits + entry, mask=inside), mask=inside)
    else:
        tl.store(bits + entry, tl.load(target, mask=inside), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _place(at, entry, inside, shift):  # type: ignore[no-untyped-def]
    """Where entries lie in a weight's memory; ``at`` counts runs of ``2 ** shift`` entries."""
    return (tl.load(at + (entry >> shift), mask=inside, other=0) << shift) + (entry & ((1 << shift) - 1))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def sweep(  # type: ignore[no-untyped-def]
    owners, weights, steps, differs, BITS: tl.constexpr, FLOAT: tl.constexpr, DELTA: tl.constexpr, BLOCK: tl.constexpr
):
    """Switch one tile of one weight per program: check and restore what leaves, then read, mix and overwrite.

    Args:
        owners: int32 ``(tiles,)``, the weight of each tile.
        weights: int64 ``(weights, 3)``: address, step, bits of the float32 scale.
        steps: int64 ``(steps, 14)``: number of its first tile; of what leaves the addresses of starts, at, base,
            written and seen, and the shift of its runs; of what arrives those of starts, at, base, written and delta,
            and the shift; whether the entries are the same. A side that is not there has empty starts.
        differs: int64 ``(2,)``: the first is set to 1 where what leaves is not what was written, the second where what
            arrives is not finite.
    """
    tile = tl.program_id(0)
    row = weights + 3 * tl.load(owners + tile)
    weight = tl.load(row).to(tl.pointer_type(BITS))
    step = steps + 14 * tl.load(row + 1)
    scale = tl.load(row + 2).to(tl.int32).to(tl.float32, bitcast=True)
    stays = tl.load(step + 13)
    tile -= tl.load(step).to(tl.int32)
    lane = tl.arange(0, BLOCK)

    starts = tl.load(step + 1).to(tl.pointer_type(tl.int32))
    at = tl.load(step + 2).to(tl.pointer_type(tl.int32))
    saved = tl.load(step + 3).to(tl.pointer_type(BITS))
    expected = tl.load(step + 4).to(tl.pointer_type(BITS))
    seen = tl.load(step + 5).to(tl.pointer_type(BITS))
    shift = tl.load(step + 6).to(tl.int32)
    end = tl.load(starts + tile + 1)
    for first in range(tl.load(starts + tile), end, BLOCK):
        entry = first + lane
        inside = entry < end
        place = _place(at, entry, inside, shift)
        now = tl.load(weight + place, mask=inside, other=0)
        written = tl.load(expected + entry, mask=inside, other=0)
        tl.store(seen + entry, now, mask=inside)
        if stays == 0:
            tl.store(weight + place, tl.load(saved + entry, mask=inside, other=0), mask=inside)
        if tl.max((now != written).to(tl.int32), 0) > 0:
            tl.store(differs, 1)

    tl.debug_barrier()  # entries in both are restored before they are read

    starts = tl.load(step + 7).to(tl.pointer_type(tl.int32))
    at = tl.load(step + 8).to(tl.pointer_type(tl.int32))
    saved = tl.load(step + 9).to(tl.pointer_type(BITS))
    new = tl.load(step + 10).to(tl.pointer_type(BITS))
    delta = tl.load(step + 11).to(tl.pointer_type(DELTA))
    shift = tl.load(step + 12).to(tl.int32)
    end = tl.load(starts + tile + 1)
    for first in range(tl.load(starts + tile), end, BLOCK):
        entry = first + lane
        inside = entry < end
        place = _place(at, entry, inside, shift)
        total = tl.load(delta + entry, mask=inside, other=0).to(tl.float32) * scale + 0.0  # no -0, as a sum from zero
        if stays != 0:
            base = tl.load(saved + entry, mask=inside, other=0)
        else:
            base = tl.load(weight + place, mask=inside, other=0)
            tl.store(saved + entry, base, mask=inside)
        value = (base.to(FLOAT, bitcast=True).to(tl.float32) + total).to(FLOAT)
        far = tl.where(inside, tl.abs(value.to(tl.float32)), 0.0)
        if tl.sum((far < float("inf")).to(tl.int32), 0) < BLOCK:  # NaN is not less either
            tl.store(differs + 1, 1)
        mixed = value.to(BITS, bitcast=True)
        tl.store(new + entry, mixed, mask=inside)
        tl.store(weight + place, mixed, mask=inside)
