"""``shira demo`` on a tiny pipeline: the sheet, the switches it reports, and that failures write nothing."""

import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageFont

from shira_diffusers import load_adapter, save_adapter
from shira_diffusers.cli import demo
from shira_diffusers.cli.__main__ import main
from shira_diffusers.cli.sheet import GAP, LARGEST, MARGIN, contact_sheet, shortened
from shira_diffusers.formats.shira_file import WEIGHTS_NAME
from tests import tiny

Run = Callable[..., tuple[int, str, str]]
HEAD, LINE = 26, 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def styles(tmp_path: Path) -> Path:
    """Two adapters, one a file and one a folder, and a file that is none."""
    pipe, folder = tiny.pipeline(), tmp_path / "styles"
    save_adapter(tiny.adapter_for(pipe, 1, components=("unet",)), folder / "gold.safetensors")
    save_adapter(tiny.adapter_for(pipe, 2, components=("unet",)), folder / "bluefire")
    (folder / "README.md").write_text("styles")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_it(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["demo", *(str(word) for word in argv)])
        out, err = capsys.readouterr()
        return status, out, err

    return run_it


def cell(sheet: Image.Image, row: int, column: int, side: int = tiny.SIZE) -> Image.Image:
    left = MARGIN + column * (side + GAP)
    top = MARGIN + HEAD + row * (LINE + side + GAP) + LINE
    return sheet.crop((left, top, left + side, top + side))


def assert_different(pictures: list[Image.Image]) -> None:
    for one, other in combinations(pictures, 2):
        assert ImageChops.difference(one, other).getbbox() is not None


def test_the_mix_of_the_bundled_styles_is_the_pair_that_shows_both() -> None:
    assert demo._columns(["blorp", "bluefire", "gold", "paintings"])[-1] == ("bluefire + paintings", demo.MIX)


# -------------------------------------------------------------------- the command


def test_the_sheet_and_the_switches(run: Run, base: Path, styles: Path, tmp_path: Path) -> None:
    target = tmp_path / "sheet.png"
    argv = ("--base", base, "--adapters", styles, "-o", target, "--steps", 1, "--prompt", "a cat", "--prompt", "a dog")
    status, out, err = run(*argv)
    assert status == 0
    assert out.endswith(f"\nwrote {target.resolve()}\n")
    total = sum(p.numel() for p in tiny.snapshot(tiny.pipeline()).values())
    alone = [load_adapter(path).nnz for path in (styles / "bluefire", styles / "gold.safetensors")]
    rows = re.findall(r"^(\S.*?) +[\d.]+ ms +[\d.]+ ms +([\d.]+) %$", out, re.MULTILINE)
    assert [label for label, _ in rows] == ["bluefire", "gold", "mix, 0.7 each", "base"]
    assert [share for _, share in rows[:2]] == [f"{100 * nnz / total:.3f}" for nnz in alone]
    assert max(alone) / total < float(rows[2][1]) / 100 < sum(alone) / total  # they overlap
    assert rows[3][1] == "0.000"
    assert re.search(r"column 4 of 4, mix, 0.7 each: 2 pictures in [\d.]+ s\n", err)
    assert f"all {len(tiny.snapshot(tiny.pipeline()))} parameters are bit-equal to the start\n" in err
    sheet = Image.open(target)
    assert sheet.size == (2 * MARGIN + 4 * tiny.SIZE + 3 * GAP, 2 * MARGIN + HEAD + 2 * (LINE + tiny.SIZE) + GAP)
    for row in range(2):
        assert_different([cell(sheet, row, column) for column in range(4)])
    pipe = tiny.pipeline()
    expected = pipe("a cat", num_inference_steps=1, guidance_scale=3.0, generator=torch.Generator().manual_seed(0))
    difference = ImageChops.difference(cell(sheet, 0, 0), expected.images[0])
    assert max(high for _, high in difference.getextrema()) <= 1  # drawn in a batch, so not to the bit
    again = target.read_bytes()
    run(*argv)
    assert target.read_bytes() == again
    told = json.loads(run(*argv, "--seed", 5, "--json")[1])
    assert target.read_bytes() != again
    assert told["output"] == str(target.resolve())
    assert [(switch["label"], switch["total"]) for switch in told["switches"]] == [(label, total) for label, _ in rows]
    assert [switch["entries"] for switch in told["switches"]][:2] == alone


