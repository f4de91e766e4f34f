"""Adapters in ONNX Runtime without torch: a switch against building a session anew, steps, memory; the demo model.

python -m benchmarks.scripts.edge [--toy] [--out FILE]

``switch``: ``OnnxResident.set`` from one adapter to another in turns; ``strength``: the same with another strength;
``mix``: from one mix of two to the other adapter. ``rebuild``: the way without it: weights merged in NumPy, written to
a file, and a session with all of ONNX Runtime's optimizations built from that. ``step``: the UNet, picture and
guidance, batch 2: ``resident``, whose weights can be overwritten; ``constant``, as such a rebuilt session; and
``unpacked``, one of constants with prepacking, folding and the reordering of convolutions off. Sessions take turns.
``memory_mb``: resident memory of a process without torch: ``loaded``, libraries alone; beyond that ``opened``,
``drawn`` (a first step), ``switched`` (twice, and a step), ``peak``; for ``rebuilt`` a switch drops the session and
builds another.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from diffusers import StableDiffusionPipeline

from benchmarks.measure import ASSETS, ROOT, alternate, out_of, seconds_of, spread, timed, toy_options, write
from shira_diffusers.edge import OnnxResident
from shira_diffusers.edge.export import export_onnx

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
PAIR = ("bluefire", "gold")
UNPACKED = ("ConstantFolding", "NchwcTransformer")


def main() -> None:
    args = toy_options(__doc__, "few repeats in float32", "edge.json").parse_args()
    rows = [measure(dtype, 3 if args.toy else 15) for dtype in (["fp32"] if args.toy else DTYPES)]
    versions = {"onnxruntime": ort.__version__, "onnx": onnx.__version__, "onnxruntime_threads": 1}
    figures = {"model": "emoji-diffusion", "toy": args.toy, **versions, "rows": rows}
    print(write("edge", figures, out_of("edge", args)).read_text())


def measure(dtype: str, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = exported(dtype, Path(temporary))
        resident = OnnxResident(folder / "live", session_options=options)
        for name in PAIR:
            resident.add(ASSETS / "adapters" / f"{name}.safetensors", name)
        model = resident._models["unet"]
        before, feeds = model.weights.memory.copy(), feeds_for(model.weights.memory.dtype)
        switches = {
            "switch": [{name: 1.0} for name in PAIR],
            "strength": [{PAIR[0]: 0.5}, {PAIR[0]: 1.0}],
            "mix": [dict.fromkeys(PAIR, 0.7), {PAIR[0]: 1.0}],
        }
        entries = sum(len(each.adapters[PAIR[0]].positions) for each in resident._models.values() if each.adapters)
        figures: dict[str, Any] = {"dtype": dtype, "entries": entries}
        for name, mixes in switches.items():
            figures[name] = timed(alternate(resident.set, mixes), repeats)
        figures["rebuild"] = timed(alternate(rebuild(resident, folder / "constant"), PAIR), max(3, repeats // 3), 1)
        figures["step"] = steps(resident, folder / "constant", feeds, repeats)
        resident.clear()
        assert np.array_equal(model.weights.memory.view(np.uint8), before.view(np.uint8)), "the base has changed"
        figures["memory_mb"] = {way: memory(way, folder, feeds) for way in ("resident", "rebuilt")}
        return figures


def options() -> ort.SessionOptions:
    own = ort.SessionOptions()
    own.intra_op_num_threads, own.log_severity_level = 1, 3
    return own


def exported(dtype: str, folder: Path) -> Path:
    """The demo model twice: as ``OnnxResident`` has it, and its UNet with constants."""
    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji-diffusion", torch_dtype=DTYPES[dtype])
    export_onnx(pipe, folder / "live")
    shutil.copytree(folder / "live" / "unet", folder / "constant")
    graph = onnx.load(str(folder / "constant" / "model.onnx"), load_external_data=False)
    weights = {each.name for each in graph.graph.initializer}
    kept = [each for each in graph.graph.input if each.name not in weights]
    del graph.graph.input[:]
    graph.graph.input.extend(kept)
    onnx.save(graph, str(folder / "constant" / "model.onnx"))
    return folder


def feeds_for(dtype: Any) -> dict[str, Any]:
    chance = np.random.default_rng(0)
    sample, text = chance.standard_normal((2, 4, 16, 16)), chance.standard_normal((2, 32, 192))
    times = np.full(2, 500, np.int64)
    return {"sample": sample.astype(dtype), "timestep": times, "encoder_hidden_states": text.astype(dtype)}


def rebuild(resident: OnnxResident, folder: Path) -> Callable[[str], Any]:
    """What makes a session of the UNet with one adapter merged into it."""
    resident.clear()
    model = resident._models["unet"]
    content = (folder / "model.safetensors").read_bytes()
    base = model.weights.memory.copy()

    def build(name: str) -> Any:
        merged, entries = base.copy(), model.adapters[name]
        total = merged[entries.positions].astype(np.float32) + entries.values.to_float32()
        merged[entries.positions] = total.astype(merged.dtype)
        (folder / "model.safetensors").write_bytes(content[: -merged.nbytes] + merged.tobytes())
        return ort.InferenceSession(str(folder / "model.onnx"), options())

    return build


def steps(resident: OnnxResident, folder: Path, feeds: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Steps with ``PAIR[0]`` active, in turns, after their results were compared."""
    constant = rebuild(resident, folder)(PAIR[0])
    unpacked_options = options()
    unpacked_options.add_session_config_entry("session.disable_prepacking", "1")
    unpacked = ort.InferenceSession(str(folder / "model.onnx"), unpacked_options, disabled_optimizers=list(UNPACKED))
    resident.set({PAIR[0]: 1.0})
    ways: dict[str, Callable[[], Any]] = {
        "resident": lambda: resident.run("unet", feeds)[0],
        "constant": lambda: constant.run(None, feeds)[0],
        "unpacked": lambda: unpacked.run(None, feeds)[0],
    }
    found = {way: run().astype(np.float32) for way, run in ways.items()}
    close = 1e-4 if feeds["sample"].dtype == np.float32 else 2e-2
    assert all(np.allclose(each, found["resident"], atol=close) for each in found.values()), "results differ"
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            taken[way].append(seconds_of(run))
    return {way: spread(seconds) for way, seconds in taken.items()}


