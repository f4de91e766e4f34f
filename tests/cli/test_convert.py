"""``shira convert`` and ``shira extract``: files written whole or not at all, what they say; ``--json`` everywhere."""

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch

from shira_diffusers import convert_lora, extract_adapter, load_adapter, save_adapter
from shira_diffusers.cli.arguments import EXAMPLES, parser
from tests import loras, tiny
from tests.cli.conftest import Run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune of its UNet, a LoRA for it, and an adapter."""
    folder = tmp_path_factory.mktemp("files")
    tiny.pipeline().save_pretrained(folder / "base")
    tuned = tiny.pipeline()
    torch.manual_seed(0)
    for parameter in tuned.unet.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    tuned.save_pretrained(folder / "tuned")
    unet, text = loras.adapted(tiny.unet(), loras.UNET), loras.adapted(tiny.text_encoder(), loras.TEXT)
    loras.of_kohya(folder / "style.safetensors", unet, text)
    loras.of_peft(folder / "peft", tiny.unet(), ["to_q"])
    save_adapter(tiny.adapter_for(tuned), folder / "adapter.safetensors")
    (folder / "note.txt").write_text("mine")
    return folder


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands write where they run."""
    monkeypatch.chdir(tmp_path)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def test_convert(run: Run, files: Path, tmp_path: Path) -> None:
    status, out, err = run("convert", files / "style.safetensors", "--base", files / "base")
    assert (status, err) == (0, "")
    written = tmp_path / "style-shira.safetensors"
    adapter = load_adapter(written)
    expected = convert_lora(files / "style.safetensors", tiny.pipeline(), 0.02, dtype=torch.float16)
    tiny.assert_same_adapter(adapter, expected.adapter)
    assert adapter.metadata["base_model"] == str(files / "base") and adapter.base_probes
    head, *rows, last = out.splitlines()
    assert head.split("  ")[-1].strip() == "at 20 %"
    energies = expected.report.components | {"total": expected.report.total}
    for (part, energy), row in zip(energies.items(), rows, strict=True):
        shares = (energy.entries / energy.numel, energy.kept, *energy.at.values())
        cells = [part, f"{energy.entries:,}", *map(percent, shares)]
        assert re.split(r" {2,}", row) == cells
    assert last == (
        f"wrote {written.name}: {adapter.nnz:,} entries in {len(adapter.deltas)} parameters, "
        f"{written.stat().st_size:,} bytes"
    )


def test_convert_for_programs(run: Run, files: Path, tmp_path: Path) -> None:
    """A PEFT folder, calibrated, with the layer ranking, in float32."""
    argv = ("convert", files / "peft", "--base", files / "base", "--density", "0.1", "--ranking", "layer", "--json")
    status, out, _ = run(*argv, "--dtype", "float32", "--calibrated", "--prompt", "a cat", "-o", tmp_path / "sub")
    assert status == 0
    told = json.loads(out)
    adapter = load_adapter(tmp_path / "sub")
    assert told["output"] == str(tmp_path / "sub" / "pytorch_shira_weights.safetensors")
    assert told["total"]["entries"] == adapter.nnz and told["components"]["unet"] == told["total"]
    assert told["effect_kept"] == float(adapter.metadata["effect_kept"]) > told["total"]["energy_kept"]
    assert adapter.metadata["calibrated"] == "1" and adapter.metadata["mask"] == "top-layer"
    assert {delta.values.dtype for delta in adapter.deltas.values()} == {torch.float32}
    shown = run(*argv[:-1], "--prompt", "a cat")[1]
    assert re.search(
        r"\nkept of the update's effect on the calibration pictures' activations: \d+\.\d %\nwrote ", shown
    )