def test_one_adapter_has_no_mix(run: Run, base: Path, styles: Path, tmp_path: Path) -> None:
    (styles / "gold.safetensors").unlink()
    status, out, _ = run(
        "--base", base, "--adapters", styles, "-o", tmp_path / "s.png", "--steps", 1, "--prompt", "a cat"
    )
    assert status == 0
    assert "mix, " not in out and "bluefire" in out
    assert Image.open(tmp_path / "s.png").width == 2 * MARGIN + 2 * tiny.SIZE + GAP


def test_side_files_are_no_styles(run: Run, base: Path, tmp_path: Path) -> None:
    """``._gold`` sorts before ``gold``, and took its place or stopped the demo."""
    for name in ("gold.SAFETENSORS", "moss.safetensors", "fire"):
        save_adapter(tiny.adapter_for(tiny.pipeline(), 3), tmp_path / "styles" / name)
    for name in ("._gold.SAFETENSORS", "._moss.safetensors", ".moss.safetensors"):
        (tmp_path / "styles" / name).write_bytes(b"\x00\x05\x16\x07")
    argv = ("--base", base, "--adapters", tmp_path / "styles", "-o", tmp_path / "s.png", "--steps", 1)
    status, out, err = run(*argv)
    assert status == 0, err
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["fire", "gold", "moss"]


