"""The notebooks run from top to bottom, are stored with their pictures, and these differ where they should."""

import io
import json
import re
from base64 import b64decode
from itertools import combinations
from pathlib import Path

import nbclient
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from PIL import Image, ImageChops

from tests.warm import python

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
FUSION = ROOT / "examples" / "fusion.ipynb"
TRAINING = ROOT / "examples" / "training.ipynb"
ASSETS = ROOT / "assets"
STEPS = 2
PROBE = """
import hashlib, json
digest = lambda picture: hashlib.sha256(picture.tobytes()).hexdigest()
print(json.dumps({
    "base": digest(base), "mix": digest(mix), "fused": digest(fused), "restored": restored,
    "styled": {name: digest(picture) for name, picture in styled.items()},
    "sweep": {str(strength): digest(picture) for strength, picture in sweep.items()},
    "first": first, "part": digest(part), "aside": digest(aside), "left": pipe.list_shira(), "now": digest(draw()),
}))
"""


def read(path: Path = NOTEBOOK) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


class WarmKernel(AsyncKernelManager):
    """A kernel of this Python, forked with the imports done."""

    kernel_spec = KernelSpec(argv=python("-m", "ipykernel_launcher", "-f", "{connection_file}"), language="python")


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in a kernel of its own; CellExecutionError names the cell that failed."""
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    assert "STEPS = 20" in parameters.source
    parameters.source = re.sub(r"= \d+", f"= {STEPS}", parameters.source)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, kernel_manager_class=WarmKernel, timeout=300, resources=resources).execute()


def pictures_of(cell: nbformat.NotebookNode) -> list[Image.Image]:
    found = [output.data["image/png"] for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(b64decode(png))) for png in found]


@pytest.mark.parametrize(
    ("path", "shapes"),
    [(NOTEBOOK, [1, 5, 3, 5, 3]), (FUSION, [3, 5]), (TRAINING, [8, 2, 5, 3])],
    ids=lambda it: str(it)[-15:],
)
def test_the_file_is_stored_with_its_outputs(path: Path, shapes: list[int]) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run from top to bottom, once"
    assert all(len(cell.source.splitlines()) <= 35 for cell in code), "a cell that nobody reads"
    assert not [output for cell in code for output in cell.outputs if output.get("name") == "stderr"]
    pictures = [picture for cell in code for picture in pictures_of(cell)]
    assert [picture.width // picture.height for picture in pictures] == shapes
    assert path.stat().st_size < 1_000_000


needs_the_demo = pytest.mark.skipif(
    not (ASSETS / "emoji-diffusion").is_dir() or len(list((ASSETS / "adapters").glob("*.safetensors"))) < 2,
    reason="the demo model and its styles (assets/emoji-diffusion, assets/adapters) are not in this checkout",
)


@needs_the_demo
def test_fusion_runs() -> None:
    notebook = read(FUSION)
    notebook.cells.append(
        nbformat.v4.new_code_cell("print(json.dumps([*report.values()]), json.dumps([*worst.values()]), sep='\\n')")
    )
    notebook.cells[-1].source = "import json\n" + notebook.cells[-1].source
    execute(notebook, FUSION.parent)
    told, worst = map(json.loads, notebook.cells[-1].outputs[0].text.splitlines())
    assert all(0.4 < pair["overlap"] < 0.6 for pair in told)
    assert min(told, key=lambda pair: pair["opposing"]) == told[2], "gold and paintings"
    assert worst[0]["overlap"] == 1.0
    assert 0.99 < worst[0]["sign_conflict"] <= 1.0, "all but the zeros"
    html = [
        o.data["text/html"]
        for cell in notebook.cells
        for o in cell.get("outputs", ())
        if "text/html" in o.get("data", {})
    ]
    assert [shown.count("<tr>") for shown in html][1:] == [4, 2, 3], (
        "a report of three pairs, one of one, and a mix of two"
    )
    assert any("same picture: True" in str(cell.get("outputs")) for cell in notebook.cells)


@needs_the_demo
def test_training_runs() -> None:
    """An adapter is trained and saved; loaded again, it draws the same pictures, and without it the base draws its."""
    notebook = read(TRAINING)
    probe = "import json\nprint(json.dumps([file.is_file(), restored, reloaded, pipe.get_active_shira()]))"
    notebook.cells.append(nbformat.v4.new_code_cell(probe))
    execute(notebook, TRAINING.parent)
    assert json.loads(notebook.cells[-1].outputs[-1].text) == [True, True, True, {"reloaded": 1.0}]
    shown = [picture for cell in notebook.cells for picture in pictures_of(cell)]
    pair = shown[1]
    before, after = (pair.crop((0, top, pair.width, top + pair.height // 2)) for top in (0, pair.height // 2))
    assert ImageChops.difference(before.convert("RGB"), after.convert("RGB")).getbbox() is not None


@needs_the_demo
def test_it_runs() -> None:
    """From examples/, where Jupyter starts it."""
    notebook = read()
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    execute(notebook, NOTEBOOK.parent)
    told = json.loads(notebook.cells[-1].outputs[0].text)
    styled, sweep = told["styled"], told["sweep"]
    assert sorted(styled) == sorted(path.stem for path in (ASSETS / "adapters").glob("*.safetensors"))
    different = [told["base"], told["mix"], *styled.values()]
    assert len(set(different)) == len(different)
    assert told["fused"] == told["mix"]
    assert sweep["0.0"] == told["base"]
    assert told["first"] == "bluefire", "a style, which shows whatever the prompt"
    assert sweep["1.0"] == styled[told["first"]]
    assert told["aside"] == told["base"]
    assert told["part"] not in (told["base"], styled[told["first"]])
    assert len(set(sweep.values())) == len(sweep)
    assert told["restored"] is True
    assert told["now"] == told["base"]
    assert told["left"] == {}
    shown = [picture for cell in notebook.cells for picture in pictures_of(cell)]
    side = shown[0].width
    assert [picture.width // side for picture in shown] == [1, 1 + len(styled), 3, len(sweep), 3]
    for picture in shown[1:]:
        tiles = [picture.crop((left, 0, left + side, side)) for left in range(0, picture.width, side)]
        for one, other in combinations(tiles, 2):
            assert ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getbbox() is not None


def test_it_finds_its_files_from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    line = next(line for cell in read().cells for line in cell.source.splitlines() if line.startswith("ASSETS = "))
    for folder in (ROOT, ROOT / "examples"):
        monkeypatch.chdir(folder)
        scope: dict[str, Path] = {}
        exec(line, {"Path": Path}, scope)
        assert scope["ASSETS"].resolve() == ASSETS