def memory(way: str, folder: Path, feeds: dict[str, Any]) -> dict[str, float]:
    """Resident memory of a process of its own, stage by stage."""
    np.savez(folder / "feeds.npz", **feeds)
    command = [sys.executable, "-c", _MEMORY, way, str(folder), str(ASSETS / "adapters")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


_MEMORY = """
import json, sys
sys.modules |= dict.fromkeys(("torch", "diffusers", "transformers", "onnx"))
import numpy, psutil, onnxruntime
from shira_diffusers.edge import OnnxResident

way, folder, adapters = sys.argv[1:]
feeds, start = dict(numpy.load(folder + "/feeds.npz")), psutil.Process().memory_info().rss
found = {"loaded": round(start / 1e6, 1)}

def note(stage):
    found[stage] = round((psutil.Process().memory_info().rss - start) / 1e6, 1)

def options():
    own = onnxruntime.SessionOptions()
    own.intra_op_num_threads, own.log_severity_level = 1, 3
    return own

def session():
    return onnxruntime.InferenceSession(folder + "/constant/model.onnx", options())

if way == "resident":
    resident = OnnxResident(folder + "/live", ["unet"], session_options=options)
    model = resident.sessions["unet"]
else:
    model = session()
note("opened")
model.run(None, feeds)
note("drawn")
if way == "resident":
    for name in ("bluefire", "gold"):
        resident.add(f"{adapters}/{name}.safetensors", name)
        resident.set({name: 1})
else:
    del model
    model = session()
model.run(None, feeds)
note("switched")
status = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))
found["peak"] = round((1024 * int(status["VmHWM"].split()[0]) - start) / 1e6, 1)
print(json.dumps(found))
"""


if __name__ == "__main__":
    main()