def test_extract(run: Run, files: Path, tmp_path: Path) -> None:
    status, out, err = run("extract", files / "base", files / "tuned", "--density", "0.05")
    assert (status, err) == (0, "")
    adapter = load_adapter(tmp_path / "tuned-shira.safetensors")
    expected = extract_adapter(files / "base", files / "tuned", 0.05, dtype=torch.float16)
    tiny.assert_same_adapter(adapter, expected.adapter)
    assert percent(expected.report.total.kept) in out and "wrote tuned-shira.safetensors" in out
    status, out, _ = run("extract", files / "base", files / "tuned", "--density", "0.05", "--force", "--json")
    assert json.loads(out)["total"]["energy_kept"] == expected.report.total.kept


def test_a_folder_with_a_point_in_its_name_gives_all_of_it(run: Run, files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "peft", tmp_path / "lora-v1.0")
    assert run("convert", tmp_path / "lora-v1.0", "--base", files / "base")[0] == 0
    assert (tmp_path / "lora-v1.0-shira.safetensors").is_file()


@pytest.mark.parametrize(
    "argv",
    [
        "convert style.safetensors --base {f}/base -o style.safetensors --force",
        "extract {f}/base style.safetensors -o style.safetensors --force",
        "extract style.safetensors {f}/base -o link.safetensors --force",
    ],
)
def test_what_an_adapter_is_made_from_stays(run: Run, files: Path, tmp_path: Path, argv: str) -> None:
    content = (files / "style.safetensors").read_bytes()
    (tmp_path / "style.safetensors").write_bytes(content)
    (tmp_path / "link.safetensors").symlink_to("style.safetensors")
    status, _, err = run(*argv.format(f=files).split())
    assert status == 1 and "safetensors is what the adapter is made from, and stays" in err
    assert (tmp_path / "style.safetensors").read_bytes() == content


@pytest.mark.parametrize(
    ("argv", "stays"),
    [
        ("extract {f}/base tuned -o {t} --force", "tuned/unet/diffusion_pytorch_model.safetensors"),
        ("extract {f}/base/unet tuned/unet -o {t} --force", "tuned/unet/diffusion_pytorch_model.safetensors"),
        ("convert {f}/style.safetensors --base tuned -o {t} --force", "tuned/unet/diffusion_pytorch_model.safetensors"),
        ("convert peft --base {f}/base -o {t} --force", "peft/adapter_model.safetensors"),
        ("fuse adapter.safetensors {f}/adapter.safetensors -o {t} --force", "adapter.safetensors"),
        ("fuse folder {f}/adapter.safetensors -o folder --force", "folder/pytorch_shira_weights.safetensors"),
    ],
)
def test_weights_inside_of_a_folder_that_an_adapter_is_made_from_stay(
    run: Run, files: Path, tmp_path: Path, argv: str, stays: str
) -> None:
    for name in ("tuned", "peft"):
        shutil.copytree(files / name, tmp_path / name)
    save_adapter(load_adapter(shutil.copy(files / "adapter.safetensors", tmp_path)), tmp_path / "folder")
    before = (tmp_path / stays).read_bytes()
    status, _, err = run(*argv.format(f=files, t=stays).split())
    assert status == 1 and err == f"error: {stays} is what the adapter is made from, and stays; choose another name\n"
    assert (tmp_path / stays).read_bytes() == before


