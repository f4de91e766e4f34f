"""Triton kernels; importing this needs Triton, which the CUDA builds of torch bring."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def move(addresses, blocks, at, bits, WRITE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy bits to (or from) entries of many weights; see ``launches.Table`` for the arguments. One program a block."""
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