def test_without_the_bundled_files(run: Run, base: Path, styles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in an installed package: the way out is told; what is given is not asked for."""
    monkeypatch.setattr(demo, "BASE", tmp_path / "no-base")
    monkeypatch.setattr(demo, "ADAPTERS", tmp_path / "no-adapters")
    monkeypatch.chdir(tmp_path)
    status, out, err = run()
    assert (status, out) == (1, "")
    assert re.fullmatch(
        r"error: no folder \S+no-base and no folder \S+no-adapters: .*--base FOLDER and --adapters.*\n", err
    )
    assert re.fullmatch(
        r"error: no folder \S+no-base: .*name your own with --base FOLDER\n", run("--adapters", styles)[2]
    )
    assert "no folder of adapters at nowhere" in run("--base", base, "--adapters", "nowhere")[2]
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.skipif(
    not Path("/proc/self").is_dir(), reason="a folder that takes no files, for root neither, is Linux's"
)
def test_a_folder_that_takes_no_files_is_told_before_drawing(run: Run, base: Path, styles: Path) -> None:
    status, _, err = run("--base", base, "--adapters", styles, "-o", "/proc/s.png")
    assert status == 1
    assert re.fullmatch(r"error: cannot write /proc/s.png: .+; name another place with -o\n", err)


def test_the_bundled_files_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).resolve().parents[2]
    bundled = (demo.BASE, demo.ADAPTERS)
    assert bundled == (root / "assets/emoji-diffusion", root / "assets/adapters")
    monkeypatch.setattr(demo, "BASE", tmp_path)
    monkeypatch.setattr(demo, "ADAPTERS", tmp_path)
    assert demo.find_assets(None, None) == (str(tmp_path), tmp_path)
    assert demo.find_assets("a/b", Path("c")) == ("a/b", Path("c"))


def test_failures_write_nothing(run: Run, base: Path, styles: Path, tmp_path: Path) -> None:
    good = {"--base": base, "--adapters": styles, "-o": tmp_path / "s.png", "--steps": 1}
    empty, broken, misfit = (tmp_path / name for name in ("empty", "broken", "misfit"))
    empty.mkdir()
    broken.mkdir()
    (broken / "cut.safetensors").write_bytes((styles / "gold.safetensors").read_bytes()[:-9])
    for name in ("same.safetensors", "same"):
        save_adapter(load_adapter(styles / "gold.safetensors"), tmp_path / "twice" / name)
    other = tiny.adapter_for(tiny.unet(block_out_channels=(32, 96))).prefixed("unet")
    save_adapter(other, misfit / "wide.safetensors")
    cases = {
        "ends in .png, got .*s.jpg": {"-o": tmp_path / "s.jpg"},
        "a folder that exists": {"-o": tmp_path / "nowhere" / "s.png"},
        "no folder of adapters at .*nothing": {"--adapters": tmp_path / "nothing"},
        f"holds no adapters, expected NAME.safetensors or NAME/{WEIGHTS_NAME}": {"--adapters": empty},
        "cut.safetensors cannot be read": {"--adapters": broken},
        r"a name of its own, got .*same/pytorch.* and .*same.safetensors; rename": {"--adapters": tmp_path / "twice"},
        r"wide.safetensors: adapter does not fit.*expected \(64": {"--adapters": misfit},
        "no base pipeline at": {"--base": tmp_path / "nothing"},
        "cannot load a pipeline from": {"--base": empty},
    }
    for message, change in cases.items():
        argv = [word for pair in {**good, **change}.items() for word in pair]
        status, out, err = run(*argv)
        assert (status, out) == (1, ""), message
        *progress, last = err.splitlines()
        assert re.fullmatch(rf"error: .*{message}.*", last), err
        assert all(line.startswith("loading ") for line in progress)
        assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob("*.jpg"))


def test_bits_that_do_not_return(run: Run, base: Path, styles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "_again", lambda *_: [])  # the mix stays active
    status, _, err = run(
        "--base", base, "--adapters", styles, "-o", tmp_path / "s.png", "--steps", 1, "--prompt", "a cat"
    )
    assert status == 1
    assert re.search(r"error: \d+ of \d+ parameters? differs? from the start: unet\.", err)
    assert not (tmp_path / "s.png").exists()


def test_another_base_is_remarked_on(run: Run, base: Path, styles: Path, tmp_path: Path) -> None:
    adapter = load_adapter(styles / "gold.safetensors")
    strange = {name: torch.ones(delta.nnz)[:64].half() for name, delta in list(adapter.deltas.items())[:4]}
    save_adapter(type(adapter)(adapter.deltas, {"base_model": "b/c"}, strange), styles / "gold.safetensors")
    status, _, err = run(
        "--base", base, "--adapters", styles, "-o", tmp_path / "s.png", "--steps", 1, "--prompt", "a cat"
    )
    assert status == 0
    assert "note: adapter 'gold' fits by shape but was trained on another model" in err


# -------------------------------------------------------------------- the sheet


def test_places_on_the_sheet() -> None:
    colors = [["red", "green", "blue"], ["yellow", "black", "gray"]]
    pictures = [[Image.new("RGB", (40, 30), color) for color in row] for row in colors]
    sheet = contact_sheet(["a", "b", "c"], ["first", "second"], pictures)
    for row in range(2):
        for column in range(3):
            left, top = MARGIN + column * (40 + GAP), MARGIN + HEAD + row * (LINE + 30 + GAP) + LINE
            assert (
                ImageChops.difference(sheet.crop((left, top, left + 40, top + 30)), pictures[row][column]).getbbox()
                is None
            )
    for top, bottom in ((MARGIN, MARGIN + HEAD), (MARGIN + HEAD, MARGIN + HEAD + LINE)):
        assert sheet.crop((0, top, sheet.width, bottom)).getextrema()[0][0] < 128  # there is text
    assert sheet.getpixel((0, 0)) == (255, 255, 255)


def test_large_pictures_are_scaled_down() -> None:
    sheet = contact_sheet(["a"], ["b"], [[Image.new("L", (1024, 512))]])
    assert sheet.mode == "RGB"
    assert sheet.size == (2 * MARGIN + LARGEST, 2 * MARGIN + HEAD + LINE + LARGEST // 2)


def test_long_labels_are_cut() -> None:
    font = ImageFont.load_default(12)
    assert shortened("short", font, 100) == "short"
    cut = shortened("a very long label of a column" * 3, font, 100)
    assert cut.startswith("a very") and cut.endswith("...") and font.getlength(cut) <= 100
