"""From a file to an active adapter: each part by itself, and the whole.

python -m benchmarks.scripts.cold_start [--device cpu|cuda] [--toy] [--models "SD 1.5"] [--out FILE]

Random masks for attention and feed-forward of a UNet of random weights. The file is in the page cache, but for
``disk``. Parts, each after the one before: ``read`` into memory (``pin``: lock it for the GPU), ``parse`` the header,
``decode`` with all threads and with one (``check`` of the values alone is a part of it; on CUDA ``copy`` to the GPU
alone, and ``decode`` with the copies, as they overlap), ``fit`` (names, shapes and base against the model), and
``switch``: plan, save the bits and write. Whole: ``load_shira``; ``library``, that is ``AdapterLibrary.set`` of an
adapter that nothing is kept of; and ``packed`` and ``prefetched``, where its bytes are in memory, or it is decoded.
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Run, options, timed
from benchmarks.models import copies, make_pipe, require_active, require_base, shira_adapter
from shira_diffusers import AdapterLibrary, ShiraAdapter, save_adapter
from shira_diffusers.formats.gpu_decoder import DeviceDecoder
from shira_diffusers.formats.header import header_of
from shira_diffusers.formats.opened_adapter import opened
from shira_diffusers.formats.safetensors_bytes import cut
from shira_diffusers.integrations.pipelines import resident_of
from shira_diffusers.library.packed_adapter import HostMemory, PackedAdapter
from shira_diffusers.weights.finite import all_finite

DENSITIES = (0.01, 0.02)
NAME = "a"


def main() -> None:
    args = options(__doc__).parse_args()
    run = Run("cold_start", args)
    for model in args.models:
        pipe = make_pipe(model, args)
        base = copies(pipe.unet)
        for density in DENSITIES:
            labels = {"model": model, "family": "rand", "density": density}
            run.case(lambda p=pipe, b=base, d=density: measure(p, b, d, args), **labels, method="library")
        del pipe, base


def measure(pipe: Any, base: dict[str, Any], density: float, args: Any) -> dict[str, Any]:
    repeats = 3 if args.toy else 9
    device = None if args.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
    adapter = shira_adapter(pipe.unet, "rand", density, 0)
    with tempfile.TemporaryDirectory() as folder:
        file = save_adapter(adapter, Path(folder, f"{NAME}.safetensors"))
        about = {"file_bytes": file.stat().st_size, "entries": adapter.nnz}
        parts = (
            reading(file, device, repeats) | decoding(file, device, repeats) | switching(pipe, file, device, repeats)
        )
        return about | parts | wholes(pipe, base, adapter, file, repeats)


def reading(file: Path, device: torch.device | None, repeats: int) -> dict[str, Any]:
    size = file.stat().st_size
    figures = {
        "disk": timed(lambda: HostMemory(size).fill(file), repeats, 1, before=lambda: forget(file)),
        "read": timed(lambda: HostMemory(size).fill(file), repeats, 1),
    }
    if device is not None:
        fresh: list[HostMemory] = []
        figures["pin"] = timed(lambda: fresh.pop().pin(device), repeats, 1, before=lambda: fresh.append(filled(file)))
    memory = filled(file)
    return figures | {"parse": timed(lambda: pack(memory), repeats, 1)}


def decoding(file: Path, device: torch.device | None, repeats: int) -> dict[str, Any]:
    memory = filled(file, device)
    source = pack(memory)
    decoder = DeviceDecoder(device) if device is not None else None
    figures = {"decode": timed(lambda: source.unpack(decoder), repeats, 1)}
    if device is None:
        figures["decode_one_thread"] = one_thread(lambda: timed(source.unpack, repeats, 1))
    else:
        content = torch.from_numpy(memory.content)
        figures["copy"] = timed(lambda: content.to(device, non_blocking=True), repeats, 1)
    decoded, _ = source.unpack(decoder)
    check = timed(lambda: all(bool(all_finite(delta.values)) for delta in decoded.deltas.values()), repeats, 1)
    return figures | ({"check": check} if device is None else {})


def switching(pipe: Any, file: Path, device: torch.device | None, repeats: int) -> dict[str, Any]:
    resident = resident_of(pipe)
    adapter, _ = pack(filled(file, device)).unpack(DeviceDecoder(device) if device is not None else None)

    def added() -> None:
        pipe.unload_shira()
        resident.add(adapter, NAME)

    figures = {"fit": timed(lambda: resident.check(adapter), repeats, 1)}
    figures["switch"] = timed(lambda: resident.set({NAME: 1.0}), repeats, 1, before=added)
    pipe.unload_shira()
    return figures


def wholes(pipe: Any, base: dict[str, Any], adapter: ShiraAdapter, file: Path, repeats: int) -> dict[str, Any]:
    """Times until an adapter is active; the weights are checked after each."""
    figures: dict[str, Any] = {}
    unload = pipe.unload_shira
    figures["load_shira"] = timed(lambda: pipe.load_shira(file, NAME), repeats, 1, before=unload)
    check(pipe, base, adapter)
    for kind in ("library", "packed", "prefetched"):
        with AdapterLibrary(file.parent, device_bytes=2 * adapter.nbytes, device=pipe.unet.device) as library:
            prepare = {
                "library": lambda library=library: (unload(), library.clear()),
                "packed": lambda library=library: (unload(), library.get(NAME), library.clear(packed=False)),
                "prefetched": lambda library=library: (unload(), library.get(NAME)),
            }[kind]
            figures[kind] = timed(partial(library.set, pipe, {NAME: 1.0}), repeats, 1, before=prepare)
            check(pipe, base, adapter)
    return figures


def check(pipe: Any, base: dict[str, Any], adapter: ShiraAdapter) -> None:
    require_active(pipe.unet, base, [(adapter, 1.0)])
    pipe.unload_shira()
    require_base(pipe.unet, base)


def filled(file: Path, device: torch.device | None = None) -> HostMemory:
    memory = HostMemory(file.stat().st_size, device)
    memory.fill(file)
    return memory


def pack(memory: HostMemory) -> PackedAdapter:
    return PackedAdapter(opened(header_of(cut(memory.content), Path("the file"))), memory, compare=False)


def forget(file: Path) -> None:
    """Drop a file from the page cache, where the system lets one."""
    with open(file, "rb") as raw:
        os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_thread(action: Callable[[], dict[str, float]]) -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return action()
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