def test_an_earlier_output_beside_a_lora_is_replaced(run: Run, files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "peft", tmp_path / "peft")
    for _ in range(2):
        status, _, err = run("convert", "peft", "--base", files / "base", "-o", "peft/mine.safetensors", "--force")
        assert (status, err) == (0, "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("convert {f}/style.safetensors --base {f}/base -o {f}/adapter.safetensors", "exists, expected a new file"),
        ("convert {f}/style.safetensors --base {f}/base -o {f}/note.txt", "note.txt is a file whose name does not end"),
        ("convert {f}/style.safetensors --base {f}/nowhere -o new", "no base pipeline at"),
        ("convert {f}/nowhere --base {f}/base", "no adapter at"),
        ("convert {f}/style.safetensors --base {f}/base --component vae", "nothing for the component 'vae'"),
        ("convert {f}/adapter.safetensors --base {f}/base", "is a SHiRA adapter already"),
        ("convert {f}/style.safetensors --base {f}/base --density 0", r"density must be in \(0, 1\], got 0.0"),
        (
            "convert {f}/style.safetensors --base {f}/base --density 1e-9",
            "nothing to keep of this update: density 1e-09 keeps no entry; raise it",
        ),
        ("extract {f}/base {f}/tuned -o {f}/adapter.safetensors", "exists, expected a new file"),
        (
            "convert {f}/style.safetensors --base {f}/base -o new.bin",
            "expected a .safetensors file or a folder to write",
        ),
        ("extract {f}/base {f}/tuned -o new.pt", "expected a .safetensors file or a folder to write to, got new.pt"),
        ("extract {f}/base {f}/base", "no weight is changed"),
        ("extract {f}/base/unet {f}/base/vae", "on both sides, as of a model and a fine-tune of it"),
        ("extract {f}/base {f}/nowhere", "no model at"),
    ],
)
def test_errors_are_one_sentence_and_nothing_is_written(
    run: Run, files: Path, tmp_path: Path, argv: str, message: str
) -> None:
    before = (files / "adapter.safetensors").read_bytes()
    status, out, err = run(*argv.format(f=files).split())
    assert (status, out) == (1, "")
    assert re.fullmatch(rf"error: .*({message}).*\n", err), err
    assert not list(tmp_path.iterdir())
    assert (files / "adapter.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "argv",
    [
        "convert {f}/style.safetensors --base {f}/base --density 0.9 -o {f}/new/folder",
        "extract {f}/base {f}/tuned --density 0.9 -o {f}/new.safetensors",
        "fuse {f}/adapter.safetensors {f}/adapter.safetensors -o {f}/new.safetensors",
        "bake {f}/base {f}/adapter.safetensors -o {f}/new",
        "export-peft {f}/adapter.safetensors --partial -o {f}/new/folder",
    ],
    ids=lambda argv: argv.partition(" ")[0],
)
def test_a_full_disk_is_named_and_nothing_is_left(run: Run, files: Path, argv: str) -> None:
    """As large a file as the system lets it write stands for a disk: the same error at the same place."""
    before, limits = sorted(files.rglob("*")), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        status, out, err = run(*argv.format(f=files).split())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, out) == (1, "")
    assert re.search(rf"error: \[Errno 27\] File too large: '{files}/new[^']*'\n$", err) and ".tmp" not in err, err
    assert sorted(files.rglob("*")) == before


def test_verify_and_fuse_for_programs(run: Run, files: Path, tmp_path: Path) -> None:
    status, out, _ = run("verify", files / "adapter.safetensors", "--base", files / "base", "--json")
    told = json.loads(out)
    assert status == 0 and told["fits"]
    assert [check["check"] for check in told["checks"]][-1] == "restore" and all(c["passed"] for c in told["checks"])
    save_adapter(tiny.adapter_for(tiny.unet(block_out_channels=(32, 96))).prefixed("unet"), tmp_path / "w.safetensors")
    status, out, err = run("verify", "w.safetensors", "--base", files / "base", "--json")
    assert status == 1 and not json.loads(out)["fits"] and err.startswith("error: ")
    status, out, _ = run("fuse", files / "adapter.safetensors", "-o", "mix.safetensors", "--json")
    adapter = load_adapter(tmp_path / "mix.safetensors")
    size = (tmp_path / "mix.safetensors").stat().st_size
    assert json.loads(out) == {"output": "mix.safetensors", "entries": adapter.nnz, "bytes": size}


def test_every_command_has_json_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command, examples in EXAMPLES.items():
        with pytest.raises(SystemExit):
            parser("").parse_args([command, "--help"])
        shown = capsys.readouterr().out
        assert "--json" in shown and all(example in shown for example in examples)
        assert any("--json" in example for example in examples), command
